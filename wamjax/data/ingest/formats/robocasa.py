"""HDF5 of RoboCasa: robomimic's layout, with an instruction in ``ep_meta`` of each demonstration.

Actions have 12 values: arm 6, gripper, base 3, torso, and whether the base moves. The first 7 are
used, as published, unless you set ``--action``.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from wamjax.data.ingest import hdf5
from wamjax.data.ingest.demos import Demos, Layout
from wamjax.data.ingest.formats import robomimic

BASE = ("base_x", "base_y", "base_turn", "torso", "base_mode")


def open(source: pathlib.Path, split: str = "", flip: str = "no") -> Demos:
    """Opens a file, or a folder of files.

    Args:
      split, flip: as for the format robomimic.
    """
    layout = Layout(
        instruction=_instruction,
        state=_state,
        action=lambda widths: ("actions[0:7]",) if widths.get("actions") == 12 else ("actions",),
        names=robomimic.NAMES | {"actions": (*robomimic.NAMES["actions"], *BASE),
                                 "robot_states": ("finger_left", "finger_right", "x", "y", "z",
                                                  "qx", "qy", "qz", "qw")},
        hz=20.0,
        notes=("of 12 actions the first 7 are the arm and its gripper, the others move the base",),
    )  # fmt: skip
    return Demos(source, layout, flip, split)


def _state(widths: Mapping[str, int]) -> tuple[str, ...]:
    if "robot_states" not in widths:
        return robomimic.state(widths)
    return "robot_states[0:5]", "robot_states[5:9]:quat_xyzw"


def _instruction(path: pathlib.Path, data: Mapping, demo: Mapping) -> str:
    claim = hdf5.json_of(demo, "ep_meta").get("lang", "")
    return str(claim).strip() or hdf5.text_of(demo, "task_description")
