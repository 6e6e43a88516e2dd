"""Defines the protocol of worlds, `World`, and what a rollout returns, `Recording`.

There are two kinds of worlds behind this protocol. A jitted world (the tabletop) runs the policy
inside its own program. A world of host environments (`wamjax.envs.host`) steps simulators in other
processes and calls the policy once per plan for all of them. Callers do not see the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from wamjax.config import did_you_mean
from wamjax.envs.joins import SYNC, Join
from wamjax.envs.worker import parts_of
from wamjax.named import find

Dials = Mapping[str, float]
SETTLE = 3  # steps that a recorded episode continues after success
# "module:attribute" of the worlds that come with the package.
WORLDS = {
    "tabletop": "wamjax.envs.tabletop.embedded:Tabletop",
    "turntable": "wamjax.envs.tabletop.embedded:Turntable",
    "recombined": "wamjax.envs.tabletop.embedded:Recombined",
    "metaworld": "wamjax.envs.metaworld:world",
    "pusht": "wamjax.envs.pusht:world",
    "aloha": "wamjax.envs.aloha:world",
    "libero": "wamjax.envs.libero:world",
    "remote": "wamjax.envs.remote:world",
}


class Recording(NamedTuple):
    """Holds what happened in e episodes of at most t actions, as numpy arrays.

    Attributes:
      tasks, instructions: one per episode.
      success: latched at the first action that achieves the task.
      steps: actions until success; for a failed episode, all of its actions.
      rewards, returns: reward of each action, and the discounted sum from it on.
      actions: as the policy sent them, in robot units; ignore those after success.
      proprio: before each action and after the last one, in robot units.
      frames: camera -> pictures at the same times, if requested.
      extras: anything else the policy returned, leading axes (plans, e), or None.
      crashes: how often the environment of an episode had to be restarted.
      states: world states at the same times as `proprio`, leading axes (e, t + 1), from which
        `roll_out` can start; if requested.
    """

    tasks: tuple[str, ...]
    instructions: tuple[str, ...]
    success: Bool[np.ndarray, " e"]
    steps: Int[np.ndarray, " e"]
    rewards: Float[np.ndarray, "e t"]
    returns: Float[np.ndarray, "e t"]
    actions: Float[np.ndarray, "e t a"]
    proprio: Float[np.ndarray, "e t+1 p"]
    frames: Mapping[str, UInt8[np.ndarray, "e t+1 h w 3"]] | None
    extras: Any
    crashes: Int[np.ndarray, " e"]
    states: Any = None

    def first(self, count: int) -> Recording:
        """Returns the first `count` episodes."""
        arrays = self._replace(tasks=(), instructions=(), extras=None)
        return jax.tree.map(lambda x: x[:count], arrays)._replace(
            tasks=self.tasks[:count],
            instructions=self.instructions[:count],
            extras=jax.tree.map(lambda x: x[:, :count], self.extras),
        )


class Demonstrations(NamedTuple):
    """Holds episodes of a scripted expert; those in `recording` end at `length`.

    Attributes:
      recording: what was executed, noise included.
      intended: the expert's actions without the noise.
      length: actions to keep as data; includes a few after success, so that the end is visible.
    """

    recording: Recording
    intended: Float[np.ndarray, "e t a"]
    length: Int[np.ndarray, " e"]


@runtime_checkable
class World(Protocol):
    """Describes a robot, its cameras and tasks, and runs policies on it in closed loop.

    Attributes:
      name: name of the world in ``config.eval.env``.
      tasks: task -> its instruction.
      cameras: name -> (height, width) of every camera.
      proprio_names, action_names: names of the dimensions.
      control_hz: control steps per second.
      max_steps: control steps within which the expert almost always succeeds.
      shifts: name -> nonzero dials; "none" has none.
      dials: all dials of the world.
      expert: whether there is a scripted expert.
      restores: whether an episode can start from a saved state of another one.
      jitted: whether a rollout is one compiled program per number of episodes, so that a number
        that was rolled out before costs less than a smaller new one.
      batch: number of episodes that are best simulated together.
      versions: versions of the simulator, for reports.
    """

    name: str
    tasks: Mapping[str, str]
    cameras: Mapping[str, tuple[int, int]]
    proprio_names: tuple[str, ...]
    action_names: tuple[str, ...]
    control_hz: float
    max_steps: int
    shifts: Mapping[str, Dials]
    dials: tuple[str, ...]
    expert: bool
    restores: bool
    jitted: bool
    batch: int
    versions: Mapping[str, str]

    def roll_out(
        self,
        policy: Callable,
        tasks: Sequence[str],
        keys: Array,
        *,
        shift: Dials,
        told: Mapping[str, Array],
        cameras: tuple[str, ...],
        max_steps: int,
        execute: int,
        record: bool | int = False,
        join: Join = SYNC,
        start: Any = None,
        save: bool = False,
    ) -> Recording:
        """Runs a policy in closed loop, all episodes at once.

        Args:
          policy: ``policy(observation, keys) -> actions (e, j, a)`` in robot units, or
            ``-> (actions, extras)``; jittable. If chunks are joined by "prefix", it is called with
            a third argument, see `Join.committed`. The observation is a batch {"images": camera ->
            uint8 (e, h, w, 3), "proprio": float32 (e, p)} and `told`; keys are (e,), one for each
            episode and plan, so that what an episode draws does not depend on its neighbours. Pass
            parameters as ``jax.tree_util.Partial(function, params)``: a closure would bake them in.
          tasks: one per episode.
          keys: (e,) random keys that determine the scenes.
          shift: nonzero dials.
          told: further keys of the observation, leading axis e, such as token ids.
          cameras: cameras to render.
          max_steps: steps after which an episode has failed.
          execute: actions executed of each plan before the next observation.
          record: whether to keep the frames, or the number of first episodes to keep them of.
          join: how plans follow each other, and their delay; optional for worlds without delays.
          start: states to start from instead of new scenes, leading axis e, from
            `Recording.states`.
          save: whether to return the states. Worlds that do not restore need neither.

        Raises:
          ValueError: the policy returns fewer actions than `execute`, or a wrong action dimension.
        """

    def demonstrate(
        self,
        tasks: Sequence[str],
        keys: Array,
        *,
        noise: float,
        draw: Callable | None = None,
        confusion: float = 0.0,
    ) -> Demonstrations:
        """Runs the scripted expert, all episodes at once; see `Demonstrations`.

        Args:
          noise: standard deviation of the noise on its actions.
          draw: selects, from demonstrations without frames, the rows to render; None: all.
            Rendering costs more than simulating, and failures are discarded.
          confusion: share of episodes in which it confuses look-alike targets; optional for worlds
            without such an expert.

        Raises:
          NotImplementedError: the world has no expert.
        """


def open_world(name: str, **options: Any) -> World:
    """Opens the world that ``config.eval.env`` names.

    Args:
      name: one of `WORLDS`, or "module:attribute" of your own function that returns a world.
        Options may follow, as in ``metaworld:size=96,fast=false``.
      **options: further options.

    Raises:
      ValueError: unknown world or option; lists the known ones.
    """
    place, given = parts_of(name)
    function = find(place, WORLDS, "config.eval.env")
    try:
        return function(**given, **options)
    except TypeError as error:
        if "argument" not in str(error) or not given:
            raise
        raise ValueError(f"config.eval.env = {name!r}: {error}") from error


def recorded(record: bool | int, episodes: int) -> int:
    """Returns the number of first episodes whose frames `World.roll_out` keeps."""
    return episodes if record is True else min(int(record), episodes)


def shift_of(world: World, name: str, dials: Dials | None = None) -> dict[str, float]:
    """Returns the dials of a named shift, with overrides for single dials.

    Raises:
      ValueError: unknown shift or dial; lists the known ones.
    """
    if name not in world.shifts:
        raise ValueError(
            f"shift {name!r} does not exist in {world.name}{did_you_mean(name, world.shifts)}; "
            f"there are {sorted(world.shifts)}"
        )
    for dial in dials or {}:
        if dial not in world.dials:
            raise ValueError(
                f"config.eval.shift.{dial}: {world.name} has no dial {dial!r}"
                f"{did_you_mean(dial, world.dials)}; it has {list(world.dials)}"
            )
    return {k: v for k, v in {**world.shifts[name], **(dials or {})}.items() if v}


def outcome(
    achieved: Bool[np.ndarray, "e t"], discount: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Latches success at the first action that achieves the task.

    Returns:
      (success (e,), steps (e,), rewards (e, t), returns (e, t)), see `Recording`.
    """
    most = achieved.shape[1]
    success = achieved.any(axis=1)
    steps = np.where(success, achieved.argmax(axis=1) + 1, most)
    ahead = steps[:, None] - 1 - np.arange(most)
    rewards = (success[:, None] & (ahead == 0)).astype(np.float32)
    powers = discount ** np.maximum(ahead, 0)
    returns = np.where(success[:, None] & (ahead >= 0), powers, 0.0).astype(np.float32)
    return success, steps, rewards, returns


def composite(images: Mapping[str, Any], cameras: Sequence[str] = ()) -> Any:
    """Places the cameras' pictures side by side, (..., h, W, 3); works on numpy and JAX arrays.

    Args:
      cameras: cameras, in this order; () = all, in the order of `images`.

    Raises:
      ValueError: the pictures differ in height.
    """
    cameras = tuple(cameras) or tuple(images)
    parts = [images[name] for name in cameras]
    if len({part.shape[-3] for part in parts}) > 1:
        sizes = {name: tuple(images[name].shape[-3:-1]) for name in cameras}
        raise ValueError(f"cameras {sizes} are not equally high and cannot stand side by side")
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis=-2)
    import jax.numpy as jnp

    return jnp.concatenate(parts, axis=-2)
