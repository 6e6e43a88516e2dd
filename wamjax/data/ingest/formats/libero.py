"""HDF5 of LIBERO: ``<suite>/<task>_demo.hdf5``, and what OpenVLA and Cosmos Policy made of it.

As collected (`/data` has ``problem_info``), pictures are stored upside down; and each observation
was stored after the action that it is paired with, where the file says that LIBERO's own script
wrote it (``bddl_file_name`` or ``macros_image_convention``). Files that were made anew by replaying
the actions have neither: upright, and stored before. The instruction is that of ``problem_info``,
or the name of the file.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping

from wamjax.data.ingest import hdf5
from wamjax.data.ingest.demos import Demos, Layout

ACTION = ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")
NAMES = {
    "actions": ACTION,
    "ee_states": ("x", "y", "z", "rx", "ry", "rz"),
    "ee_pos": ("x", "y", "z"),
    "ee_ori": ("rx", "ry", "rz"),
    "gripper_states": ("finger_left", "finger_right"),
    "joint_states": tuple(f"joint_{i}" for i in range(7)),
    "robot_states": ("finger_left", "finger_right", "x", "y", "z", "qx", "qy", "qz", "qw"),
}


def open(source: pathlib.Path, flip: str = "auto") -> Demos:
    """Opens a file, or a folder of files.

    Args:
      flip: yes or no, whether pictures are upside down in the files; auto = as the file says.
    """
    layout = Layout(
        instruction=_instruction,
        state=_state,
        action=lambda widths: ("actions",),
        names=NAMES,
        upside_down=lambda attributes: "problem_info" in attributes,
        after=lambda attributes: bool({"bddl_file_name", "macros_image_convention"}
                                      & set(attributes)),
        hz=20.0,
    )  # fmt: skip
    return Demos(source, layout, flip)


def _state(widths: Mapping[str, int]) -> tuple[str, ...]:
    """Position, axis-angle and fingers, as published."""
    if "ee_states" in widths:
        return "ee_states[0:3]", "ee_states[3:6]:axis_angle", "gripper_states"
    if "ee_pos" in widths:
        return "ee_pos", "ee_ori:axis_angle", "gripper_states"
    return "robot_states[0:5]", "robot_states[5:9]:quat_xyzw"


def _instruction(path: pathlib.Path, data: Mapping, demo: Mapping) -> str:
    claim = hdf5.json_of(data, "problem_info").get("language_instruction", "")
    claim = claim if isinstance(claim, str) else "".join(claim)
    return claim.strip().strip('"') or hdf5.text_of(demo, "task_description") or of_name(path.stem)


def of_name(stem: str) -> str:
    """The instruction in the name of a file: without _demo, and without a leading scene."""
    name = re.sub(r"^.*SCENE\d+_", "", stem.removesuffix("_demo"))
    return name.replace("_", " ").strip()
