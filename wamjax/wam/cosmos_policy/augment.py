"""Crops, rotates and recolours at random, with one draw per sample for all its frames and cameras.

Present and future are changed alike in all cameras, so motion stays consistent. Runs on the device,
inside the training step. Strengths and order are those of the public ``dataset_utils.py`` of Cosmos
Policy; the formulas are those of torchvision's transforms.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

GREY = np.array([0.2989, 0.587, 0.114], np.float32)  # torchvision's weights


@dataclasses.dataclass(frozen=True)
class Strength:
    """Bounds each random change.

    Attributes:
      area: share of the picture that the random crop keeps.
      degrees: largest rotation in either direction.
      brightness, contrast, saturation: largest distance of the factor from 1.
      hue: largest shift in either direction, as a share of the colour circle.
    """

    area: float = 0.9
    degrees: float = 5.0
    brightness: float = 0.3
    contrast: float = 0.4
    saturation: float = 0.5
    hue: float = 0.05


STRENGTHS = {
    "strong": Strength(),  # used by all published policies
    "weak": Strength(degrees=0.0, brightness=0.2, contrast=0.2, saturation=0.2),
}


def augment(
    key: Array, frames: UInt8[Array, "b f h w 3"], strength: Strength
) -> UInt8[Array, "b f h w 3"]:
    """Changes every sample by its own draws, and all frames of a sample alike.

    To change several cameras of equal size alike, call it with the same key for each.
    """
    keys = jax.random.split(key, frames.shape[0])
    return jax.vmap(lambda key, x: _sample(key, x, strength))(keys, frames)


def centre_crop(frames: UInt8[Array, "b f h w 3"], area: float) -> UInt8[Array, "b f h w 3"]:
    """Crops to the middle at the scale of training, for a policy trained on random crops."""
    h, w = frames.shape[2:4]
    height, width = _kept(h, area), _kept(w, area)
    offset = jnp.array([(h - height) / 2, (w - width) / 2])
    crop = jax.vmap(jax.vmap(lambda x: _crop(x, offset, (height, width))))
    return _to_bytes(crop(frames / 255.0))


def _sample(key: Array, frames: Array, s: Strength) -> Array:
    draws = jax.random.uniform(key, (7,))
    f, h, w, _ = frames.shape
    size = _kept(h, s.area), _kept(w, s.area)
    offset = jnp.floor(draws[:2] * (jnp.array([h, w]) - jnp.array(size) + 1))

    def either(draw: Array, reach: float) -> Array:
        return (2 * draw - 1) * reach

    x = jax.vmap(lambda x: _crop(x, offset, size))(frames / 255.0)
    if s.degrees:
        angle = either(draws[2], s.degrees) * math.pi / 180
        x = jax.vmap(lambda x: _rotate(x, angle))(x)
    x = jnp.clip(x * (1 + either(draws[3], s.brightness)), 0, 1)
    mean = (x @ GREY).mean(axis=(1, 2))[:, None, None, None]  # of each frame
    x = _blend(x, mean, 1 + either(draws[4], s.contrast))
    x = _blend(x, (x @ GREY)[..., None], 1 + either(draws[5], s.saturation))
    return _to_bytes(_shift_hue(x, either(draws[6], s.hue)))


def _kept(side: int, area: float) -> int:
    """Returns the pixels of a side that a crop to `area` of a square keeps: 213 of 224 for 0.9,
    rounded up."""
    return math.ceil(side * math.sqrt(area))


def _crop(x: Array, offset: Array, size: tuple[int, int]) -> Array:
    """Crops at `offset` and resizes back, bilinearly."""
    h, w, _ = x.shape
    scale = jnp.array([h / size[0], w / size[1]])
    move = -offset * scale
    return jax.image.scale_and_translate(x, x.shape, (0, 1), scale, move, "linear", antialias=True)


def _rotate(x: Array, angle: Array) -> Array:
    """Rotates about the middle with the nearest pixel; black outside the picture."""
    h, w, _ = x.shape
    rows, columns = jnp.arange(h) - (h - 1) / 2, jnp.arange(w) - (w - 1) / 2
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    row = cos * rows[:, None] + sin * columns + (h - 1) / 2
    column = cos * columns - sin * rows[:, None] + (w - 1) / 2
    row, column = jnp.round(row).astype(jnp.int32), jnp.round(column).astype(jnp.int32)
    inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    return x[row.clip(0, h - 1), column.clip(0, w - 1)] * inside[..., None]


def _blend(x: Array, reference: Array, factor: Array) -> Array:
    return jnp.clip(factor * x + (1 - factor) * reference, 0, 1)


def _shift_hue(x: Float[Array, "... 3"], shift: Array) -> Float[Array, "... 3"]:
    """Moves all colours around the circle, and keeps saturation and value (HSV)."""
    high, low = x.max(axis=-1), x.min(axis=-1)
    span = high - low
    safe = jnp.where(span > 0, span, 1.0)
    red, green, blue = (x[..., i] for i in range(3))
    sixths = jnp.where(
        high == red,
        (green - blue) / safe,
        jnp.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths = sixths + 6 * shift
    # f(n) of the HSV to RGB formula: the distance to each primary on the circle.
    distance = (jnp.array([5.0, 3.0, 1.0]) + sixths[..., None]) % 6
    fall = jnp.clip(jnp.minimum(distance, 4 - distance), 0, 1)
    return high[..., None] - span[..., None] * fall


def _to_bytes(x: Array) -> UInt8[Array, "..."]:
    return jnp.round(255 * jnp.clip(x, 0, 1)).astype(jnp.uint8)
