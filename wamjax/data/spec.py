"""Describes the contents of a data set (`Info`, stored with it) and of its batches (`DataSpec`)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from wamjax.data import layout as layouts
from wamjax.data.tokens import Vocabulary

FORMAT_VERSION = 2  # of what is written; 1 had the pictures in the records of the episodes
READABLE = (1, 2)


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Holds the sizes that data determines for a model.

    Attributes:
      cameras: name -> (height, width), in the order of the composite picture.
      proprio_dim: p.
      action_dim: a.
      chunk: action steps in a window (j).
      frames: raw video frames in a window (f).
      frame_stride: control steps between them.
      instruction_length: instruction tokens (n).
      control_hz: control steps per second.
      resize: how pictures of other sizes become those of `cameras`, see `transforms.Resize`; '' =
        all have these sizes.
      layout: arrangement of the cameras in the picture, see `data.layout`; '' = side by side.
      words: words of the instructions, in the order of their ids; () = all are hashed, see
        `tokens.Vocabulary`.
    """

    cameras: Mapping[str, tuple[int, int]]
    proprio_dim: int
    action_dim: int
    chunk: int
    frames: int
    frame_stride: int
    instruction_length: int
    control_hz: float
    resize: str = ""
    layout: str = ""
    words: tuple[str, ...] = ()

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """Vocabulary that maps words of instructions to ids."""
        return Vocabulary(self.words)

    @property
    def picture(self) -> layouts.Layout:
        """Arrangement of the cameras in the picture.

        Raises:
          ValueError: there is none, or the cameras are not equally high and no layout says how.
        """
        if not self.cameras:
            raise ValueError("a DataSpec needs at least one camera")
        if self.layout:
            return layouts.parse(self.layout)
        if len({h for h, _ in self.cameras.values()}) > 1:
            raise ValueError(
                f"cameras {dict(self.cameras)} are not equally high and cannot stand side by "
                "side; choose others by config.data.cameras, resize them by "
                "config.data.image_size = (HEIGHT, WIDTH), or arrange them by "
                "config.data.layout = 'NAME:HEIGHTxWIDTH/NAME:HEIGHTxWIDTH+...'"
            )
        return layouts.beside(self.cameras)

    @property
    def composite(self) -> tuple[int, int]:
        """(height, width) of the composite picture; raises the same errors as `picture`."""
        return self.picture.size

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON to store in a checkpoint. The cameras are a list, because their order
        matters."""
        cameras = [[name, *size] for name, size in self.cameras.items()]
        out = dataclasses.asdict(self) | {"cameras": cameras, "words": list(self.words)}
        later = ("resize", "layout", "words")  # older specs lack them
        return {k: v for k, v in out.items() if v or k not in later}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> DataSpec:
        """Reverses `to_json`."""
        cameras = {name: (h, w) for name, h, w in values["cameras"]}
        words = tuple(values.get("words", ()))
        return DataSpec(**dict(values) | {"cameras": cameras, "words": words})


@dataclasses.dataclass(frozen=True)
class Info:
    """Holds the contents of a data set's ``spec.json``.

    Attributes:
      cameras: name -> (height, width).
      proprio_dim, action_dim: dimensions of the robot, even if the actions are not recorded.
      control_hz: control steps per second.
      robot: name of the robot.
      action_names, proprio_names: names of the dimensions, for messages and plots.
      action_free: whether the episodes hold video and proprio but no actions.
      collection: settings of the collection, to recognize the data set by.
      final_observation: whether the observation after the last action was recorded; otherwise an
        episode has as many observations as actions, and its last one is stored twice.
      outcomes: whether rewards or success were recorded; else episodes have no returns.
    """

    cameras: Mapping[str, tuple[int, int]]
    proprio_dim: int
    action_dim: int
    control_hz: float
    robot: str = ""
    action_names: tuple[str, ...] = ()
    proprio_names: tuple[str, ...] = ()
    action_free: bool = False
    collection: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    final_observation: bool = True
    outcomes: bool = True

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON with the format version."""
        return {"format": FORMAT_VERSION, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(values: Mapping[str, Any], where: str) -> Info:
        """Reverses `to_json`; `where` names the file in errors."""
        later = {"final_observation": True, "outcomes": True}  # implied by older data sets
        values = later | dict(values)
        version = values.pop("format", None)
        if version not in READABLE:
            raise ValueError(
                f"{where} has format {version!r}, this wamjax reads formats {READABLE}; update "
                "wamjax, or collect or convert the data set again"
            )
        fields = {f.name for f in dataclasses.fields(Info)}
        if set(values) != fields:
            raise ValueError(f"{where} differs in {sorted(set(values) ^ fields)} from {fields}")
        values["cameras"] = {k: tuple(size) for k, size in values["cameras"].items()}
        for names in ("action_names", "proprio_names"):
            values[names] = tuple(values[names])
        return Info(**values)
