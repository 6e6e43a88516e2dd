"""HDF5 of robomimic: ``/data/demo_i`` with obs, next_obs, actions and split masks.

Pictures are upright. If there are next_obs, their last row is the observation after the last
action. The files contain no instruction: give one with ``--instruction``.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from wamjax.data.ingest.demos import Demos, Layout

NAMES = {
    "actions": ("dx", "dy", "dz", "drx", "dry", "drz", "gripper"),
    "robot0_eef_pos": ("x", "y", "z"),
    "robot0_eef_quat": ("qx", "qy", "qz", "qw"),
    "robot0_gripper_qpos": ("finger_left", "finger_right"),
}


def open(source: pathlib.Path, split: str = "", flip: str = "no") -> Demos:
    """Opens a file, or a folder of files.

    Args:
      split: the demonstrations that /mask lists under this name, such as train; '' = all.
      flip: whether pictures are upside down in the files, yes or no.
    """
    layout = Layout(
        instruction=lambda path, data, demo: "",
        state=state,
        action=lambda widths: ("actions",),
        names=NAMES,
        hz=20.0,
    )
    return Demos(source, layout, flip, split)


def state(widths: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the terms of position, quaternion and fingers of the first arm, as in robomimic's
    image policies."""
    kinds = {"robot0_eef_pos": "", "robot0_eef_quat": ":quat_xyzw", "robot0_gripper_qpos": ""}
    return tuple(k + kind for k, kind in kinds.items() if k in widths) or tuple(
        key for key in widths if key.startswith("robot") and key.endswith(("pos", "qpos"))
    )
