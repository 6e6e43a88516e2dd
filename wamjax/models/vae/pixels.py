"""Pictures as bytes, and as numbers in [-1, 1]."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from wamjax.models.layers import widest


def to_unit(video: UInt8[Array, "*x"]) -> Float[Array, "*x"]:
    """0 .. 255 to [-1, 1], float32; float64 under x64.

    Raises:
      TypeError: the pictures are not bytes, so that scaling twice does not pass unseen.
    """
    if video.dtype != jnp.uint8:
        raise TypeError(f"pictures are uint8 in [0, 255], these are {video.dtype} {video.shape}")
    return video.astype(widest()) / 127.5 - 1


def to_bytes(x: Float[Array, "*x"]) -> UInt8[Array, "*x"]:
    """[-1, 1] to 0 .. 255, rounded and clipped."""
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)
