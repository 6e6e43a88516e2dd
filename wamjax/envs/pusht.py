"""PushT: a round finger pushes a T onto its outline, in the plane.

    pip install 'wamjax[pusht]'
    python -m wamjax.collect --env=pusht --tasks=push --episodes=200 --out=DIR

One camera from above; an action is the finger's target in pixels of a field of 512, at 10 Hz. The
task is achieved when the T covers 95 % of its outline. Proprio is the finger's position. The expert
plans by trying pushes in the simulator itself, see `pusht_expert`.

Source: gym-pusht 0.1.8 (Chi et al., Diffusion Policy, arXiv 2303.04137).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from wamjax.envs.worker import versions_of

SIZE, FIELD = 96, 512.0


class Environment:
    """Simulates PushT; see `wamjax.envs.worker.Environment`.

    Args:
      size: size of the pictures.
    """

    def __init__(self, size: int = SIZE):
        self._size = size
        self._env, self._expert = None, None

    def describe(self) -> Mapping[str, Any]:
        """See `wamjax.envs.worker.Described`."""
        return {
            "name": "pusht",
            "tasks": {"push": "push the T onto its outline"},
            "cameras": {"top": (self._size, self._size)},
            "proprio_names": ("x", "y"),
            "action_names": ("x", "y"),
            "control_hz": 10.0,
            "max_steps": 300,
            "versions": versions_of("gym-pusht", "pymunk", extra="pusht"),
            "expert": True,
        }

    def reset(self, task: str, seed: int, shift: Mapping[str, float]):
        """Starts an episode with finger and T at the seed's places."""
        del task, shift
        if self._env is None:
            os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws into memory
            from gym_pusht.envs.pusht import PushTEnv

            self._env = PushTEnv(
                obs_type="state", observation_width=self._size, observation_height=self._size
            )
        self._state, _ = self._env.reset(seed=seed % 2**32)
        self._seed, self._expert = seed, None
        return self._observation()

    def step(self, action: np.ndarray):
        """Executes one control step of 0.1 s."""
        action = np.clip(np.asarray(action, float), 0, FIELD)
        self._state, _, _, _, info = self._env.step(action)
        return self._observation(), bool(info["is_success"])

    def intend(self) -> np.ndarray:
        """Returns the expert's action."""
        if self._expert is None:
            from wamjax.envs.pusht_expert import Expert

            self._expert = Expert(np.random.default_rng(self._seed))
        return self._expert.act(self._env)

    def close(self) -> None:
        """Releases the simulator."""
        if self._env is not None:
            self._env.close()

    def _observation(self):
        return {"images": self._draw, "proprio": self._state[:2]}

    def _draw(self) -> dict[str, np.ndarray]:
        return {"top": self._env._render()}


def world(size: int = SIZE, **options: Any):
    """Returns PushT as a world.

    Args:
      size: see `Environment`.
      **options: of `HostWorld`, such as workers.

    Raises:
      ImportError: the extra is not installed.
    """
    from wamjax.envs.host import local

    return local(Environment, {"size": size}, **options)
