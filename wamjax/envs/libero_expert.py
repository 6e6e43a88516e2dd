"""An expert for LIBERO's pick-and-place tasks, from the objects' poses: one motion in eight phases.

Over the object, down, close, lift, over the target, down, open, up. It reads object and target
from the task's own file, and turns the gripper to the narrow side of an object. It drops flat
objects, and it cannot open drawers: collections keep only successes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

REACH, SPIN = 0.05, 0.5  # metres, radians of an action of 1
OPEN, CLOSED = -1.0, 1.0  # of the simulator
HOVER, LIFT = 0.12, 0.20  # metres above the thing, before and after
FINGERS = 0.07  # metres; wider things must be gripped across
NEAR, SLOW = 0.012, 40  # metres that count as arrived; steps after which a phase ends anyway
CLOSING, OPENING = 12, 6  # steps


class Grip(NamedTuple):
    """Describes how a suite's objects are gripped.

    Attributes:
      offset: from an object's origin to the grip point, metres; bowls are gripped at their rim.
      release: height above the target, metres.
      across: whether to turn to the narrow side and grip its middle.
    """

    offset: tuple[float, float, float]
    release: float
    across: bool


GRIPS = {
    "libero_object": Grip((0.0, 0.0, 0.0), 0.12, True),
    "libero_spatial": Grip((0.0, -0.05, 0.03), 0.03, False),
    "libero_goal": Grip((0.0, -0.05, 0.03), 0.03, False),
}


class Expert:
    """Performs one episode.

    Args:
      env: the simulator, reset.
      suite, task: suite and task of the simulator.

    Raises:
      NotImplementedError: the expert cannot do the task.
    """

    def __init__(self, env, suite: str, task: str):
        if suite not in GRIPS or not task.startswith(("pick_up", "put_the")):
            raise NotImplementedError(
                f"the scripted expert of libero picks up and places; it cannot do {task!r}"
            )
        self._env, self._how = env, GRIPS[suite]
        self._thing, self._target = env.obj_of_interest[:2]
        self._phase, self._count = self._over, 0
        self._turn = self._narrow() if self._how.across else None
        self._hold = np.zeros(3)

    def act(self, seen: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the simulator's action (7,) for its observation."""
        hand = np.array(seen["robot0_eef_pos"])
        over = True
        while over:  # a finished phase passes control to the next one
            aim, grip, over = self._phase(hand)
        spin = np.zeros(3)
        if self._turn is not None and self._phase in (self._over, self._down):
            spin[2] = np.clip(0.6 * self._twist() / SPIN, -0.4, 0.4)
        move = np.clip((aim - hand) / REACH, -1, 1)
        return np.array([*move, *spin, grip], np.float32)

    def _next(self, phase: Any) -> bool:
        self._phase, self._count = phase, 0
        return True

    def _over(self, hand):
        aim = self._handle() + [0, 0, HOVER]
        away, self._count = np.abs(aim - hand), self._count + 1
        there = np.hypot(*away[:2]) < NEAR and away[2] < 0.04 and abs(self._twist()) < 0.12
        late = self._count > SLOW and np.hypot(*away[:2]) < 0.04
        return aim, OPEN, (there or late) and self._next(self._down)

    def _down(self, hand):
        aim, self._count = self._handle(), self._count + 1
        there = np.linalg.norm(aim - hand) < NEAR or self._count > SLOW
        return aim, OPEN, there and self._next(self._close)

    def _close(self, hand):
        self._count += 1
        if self._count > CLOSING:
            self._hold = hand + [0, 0, LIFT]
            return hand, CLOSED, self._next(self._lift)
        return self._handle(), CLOSED, False

    def _lift(self, hand):
        there = abs(self._hold[2] - hand[2]) < 0.03
        return self._hold, CLOSED, there and self._next(self._carry)

    def _carry(self, hand):
        aim = self._place(self._target) + (hand - self._place(self._thing))
        aim[2] = max(self._hold[2], self._place(self._target)[2] + self._how.release + 0.1)
        there = np.hypot(*(aim - hand)[:2]) < 0.015
        return aim, CLOSED, there and self._next(self._lower)

    def _lower(self, hand):
        aim = self._place(self._target) + (hand - self._place(self._thing))
        aim[2] += self._how.release
        self._count += 1
        there = abs(aim[2] - hand[2]) < NEAR or self._count > SLOW
        return aim, CLOSED, there and self._next(self._let_go)

    def _let_go(self, hand):
        self._count += 1
        if self._count > OPENING:
            self._hold = hand + [0, 0, HOVER]
            return hand, OPEN, self._next(self._leave)
        return hand, OPEN, False

    def _leave(self, hand):
        return self._hold, OPEN, False

    def _handle(self) -> np.ndarray:
        """Returns the grip point of the object."""
        place = self._place(self._thing) + self._how.offset
        if self._turn is None:
            return place
        low, high = self._extent.min(axis=0), self._extent.max(axis=0)
        tall = high[2] - low[2] >= 0.05
        height = high[2] - 0.03 if tall else (low[2] + high[2]) / 2
        return np.array([*(low + high)[:2] / 2, max(height, low[2] + 0.012)])

    def _place(self, name: str) -> np.ndarray:
        model, data = self._env.sim.model, self._env.sim.data
        for body in (name, f"{name}_main"):
            if body in model._body_name2id:
                return data.get_body_xpos(body).copy()
        return data.get_site_xpos(name).copy()

    def _narrow(self) -> float | None:
        """Returns the direction of the narrow horizontal side; None if any will do."""
        model, data = self._env.sim.model._model, self._env.sim.data._data
        names = self._env.sim.model._body_name2id
        body = names.get(self._thing, names.get(f"{self._thing}_main"))
        signs = np.stack(np.meshgrid(*[(-1, 1)] * 3), axis=-1).reshape(-1, 3)
        corners = []
        for geom in np.flatnonzero((model.geom_bodyid == body) & (model.geom_contype > 0)):
            box = signs * model.geom_aabb[geom, 3:] + model.geom_aabb[geom, :3]
            corners.append(box @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom])
        self._extent = np.concatenate(corners)

        def width(angle: float) -> float:
            return float(np.ptp(self._extent[:, :2] @ [np.cos(angle), np.sin(angle)]))

        angle = min(np.linspace(0, np.pi, 36, endpoint=False), key=width)
        wide = width(angle + np.pi / 2)
        self._matters = wide > FINGERS or wide > 1.25 * width(angle)
        return angle

    def _twist(self) -> float:
        """Returns the radians that the gripper still has to turn."""
        if self._turn is None or not self._matters:
            return 0.0
        axis = self._env.sim.data.get_site_xmat("gripper0_grip_site").reshape(3, 3)[:, 1]
        now = np.arctan2(axis[1], axis[0])
        return float((self._turn - now + np.pi / 2) % np.pi - np.pi / 2)
