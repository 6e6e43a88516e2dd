"""Puts many pictures or clips on one sheet."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image

from wamjax import files
from wamjax.viz import video

TILE = 64  # pixels: what the shorter side of a smaller picture is brought up to
LETTER = 7  # pixels across, of the captions


def rgb(pictures: np.ndarray) -> np.ndarray:
    """Converts grey pictures (..., 1) to red, green and blue; three channels stay as they are.

    For latents (any float, any channels) it shows the first three channels between their minimum
    and maximum.
    """
    pictures = np.asarray(pictures)
    if pictures.dtype != np.uint8:
        shown = pictures[..., :3].astype(np.float32)
        low, high = shown.min(), shown.max()
        pictures = (255 * (shown - low) / max(high - low, 1e-6)).astype(np.uint8)
    channels = pictures.shape[-1]
    return pictures if channels == 3 else np.repeat(pictures[..., :1], 3, axis=-1)


def sheet(clips: np.ndarray, titles: Sequence[str] | None = None, columns: int = 0) -> np.ndarray:
    """Arranges images as a grid, or clips as one row of frames each: uint8 (H, W, 3).

    Args:
      clips: (n, f, h, w, c); an image is a clip of one frame. See `rgb` for what c may be.
      titles: title of each clip.
      columns: columns of a grid of images; 0 makes it about square.
    """
    shown = rgb(clips)
    shown = video.upscale(shown, -(-TILE // min(shown.shape[2:4])))
    tiles = list(shown)
    if shown.shape[1] > 1:
        tiles = [video.grid([frame[None] for frame in clip], columns=len(clip)) for clip in shown]
        columns = 1
    return video.grid(captioned(tiles, titles), columns=columns)[0]


def captioned(tiles: Sequence[np.ndarray], titles: Sequence[str] | None) -> list[np.ndarray]:
    """Puts videos of one size under their titles, which are broken into the same number of
    lines."""
    if titles is None:
        return list(tiles)
    width = max(tiles[0].shape[2] // LETTER, 1)
    lines = [textwrap.wrap(title, width) for title in titles]
    most = max(map(len, lines))
    out = []
    for tile, text in zip(tiles, lines, strict=True):
        for line in reversed([""] * (most - len(text)) + text):
            tile = video.caption(tile, line)
        out.append(tile)
    return out


def save(clips: np.ndarray, path: str | os.PathLike, titles=None, columns: int = 0) -> files.Path:
    """Writes a `sheet` as PNG, making parent folders."""
    with files.draft(path, replace=True) as draft:
        Image.fromarray(sheet(clips, titles, columns)).save(draft)
    return files.path(path)
