"""Renders MuJoCo's models, in stock quality or fast."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np


class Renderer:
    """Renders a model.

    Args:
      model: an ``MjModel``, before anything else renders it.
      size: (height, width) of the pictures.
      fast: render without multisampling, shadows and reflections, which take nine tenths of the
        time in software. For models that were trained on such pictures.
    """

    def __init__(self, model, size: tuple[int, int], fast: bool):
        import mujoco

        if fast:
            model.vis.quality.offsamples = 0  # must precede the context
        off = mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION
        self._renderer, self._off = mujoco.Renderer(model, *size), off if fast else ()

    def draw(self, data, cameras: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns camera -> uint8 (h, w, 3), for the state in an ``MjData``."""
        images = {}
        for name in cameras:
            self._renderer.update_scene(data, camera=name)
            for flag in self._off:
                self._renderer.scene.flags[flag] = 0
            images[name] = self._renderer.render().copy()
        return images

    def close(self) -> None:
        """Releases the context."""
        self._renderer.close()


def headless() -> None:
    """Makes OpenGL render without a screen unless MUJOCO_GL is set; call it before importing
    MuJoCo."""
    os.environ.setdefault("MUJOCO_GL", "egl")
