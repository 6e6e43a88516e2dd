"""Batches that mix programs: fixed, exact shares, laid out so that every shard holds its share.

The batch is seen as ``b / period`` rows of `period` examples. A program owns a fixed number of
columns, so its share is exact in every row, and therefore in every contiguous shard of the batch
that holds whole rows. Within its row an example lands in a column at random, because position in a
batch may mean something to the data pipeline (which source an example came from).
"""

from __future__ import annotations

from fractions import Fraction
from math import lcm

import jax
from jaxtyping import Array


def columns(shares: tuple[float, ...]) -> tuple[int, ...]:
    """Columns of each program in the shortest row with exact shares (denominators up to 16)."""
    if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"program shares must be positive and sum to 1, got {shares}")
    fractions = [Fraction(s).limit_denominator(16) for s in shares]
    period = lcm(*(f.denominator for f in fractions))
    counts = tuple(int(f * period) for f in fractions)
    inexact = any(abs(f - s) > 1e-4 for f, s in zip(fractions, shares, strict=True))
    if inexact or sum(counts) != period:
        raise ValueError(f"program shares {shares} have no exact layout with denominators <= 16")
    return counts


def split(batch: dict[str, Array], counts: tuple[int, ...], key: Array) -> list[dict[str, Array]]:
    """Splits a batch into one part for each program.

    Args:
      batch: arrays with leading dimension b.
      counts: from `columns`.
      key: decides which columns of a row go to which program.

    Returns:
      one batch for each program, of b * count / period examples.
    """
    if len(counts) == 1:
        return [batch]
    period = sum(counts)
    size = next(iter(batch.values())).shape[0]
    if size % period:
        raise ValueError(
            f"a batch of {size} cannot be shared exactly as {counts}; make data.batch_size a "
            f"multiple of {period}"
        )
    order = jax.random.permutation(key, period)
    parts, start = [], 0
    for count in counts:
        chosen = order[start : start + count]
        parts.append({k: _take(v, chosen, period) for k, v in batch.items()})
        start += count
    return parts


def _take(x: Array, chosen: Array, period: int) -> Array:
    rows = x.reshape(x.shape[0] // period, period, *x.shape[1:])
    return rows[:, chosen].reshape(-1, *x.shape[1:])
