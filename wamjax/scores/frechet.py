"""Frechet distance between the Gaussians that fit two sets of features (Heusel et al., 1706.08500).

    d = |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1^1/2 S2 S1^1/2)^1/2)

All in float64 on the host. The last trace is computed as the sum of the singular values of
``S1^1/2 S2^1/2``, which are the square roots of those eigenvalues: nothing is squared, so singular
covariances (fewer samples than features) need no regularisation.

The distance of finite samples is biased upward by about a constant / n, more for wide features:
compare distances only between sets of equal sizes.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from wamjax.viz.intervals import Interval


class Moments(NamedTuple):
    """Running statistics of features; two of them `merge` exactly, in any order."""

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]  # sum of outer products of deviations from the mean

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """Unbiased.

        Raises:
          ValueError: fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 samples or more, there are {self.count}")
        return self.scatter / (self.count - 1)


def moments(features: Float[np.ndarray, "n d"]) -> Moments:
    """The moments of one batch, by two passes over it.

    Raises:
      ValueError: not (n, d), empty, or not finite.
    """
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or not len(x):
        raise ValueError(f"features have shape {x.shape}, expected (samples > 0, width)")
    if not np.isfinite(x).all():
        rows = int((~np.isfinite(x)).any(axis=1).sum())
        raise ValueError(f"{rows} of {len(x)} feature rows are not finite; the samples diverged")
    mean = x.mean(axis=0)
    return Moments(len(x), mean, _outer(x - mean))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets together (Chan, Golub and LeVeque, 1979): no loss of digits."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of width {len(a.mean)} and of width {len(b.mean)}")
    count = a.count + b.count
    gap = b.mean - a.mean
    mean = a.mean + gap * (b.count / count)
    between = np.outer(gap, gap) * (a.count * b.count / count)
    return Moments(count, mean, a.scatter + b.scatter + between)


def distance(a: Moments, b: Moments) -> float:
    """The Frechet distance; its unit is that of the features, squared."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of width {len(a.mean)} against width {len(b.mean)}")
    s, r = a.covariance, b.covariance
    shared = np.linalg.svd(square_root(s) @ square_root(r), compute_uv=False).sum()
    gap = a.mean - b.mean
    return max(float(gap @ gap + np.trace(s) + np.trace(r) - 2 * shared), 0.0)


def frechet(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    """The Frechet distance of two sets of features."""
    return distance(moments(x), moments(y))


def square_root(matrix: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """The symmetric square root of a positive semi-definite matrix, by eigendecomposition.

    Eigenvalues within rounding of zero, of either sign, count as zero: the root of 1e-16 would be
    1e-8, much more than rounding.
    """
    values, vectors = np.linalg.eigh(matrix)
    floor = len(values) * np.finfo(np.float64).eps * np.abs(values).max(initial=0.0)
    return (vectors * np.sqrt(np.where(values > floor, values, 0.0))) @ vectors.T


def interval(
    x: Float[np.ndarray, "n d"],
    y: Float[np.ndarray, "m d"],
    confidence: float = 0.95,
    resamples: int = 100,
    seed: int = 0,
) -> Interval:
    """The distance and how far another draw of the samples would move it.

    Both sets are resampled with replacement. Repeated samples narrow the covariances, so the
    resampled distances lie too high as a whole; only their standard deviation is used, around the
    distance itself. The bias of finite samples (above) is not part of the interval. For two sets of
    one distribution the interval is about 1.7 times too wide; elsewhere it is about right.

    Args:
      x: features of one set.
      y: features of the other set.
      confidence: of the interval.
      resamples: of the bootstrap.
      seed: of the bootstrap.
    """
    value = frechet(x, y)
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    rng = np.random.default_rng(seed)
    again = [distance(_resampled(x, rng), _resampled(y, rng)) for _ in range(resamples)]
    half = NormalDist().inv_cdf((1 + confidence) / 2) * float(np.std(again, ddof=1))
    return Interval(value, max(value - half, 0.0), value + half)


def _resampled(x: np.ndarray, rng: np.random.Generator) -> Moments:
    """Moments of as many rows, drawn with replacement; each distinct row is touched once."""
    times = np.bincount(rng.integers(len(x), size=len(x)), minlength=len(x)).astype(np.float64)
    mean = times @ x / len(x)
    return Moments(len(x), mean, _outer((x - mean) * np.sqrt(times)[:, None]))


def _outer(deviations: np.ndarray) -> np.ndarray:
    return deviations.T @ deviations
