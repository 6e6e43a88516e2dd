"""Recognises the objects in a picture; exact for clean renderings, robust to noise.

Every cell is compared with every object that it could hold (4 colours, 3 shapes, 25 offsets: up to
twice the offset of rendered objects, for generated pictures) and with an empty cell. It holds the
one with the least squared difference of grey levels, which is the most likely one under white
noise.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from wamjax.data.scenes.draw import (
    BACKGROUND,
    COLOURS,
    PALETTE,
    SHAPES,
    centre,
    coverages,
    offsets,
)

CHUNK = 256  # pictures parsed at once
_PAINT = PALETTE - np.array(BACKGROUND, np.float32)
_COLOURS = list(COLOURS)
_REACH = 2
_OFFSETS = offsets(_REACH)


class Found(NamedTuple):
    """Describes an object in a picture."""

    shape: str
    colour: str
    row: int
    column: int
    centre: tuple[float, float]  # (y, x) in pixels
    confidence: float  # 1: exactly as rendered; 0: another reading fits as well

    @property
    def kind(self) -> tuple[str, str]:
        """Returns (colour, shape)."""
        return self.colour, self.shape


class Parsed(NamedTuple):
    """Holds the objects in a picture, sorted by cell."""

    objects: tuple[Found, ...]
    confidence: float  # of the least certain cell, empty ones included


def parse(images: UInt8[np.ndarray, "n h w 3"], grid: int = 3) -> list[Parsed]:
    """Reads square pictures of scenes on a grid of `grid` x `grid` cells.

    Raises:
      ValueError: `images` is not uint8 (n, size, size, 3).
    """
    images = np.asarray(images)
    square = images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] == 3
    if not square or images.dtype != np.uint8:
        raise ValueError(
            f"pictures are uint8 (n, size, size, 3), not {images.dtype} {images.shape}"
        )
    out = []
    for start in range(0, len(images), CHUNK):
        out += _parse(images[start : start + CHUNK], grid)
    return out


def _parse(images: np.ndarray, grid: int) -> list[Parsed]:
    size = images.shape[1]
    gains, which = _readings(images, grid)
    best = gains.argmax(axis=-1)
    present = np.take_along_axis(gains, best[..., None], -1)[..., 0] > 0
    sure = _confidence(gains, which, best, present, size, grid)
    out = []
    for i in range(len(images)):
        found = []
        for cell in np.flatnonzero(present[i]):
            colour, shape = divmod(int(best[i, cell]), len(SHAPES))
            row, column = divmod(int(cell), grid)
            at = centre(row, column, _OFFSETS[which[i, cell, best[i, cell]]], size / grid)
            certain = float(sure[i, cell])
            found.append(Found(SHAPES[shape], _COLOURS[colour], row, column, at, certain))
        out.append(Parsed(tuple(found), float(sure[i].min())))
    return out


def _readings(
    images: np.ndarray, grid: int
) -> tuple[Float[np.ndarray, "n cells kinds"], Int[np.ndarray, "n cells kinds"]]:
    """Returns for every cell and every (colour, shape) its gain at its best offset, and the index
    of that offset.

    The gain is by how much it explains the cell better than an empty one, in squared grey levels.
    """
    n, size = images.shape[:2]
    x = images.reshape(n, size * size, 3).astype(np.float32) - np.array(BACKGROUND, np.float32)
    cover = coverages(size, grid, _REACH)[:-1]
    # |x|^2 - |x - c p|^2 for coverage c and paint p, as one matrix product for all pictures.
    tinted = np.swapaxes(x @ _PAINT.T, 1, 2).reshape(-1, size * size)
    match = (tinted @ cover.T).reshape(n, len(_PAINT), -1)
    energy = np.outer((_PAINT**2).sum(1), (cover**2).sum(1))
    gains = (2 * match - energy).reshape(n, len(_PAINT), grid**2, len(SHAPES), len(_OFFSETS))
    gains = gains.transpose(0, 2, 1, 3, 4).reshape(n, grid**2, -1, len(_OFFSETS))
    return gains.max(axis=-1), gains.argmax(axis=-1)


def _confidence(gains, which, best, present, size, grid) -> Float[np.ndarray, "n cells"]:
    """Returns the smallest lead of each cell's reading over every other kind and the empty cell.

    The lead of reading a over b is ``(|x - b|^2 - |x - a|^2) / |a - b|^2``: linear in the picture
    x, 1 at x = a and 0 midway between a and b.
    """
    energy, products = _geometry(size, grid)
    cells = np.arange(grid**2)[None, :, None]
    kinds = np.arange(gains.shape[-1])[None, None]
    chosen = best[..., None]
    at = np.take_along_axis(which, chosen, -1)
    own = energy[cells, chosen, at]
    other = energy[cells, kinds, which]
    apart = own + other - 2 * products[cells, chosen, at, kinds, which]
    lead = np.take_along_axis(gains, chosen, -1) - gains
    rival = np.where(kinds == chosen, np.inf, lead / np.maximum(apart, 1e-6)).min(-1)
    nothing = np.take_along_axis(gains, chosen, -1)[..., 0] / own[..., 0]
    empty = (-gains / other).min(-1)
    return np.clip(np.where(present, np.minimum(rival, nothing), empty), 0.0, 1.0)


@functools.lru_cache(maxsize=8)
def _geometry(size: int, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the squared norms (cells, kinds, offsets) of all objects that a cell can hold, and
    their inner products (cells, kinds, offsets, kinds, offsets)."""
    shapes = (len(SHAPES), len(_OFFSETS))
    cover = coverages(size, grid, _REACH)[:-1].reshape(grid**2, shapes[0] * shapes[1], -1)
    gram = (cover @ np.swapaxes(cover, 1, 2)).reshape(grid**2, *shapes, *shapes)
    products = np.einsum("kl,csoqr->cksolqr", _PAINT @ _PAINT.T, gram)
    kinds = (len(_PAINT) * len(SHAPES), len(_OFFSETS))
    products = products.reshape(grid**2, *kinds, *kinds)
    return np.einsum("ckoko->cko", products), products
