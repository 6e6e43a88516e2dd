"""Solvers, each one `lax.scan` along a grid of levels.

States and grids are pytrees of the same structure, so that several quantities (video and actions)
move in lock-step on their own schedules. A model is a function

    model(x, point) -> output              (pytree like x)

where an output is what the process regresses (for `RectifiedFlow`, the default, the velocity), and
`point` is one row of whatever was prepared for the grid (levels, time embeddings, guidance scales,
...): all that depends on the schedule alone is computed once, outside the loop. A model sees x
itself; if its process has a `c_in`, the model multiplies by it.

`SOLVERS` are deterministic and take the same arguments; those with a key are in `stochastic`. All
of them return the last state, or with ``states=True`` all states, (n + 1, ...), the first and the
last one included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from wamjax.diffusion.flow import STRAIGHT
from wamjax.diffusion.multistep import ddim, dpmpp_2m, exponential, unipc, walk
from wamjax.diffusion.process import Process

Tree = Any
Model = Callable[[Tree, Tree], Tree]


def euler(
    model: Model,
    x: Tree,
    levels: Tree,
    points: Tree,
    process: Process = STRAIGHT,
    states: bool = False,
) -> Tree:
    """Explicit Euler on the velocity along `levels`.

    Args:
      model: see above.
      x: state at ``levels[0]``.
      levels: pytree like `x` of (n + 1,) grids.
      points: pytree whose leaves lead with n + 1 grid points (the last is not used).
      process: of all leaves of `x`.
      states: return the whole way.

    Returns:
      The state at ``levels[-1]``, or those at all levels.
    """

    def step(x, inputs):
        start, end = inputs
        first = slope(process, model, x, start)
        return advance(x, first, delta(start, end))

    return walk(step, x, ends(points, levels), states)


def heun(
    model: Model,
    x: Tree,
    levels: Tree,
    points: Tree,
    process: Process = STRAIGHT,
    states: bool = False,
) -> Tree:
    """Second-order Heun (two evaluations a step); arguments as in `euler`.

    Where the velocity is a division by sigma, a step that ends at data is one of Euler.
    """
    steps = ends(points, levels)
    return walk(lambda x, inputs: heun_step(process, model, x, *inputs), x, steps, states)


SOLVERS = {
    "euler": euler,
    "heun": heun,
    "ddim": ddim,
    "exponential": exponential,
    "dpmpp_2m": dpmpp_2m,
    "unipc": unipc,
}


def heun_step(process: Process, model: Model, x: Tree, start: tuple, end: tuple) -> Tree:
    """One step between two (point, level)."""
    first = slope(process, model, x, start)

    def mean():
        second = slope(process, model, advance(x, first, delta(start, end)), end)
        return jax.tree.map(lambda a, b: (a + b) / 2, first, second)

    if process.predicts == "velocity":
        return advance(x, mean(), delta(start, end))
    sigmas = [process.alpha_sigma(level)[1] for level in jax.tree.leaves(end[1])]
    clean = jnp.any(jnp.stack(sigmas) == 0)
    return advance(x, jax.lax.cond(clean, lambda: first, mean), delta(start, end))


def ends(points: Tree, levels: Tree) -> tuple[tuple, tuple]:
    """The (points, levels) where the steps of a grid start, and where they end."""
    both = points, jax.tree.map(jnp.asarray, levels)
    return jax.tree.map(lambda g: g[:-1], both), jax.tree.map(lambda g: g[1:], both)


def delta(start: tuple, end: tuple) -> Tree:
    """Change of the levels between two (point, level)."""
    return jax.tree.map(jnp.subtract, end[1], start[1])


def slope(process: Process, model: Model, x: Tree, at: tuple) -> Tree:
    """dx/dlevel by the model at a (point, level)."""
    point, level = at
    return jax.tree.map(process.velocity, x, model(x, point), level)


def advance(x: Tree, slope: Tree, delta: Tree) -> Tree:
    """``x + slope delta`` in the dtype of x."""
    return jax.tree.map(lambda x, v, d: x + v * d.astype(x.dtype), x, slope, delta)
