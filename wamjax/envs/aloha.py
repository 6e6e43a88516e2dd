"""ALOHA in simulation: two ViperX arms hand a cube over, or insert a peg into a socket.

    pip install 'wamjax[aloha]'
    python -m wamjax.collect --env=aloha --tasks=transfer_cube --episodes=100 --out=DIR

Actions are absolute joint angles and gripper openings (0 closed, 1 open), left arm first, at 50 Hz;
proprio has the same 14 numbers. The task is achieved at the published reward of 4: the left
gripper holds the cube off the table, or the peg touches the pin inside the socket. The experts
solve inverse kinematics, see `aloha_expert`. Stock pictures: ``size=480,width=640,fast=false``.

Source: gym-aloha 0.1.5 (Zhao et al., arXiv 2304.13705); MuJoCo 3.3.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from wamjax.envs.render import Renderer, headless
from wamjax.envs.worker import versions_of

SIZE = 64
CAMERAS = ("top", "angle")
SENTENCES = {
    "transfer_cube": "pick up the cube with the right arm and hand it to the left arm",
    "insertion": "insert the peg into the socket",
}
ACHIEVED = 4  # the highest reward of both tasks
JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")


class Environment:
    """Simulates ALOHA, with one simulator per task; see `wamjax.envs.worker.Environment`.

    The package's own ``step`` always renders three pictures of 640 x 480; this class has the same
    physics and rewards without that cost.

    Args:
      size, width: height and width of the pictures; width 0: equal to the height.
      fast: see `wamjax.envs.render.Renderer`.
    """

    def __init__(self, size: int = SIZE, width: int = 0, fast: bool = True):
        self._size, self._fast, self._simulators = (size, width or size), fast, {}

    def describe(self) -> Mapping[str, Any]:
        """See `wamjax.envs.worker.Described`."""
        names = tuple(f"{arm}_{joint}" for arm in ("left", "right") for joint in JOINTS)
        return {
            "name": "aloha",
            "tasks": SENTENCES,
            "cameras": {name: self._size for name in CAMERAS},
            "proprio_names": names,
            "action_names": names,
            "control_hz": 50.0,
            "max_steps": 300,
            "versions": versions_of("gym-aloha", "dm-control", "mujoco", extra="aloha"),
            "expert": True,
            "noisy": tuple(0.0 if name.endswith("gripper") else 1.0 for name in names),
        }

    def reset(self, task: str, seed: int, shift: Mapping[str, float]):
        """Starts an episode with the objects at the seed's places, as in the package."""
        del shift
        self._task, self._time, self._plan = task, 0, None
        self._physics, self._rules, self._renderer = self._open(task)
        from gym_aloha import utils
        from gym_aloha.tasks import sim

        if task == "transfer_cube":
            objects = utils.sample_box_pose(seed % 2**32)
        else:
            objects = np.concatenate(utils.sample_insertion_pose(seed % 2**32))
        sim.BOX_POSE[0] = self._objects = objects
        with self._physics.reset_context():
            self._rules.initialize_episode(self._physics)
        return self._observation()

    def step(self, action: np.ndarray):
        """Executes one control step of 20 ms."""
        from gym_aloha.constants import DT

        physics = self._physics
        self._rules.before_step(np.asarray(action, float), physics)
        physics.step(round(DT / physics.timestep()))
        self._time += 1
        return self._observation(), self._rules.get_reward(physics) == ACHIEVED

    def intend(self) -> np.ndarray:
        """Returns the expert's action."""
        from wamjax.envs import aloha_expert

        model = self._physics.model.ptr
        if self._plan is None:
            self._plan = aloha_expert.plan(model, self._task, self._objects)
        if self._task == "insertion" and self._time == aloha_expert.LOOK:
            slipped = aloha_expert.slip(self._rules.get_env_state(self._physics))
            self._plan = aloha_expert.plan(model, self._task, self._objects, slipped)
        return self._plan[min(self._time, len(self._plan) - 1)]

    def close(self) -> None:
        """Releases the simulators."""
        for physics, _, renderer in self._simulators.values():
            renderer.close()
            physics.free()

    def _open(self, task: str):
        if task not in self._simulators:
            headless()
            from dm_control import mujoco
            from gym_aloha.constants import ASSETS_DIR
            from gym_aloha.tasks import sim

            rules = {"transfer_cube": sim.TransferCubeTask, "insertion": sim.InsertionTask}[task]
            path = ASSETS_DIR / f"bimanual_viperx_{task}.xml"
            physics = mujoco.Physics.from_xml_path(str(path))
            renderer = Renderer(physics.model.ptr, self._size, self._fast)
            self._simulators[task] = physics, rules(), renderer
        return self._simulators[task]

    def _observation(self):
        return {"images": self._draw, "proprio": self._rules.get_qpos(self._physics)}

    def _draw(self) -> dict[str, np.ndarray]:
        return self._renderer.draw(self._physics.data.ptr, CAMERAS)


def world(size: int = SIZE, width: int = 0, fast: bool = True, **options: Any):
    """Returns ALOHA as a world.

    Args:
      size, width, fast: see `Environment`.
      **options: of `HostWorld`, such as workers.

    Raises:
      ImportError: the extra is not installed.
    """
    from wamjax.envs.host import local

    return local(Environment, {"size": size, "width": width, "fast": fast}, **options)
