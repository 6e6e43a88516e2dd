"""Computes confidence intervals for success rates and for means over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """Holds an estimate and the ends of its confidence interval, all in the unit of the data."""

    mean: float
    low: float
    high: float

    def percent(self) -> str:
        """Formats a rate: ``83.1 [79.5, 86.2]``."""
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(successes: float, trials: int, confidence: float = 0.95) -> Interval:
    """Returns Wilson's score interval for a success rate.

    Unlike the normal approximation it stays inside [0, 1] and has a width at 0 % and 100 %.

    Raises:
      ValueError: unless ``0 <= successes <= trials`` and ``trials > 0``.
    """
    if not 0 <= successes <= trials or trials <= 0:
        raise ValueError(f"{successes} successes of {trials} trials is not a rate")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, shrink = successes / trials, 1 + z**2 / trials
    centre = (rate + z**2 / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    # At the ends the formula is exact only up to rounding.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return Interval(rate, low, high)


def student_t(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Returns the mean over seeds with Student's t interval; one value has an infinite interval.

    Use it for a few seeds: for three it is 2.2 times as wide as a normal interval. For a rate the
    ends may leave [0, 1]; clip when drawing.
    """
    values = _finite(values)
    mean = float(values.mean())
    if values.size == 1:
        return Interval(mean, -math.inf, math.inf)
    from scipy.stats import t

    error = values.std(ddof=1) / math.sqrt(values.size)
    half = float(t.ppf((1 + confidence) / 2, values.size - 1) * error)
    return Interval(mean, mean - half, mean + half)


def bootstrap(
    groups: Sequence[Sequence[float]],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Returns the mean of the group means with a percentile interval from resampling both levels.

    Args:
      groups: one sequence of outcomes (0/1, or returns) per training seed. Seeds are drawn with
        replacement, then episodes within each, so the interval covers both kinds of randomness.
        Lists of one value give the plain bootstrap.

    With few seeds (< 6) a percentile bootstrap is too narrow; prefer `student_t` on seed means.
    """
    arrays = [_finite(g) for g in groups]
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(arrays), size=(resamples, len(arrays)))
    means = np.empty(picks.shape)
    for i, array in enumerate(arrays):
        where = picks == i
        again = rng.integers(array.size, size=(int(where.sum()), array.size))
        means[where] = array[again].mean(axis=1)
    low, high = np.quantile(means.mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(np.mean([a.mean() for a in arrays])), float(low), float(high))


def _finite(values: Sequence[float]) -> np.ndarray:
    values = np.asarray(values, float).ravel()
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"an interval needs finite values, got {values.tolist()}")
    return values
