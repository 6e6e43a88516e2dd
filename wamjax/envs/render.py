"""Pictures of MuJoCo's models, in stock quality or fast."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np


class Renderer:
    """Draws a model.

    Args:
      model: an ``MjModel``, before anything else draws it.
      size: (height, width) of the pictures.
      fast: without multisampling, shadows and reflections, which cost software rendering all but a
        tenth of its time. For models that were trained on such pictures.
    """

    def __init__(self, model, size: tuple[int, int], fast: bool):
        import mujoco

        if fast:
            model.vis.quality.offsamples = 0  # before there is a context
        off = mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION
        self._renderer, self._off = mujoco.Renderer(model, *size), off if fast else ()

    def draw(self, data, cameras: Sequence[str]) -> dict[str, np.ndarray]:
        """Camera -> uint8 (h, w, 3), of the state in an ``MjData``."""
        images = {}
        for name in cameras:
            self._renderer.update_scene(data, camera=name)
            for flag in self._off:
                self._renderer.scene.flags[flag] = 0
            images[name] = self._renderer.render().copy()
        return images

    def close(self) -> None:
        """Lets go of the context."""
        self._renderer.close()


def headless() -> None:
    """Has OpenGL draw without a screen unless MUJOCO_GL says how; before MuJoCo is imported."""
    os.environ.setdefault("MUJOCO_GL", "egl")
