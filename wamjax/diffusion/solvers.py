"""Solvers of the probability-flow ODE, each one `lax.scan`.

States and grids are pytrees of the same structure, so that several quantities (video and actions)
move in lock-step on their own schedules. A model is a function

    velocity(x, point) -> dx/dlevel        (pytree like x)

where `point` is one row of whatever was prepared for the grid (levels, time embeddings, ...): all
that depends on the schedule alone is computed once, outside the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def euler(velocity: Callable[[Tree, Tree], Tree], x: Tree, levels: Tree, points: Tree) -> Tree:
    """Explicit Euler along `levels`.

    Args:
      velocity: the model.
      x: state at ``levels[0]``.
      levels: pytree like `x` of (n + 1,) grids.
      points: pytree whose leaves lead with n + 1 grid points (the last is not used).

    Returns:
      The state at ``levels[-1]``.
    """

    def step(x, inputs):
        point, delta = inputs
        return _advance(x, velocity(x, point), delta), None

    starts = jax.tree.map(lambda p: p[:-1], points)
    return jax.lax.scan(step, x, (starts, jax.tree.map(_differences, levels)))[0]


def heun(velocity: Callable[[Tree, Tree], Tree], x: Tree, levels: Tree, points: Tree) -> Tree:
    """Second-order Heun (two evaluations a step); arguments as in `euler`."""

    def step(x, inputs):
        start, end, delta = inputs
        slope = velocity(x, start)
        corrector = velocity(_advance(x, slope, delta), end)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, slope, corrector)
        return _advance(x, mean, delta), None

    starts = jax.tree.map(lambda p: p[:-1], points)
    ends = jax.tree.map(lambda p: p[1:], points)
    return jax.lax.scan(step, x, (starts, ends, jax.tree.map(_differences, levels)))[0]


SOLVERS = {"euler": euler, "heun": heun}


def _differences(levels):
    levels = jnp.asarray(levels)
    return levels[1:] - levels[:-1]


def _advance(x: Tree, slope: Tree, delta: Tree) -> Tree:
    return jax.tree.map(lambda x, v, d: x + v * d.astype(x.dtype), x, slope, delta)
