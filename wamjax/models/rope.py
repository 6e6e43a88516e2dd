"""Computes rotary position embeddings over one or more axes (Wan: interleaved pairs, theta
10000)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wamjax.models.layers import at_least_float32, on_tpu

Rope = tuple[Array, Array]  # cos and sin, each (l, k / 2)


def split_axes(head_dim: int) -> tuple[int, int, int]:
    """Splits a head dimension into parts for (time, height, width); 128 gives Wan's 44 / 42 /
    42."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope(
    positions: Sequence[Float[np.ndarray, " l"]],
    dims: Sequence[int],
    theta: float | Sequence[float] = 10000.0,
) -> Rope:
    """Returns rotation tables for tokens at `positions`, one array of positions per axis.

    Axis i rotates `dims[i]` of the head's dimensions, with its own dimension in the exponent, and
    with its own base if `theta` has one per axis.
    """
    bases = np.broadcast_to(theta, len(dims))
    if any(d % 2 for d in dims):
        raise ValueError(f"rotary dimensions must be even, got {tuple(dims)}")
    angles = np.concatenate(
        [
            np.outer(np.asarray(p, np.float64), base ** (-np.arange(0, d, 2) / d))
            for p, d, base in zip(positions, dims, bases, strict=True)
        ],
        axis=-1,
    )
    return np.cos(angles), np.sin(angles)


def ntk_bases(dims: Sequence[int], scale: Sequence[float]) -> list[float]:
    """Returns bases that stretch each axis to `scale` times its training length: NTK-aware scaling.

    The base is 10000 scale^(d / (d - 2)), which divides the lowest frequency by the scale and
    leaves the highest unchanged. Cosmos-Predict2 has (1, 3, 3).
    """
    pairs = zip(dims, scale, strict=True)
    return [10000.0 if s == 1 else 10000.0 * s ** (d / (d - 2)) for d, s in pairs]


def video_rope(
    frames: Sequence[int],
    height: int,
    width: int,
    head_dim: int,
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Rope:
    """Returns tables for the tokens of latent frames at the given time positions, in (t, h, w)
    order.

    Args:
      scale: see `ntk_bases`.
    """
    grid = np.meshgrid(np.asarray(frames), np.arange(height), np.arange(width), indexing="ij")
    dims = split_axes(head_dim)
    return rope([g.reshape(-1) for g in grid], dims, ntk_bases(dims, scale))


def rotate(x: Float[Array, "b n l k"], table: Rope, style: str = "pairs") -> Array:
    """Rotates every head by the token's angles.

    Args:
      style: which dimensions form a pair, (2i, 2i + 1) for "pairs" (Wan) or (i, i + k / 2) for
        "half" (Cosmos).
    """
    if on_tpu():
        return by_matmul(style, x, *(by_dimension(style, part) for part in table))
    y = at_least_float32(x)
    cos, sin = (jnp.asarray(part, y.dtype) for part in table)
    if style == "half":
        first, second = jnp.split(y, 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
        return rotated.astype(x.dtype)
    even, odd = y[..., 0::2], y[..., 1::2]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_matmul(
    style: str, x: Float[Array, "b n l k"], cos: Float[Array, "l k"], sin: Float[Array, "l k"]
) -> Array:
    """Computes the same as `rotate` on the matrix unit of a TPU, where swapping the dimensions of a
    pair would be a copy into another layout. They are swapped by a matrix of zeros, ones and minus
    ones, whose products are exact. The constants have no gradient.

    Args:
      cos, sin: values for each dimension, see `by_dimension`.
    """
    y = at_least_float32(x)
    cos, sin = (jnp.asarray(part, y.dtype) for part in (cos, sin))
    partner = jnp.matmul(
        x,
        jnp.asarray(_exchange(style, x.shape[-1]), x.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=y.dtype,
    )
    return (y * cos + partner * sin).astype(x.dtype)


def _by_matmul_forward(style: str, x: Array, cos: Array, sin: Array):
    return by_matmul(style, x, cos, sin), (cos, sin)


def _by_matmul_backward(style: str, table: Rope, gradient: Array):
    cos, sin = table
    return by_matmul(style, gradient, cos, -sin), None, None  # rotates back by the same angle


by_matmul.defvjp(_by_matmul_forward, _by_matmul_backward)


def by_dimension(style: str, part: Float[Array, "l h"]) -> Float[Array, "l k"]:
    """Expands a table from one number per pair to one per dimension.

    Numpy arrays stay numpy, hence constants: inside a loop, JAX would repeat the work at every
    step.
    """
    library = np if isinstance(part, np.ndarray) else jnp
    if style == "half":
        return library.concatenate([part, part], axis=-1)
    return library.repeat(part, 2, axis=-1)


def _exchange(style: str, size: int) -> np.ndarray:
    """Returns the (k, k) matrix that gives each dimension the signed value of the other one in its
    pair."""
    first = np.arange(0, size, 2) if style == "pairs" else np.arange(size // 2)
    second = first + (1 if style == "pairs" else size // 2)
    matrix = np.zeros((size, size))
    matrix[second, first], matrix[first, second] = -1, 1
    return matrix
