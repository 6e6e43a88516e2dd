"""A source in one file: a dot that moves along a line, made as it is read."""

import numpy as np

from wamjax.data.ingest.reader import About, Entry

STEPS = (9, 6, 12)


class Dot:
    """Episodes of a dot; the action is where it goes next."""

    late = 0.0

    def __init__(self, name="side"):
        self.about = About(
            hz=5.0, cameras={name: (16, 16)}, arrays={"x": 2, "dx": 1}, state=("x",),
            action=("dx",), robot="dot", kind="delta", final=True,
        )  # fmt: skip

    def episodes(self):
        return [Entry(name=f"dot {i}", file="made", length=n, instruction=f"go {way}", success=True)
                for i, (n, way) in enumerate(zip(STEPS, ("left", "right", "left"), strict=True))]

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


def broken():
    """The same, but it shows what it did not say."""
    return Dot("front")
