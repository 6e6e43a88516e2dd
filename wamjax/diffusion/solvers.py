"""Implements solvers, each a single `lax.scan` along a grid of levels.

States and grids are pytrees of the same structure, so several quantities (such as video and
actions) advance together, each on its own schedule. A model is a function

    model(x, point) -> output              (pytree like x)

whose output is what the process regresses (for `RectifiedFlow`, the default, the velocity). `point`
is one row of the values prepared for the grid, such as levels, time embeddings or guidance scales:
whatever depends on the schedule alone is computed once, outside the loop. A model receives x
unscaled; if its process has a `c_in`, the model applies it.

`SOLVERS` are deterministic and take the same arguments; solvers with a random key are in
`stochastic`. All return the last state, or with ``states=True`` all n + 1 states, (n + 1, ...).
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
    """Integrates the velocity along `levels` by explicit Euler.

    Args:
      model: ``model(x, point) -> output``, what the process regresses at x; `point` is one row of
        `points`.
      x: state at ``levels[0]``.
      levels: pytree like `x` of (n + 1,) grids.
      points: pytree with leaves (n + 1, ...), one row per grid point (the last is not used), such
        as levels, time embeddings or guidance scales.
      process: process of all leaves of `x`.
      states: whether to return the states at all levels.

    Returns:
      the state at ``levels[-1]``, or the states at all levels.
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
    """Integrates by second-order Heun, with two evaluations per step; arguments as in `euler`.

    If the velocity needs a division by sigma, a step that ends at data is an Euler step.
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
    """Takes one step of Heun between two (point, level)."""
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
    """Returns the (points, levels) where the steps of a grid start, and those where they end."""
    both = points, jax.tree.map(jnp.asarray, levels)
    return jax.tree.map(lambda g: g[:-1], both), jax.tree.map(lambda g: g[1:], both)


def delta(start: tuple, end: tuple) -> Tree:
    """Returns the change of the levels between two (point, level)."""
    return jax.tree.map(jnp.subtract, end[1], start[1])


def slope(process: Process, model: Model, x: Tree, at: tuple) -> Tree:
    """Returns the model's dx/dlevel at a (point, level)."""
    point, level = at
    return jax.tree.map(process.velocity, x, model(x, point), level)


def advance(x: Tree, slope: Tree, delta: Tree) -> Tree:
    """Returns ``x + slope delta`` in the dtype of x."""
    return jax.tree.map(lambda x, v, d: x + v * d.astype(x.dtype), x, slope, delta)
