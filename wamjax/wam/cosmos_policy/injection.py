"""Writes numbers into latent frames by tiling, and reads them as the mean of all copies.

A chunk of actions or a state is flattened row by row and repeated until it fills the c x h x w
values of a latent frame, channel slowest; a value fills the frame. Reading takes the mean over the
full copies; the last one, if it is cut, does not count. Numbers are normalised to [-1, 1] by the
minima and maxima of the demonstrations (`wamjax.data.normalize`, "min_max").

Source: the public ``policy_text2world_model.py`` and ``cosmos_utils.py``. Their latents are (c, h,
w), which defines the order of the copies; ours are (h, w, c), with the same numbers in the same
places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from wamjax.wam.cosmos_policy.layouts import Layout


def tile(
    values: Array, shape: tuple[int, ...], latent: tuple[int, int, int]
) -> Float[Array, "... h w c"]:
    """Tiles numbers (..., *shape) into latent frames (..., h, w, c).

    Raises:
      ValueError: there are more numbers than a latent frame holds.
    """
    h, w, c = latent
    n, size = _count(shape, latent), h * w * c
    flat = values.reshape(*values.shape[: values.ndim - len(shape)], n)
    copies = jnp.tile(flat, (1,) * (flat.ndim - 1) + (-(-size // n),))[..., :size]
    return jnp.moveaxis(copies.reshape(*flat.shape[:-1], c, h, w), -3, -1)


def untile(latents: Float[Array, "... h w c"], shape: tuple[int, ...]) -> Array:
    """Reads numbers (..., *shape) from latent frames, as the mean over the full copies."""
    *lead, h, w, c = latents.shape
    n = _count(shape, (h, w, c))
    flat = jnp.moveaxis(latents, -1, -3).reshape(*lead, h * w * c)
    copies = flat[..., : h * w * c // n * n].reshape(*lead, -1, n)
    return copies.mean(axis=-2).reshape(*lead, *shape)


def inject(
    layout: Layout, latents: Float[Array, "b t h w c"], values: Mapping[str, Array]
) -> Float[Array, "b t h w c"]:
    """Writes numbers into their slots.

    Args:
      layout: layout of all slots; `latents` may hold only the first of them.
      values: name of a slot -> normalised numbers (b, *shape).
    """
    for name, numbers in values.items():
        frame = tile(numbers, layout.numbers[name].shape, latents.shape[2:])
        latents = latents.at[:, layout.index(name)].set(frame.astype(latents.dtype))
    return latents


def extract(layout: Layout, latents: Float[Array, "b t h w c"], name: str) -> Array:
    """Reads the numbers (b, *shape) of a slot."""
    return untile(latents[:, layout.index(name)], layout.numbers[name].shape)


def value_target(returns: Float[Array, " b"]) -> Float[Array, " b"]:
    """Converts a return in [0, 1] to the injected number in [-1, 1]."""
    return 2 * returns - 1


def read_value(layout: Layout, latents: Float[Array, "b t h w c"]) -> Float[Array, " b"]:
    """Reads the predicted return, in [0, 1]."""
    return jnp.clip((extract(layout, latents, "value") + 1) / 2, 0, 1)


def _count(shape: tuple[int, ...], latent: tuple[int, int, int]) -> int:
    n = math.prod(shape)
    if n > math.prod(latent):
        raise ValueError(
            f"{n} numbers of shape {shape} do not fit a latent frame of shape {latent}, which has "
            f"{math.prod(latent)}: shorten the chunk, or take a codec with larger latents"
        )
    return n
