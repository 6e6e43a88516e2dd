"""Computes statistics of actions and proprio, and normalizers from them.

Statistics are plain JSON: {"actions": {"min": [...], "max", "mean", "std", "q01", "q99", "count",
"digest"}, "proprio": {...}}, one number per dimension; the number of steps and the digest of the
episodes identify their data. They are stored with the data set and in checkpoints.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

KEYS = ("proprio", "actions")  # the normalized keys
CONSTANT = 1e-4  # a dimension with a smaller range carries no information
CLIP = 5.0
ABOUT = ("count", "digest", "skipped")  # entries of a key's statistics that identify their data
LOSS = 0.05  # share of a dimension's range: more clipping gives a warning
FAR = 1000.0  # distance from the demonstrations, in ranges, that no robot reaches
MODES = ("min_max", "mean_std", "quantile")

Statistics = Mapping[str, Mapping[str, Any]]


def statistics(arrays: Mapping[str, Iterable[np.ndarray]]) -> dict[str, dict[str, Any]]:
    """Returns per-dimension statistics over all steps of all episodes; quantiles are exact.

    Args:
      arrays: key -> one (steps, dim) array per episode.

    Raises:
      ValueError: there are no steps.
    """
    return {key: _summary(key, list(episodes)) for key, episodes in arrays.items()}


def _summary(key: str, episodes: list[np.ndarray]) -> dict[str, Any]:
    if not sum(len(x) for x in episodes):
        raise ValueError(f"no statistics of {key!r}: there is not a single step")
    x = np.concatenate(episodes).astype(np.float64)
    q01, q99 = np.quantile(x, (0.01, 0.99), axis=0)
    rows = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
    rows |= {"q01": q01, "q99": q99}
    known = {"count": len(x), "digest": digest_of(digest(part) for part in episodes)}
    return {name: row.tolist() for name, row in rows.items()} | known


def lost(statistics: Statistics, mode: str) -> list[tuple[str, int, float, float]]:
    """Finds dimensions in which clipping changes numbers of the demonstrations.

    Returns:
      (key, dimension, number, its value after a round trip) for each that changes by more than
      `LOSS` of the range: rare large numbers next to a narrow spread. Under "min_max" there are
      none.
    """
    out = []
    for key, n in normalizers(statistics, mode).items():
        ends = {row: np.asarray(statistics[key][row], np.float64) for row in ("min", "max")}
        backs = {row: n.inverse(n.forward(x)) for row, x in ends.items()}
        for i in range(len(ends["min"])):
            worst = max(ends, key=lambda row: abs(ends[row][i] - backs[row][i]))  # noqa: B023
            gone = abs(ends[worst][i] - backs[worst][i])
            if n.active[i] and gone > LOSS * (ends["max"][i] - ends["min"][i]):
                out.append((key, i, float(ends[worst][i]), float(backs[worst][i])))
    return out


def bounds(statistics: Statistics) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the (lowest, highest) plausible numbers of each key, given the demonstrations'
    statistics; infinite where a dimension is constant."""
    out = {}
    for key in KEYS:
        if key in statistics:
            low, high = (np.asarray(statistics[key][row], np.float64) for row in ("min", "max"))
            room = np.where(high - low < CONSTANT, np.inf, FAR * (high - low))
            out[key] = low - room, high + room
    return out


def digest(x: np.ndarray) -> str:
    """Returns 16 hexadecimal digits of the shape and the numbers (as float32) of one episode's
    array."""
    out = hashlib.blake2b(str(np.shape(x)).encode(), digest_size=8)
    out.update(np.ascontiguousarray(x, "<f4").tobytes())
    return out.hexdigest()


def digest_of(digests: Iterable[str]) -> str:
    """Combines the digests of several episodes, in order."""
    return hashlib.blake2b(" ".join(digests).encode(), digest_size=8).hexdigest()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("offset", "scale", "active"),
    meta_fields=("clip",),
)
@dataclasses.dataclass(frozen=True)
class Normalizer:
    """Maps x to ``(x - offset) / scale``, clamped, per dimension; a pytree of arrays.

    Works on numpy and jax arrays (so also inside jit), over the last axis.

    Attributes:
      offset, scale: (dim,); for an inactive dimension, its constant and 1.
      active: (dim,) 1, or 0 where the dimension is constant: forward gives 0, inverse the constant.
      clip: bound on the output of forward.
    """

    offset: Any
    scale: Any
    active: Any
    clip: float = CLIP

    def forward(self, x):
        """Maps robot units to about [-1, 1], at most ``clip``."""
        return ((x - self.offset) / self.scale * self.active).clip(-self.clip, self.clip)

    def inverse(self, x):
        """Maps back to robot units, without clipping."""
        return x * (self.scale * self.active) + self.offset


def normalizers(statistics: Statistics, mode: str) -> dict[str, Normalizer]:
    """Returns one normalizer for each of `KEYS` that has statistics.

    Args:
      statistics: see `statistics`.
      mode: "min_max" maps [min, max] to [-1, 1]; "quantile" does so with the 1 % and 99 % quantiles
        (a dimension that is constant between them, such as a gripper that rarely moves, falls back
        to min and max); "mean_std" standardizes.
    """
    if mode not in MODES:
        raise ValueError(f"config.data.normalization = {mode!r} is not one of {', '.join(MODES)}")
    return {k: _normalizer(_arrays(statistics[k]), mode) for k in KEYS if k in statistics}


def check_same(ours: Mapping[str, Normalizer], theirs: Mapping[str, Normalizer], what: str) -> None:
    """Checks that two policies normalize in the same way.

    Args:
      what: name of the second policy, for the error.

    Raises:
      ValueError: they normalize a key differently; names it.
    """
    for key in sorted({*ours, *theirs}):
        a, b = (jax.tree.leaves(x[key]) if key in x else [] for x in (ours, theirs))
        if len(a) != len(b) or not all(map(np.array_equal, a, b)):
            raise ValueError(
                f"{what} was trained with another normalization of {key}: train both with the same "
                "statistics and the same config.data.normalization"
            )


def _arrays(rows: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {k: np.asarray(v, np.float64) for k, v in rows.items() if k not in ABOUT}


def _normalizer(rows: dict[str, np.ndarray], mode: str) -> Normalizer:
    low, high = rows["min"], rows["max"]
    active = high - low >= CONSTANT
    if mode == "quantile":
        usable = rows["q99"] - rows["q01"] >= CONSTANT
        low, high = np.where(usable, (rows["q01"], rows["q99"]), (low, high))
    if mode == "mean_std":
        offset, scale = rows["mean"], rows["std"] + 1e-8
    else:
        offset, scale = (high + low) / 2, (high - low) / 2
    scale = np.where(active, scale, 1.0)
    return Normalizer(*(np.asarray(x, np.float32) for x in (offset, scale, active)))
