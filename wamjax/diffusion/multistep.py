"""Implements exponential integrators in x0: exact in x, polynomial in the predicted x0.

With e^-h the quotient of the noise-to-signal ratios at the two ends of a step, each of them is

    x' = (sigma' / sigma) x + alpha' [(1 - e^-h) x0 + w (x0 - x0 of the last step)]

and they differ in the weight w alone. Nothing else depends on the process: divided by alpha, the
update shows that a solver returns the same data on every path through the same ratios. The first
step, and a step that ends at data (h is infinite), are first order: w = 0. Arguments are as in
`solvers.euler`; the coefficients are computed once, in float64 unless the grid is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from wamjax.diffusion.flow import STRAIGHT
from wamjax.diffusion.process import Process, concrete, namespace

Tree = Any
Model = Callable[[Tree, Tree], Tree]


def ddim(
    model: Model,
    x: Tree,
    levels: Tree,
    points: Tree,
    process: Process = STRAIGHT,
    states: bool = False,
) -> Tree:
    """Integrates by DDIM without noise (arXiv 2010.02502), first order; on a flow, it is Euler."""
    return _solve(model, x, levels, points, process, states, lambda s: 0 * s.keep)


def exponential(
    model: Model,
    x: Tree,
    levels: Tree,
    points: Tree,
    process: Process = STRAIGHT,
    states: bool = False,
) -> Tree:
    """Integrates by second-order exponential Adams-Bashforth: "2ab" of Cosmos Policy, RES and DEIS.

    It integrates the line through the last two x0 exactly.
    """
    return _solve(model, x, levels, points, process, states, _line)


def dpmpp_2m(
    model: Model,
    x: Tree,
    levels: Tree,
    points: Tree,
    process: Process = STRAIGHT,
    states: bool = False,
) -> Tree:
    """Integrates by DPM-Solver++(2M) (arXiv 2211.01095), second order.

    It takes x0 from the line through the last two, at the middle of the step.
    """
    return _solve(model, x, levels, points, process, states, _middle)


def unipc(
    model: Model,
    x: Tree,
    levels: Tree,
    points: Tree,
    process: Process = STRAIGHT,
    states: bool = False,
) -> Tree:
    """Integrates by UniPC-2 with B(h) = e^h - 1, "bh2" (arXiv 2302.04867): DPM-Solver++(2M) with a
    corrector.

    Once the model has been evaluated at the end of a step, the step is repeated with that value:
    third order without an additional evaluation. The last step is not corrected.
    """
    return _solve(model, x, levels, points, process, states, _middle, corrected=True)


class Steps(NamedTuple):
    """Holds the coefficients of the steps of a grid, (n,) each.

    Attributes:
      keep: sigma' / sigma.
      alpha: alpha'.
      h, last: step size in log(alpha / sigma), and that of the previous step.
      gain: 1 - e^-h.
      single: whether the step is first order: it is the first one, or ends at data.
    """

    keep: Array
    alpha: Array
    h: Array
    last: Array
    gain: Array
    single: Array


def walk(step: Callable, x: Tree, inputs: Tree, states: bool, of: Callable = lambda x: x) -> Tree:
    """Scans ``step(carry, inputs) -> carry`` and returns the last ``of(carry)``, or all of them.

    With `states` the result is (n + 1, ...), starting with ``of(x)``.
    """

    def scanned(carry, inputs):
        carry = step(carry, inputs)
        return carry, of(carry) if states else None

    last, way = jax.lax.scan(scanned, x, inputs)
    if not states:
        return of(last)
    return jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), of(x), way)


def _solve(model, x, levels, points, process, states, weight, corrected=False):
    def step(carry, inputs):
        x, base, data, before = carry  # base and data belong to the start of the step that led to x
        point, level, predict, correct = inputs
        now = jax.tree.map(process.data, x, model(x, point), level)
        now = jax.tree.map(lambda now, x: now.astype(x.dtype), now, x)
        if corrected:
            x = _combine(correct, base, data, before, now)
        return _combine(predict, x, now, data), x, now, data

    grids = jax.tree.map(lambda grid: concrete(process, grid), levels)
    predict = jax.tree.map(lambda grid: _predictor(_steps(process, grid), weight), grids)
    correct = jax.tree.map(lambda grid: _corrector(_steps(process, grid)), grids)
    starts = jax.tree.map(lambda g: jnp.asarray(g)[:-1], (points, grids))
    zeros = jax.tree.map(jnp.zeros_like, x)
    start, inputs = (x, x, zeros, zeros), (*starts, predict, correct)
    return walk(step, start, inputs, states, of=lambda carry: carry[0])


@np.errstate(divide="ignore", invalid="ignore")
def _steps(process: Process, levels: Array) -> Steps:
    xp = namespace(levels)
    alpha, sigma = process.alpha_sigma(levels)
    signal = xp.log(alpha) - xp.log(sigma)
    h = xp.diff(signal)
    first = xp.arange(len(h)) == 0
    last = xp.where(first, np.inf, xp.roll(h, 1))
    return Steps(
        sigma[1:] / sigma[:-1], alpha[1:], h, last, -xp.expm1(-h), first | (sigma[1:] == 0)
    )


def _line(s: Steps) -> Array:
    return (s.h - s.gain) / s.last


def _middle(s: Steps) -> Array:
    return s.gain * s.h / (2 * s.last)


@np.errstate(invalid="ignore")
def _predictor(s: Steps, weight: Callable[[Steps], Array]) -> Array:
    """Returns the factors of x, its x0 and the previous x0, (n, 3)."""
    xp = namespace(s.h)
    w = xp.where(s.single, 0.0, weight(s))
    return xp.stack([s.keep, s.alpha * (s.gain + w), -s.alpha * w], axis=-1)


@np.errstate(divide="ignore", invalid="ignore")
def _corrector(s: Steps) -> Array:
    """Returns factors for repeating the step that led to x, (n, 4).

    They multiply its start, the x0 there, the x0 before it and the x0 now: a parabola through the
    three x0, with the weights of the paper; for the first step the trapezoid rule. The first row
    leaves x unchanged, since no step precedes it.
    """
    xp = namespace(s.h)
    mean = 1 / s.gain - 1 / s.h  # mean position in the step, as weighted in x'; 1/2 as h -> 0
    bend = (2 * mean - 1) / s.h
    first = xp.arange(len(s.h)) == 0
    before = xp.where(first, 0.0, -bend * s.h**2 / (s.last * (s.h + s.last)))
    now = xp.where(first, 0.5, mean - bend * s.h / (s.h + s.last))
    rows = [s.keep, s.alpha * s.gain * (1 - before - now), s.alpha * s.gain * before]
    rows = xp.stack([*rows, s.alpha * s.gain * now], axis=-1)
    return xp.concatenate([xp.eye(4)[:1], rows[:-1]])


def _combine(factors: Tree, *states: Tree) -> Tree:
    """Returns the sum of the states times their factors, (k,), in the dtype of the states."""
    return jax.tree.map(
        lambda f, *xs: sum(f[k] * x for k, x in enumerate(xs)).astype(xs[0].dtype), factors, *states
    )
