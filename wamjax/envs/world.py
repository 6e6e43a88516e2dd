"""What a world is to everything that acts in it, and what it hands back: a `Recording`.

Two kinds stand behind one protocol. A jitted world (the tabletop) runs the policy inside its
program. A world of host environments (`wamjax.envs.host`) steps simulators in other processes and
calls the policy once a plan for all of them. What evaluates, records or draws sees neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from wamjax.config import did_you_mean
from wamjax.envs.joins import SYNC, Join
from wamjax.envs.worker import parts_of
from wamjax.named import find

Dials = Mapping[str, float]
SETTLE = 3  # steps that a recorded episode goes on after success
# "module:attribute" of the worlds that come with the package.
WORLDS = {
    "tabletop": "wamjax.envs.tabletop.embedded:Tabletop",
    "turntable": "wamjax.envs.tabletop.embedded:Turntable",
    "metaworld": "wamjax.envs.metaworld:world",
    "pusht": "wamjax.envs.pusht:world",
    "aloha": "wamjax.envs.aloha:world",
    "libero": "wamjax.envs.libero:world",
    "remote": "wamjax.envs.remote:world",
}


class Recording(NamedTuple):
    """What happened in e episodes of at most t actions, in numpy.

    Attributes:
      tasks, instructions: of each episode.
      success: latched at the first action that achieves the task.
      steps: actions until success; of an episode that failed, all of its actions.
      rewards, returns: of each action, and their discounted sum from it on.
      actions: as the policy sent them, in robot units; what comes after success does not count.
      proprio: before each action and after the last one, in robot units.
      frames: camera -> pictures at the same times, if they were asked for.
      extras: whatever else the policy returned, leading axes (plans, e), or None.
      crashes: how often the environment of an episode had to be started anew.
      states: of the world at the same times as `proprio`, leading axes (e, t + 1), as `roll_out`
        begins from them; if they were asked for.
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


class Demonstrations(NamedTuple):
    """Episodes of a scripted expert; the examples of `recording` end where `length` says.

    Attributes:
      recording: what was executed, noise included.
      intended: what the expert would have done without the noise.
      length: actions that are data; a few after success, so that the end is seen.
    """

    recording: Recording
    intended: Float[np.ndarray, "e t a"]
    length: Int[np.ndarray, " e"]


@runtime_checkable
class World(Protocol):
    """Tasks, senses and actions of a robot, and the loop in which a policy closes them.

    Attributes:
      name: of the world, as ``config.eval.env`` names it.
      tasks: task -> its instruction, in words.
      cameras: name -> (height, width) of all there are.
      proprio_names, action_names: of the dimensions.
      control_hz: control steps a second.
      max_steps: control steps in which the expert all but always succeeds.
      shifts: name -> dials away from zero; "none" has none.
      dials: all that can be turned.
      expert: whether there is a scripted one.
      restores: whether an episode can begin from a state that another one was in.
      batch: episodes that are best simulated together.
      versions: of what simulates, for reports.
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
        record: bool = False,
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
          tasks: of each episode.
          keys: (e,) they determine the scenes.
          shift: dials that are not zero.
          told: further keys of the observation, leading axis e, such as token ids.
          cameras: that are rendered.
          max_steps: steps after which an episode has failed.
          execute: actions executed of each plan before the policy looks again.
          record: whether to keep the frames.
          join: how plans follow each other, and how late they come; a world that cannot be late
            need not take it.
          start: states to begin from instead of new scenes, leading axis e; of `Recording.states`.
          save: whether to return the states. A world that does not restore need take neither.

        Raises:
          ValueError: the policy returns fewer actions than `execute`, or of another width.
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
          draw: says of the demonstrations, which have no frames yet, which rows get them; None:
            all. Drawing costs more than simulating, and failures are thrown away.
          confusion: share of the episodes in which it takes things for others that look alike; a
            world without such an expert need not take it.

        Raises:
          NotImplementedError: the world has no expert.
        """


def open_world(name: str, **options: Any) -> World:
    """Opens the world that ``config.eval.env`` names.

    Args:
      name: one of `WORLDS`, or "module:attribute" of one's own: something that returns a world.
        Options may follow, as in ``metaworld:size=96,fast=false``.
      **options: for it.

    Raises:
      ValueError: there is no such world, or it has no such option; names those that there are.
    """
    place, given = parts_of(name)
    function = find(place, WORLDS, "config.eval.env")
    try:
        return function(**given, **options)
    except TypeError as error:
        if "argument" not in str(error) or not given:
            raise
        raise ValueError(f"config.eval.env = {name!r}: {error}") from error


def shift_of(world: World, name: str, dials: Dials | None = None) -> dict[str, float]:
    """The dials of a named shift, with single ones overridden.

    Raises:
      ValueError: there is no such shift or dial; names those that there are.
    """
    if name not in world.shifts:
        raise ValueError(
            f"shift {name!r} does not exist in {world.name}{did_you_mean(name, world.shifts)}; "
            f"there are {sorted(world.shifts)}"
        )
    for dial in dials or {}:
        if dial not in world.dials:
            raise ValueError(
                f"eval.shift.{dial} is no dial of {world.name}{did_you_mean(dial, world.dials)}; "
                f"there are {list(world.dials)}"
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
    """Pictures of cameras side by side in this order, (..., h, W, 3); numpy or JAX alike.

    Args:
      cameras: () = all, as they stand.

    Raises:
      ValueError: they are not equally high.
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
