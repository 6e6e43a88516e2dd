"""Exponential integrators in x0: exact in x, and polynomial in the x0 that the model predicts.

With e^-h the quotient of the noise-to-signal ratios at the two ends of a step, all of them are

    x' = (sigma' / sigma) x + alpha' [(1 - e^-h) x0 + w (x0 - x0 of the last step)]

and differ in the weight w alone. Nothing else of the process enters, and dividing x by alpha shows
that a solver gives the same data on every path that visits the same ratios. The first step, and a
step that ends at data (h is infinite), are of first order: w = 0. Arguments are as in
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
    """DDIM without noise (arXiv 2010.02502): first order. On a flow it is Euler."""
    return _solve(model, x, levels, points, process, states, lambda s: 0 * s.keep)


def exponential(
    model: Model,
    x: Tree,
    levels: Tree,
    points: Tree,
    process: Process = STRAIGHT,
    states: bool = False,
) -> Tree:
    """Second-order exponential Adams-Bashforth: "2ab" of Cosmos Policy, RES and DEIS.

    The line through the last two x0, integrated exactly.
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
    """DPM-Solver++(2M) (arXiv 2211.01095): second order; that line at the middle of the step."""
    return _solve(model, x, levels, points, process, states, _middle)


def unipc(
    model: Model,
    x: Tree,
    levels: Tree,
    points: Tree,
    process: Process = STRAIGHT,
    states: bool = False,
) -> Tree:
    """UniPC-2 with B(h) = e^h - 1, "bh2" (arXiv 2302.04867): DPM-Solver++(2M) and a corrector.

    When the model has been called at the end of a step, the step is done again with what it said:
    third order without a further call. The last step stays uncorrected.
    """
    return _solve(model, x, levels, points, process, states, _middle, corrected=True)


class Steps(NamedTuple):
    """The steps of a grid, (n,) each.

    Attributes:
      keep: sigma' / sigma.
      alpha: alpha'.
      h, last: step size in log(alpha / sigma), and that of the step before.
      gain: 1 - e^-h.
      single: steps that have none before, or end at data.
    """

    keep: Array
    alpha: Array
    h: Array
    last: Array
    gain: Array
    single: Array


def walk(step: Callable, x: Tree, inputs: Tree, states: bool, of: Callable = lambda x: x) -> Tree:
    """Scans ``step(carry, inputs) -> carry`` and returns the last ``of(carry)``, or all of them.

    With `states` the first one is that of `x` itself, so they lead with n + 1.
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
    """Factors of x, its x0 and the x0 before, (n, 3)."""
    xp = namespace(s.h)
    w = xp.where(s.single, 0.0, weight(s))
    return xp.stack([s.keep, s.alpha * (s.gain + w), -s.alpha * w], axis=-1)


@np.errstate(divide="ignore", invalid="ignore")
def _corrector(s: Steps) -> Array:
    """To redo the step that led to x: factors of its start, x0 there, x0 before, x0 now: (n, 4).

    A parabola through the three x0, with the weights of the paper; for the first step the
    trapezoid. The first row, before which there is no step, leaves x as it is.
    """
    xp = namespace(s.h)
    mean = 1 / s.gain - 1 / s.h  # of the position in the step, as x' weighs it; 1/2 as h -> 0
    bend = (2 * mean - 1) / s.h
    first = xp.arange(len(s.h)) == 0
    before = xp.where(first, 0.0, -bend * s.h**2 / (s.last * (s.h + s.last)))
    now = xp.where(first, 0.5, mean - bend * s.h / (s.h + s.last))
    rows = [s.keep, s.alpha * s.gain * (1 - before - now), s.alpha * s.gain * before]
    rows = xp.stack([*rows, s.alpha * s.gain * now], axis=-1)
    return xp.concatenate([xp.eye(4)[:1], rows[:-1]])


def _combine(factors: Tree, *states: Tree) -> Tree:
    """Sums of the states times (k,) factors, in the dtype of the states."""
    return jax.tree.map(
        lambda f, *xs: sum(f[k] * x for k, x in enumerate(xs)).astype(xs[0].dtype), factors, *states
    )
