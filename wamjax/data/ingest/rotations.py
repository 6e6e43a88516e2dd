"""Converts rotations between representations, which are chosen by name.

Rotations are active rotations of the robot's frame; the columns of a matrix are the rotated axes.
"rotation_6d" is the first two *columns*, one after the other (Zhou et al., 2019);
"rotation_6d_rows" is the first two rows, as in PyTorch3D. Euler angles are in radians: "euler_xyz"
rotates about the fixed axes x, y, z in this order, "euler_XYZ" about the moving axes.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from wamjax.config import did_you_mean

_EULER = {f"euler_{order}": order for order in ("xyz", "zyx", "XYZ", "ZYX")}
SIZES = {
    "axis_angle": 3, "quat_xyzw": 4, "quat_wxyz": 4, "rotation_6d": 6, "rotation_6d_rows": 6,
    "matrix": 9,
} | dict.fromkeys(_EULER, 3)  # fmt: skip


def check(name: str) -> str:
    """Returns `name` if it is a representation.

    Raises:
      ValueError: `name` is unknown.
    """
    if name not in SIZES:
        raise ValueError(f"there is no rotation format {name!r}{did_you_mean(name, SIZES)}; there "
                         f"are {', '.join(SIZES)}")  # fmt: skip
    return name


def read(x: np.ndarray, kind: str) -> Rotation:
    """Reads rotations from an array (n, `SIZES[kind]`).

    Raises:
      ValueError: the array has another width, or a quaternion is zero.
    """
    x = np.asarray(x, np.float64)
    if x.shape[-1] != SIZES[check(kind)]:
        raise ValueError(
            f"a rotation in the format {kind} has {SIZES[kind]} numbers, not {x.shape[-1]}"
        )
    if kind == "axis_angle":
        return Rotation.from_rotvec(x)
    if kind == "quat_xyzw":
        return Rotation.from_quat(x)
    if kind == "quat_wxyz":
        return Rotation.from_quat(np.roll(x, -1, axis=-1))
    if kind in _EULER:
        return Rotation.from_euler(_EULER[kind], x)
    if kind == "matrix":
        return Rotation.from_matrix(x.reshape(-1, 3, 3))
    first, second = x[..., :3], x[..., 3:]
    first = first / np.linalg.norm(first, axis=-1, keepdims=True)
    second = second - np.sum(first * second, axis=-1, keepdims=True) * first
    second = second / np.linalg.norm(second, axis=-1, keepdims=True)
    axis = -1 if kind == "rotation_6d" else -2
    return Rotation.from_matrix(np.stack([first, second, np.cross(first, second)], axis=axis))


def write(rotation: Rotation, kind: str) -> np.ndarray:
    """Writes rotations as an array, f64 (n, `SIZES[kind]`); the inverse of `read`.

    Since q and -q are the same rotation, signs of quaternions are chosen so that the first has
    w >= 0 and the rest are continuous along n.
    """
    if check(kind) == "axis_angle":
        return rotation.as_rotvec()
    if kind.startswith("quat"):
        x = rotation.as_quat(canonical=True)
        turns = np.sign(np.sum(x[1:] * x[:-1], axis=-1))
        x[1:] *= np.cumprod(np.where(turns < 0, -1.0, 1.0))[:, None]
        return x if kind == "quat_xyzw" else np.roll(x, 1, axis=-1)
    if kind in _EULER:
        return rotation.as_euler(_EULER[kind])
    matrix = rotation.as_matrix()
    if kind == "matrix":
        return matrix.reshape(-1, 9)
    rows = matrix.swapaxes(-1, -2) if kind == "rotation_6d" else matrix
    return rows[..., :2, :].reshape(-1, 6)


def convert(x: np.ndarray, old: str, new: str) -> np.ndarray:
    """Converts rotations (n, `SIZES[old]`) to another representation (n, `SIZES[new]`)."""
    return write(read(x, old), new)
