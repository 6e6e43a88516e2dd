"""Converts pictures between bytes and numbers in [-1, 1]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from wamjax.models.layers import at_least_float32, widest


def to_unit(video: Array) -> Float[Array, "*x"]:
    """Converts 0 .. 255 to [-1, 1], float32; float64 under x64.

    All published pipelines give their autoencoders floats in [-1, 1]. Those pass unchanged, but
    only if their values can be checked, so not inside jit.

    Raises:
      TypeError: the pictures are neither bytes nor floats in [-1, 1], or might be in [0, 1]; so
        scaling twice, or not at all, is noticed.
    """
    if video.dtype == jnp.uint8:
        return video.astype(widest()) / 127.5 - 1
    error = f"pictures must be uint8 in [0, 255] or floats in [-1, 1], not {video.dtype}"
    if isinstance(video, jax.core.Tracer) or not jnp.issubdtype(video.dtype, jnp.floating):
        raise TypeError(f"{error} of shape {video.shape}: convert them, or inside jit, pass floats "
                        "in [-1, 1] to `encode_unit`")  # fmt: skip
    low, high = float(jnp.min(video)), float(jnp.max(video))
    if not (-1 <= low and high <= 1):
        raise TypeError(f"{error} from {low:.4g} to {high:.4g}")
    if low >= 0:
        raise TypeError(
            f"{error} from {low:.4g} to {high:.4g}, which may be in [0, 1]: if so, pass 2 x - 1; "
            "if not, pass them to the autoencoder's `encode_unit`"
        )
    return at_least_float32(video)


def to_bytes(x: Float[Array, "*x"]) -> UInt8[Array, "*x"]:
    """Converts [-1, 1] to 0 .. 255, rounded and clipped."""
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)
