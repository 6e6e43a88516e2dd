"""Times calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def seconds_of(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Returns the best, median and worst seconds of a call, after two warm-up calls."""
    for _ in range(2):
        jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": min(seconds),
        "median_seconds": float(np.median(seconds)),
        "worst_seconds": max(seconds),
    }


def random_batch(spec: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Returns a random batch: normal floats, small integers, and masks that are True."""
    rng = np.random.default_rng(0)

    def draw(s: jax.ShapeDtypeStruct) -> jax.Array:
        x = rng.normal(size=s.shape)
        return jnp.asarray(np.abs(x) if jnp.issubdtype(s.dtype, jnp.integer) else x, s.dtype)

    return {
        key: jnp.ones(s.shape, s.dtype) if s.dtype == jnp.bool_ else draw(s)
        for key, s in spec.items()
    }
