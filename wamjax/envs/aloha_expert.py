"""Experts for ALOHA's tasks: waypoints of both gripper tips, joints by damped least squares.

A plan is made from the places of the objects and executed without observing, except in the
insertion: there the expert checks once what it holds, since things slip when fingers close.
Between waypoints a tip moves straight; the joints are solved for every fifth control step and
interpolated.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

TIP = 0.1347  # metres from a gripper's link to the point between its fingers
EVERY = 5  # control steps between solutions
ITERATIONS, DAMPING, TURN, MOST = 150, 1e-5, 0.3, 0.2  # settings of the solver; TURN weighs angles
SPEED = {"transfer_cube": 1.5, "insertion": 1.0}  # waypoints' times are divided by it
FIRST = 0.02239  # opening of the fingers when an episode starts, metres
DOWN = -60.0  # degrees that a gripper is tilted to pick something up
LOOK = 175  # control step at which peg and socket are in the air and at rest
APART, TOGETHER, LIFT = 0.12, 0.03, 0.013  # metres: tips from the middle; the peg's tip upwards
MEET = np.array([0.0, 0.5, 0.2])  # where peg and socket meet


class Waypoint(NamedTuple):
    """Holds the pose of a tip at a control step; its turn is relative to pointing at the table's
    middle."""

    step: float
    place: np.ndarray
    turn: Rotation
    grip: float  # 1 open


class Arm:
    """Computes an arm's tip from its joints and back.

    Args:
      model: an ``MjModel`` of a task.
      side: "left" or "right".
    """

    def __init__(self, model, side: str):
        import mujoco

        self._mujoco, self._model, self._data = mujoco, model, mujoco.MjData(model)
        name = f"vx300s_{side}/gripper_link"
        self._body = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, name)
        first = 0 if side == "left" else 8
        self.joints = slice(first, first + 6)
        self._range = model.jnt_range[model.dof_jntid[self.joints]]
        self._ahead = Rotation.from_euler("z", 0 if side == "left" else 180, degrees=True)

    def tip(self, angles: np.ndarray) -> tuple[np.ndarray, Rotation]:
        """Returns (place, turn) of the tip."""
        data = self._data
        data.qpos[self.joints] = angles
        self._mujoco.mj_kinematics(self._model, data)
        self._mujoco.mj_comPos(self._model, data)
        frame = data.xmat[self._body].reshape(3, 3)
        place = data.xpos[self._body] + TIP * frame[:, 0]
        return place, Rotation.from_matrix(frame) * self._ahead.inv()

    def solve(self, angles: np.ndarray, place: np.ndarray, turn: Rotation) -> np.ndarray:
        """Returns angles that bring the tip there, starting from `angles`; as close as the joints
        allow."""
        linear, angular = np.zeros((3, self._model.nv)), np.zeros((3, self._model.nv))
        for _ in range(ITERATIONS):
            position, rotation = self.tip(angles)
            missing = np.concatenate([place - position, TURN * (turn * rotation.inv()).as_rotvec()])
            if np.abs(missing).max() < 1e-4:
                break
            self._mujoco.mj_jac(self._model, self._data, linear, angular, position, self._body)
            jacobian = np.concatenate([linear[:, self.joints], TURN * angular[:, self.joints]])
            square = jacobian @ jacobian.T + DAMPING * np.eye(6)
            change = jacobian.T @ np.linalg.solve(square, missing)
            angles = np.clip(angles + np.clip(change, -MOST, MOST), *self._range.T)
        return angles


class Slip(NamedTuple):
    """Holds the correction that aligns the peg with the socket.

    Attributes:
      turn: rotation of the peg's gripper.
      place: extra displacement of the tip, metres; 0 along the socket.
    """

    turn: Rotation
    place: np.ndarray


def slip(held: np.ndarray) -> Slip:
    """Returns the correction for what slipped when the fingers closed.

    Args:
      held: poses (7,) of peg and socket at step `LOOK`.
    """
    peg, socket = held[:3], held[7:10]
    turns = [Rotation.from_quat(held[i : i + 4], scalar_first=True) for i in (3, 10)]
    turn = turns[1] * turns[0].inv()
    right, left = MEET + [APART, 0, LIFT], MEET + [-APART, 0, 0]  # the targets of the tips
    # The socket stays as it is; the peg turns about the tip that holds it.
    missing = (socket - left) - (turn.apply(peg - right) + [0, 0, LIFT])
    return Slip(turn, missing * [0, 1, 1])


def plan(model, task: str, objects: np.ndarray, slipped: Slip | None = None) -> np.ndarray:
    """Returns the actions of an episode, (n, 14).

    Args:
      model: an ``MjModel`` of the task.
      task: key of `wamjax.envs.aloha.SENTENCES`.
      objects: poses (7,) of the objects on the table, concatenated.
      slipped: correction applied after step `LOOK`; nothing before it depends on it.
    """
    from gym_aloha.constants import START_ARM_POSE, normalize_puppet_gripper_position

    ways = _transfer(objects) if task == "transfer_cube" else _insertion(objects, slipped)
    start, grip = np.array(START_ARM_POSE), float(normalize_puppet_gripper_position(FIRST))
    tracks = []
    for side, way in zip(("left", "right"), ways, strict=True):
        arm = Arm(model, side)
        tracks.append(_track(arm, start[arm.joints], grip, way, SPEED[task]))
    return np.concatenate(tracks, axis=1)


def _track(arm: Arm, angles: np.ndarray, grip: float, way: list[Waypoint], speed: float):
    """Returns the actions of one arm along its waypoints, (n, 7)."""
    times, keys = [0.0], [np.append(angles, grip)]
    before = Waypoint(0.0, *arm.tip(angles), grip)
    for point in way:
        count = max(1, int(np.ceil((point.step - before.step) / EVERY)))
        turns = Slerp([0, 1], Rotation.concatenate([before.turn, point.turn]))
        for part in np.arange(1, count + 1) / count:
            place = before.place + part * (point.place - before.place)
            angles = arm.solve(angles, place, turns(part))
            times.append(before.step + part * (point.step - before.step))
            keys.append(np.append(angles, before.grip + part * (point.grip - before.grip)))
        before = point
    at = np.arange(0, way[-1].step, speed)
    return np.stack([np.interp(at, times, column) for column in np.array(keys).T], axis=1)


def _transfer(objects: np.ndarray) -> tuple[list[Waypoint], list[Waypoint]]:
    """Returns waypoints: the right arm lifts the cube to the middle, the left one takes it
    there."""
    cube, meet = np.array([*objects[:2], 0.02]), np.array([0.0, 0.5, 0.25])
    down, side = _turn("y", DOWN), _turn("x", 90)
    near, far = meet + [0.01, 0, -0.02], meet + [-0.12, 0, -0.02]
    right = [
        Waypoint(50, cube + [0, 0, 0.08], down, 1), Waypoint(80, cube, down, 1),
        Waypoint(90, cube, down, 1), Waypoint(105, cube, down, 0), Waypoint(150, meet, down, 0),
        Waypoint(205, meet, down, 0), Waypoint(220, meet, down, 1),
        Waypoint(250, meet + [0.1, 0, 0], down, 1),
    ]  # fmt: skip
    left = [
        Waypoint(80, far, side, 1), Waypoint(150, far, side, 1), Waypoint(180, near, side, 1),
        Waypoint(190, near, side, 1), Waypoint(205, near, side, 0), Waypoint(220, near, side, 0),
        Waypoint(250, meet + [-0.1, 0, -0.02], side, 0),
    ]  # fmt: skip
    return left, right


def _insertion(
    objects: np.ndarray, slipped: Slip | None
) -> tuple[list[Waypoint], list[Waypoint]]:
    """Returns waypoints: both arms lift the object on their side and join the two in the air."""
    # A tip lower than this presses the fingers onto the table, where they cannot close.
    peg, socket = np.array([*objects[:2], 0.022]), np.array([*objects[7:9], 0.022])
    slipped = slipped or Slip(Rotation.identity(), np.zeros(3))

    def way(thing: np.ndarray, turn: Rotation, side: float, lift: float, slipped: Slip):
        def apart(distance: float) -> np.ndarray:
            return MEET + [side * distance, 0, lift]

        after = slipped.turn * turn
        return [
            Waypoint(50, thing + [0, 0, 0.08], turn, 1), Waypoint(85, thing, turn, 1),
            Waypoint(95, thing, turn, 1), Waypoint(115, thing, turn, 0),
            Waypoint(160, apart(APART), turn, 0), Waypoint(LOOK, apart(APART), turn, 0),
            Waypoint(210, apart(0.08) + slipped.place, after, 0),
            Waypoint(260, apart(TOGETHER) + slipped.place, after, 0),
            Waypoint(290, apart(TOGETHER) + slipped.place, after, 0),
        ]  # fmt: skip

    still = Slip(Rotation.identity(), np.zeros(3))
    left = way(socket, _turn("y", -DOWN), -1, 0.0, still)
    return left, way(peg, _turn("y", DOWN), 1, LIFT, slipped)


def _turn(axis: str, degrees: float) -> Rotation:
    return Rotation.from_euler(axis, degrees, degrees=True)
