"""Meta-World: fifty manipulation tasks of a Sawyer arm, with scripted experts.

    pip install 'wamjax[metaworld]'
    python -m wamjax.collect --env=metaworld --tasks=button-press-topdown,drawer-open --out=DIR

Two cameras: `corner2`, brought near and turned upright (it is mounted upside down and far away),
and `gripperPOV`, in which small things are large. Proprio is only the first four numbers of the
observation (the hand's position and the gripper's opening); the others would reveal where the
objects are. The episode's seed draws its goal.

Source: metaworld 3.1.1, Farama Foundation; MuJoCo 3.3.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from wamjax.envs.render import Renderer, headless
from wamjax.envs.worker import versions_of

SIZE = 64
CAMERAS = ("corner2", "gripperPOV")
CLOSE = (0.75, 0.075, 0.7)  # where `corner2` stands, so that the arm fills the picture
SENTENCES = {
    "reach": "reach the goal marker",
    "push": "push the puck to the goal marker",
    "pick-place": "pick up the puck and bring it to the goal marker",
    "button-press-topdown": "press the button from above",
    "drawer-open": "open the drawer",
    "door-open": "open the door",
    "window-open": "open the window",
    "handle-press-side": "press the handle from the side",
    "coffee-button": "press the button of the coffee machine",
    "dial-turn": "turn the dial",
}
# All with an expert that succeeds in 85 % of the episodes or more.
TASKS = (
    "assembly", "basketball", "bin-picking", "box-close", "button-press", "button-press-topdown",
    "button-press-topdown-wall", "button-press-wall", "coffee-button", "coffee-pull", "coffee-push",
    "dial-turn", "disassemble", "door-close", "door-lock", "door-open", "door-unlock",
    "drawer-close", "drawer-open", "faucet-close", "faucet-open", "hammer", "hand-insert",
    "handle-press", "handle-press-side", "handle-pull", "handle-pull-side", "lever-pull",
    "peg-insert-side", "peg-unplug-side", "pick-out-of-hole", "pick-place", "pick-place-wall",
    "plate-slide", "plate-slide-back", "plate-slide-back-side", "plate-slide-side", "push",
    "push-back", "push-wall", "reach", "reach-wall", "shelf-place", "soccer", "stick-pull",
    "stick-push", "sweep", "sweep-into", "window-close", "window-open",
)  # fmt: skip


class Environment:
    """Simulates Meta-World, with one simulator per task, created on demand; see
    `wamjax.envs.worker.Environment`.

    Args:
      size: size of the pictures.
      fast: see `wamjax.envs.render.Renderer`.
    """

    def __init__(self, size: int = SIZE, fast: bool = True):
        self._size, self._fast, self._simulators = size, fast, {}

    def describe(self) -> Mapping[str, Any]:
        """See `wamjax.envs.worker.Described`."""
        return {
            "name": "metaworld",
            "tasks": {task: SENTENCES.get(task, task.replace("-", " ")) for task in TASKS},
            "cameras": {name: (self._size, self._size) for name in CAMERAS},
            "proprio_names": ("x", "y", "z", "opening"),
            "action_names": ("dx", "dy", "dz", "grip"),
            "control_hz": 80.0,
            "max_steps": 150,
            "versions": versions_of("metaworld", "mujoco", extra="metaworld"),
            "expert": True,
            "noisy": (1.0, 1.0, 1.0, 0.0),
        }

    def reset(self, task: str, seed: int, shift: Mapping[str, float]):
        """Starts an episode with the objects and the goal of its seed."""
        del shift
        self._env, self._expert, self._renderer = self._open(task)
        self._env.seed(seed % 2**32)
        self._state, _ = self._env.reset()
        return self._observation()

    def step(self, action: np.ndarray):
        """Executes one control step of 12.5 ms."""
        action = np.clip(action, -1, 1)
        self._state, _, _, _, info = self._env.step(np.asarray(action, np.float32))
        return self._observation(), bool(info["success"] > 0)

    def intend(self) -> np.ndarray:
        """Returns the scripted expert's action."""
        return np.clip(self._expert.get_action(self._state), -1, 1)

    def close(self) -> None:
        """Releases the simulators."""
        for env, _, renderer in self._simulators.values():
            renderer.close()
            env.close()

    def _open(self, task: str):
        if task not in self._simulators:
            headless()
            import warnings

            warnings.filterwarnings("ignore", message="Constant.s. may be too high")
            from metaworld import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as environments
            from metaworld.policies import ENV_POLICY_MAP as experts

            env = environments[f"{task}-v3-goal-observable"](seed=0)
            env.seeded_rand_vec, env._freeze_rand_vec = True, False  # or reset ignores the seed
            env.model.cam("corner2").pos[:] = CLOSE
            renderer = Renderer(env.model, (self._size, self._size), self._fast)
            self._simulators[task] = env, experts[f"{task}-v3"](), renderer
        return self._simulators[task]

    def _observation(self):
        return {"images": self._draw, "proprio": self._state[:4]}

    def _draw(self) -> dict[str, np.ndarray]:
        images = self._renderer.draw(self._env.data, CAMERAS)
        images["corner2"] = images["corner2"][::-1]
        return images


def world(size: int = SIZE, fast: bool = True, **options: Any):
    """Returns Meta-World as a world.

    Args:
      size, fast: see `Environment`.
      **options: of `HostWorld`, such as workers.

    Raises:
      ImportError: the extra is not installed.
    """
    from wamjax.envs.host import local

    return local(Environment, {"size": size, "fast": fast}, **options)
