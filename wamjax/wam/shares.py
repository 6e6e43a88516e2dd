"""Divides a batch among uses in fixed, exact shares, so that every shard of it holds its share.

The batch is seen as ``b / period`` rows of `period` examples. A use owns a fixed number of columns
of every row. So its share is exact in every row, and hence in every contiguous shard of the batch
that holds whole rows. Within its row an example gets a random column, because its position in the
batch may have a meaning in the data pipeline (the source of an example).
"""

from __future__ import annotations

from fractions import Fraction
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


def columns(shares: tuple[float, ...]) -> tuple[int, ...]:
    """Returns the columns of each use in the shortest row with exact shares (denominators up to
    16)."""
    if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares must be positive and sum to 1, got {shares}")
    fractions = [Fraction(s).limit_denominator(16) for s in shares]
    period = lcm(*(f.denominator for f in fractions))
    counts = tuple(int(f * period) for f in fractions)
    inexact = any(abs(f - s) > 1e-4 for f, s in zip(fractions, shares, strict=True))
    if inexact or sum(counts) != period:
        raise ValueError(f"shares {shares} must be fractions with denominators of at most 16")
    return counts


def order(
    key: Array, counts: tuple[int, ...], size: int, last: Bool[Array, " b"] | None = None
) -> Int[Array, "r p"]:
    """Returns the columns of every row of a batch, ordered by the use to which they are assigned.

    Args:
      key: decides among equals.
      counts: columns of each use in a row.
      size: size of the batch.
      last: examples that are assigned to the first uses only if their row has too few others.

    Raises:
      ValueError: the batch does not divide into rows.
    """
    period = sum(counts)
    if size % period:
        raise ValueError(
            f"a batch of {size} cannot be shared exactly as {counts}; make data.batch_size a "
            f"multiple of {period}"
        )
    if last is None:
        return jnp.broadcast_to(jax.random.permutation(key, period), (size // period, period))
    # Within rows, so that a shard keeps its examples; at random among equals.
    draw = jax.random.uniform(key, (size // period, period))
    return jnp.argsort(last.reshape(-1, period) + draw, axis=1)


def use_of(order: Int[Array, "r p"], counts: tuple[int, ...]) -> Int[Array, " b"]:
    """Returns the index of the use of every example, from `order`."""
    by_rank = jnp.asarray(np.repeat(np.arange(len(counts)), counts))
    return jnp.take(by_rank, jnp.argsort(order, axis=1)).reshape(-1)


def split(batch: Any, order: Int[Array, "r p"], counts: tuple[int, ...]) -> list[Any]:
    """Splits a batch into one part per use, row by row.

    Args:
      batch: a tree of arrays with leading dimension b.
      order: from `order`.

    Returns:
      one batch per use, of b * count / period examples.
    """
    rows, period = order.shape
    if len(counts) == 1:
        return [batch]

    def take(x: Array, columns: Array) -> Array:
        x = x.reshape(rows, period, *x.shape[1:])
        index = columns.reshape(*columns.shape, *[1] * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1).reshape(-1, *x.shape[2:])

    edges = np.cumsum([0, *counts])
    return [
        jax.tree.map(lambda x, own=order[:, start:stop]: take(x, own), batch)
        for start, stop in zip(edges[:-1], edges[1:], strict=True)
    ]
