"""Implements a source in one file: a dot that moves along a line, generated on reading."""

import numpy as np

from wamjax.data.ingest.reader import About, Entry

STEPS = (9, 6, 12)


class Dot:
    """Gives episodes of a dot; the action is its next position."""

    late = 0.0

    def __init__(self, name="side", say="go"):
        self.say = say
        self.about = About(
            hz=5.0, cameras={name: (16, 16)}, arrays={"x": 2, "dx": 1}, state=("x",),
            action=("dx",), robot="dot", kind="delta", final=True,
        )  # fmt: skip

    def episodes(self):
        ways = zip(STEPS, ("left", "right", "left"), strict=True)
        return [
            Entry(f"dot {i}", "made", steps, f"{self.say} {way}", success=True)
            for i, (steps, way) in enumerate(ways)
        ]

    def arrays(self, i):
        x = np.linspace(0, 1 + i, STEPS[i] + 1)
        dx = np.diff(x)[:, None] * np.sin(x[1:, None])
        return {"x": np.stack([x, np.sin(x)], axis=1), "dx": dx}

    def frames(self, i, camera, steps):
        assert camera == "side" and list(steps) == sorted(set(steps))
        for t in steps:
            picture = np.zeros((16, 16, 3), np.uint8)
            picture[8, t % 16] = 255 - i
            yield picture


def slow():
    """Gives the same episodes with other instructions."""
    return Dot(say="slowly go")


def broken():
    """Gives the same episodes, but contradicts its description."""
    return Dot("front")
