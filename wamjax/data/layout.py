"""The picture that a published model sees, put together of several cameras.

    image:224x224+wrist_image:224x224                                     side by side
    cam_high:256x320/cam_left_wrist:128x160+cam_right_wrist:128x160       one above two

``name:HEIGHTxWIDTH`` is a camera, resized; ``+`` puts cameras beside each other, ``/`` rows below
each other. The two above are those of Fast-WAM on LIBERO and on RoboTwin 2.0.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Cell = tuple[str, int, int]  # camera, height, width


@dataclasses.dataclass(frozen=True)
class Layout:
    """Rows of cameras with their sizes."""

    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self):
        for row in self.rows:
            if len({height for _, height, _ in row}) > 1:
                raise ValueError(f"the cameras {row} stand side by side and are not equally high")
        if len({sum(width for _, _, width in row) for row in self.rows}) > 1:
            raise ValueError(f"the rows of {str(self)!r} are not equally wide")

    def __str__(self) -> str:
        rows = ("+".join(f"{name}:{h}x{w}" for name, h, w in row) for row in self.rows)
        return "/".join(rows)

    @property
    def cameras(self) -> dict[str, tuple[int, int]]:
        """What stands side by side in the whole picture: cameras, or "composite" for all rows."""
        if len(self.rows) == 1:
            return {name: (h, w) for name, h, w in self.rows[0]}
        height = sum(row[0][1] for row in self.rows)
        return {"composite": (height, sum(width for _, _, width in self.rows[0]))}

    def compose(
        self, images: Mapping[str, UInt8[np.ndarray, "t _ _ 3"]]
    ) -> UInt8[np.ndarray, "t H W 3"]:
        """The whole picture at each time.

        Raises:
          ValueError: a camera is missing.
        """
        for row in self.rows:
            for name, _, _ in row:
                if name not in images:
                    raise ValueError(
                        f"the layout wants camera {name!r}; the cameras are {list(images)}"
                    )
        rows = [
            np.concatenate([resize(images[name], h, w) for name, h, w in row], axis=2)
            for row in self.rows
        ]
        return np.concatenate(rows, axis=1)


def parse(text: str) -> Layout:
    """A layout from its text.

    Raises:
      ValueError: it is none, or sizes do not fit.
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
    """Resizes by PIL's bilinear filter, which smooths when it shrinks; untouched if it fits."""
    if pictures.shape[1:3] == (height, width):
        return pictures
    size, how = (width, height), Image.Resampling.BILINEAR
    return np.stack([np.asarray(Image.fromarray(x).resize(size, how)) for x in pictures])
