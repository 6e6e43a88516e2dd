"""Mixes sources with exact counts: examples per batch, and their positions.

A batch is the same for any number of processes: each makes some of its rows. Source s
with `count` examples in a batch contributes its shuffled stream in order, `count` at a time, so
all processes together see each of its windows exactly once per epoch.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction

import grain
import numpy as np


def counts(weights: Mapping[str, float], batch_size: int) -> tuple[int, ...]:
    """Returns the examples of each source per batch: proportional, by largest remainder; they sum
    to the batch size.

    Args:
      weights: name -> share relative to the others.
      batch_size: size of the whole batch, over all processes.

    Raises:
      ValueError: a weight is not positive, or a source would get no examples.
    """
    for name, weight in weights.items():
        if not weight > 0:
            raise ValueError(
                f"config.data.sources.{name}.weight = {weight} must be positive; remove the source "
                "to leave it out"
            )
    decimal = {name: Fraction(str(float(weight))) for name, weight in weights.items()}
    total = sum(decimal.values())
    exact = {name: weight * batch_size / total for name, weight in decimal.items()}
    out = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: out[name] - exact[name])
    for name in by_remainder[: batch_size - sum(out.values())]:
        out[name] += 1
    for name, count in out.items():
        if count == 0:
            least = math.ceil(total / decimal[name])
            raise ValueError(
                f"config.data.sources.{name} with weight {weights[name]} of {float(total):g} gets "
                f"no example in a batch of {batch_size}; raise its weight, or config.data."
                f"batch_size to {least}"
            )
    return tuple(out.values())


def layout(counts: Sequence[int]) -> np.ndarray:
    """Returns the source at each position of the batch: int (b,).

    Every prefix holds each source's proportional share to less than one example, so wherever a
    shard's share is whole it is exact: for any number of devices that divides both the batch and
    the count of a source. (Tijdeman's "chairman assignment": of the sources that lag enough, take
    the one with the earliest deadline.)
    """
    size, sources = sum(counts), len(counts)
    slack = Fraction(1, 2 * sources - 2) if sources > 1 else Fraction(0)
    given, out = [0] * sources, []
    for position in range(1, size + 1):
        lag = [Fraction(position * n, size) - given[s] for s, n in enumerate(counts)]
        ready = [s for s in range(sources) if lag[s] >= slack]
        source = min(ready, key=lambda s: ((1 - slack - lag[s]) * size / counts[s], s))
        given[source] += 1
        out.append(source)
    return np.array(out)


def period(counts: Sequence[int]) -> int:
    """Returns the number of positions after which the pattern of `layout` repeats with exact
    shares."""
    return sum(counts) // math.gcd(*counts)


class Schedule(grain.transforms.DatasetSelectionMap):
    """Maps the i-th example of this process to (source, index into its endless stream).

    Args:
      counts: examples of each source in a whole batch.
      rows: rows of every batch to make; all by default.

    Raises:
      ValueError: the batch lacks these rows.
    """

    def __init__(self, counts: Sequence[int], rows: Sequence[int] | None = None):
        size = sum(counts)
        rows = np.arange(size) if rows is None else np.asarray(rows)
        if not rows.size or rows.min() < 0 or rows.max() >= size:
            raise ValueError(f"rows {rows.tolist()} must lie in 0 to {size - 1}, the rows of a "
                             "batch (config.data.batch_size)")  # fmt: skip
        sources = layout(counts)
        ranks = np.array([np.sum(sources[:i] == s) for i, s in enumerate(sources)])
        self.size = len(rows)  # of this process's share
        self._counts = tuple(counts)
        self._part = [(int(s), int(r)) for s, r in zip(sources[rows], ranks[rows], strict=True)]

    def __len__(self) -> int:
        return sys.maxsize // max(self._counts) // self.size * self.size

    def __getitem__(self, index: int) -> tuple[int, int]:
        batch, position = divmod(index, self.size)
        source, rank = self._part[position]
        return source, batch * self._counts[source] + rank

    def __repr__(self) -> str:
        return f"Schedule({self._counts}, {self._part})"


def shuffle_seed(seed: int, name: str) -> int:
    """Returns 32 bits that differ between sources and between neighbouring seeds.

    Grain shuffles epoch e by seed + e: with plain seeds, runs 0 and 1 would share their epochs.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "big")
