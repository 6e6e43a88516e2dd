"""Noise from one key for a whole batch, or from one key for each example.

With keys of their own, what an example draws does not depend on who else is in the batch: an
episode is the same alone and among others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

PROPOSALS = 1000  # streams below it are an objective's own


def normal(key: Array, shape: tuple[int, ...], axis: int = 0) -> Array:
    """Standard normal noise.

    Args:
      key: one, or as many as there are examples.
      axis: of the examples.
    """
    if not key.ndim:
        return jax.random.normal(key, shape)
    rest = (*shape[:axis], *shape[axis + 1 :])
    return jnp.moveaxis(jax.vmap(lambda k: jax.random.normal(k, rest))(key), 0, axis)


def fold_in(key: Array, number: int | Array) -> Array:
    """Another key, or as many as there are examples."""
    return _each(lambda k: jax.random.fold_in(k, number), key)


def proposal(key: Array, number: int) -> Array:
    """The key of one of several proposals from one key; the first has it as it is."""
    return fold_in(key, PROPOSALS + number) if number else key


def split(key: Array, count: int) -> tuple[Array, ...]:
    """`count` further keys, each one or as many as there are examples."""
    keys = _each(lambda k: jax.random.split(k, count), key)
    return tuple(jnp.moveaxis(keys, -1, 0))


def start(
    noise: Array | None,
    key: Array | None,
    shape: tuple[int, ...],
    what: str = "noise",
    axis: int = 0,
) -> Array:
    """Standard normals to start from: those given, or drawn.

    Args:
      key: one, or one for each example; see `normal`, and for `axis`.

    Raises:
      ValueError: there are neither, or they are of another shape; it is named.
    """
    if noise is None:
        if key is None:
            raise ValueError(f"sampling starts from noise: give a key, or {what} of shape {shape}")
        return normal(key, shape, axis)
    if noise.shape != shape:
        raise ValueError(f"{what} is {noise.shape}, the model starts from {shape}")
    return noise


def _each(function: Callable[[Array], Any], key: Array) -> Any:
    return jax.vmap(function)(key) if key.ndim else function(key)
