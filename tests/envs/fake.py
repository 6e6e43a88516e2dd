"""Simulates one point on a line, for worlds of host environments; needs only numpy."""

import contextlib
import os
import pathlib

import numpy as np

SIZE = 16


class Line:
    """Moves the point by the action; the task is to reach one end, which the instruction names.

    Args:
      crash: folder; the process ends at the second step, once for each file ``crash-0`` ... in it,
        which it removes.
      always: does not remove them.
    """

    def __init__(self, crash: str = "", always: bool = False):
        self.crash, self.always = crash, always

    def reset(self, task, seed, shift):
        self.rng = np.random.default_rng(seed)
        self.goal = {"left": -1.0, "right": 1.0}[task]
        self.x, self.time = self.rng.uniform(-0.3, 0.3), 0
        self.slip = shift.get("slip", 0.0)
        return self._seen()

    def step(self, action):
        self.time += 1
        if self.crash and self.time == 2:
            for file in sorted(pathlib.Path(self.crash).glob("crash-*")):
                with contextlib.suppress(FileNotFoundError):  # another process took it
                    if not self.always:
                        file.unlink()
                    os._exit(7)
        self.x += float(np.clip(action[0], -1, 1)) * (0.2 - self.slip)
        self.x += self.rng.normal(0, 0.01)
        return self._seen(), abs(self.x - self.goal) < 0.15

    def intend(self):
        return np.array([self.goal - self.x])

    def describe(self):
        return dict(
            name="line",
            tasks={"left": "go left", "right": "go right"},
            cameras={"side": (SIZE, SIZE)},
            proprio_names=("x", "time"),
            action_names=("dx",),
            control_hz=10.0,
            max_steps=12,
            shifts={"none": {}, "slippery": {"slip": 0.18}},
            dials=("slip",),
            versions={"line": "1"},
        )

    def close(self):
        pass

    def _seen(self):
        return {"images": self._draw, "proprio": np.array([self.x, self.time])}

    def _draw(self):
        picture = np.zeros((SIZE, SIZE, 3), np.uint8)
        picture[:, int(np.clip((self.x + 1.2) / 2.4 * SIZE, 0, SIZE - 1))] = 255
        return {"side": picture}


def world(**changes):
    """Returns the line as a world."""
    from wamjax.envs.host import HostWorld  # here: the simulator's process imports no JAX

    place = {"environment": "envs.fake:Line", "workers": 3, "timeout": 60.0}
    return HostWorld(**Line().describe() | place | changes)
