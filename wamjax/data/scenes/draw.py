"""Renders objects on a grid of cells.

A cell holds at most one object, whose centre has one of nine offsets from the cell's. So there are
few ways to render an object, and a table of their coverages is computed once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 180, 70),
    "blue": (60, 90, 240),
    "yellow": (240, 210, 60),
}
BACKGROUND = (24, 24, 28)
PALETTE = np.array(list(COLOURS.values()), np.float32)
RADIUS, OFFSET = 0.4, 0.09  # in units of a cell: an object never leaves its cell
FINE = 8  # samples along each side of a pixel


def offsets(reach: int) -> list[tuple[int, int]]:
    """Returns offsets (down, right) from a cell's centre, in units of OFFSET, up to `reach`."""
    steps = range(-reach, reach + 1)
    return [(dy, dx) for dy in steps for dx in steps]


OFFSETS = offsets(1)  # offsets of rendered objects


class Object(NamedTuple):
    """Describes one object; row 0 is at the top, column 0 on the left."""

    shape: str
    colour: str
    row: int
    column: int
    offset: int = 4  # index into OFFSETS; 4 is the centre of the cell

    @property
    def kind(self) -> tuple[str, str]:
        """Returns (colour, shape), which is what a caption says about an object."""
        return self.colour, self.shape


def render(
    scenes: Sequence[Sequence[Object]], size: int = 32, grid: int = 3
) -> UInt8[np.ndarray, "n h w 3"]:
    """Renders scenes on a grid of `grid` x `grid` cells as pictures of `size` x `size` pixels.

    Raises:
      ValueError: an object is outside the grid, or two share a cell.
    """
    cover = coverages(size, grid)
    colours = list(COLOURS)
    colours, most = list(COLOURS), max((len(scene) for scene in scenes), default=0)
    numbers = np.full((len(scenes), most), len(cover) - 1)  # the last row covers nothing
    tints = np.zeros((len(scenes), most), int)
    for i, scene in enumerate(scenes):
        _check(scene, grid)
        numbers[i, : len(scene)] = [index(o, grid) for o in scene]
        tints[i, : len(scene)] = [colours.index(o.colour) for o in scene]
    paint = PALETTE - np.array(BACKGROUND, np.float32)
    out = np.empty((len(scenes), size * size, 3), np.float32)
    out[:] = BACKGROUND
    for number, tint in zip(numbers.T, tints.T, strict=True):
        out += cover[number][:, :, None] * paint[tint][:, None, :]
    return np.round(out).astype(np.uint8).reshape(-1, size, size, 3)


def index(thing: Object, grid: int) -> int:
    """Returns the row of `coverages` for an object."""
    cell = thing.row * grid + thing.column
    return (cell * len(SHAPES) + SHAPES.index(thing.shape)) * len(OFFSETS) + thing.offset


@functools.lru_cache(maxsize=8)
def coverages(size: int, grid: int, reach: int = 1) -> Float[np.ndarray, "k pixels"]:
    """Returns which share of each pixel each (cell, shape, offset) covers, then a row of zeros."""
    fine = (np.arange(size * FINE, dtype=np.float32) + 0.5) / FINE
    rows = []
    for cell in range(grid * grid):
        for shape in SHAPES:
            for offset in offsets(reach):
                y, x = centre(*divmod(cell, grid), offset, size / grid)
                full = _inside(shape, fine - x, (fine - y)[:, None], RADIUS * size / grid)
                rows.append(full.reshape(size, FINE, size, FINE).mean((1, 3)).ravel())
    out = np.stack([*rows, np.zeros_like(rows[0])]).astype(np.float32)
    out.flags.writeable = False
    return out


def centre(row: int, column: int, offset: tuple[int, int], cell: float) -> tuple[float, float]:
    """Returns (y, x) of an object's centre in pixels; `cell` is the side of a cell in pixels."""
    return (row + 0.5 + OFFSET * offset[0]) * cell, (column + 0.5 + OFFSET * offset[1]) * cell


def _inside(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Returns whether points (x right, y down, from the centre) are in a shape of radius r."""
    if shape == "circle":
        return x**2 + y**2 < r**2
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) < 0.88 * r  # nearly the circle's area
    return (y < 0.85 * r) & (1.85 * np.abs(x) < y + r)  # a triangle, tip up, as wide as the circle


def _check(scene: Sequence[Object], grid: int) -> None:
    cells = [(o.row, o.column) for o in scene]
    if len(set(cells)) < len(cells):
        raise ValueError(f"two objects in one cell: {list(scene)}")
    for thing in scene:
        if not (0 <= thing.row < grid and 0 <= thing.column < grid):
            raise ValueError(f"{thing} is outside of a grid of {grid}x{grid} cells")
