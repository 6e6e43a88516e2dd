"""Composes the picture that a published model sees from several cameras.

    image:224x224+wrist_image:224x224                                     side by side
    cam_high:256x320/cam_left_wrist:128x160+cam_right_wrist:128x160       one above two

``name:HEIGHTxWIDTH`` is a resized camera; ``+`` puts cameras side by side, ``/`` puts rows below
each other. The examples are the layouts of Fast-WAM on LIBERO and on RoboTwin 2.0.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image

Cell = tuple[str, int, int]  # camera, height, width


@dataclasses.dataclass(frozen=True)
class Layout:
    """Holds rows of cameras with their sizes."""

    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self):
        names = [name for row in self.rows for name, _, _ in row]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the layout {str(self)!r} shows {twice} more than once")
        for row in self.rows:
            if len({height for _, height, _ in row}) > 1:
                raise ValueError(
                    f"the cameras {row} stand side by side, so they must be equally high"
                )
        if len({sum(width for _, _, width in row) for row in self.rows}) > 1:
            raise ValueError(f"the rows of {str(self)!r} are not equally wide")

    def __str__(self) -> str:
        rows = ("+".join(f"{name}:{h}x{w}" for name, h, w in row) for row in self.rows)
        return "/".join(rows)

    @property
    def cameras(self) -> dict[str, tuple[int, int]]:
        """Cameras side by side in the whole picture, or "composite" for several rows."""
        if len(self.rows) == 1:
            return {name: (h, w) for name, h, w in self.rows[0]}
        return {"composite": self.size}

    @property
    def cells(self) -> dict[str, tuple[int, int]]:
        """Camera -> (height, width) in the picture, row by row."""
        return {name: (h, w) for row in self.rows for name, h, w in row}

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the whole picture."""
        return sum(row[0][1] for row in self.rows), sum(width for _, _, width in self.rows[0])

    def join(self, images: Mapping[str, Any]) -> Any:
        """Returns the whole picture (..., H, W, 3) from cameras in their sizes; numpy or JAX.

        Raises:
          ValueError: a camera is missing or has another size.
        """
        for name, size in self.cells.items():
            if name not in images:
                raise ValueError(f"there is no camera {name!r}; the cameras are {list(images)}")
            if images[name].shape[-3:] != (*size, 3):
                raise ValueError(
                    f"pictures of camera {name!r} are {images[name].shape[-3:]}, the spec says "
                    f"{(*size, 3)}"
                )
        stack = jnp if any(isinstance(images[name], jax.Array) for name in self.cells) else np
        rows = [stack.concatenate([images[name] for name, _, _ in row], axis=-2)
                for row in self.rows]  # fmt: skip
        return stack.concatenate(rows, axis=-3)

    def cut(self, picture: Any) -> dict[str, Any]:
        """Reverses `join`."""
        images, top = {}, 0
        for row in self.rows:
            left = 0
            for name, height, width in row:
                images[name] = picture[..., top : top + height, left : left + width, :]
                left += width
            top += row[0][1]
        return images

    def compose(
        self, images: Mapping[str, UInt8[np.ndarray, "t _ _ 3"]]
    ) -> UInt8[np.ndarray, "t H W 3"]:
        """Returns the whole picture at each time.

        Raises:
          ValueError: a camera is missing.
        """
        for name in self.cells:
            if name not in images:
                raise ValueError(
                    f"the layout shows camera {name!r}, which does not exist; the cameras are "
                    f"{list(images)}"
                )
        return self.join({name: resize(images[name], *size) for name, size in self.cells.items()})


def beside(cameras: Mapping[str, tuple[int, int]]) -> Layout:
    """Returns a row of cameras (height, width).

    Raises:
      ValueError: their heights differ.
    """
    return Layout((tuple((name, *size) for name, size in cameras.items()),))


ON_ARM = re.compile(r"wrist|hand|grip|arm", re.IGNORECASE)
LARGE = 256 * 320 / 224**2  # area of the large camera of RoboTwin, of LIBERO's cameras


def arrange(cameras: Mapping[str, tuple[int, int]], side: int = 224, step: int = 32) -> Layout:
    """Returns the layout of a data set's cameras in the style of published data sets.

    One or two stand in a row and have about `side` x `side` pixels each (LIBERO). Of more, the
    first camera that is not on an arm is large and on top, and the others share the row below
    (RoboTwin). Proportions are kept as far as sides are multiples of `step`, a token of the video
    model.

    Args:
      cameras: name -> (height, width) of the data.

    Raises:
      ValueError: there is no camera.
    """
    if not cameras:
        raise ValueError("there is no camera: name at least one in config.data.cameras")
    ratio = {name: w / h for name, (h, w) in cameras.items()}

    def whole(pixels: float) -> int:
        return step * max(1, round(pixels / step))

    if len(cameras) < 3:
        height = whole((len(cameras) * side**2 / sum(ratio.values())) ** 0.5)
        return beside({name: (height, whole(height * r)) for name, r in ratio.items()})
    main = next((name for name in cameras if not ON_ARM.search(name)), next(iter(cameras)))
    others = [name for name in cameras if name != main]
    height = whole((LARGE * side**2 / ratio[main]) ** 0.5 / len(others))
    width = whole(height * ratio[main])
    large = main, len(others) * height, len(others) * width
    return Layout(((large,), tuple((name, height, width) for name in others)))


@functools.lru_cache(maxsize=64)
def parse(text: str) -> Layout:
    """Parses a layout.

    Raises:
      ValueError: the text is not a layout, or sizes do not match.
    """
    rows = []
    for row in text.split("/"):
        cells = [re.fullmatch(r"([^:/+]+):(\d+)x(\d+)", cell) for cell in row.split("+")]
        if not all(cells):
            raise ValueError(
                f"layout {text!r}: {row!r} is not NAME:HEIGHTxWIDTH, several joined by '+'; rows "
                "are joined by '/'"
            )
        rows.append(tuple((cell[1], int(cell[2]), int(cell[3])) for cell in cells))
    return Layout(tuple(rows))


def resize(
    pictures: UInt8[np.ndarray, "t _ _ 3"], height: int, width: int
) -> UInt8[np.ndarray, "t h w 3"]:
    """Resizes with PIL's bilinear filter, which smooths when it shrinks; returns matching sizes
    unchanged."""
    if pictures.shape[1:3] == (height, width):
        return pictures
    size, how = (width, height), Image.Resampling.BILINEAR
    return np.stack([np.asarray(Image.fromarray(x).resize(size, how)) for x in pictures])
