"""Draws noise from one key for a whole batch, or from one key per example.

With one key per example, an example's draws do not depend on the rest of the batch: an episode is
the same alone and in a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

PROPOSALS = 1000  # numbers below it are streams of the objectives


def normal(key: Array, shape: tuple[int, ...], axis: int = 0) -> Array:
    """Draws standard normal noise.

    Args:
      key: one key, or one per example.
      axis: axis of the examples.
    """
    if not key.ndim:
        return jax.random.normal(key, shape)
    example_shape = (*shape[:axis], *shape[axis + 1 :])
    return jnp.moveaxis(jax.vmap(lambda k: jax.random.normal(k, example_shape))(key), 0, axis)


def fold_in(key: Array, number: int | Array) -> Array:
    """Returns another key, or one per example."""
    return _each(lambda k: jax.random.fold_in(k, number), key)


def proposal(key: Array, number: int) -> Array:
    """Returns the key of one of several proposals from one key; the first proposal gets the key
    itself."""
    return fold_in(key, PROPOSALS + number) if number else key


def split(key: Array, count: int) -> tuple[Array, ...]:
    """Returns `count` further keys, each a single key or one per example."""
    keys = _each(lambda k: jax.random.split(k, count), key)
    return tuple(jnp.moveaxis(keys, -1, 0))


def start(
    noise: Array | None,
    key: Array | None,
    shape: tuple[int, ...],
    what: str = "noise",
    axis: int = 0,
) -> Array:
    """Returns standard normals to start from: the given ones, or new draws.

    Args:
      key: one key, or one per example; see `normal`, also for `axis`.

    Raises:
      ValueError: there is neither noise nor a key, or the noise has another shape; names it.
    """
    if noise is None:
        if key is None:
            raise ValueError(f"sampling starts from noise: give a key, or {what} of shape {shape}")
        return normal(key, shape, axis)
    if noise.shape != shape:
        raise ValueError(f"{what} has shape {noise.shape}, the model takes {shape}")
    return noise


def _each(function: Callable[[Array], Any], key: Array) -> Any:
    return jax.vmap(function)(key) if key.ndim else function(key)
