"""Runs a policy in closed loop with a world and measures how often it succeeds.

``config.eval`` holds the settings. The scenes and the policy's keys derive from the number of an
episode, so equal settings give equal episodes, regardless of batching and of how processes share
them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from wamjax import files
from wamjax.config import did_you_mean
from wamjax.console import say
from wamjax.data import layout as layouts
from wamjax.envs.joins import SYNC, Join, jerk
from wamjax.envs.outcomes import Outcomes
from wamjax.envs.world import Dials, Recording, World, open_world, shift_of
from wamjax.runs.trained import Policy
from wamjax.training import state as states
from wamjax.viz import intervals


def check(config: ConfigDict, objective, world: World | None = None) -> None:
    """Checks that a policy can be rolled out as ``config.eval`` says.

    Raises:
      ValueError: it cannot; names the key and a value that works.
    """
    world, options = world or open_world(config.eval.env), config.eval
    shift_of(world, "none", options.shift)
    for key in ("episodes", "execute", "max_steps", "batch_size"):
        if options[key] < 1:
            raise ValueError(f"config.eval.{key} = {options[key]} must be at least 1")
    for task in (tasks := task_names(config, world)):
        if task not in world.tasks:
            raise ValueError(f"config.eval.tasks = {tuple(tasks)}: there is no task {task!r}"
                             f"{did_you_mean(task, world.tasks)}; there are "
                             f"{tuple(world.tasks)}")  # fmt: skip
    if objective.kind != "policy":
        raise ValueError(f"config.eval.episodes = {options.episodes}: {config.objective.name!r} is "
                         "no policy, set it to 0")  # fmt: skip
    spec, cameras = objective.batch_spec(1), tuple(config.data.cameras)
    if unknown := [c for c in cameras if c not in world.cameras]:
        raise ValueError(f"config.data.cameras = {cameras}: {world.name} has no {unknown}, it has "
                         f"{tuple(world.cameras)}; set eval.episodes to 0")  # fmt: skip
    for key in ("video", "instruction"):
        if key not in spec and not (key == "instruction" and config.data.embeddings):
            raise ValueError(
                f"config.eval.episodes = {options.episodes}: {world.name} shows pictures and says "
                f"words, and the policy takes {sorted(spec)}, no {key!r}: set it to 0"
            )
    camera_sizes = [world.cameras[c] for c in cameras]
    if any(config.data.image_size):  # the policy sees them resized
        camera_sizes = [tuple(config.data.image_size)] * len(cameras)
    picture_size = camera_sizes[0][0], sum(width for _, width in camera_sizes)
    if config.data.layout:
        picture_size = layouts.parse(config.data.layout).size
    sizes = {
        "video": (*picture_size, 3),
        "actions": (len(world.action_names),),
        "proprio": (len(world.proprio_names),),
    }
    for key, expected in sizes.items():
        if key in spec and (actual := spec[key].shape[-len(expected) :]) != expected:
            raise ValueError(f"config.eval.episodes = {options.episodes}: {key} of the policy are "
                             f"{actual}, of {world.name} {expected}; set it to 0")  # fmt: skip
    if options.execute > (chunk := spec["actions"].shape[1]):
        raise ValueError(f"config.eval.execute = {options.execute}, and a plan has {chunk} actions "
                         "(data.chunk)")  # fmt: skip
    join = join_of(config, world)
    join.check(options.execute, chunk)
    if join.way == "prefix" and join.delay > objective.prefix_max:
        raise ValueError(f"config.eval.delay = {join.delay}: the policy takes prefixes of at most "
                         f"{objective.prefix_max} actions (objective.prefix_max), for join "
                         "'prefix'")  # fmt: skip


def roll_out(
    policy: Policy,
    config: ConfigDict,
    shift: Dials,
    world: World | None = None,
    record: Outcomes | None = None,
    kind: str = "policy",
    function: Callable | None = None,
) -> dict[str, Any]:
    """Returns the success rate over ``config.eval.episodes``, with the tasks in equal shares.

    Args:
      shift: the dials of the world that are not zero.
      record: outcomes of a run that may be killed; episodes that it holds are not repeated.
      kind: kind of policy, for the record.
      function: see `play`; by default `Policy.act`, or `Policy.decide` if the policy adapts.

    Returns:
      {"success_rate", "interval" (95 %, Wilson's), "episodes", "jerk" (mean, see `joins.jerk`),
      "per_task": {task: {"success_rate", "interval", "episodes", "steps", "jerk"}}, "outcomes",
      "crashes"}; with ``config.eval.blind`` also "blind_success_rate", that of the same actions
      executed in another scene of their task without observing. Outcomes are 0 or 1 per episode;
      equal settings give equal episodes for any policy, so outcomes are paired.
    """
    world, record = world or open_world(config.eval.env), record or Outcomes()
    tasks = task_names(config, world)
    total = -(-config.eval.episodes // len(tasks)) * len(tasks)
    processes, process = jax.process_count(), jax.process_index()  # each process rolls out a share
    size = batch_size(config, total)
    blind = config.eval.blind and kind == "policy"
    for start in range(0, total, size * processes):
        evaluated = np.arange(start, min(start + size * processes, total))
        numbers = start + process * size + np.arange(size)  # fills the last batch
        if all(record.has(k, evaluated) for k in ([kind, "blind"] if blind else [kind])):
            continue
        names = [tasks[i % len(tasks)] for i in numbers]
        keys = episode_keys(config, "evaluate", numbers)
        act = Policy.decide if policy.adapts else Policy.act
        recording = play(policy, config, world, names, keys, shift, function=function or act)
        hold = _hold(config, world)
        _keep(record, kind, evaluated, tasks, recording, hold, config.eval.execute)
        if blind:
            replayed = _blind(recording, config, world, keys, shift)
            _keep(record, "blind", evaluated, tasks, replayed, hold, config.eval.execute)
        rate = np.mean([row["success"] for row in record.rows(kind, total)])
        say(f"  {evaluated[-1] + 1}/{total} episodes: success {rate:.1%}")
    rows = record.rows(kind, total)
    result = _rates(rows) | {
        "episodes": total,
        "per_task": {task: _rates([r for r in rows if r["task"] == task]) for task in tasks},
        "outcomes": "".join(str(row["success"]) for row in rows),
        "crashes": sum(row["crashes"] for row in rows),
    }
    if blind:
        result["blind_success_rate"] = _rates(record.rows("blind", total))["success_rate"]
    return result


def batch_size(config: ConfigDict, episodes: int) -> int:
    """Returns how many episodes a process rolls out at once to evaluate so many."""
    return min(config.eval.batch_size, -(-episodes // jax.process_count()))


def play(
    policy: Policy,
    config: ConfigDict,
    world: World,
    tasks,
    keys,
    shift: Dials,
    record: bool | int = False,
    function: Callable = Policy.act,
    **saved: Any,
) -> Recording:
    """Rolls out one episode per task in `tasks` and key, as ``config.eval`` says.

    Args:
      config: also names the policy's cameras, in order.
      function: ``function(policy, observation, keys)`` maps an observation in the policy's format
        to actions, or to actions and more; it takes a prefix as fourth argument where
        ``config.eval.join`` is "prefix".
      **saved: "start" and "save" of `World.roll_out`, in a world that restores states.
    """
    policy = looking(policy, config)
    join = join_of(config, world)
    join_option = {} if join == SYNC else {"join": join}  # other worlds need not support it
    return world.roll_out(
        jax.tree_util.Partial(seeing(function), policy),
        tasks,
        keys,
        shift=shift,
        told=told(config, policy, [world.tasks[task] for task in tasks]),
        cameras=tuple(config.data.cameras),
        max_steps=config.eval.max_steps,
        execute=config.eval.execute,
        record=record,
        **join_option,
        **saved,
    )


def looking(policy: Policy, config: ConfigDict) -> Policy:
    """Returns the policy with the cameras of a config, in their order."""
    return dataclasses.replace(policy, cameras=tuple(config.data.cameras))


@functools.cache
def seeing(function: Callable) -> Callable:
    """Wraps `function` to take a world's observations; cached, because a new wrapper would compile
    again."""

    def call(policy: Policy, observation, keys, *prefix):
        images = observation["images"]
        inputs = {k: v for k, v in observation.items() if k != "images"}
        inputs["video"] = policy.see(images)[:, None]
        return function(policy, inputs, keys, *prefix)

    return call


def told(config: ConfigDict, policy: Policy, instructions) -> dict[str, np.ndarray]:
    """Returns instructions in the policy's format, leading axis e: word ids, or text embeddings.

    Raises:
      ValueError: an instruction is too long or has no embedding.
    """
    from wamjax.data.embeddings import EmbeddingCache
    from wamjax.data.tokens import Vocabulary

    if "context" in policy.objective.batch_spec(1):
        cache = EmbeddingCache(files.below(files.path(config.data.root), config.data.embeddings))
        return {"context": np.stack([cache.lookup(text) for text in instructions])}
    length, vocabulary = config.data.instruction_length, Vocabulary(policy.words)
    return {"instruction": np.stack([vocabulary.tokenize(t, length) for t in instructions])}


def join_of(config: ConfigDict, world: World) -> Join:
    """Returns how chunks are joined, from ``config.eval``."""
    return Join(config.eval.join, config.eval.delay, _hold(config, world))


def _hold(config: ConfigDict, world: World) -> tuple[bool, ...]:
    """Returns which actions keep their last command while a robot stands still, the same as after
    the end of its demonstrations."""
    from wamjax.data.windows import GRIPPER, held, padding

    words = padding(config.data.padding)
    names = world.action_names
    return tuple(held((GRIPPER,) if words is None else words, names, len(names)).tolist())


def episode_keys(config: ConfigDict, purpose: str, indices: np.ndarray) -> jax.Array:
    """Returns the keys that determine the scenes of episodes, by episode number."""
    key = functools.partial(states.key, config.eval.seed, purpose)
    return jax.vmap(key)(jnp.asarray(indices))


def task_names(config: ConfigDict, world: World | None = None) -> list[str]:
    """Returns ``eval.tasks``, else the tasks that the data sources collect, else all."""
    tasks = config.eval.tasks or tuple(
        dict.fromkeys(t for s in config.data.sources.values() for t in s.collect.tasks)
    )
    return list(tasks or (world or open_world(config.eval.env)).tasks)


def _rates(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the success rate of episodes, its interval, and the mean steps of the successful
    ones."""
    success = [row["success"] for row in rows]
    steps = [row["steps"] for row in rows if row["success"]]
    rate = intervals.wilson(sum(success), len(success))
    return {
        "success_rate": float(rate.mean),
        "interval": [float(rate.low), float(rate.high)],
        "episodes": len(rows),
        "steps": float(np.mean(steps)) if steps else None,
        "jerk": float(np.mean([row["jerk"] for row in rows])),
    } | _climbed(rows)


def _rungs(recording: Recording, execute: int) -> np.ndarray:
    """Returns the rung that each plan made before success reached, else -1: (e, plans), or (e, 0)
    without a ladder."""
    if not isinstance(recording.extras, dict) or "rung" not in recording.extras:
        return np.zeros((len(recording.steps), 0), int)
    rungs = np.asarray(recording.extras["rung"]).T
    before_end = np.arange(rungs.shape[1]) * execute < recording.steps[:, None]
    return np.where(before_end, rungs, -1)


def _climbed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns {"rungs": share of plans on each rung of the ladder}, or {} without a ladder."""
    rungs = [rung for row in rows for rung in row.get("rungs", ())]
    return {"rungs": (np.bincount(rungs) / len(rungs)).tolist()} if rungs else {}


def _blind(recording: Recording, config: ConfigDict, world: World, keys, shift: Dials) -> Recording:
    """Executes the actions of each episode in the next episode of its task, without observing."""
    source = np.arange(len(recording.tasks))
    for task in set(recording.tasks):
        episodes = np.flatnonzero(np.array(recording.tasks) == task)
        source[episodes] = np.roll(episodes, 1)
    steps = recording.actions.shape[1]
    return world.roll_out(
        jax.tree_util.Partial(replay), recording.tasks, keys, shift=shift,
        told={"actions": recording.actions[source]}, cameras=tuple(config.data.cameras),
        max_steps=steps, execute=steps,
    )  # fmt: skip


def replay(observation, keys):
    """Acts as a policy that returns the "actions" in its observation."""
    del keys
    return observation["actions"]


def _keep(
    record: Outcomes, kind: str, numbers, tasks, recording: Recording, hold, execute: int
) -> None:
    """Adds the outcomes of all processes to the record; the shares follow one another."""
    jerks = jerk(recording.actions, recording.steps, hold)
    parts = [recording.success, recording.steps, recording.crashes, jerks]
    parts.append(_rungs(recording, execute))
    if jax.process_count() > 1:
        parts = [multihost_utils.process_allgather(x, tiled=True) for x in parts]
    rows = []
    for number, (*counts, score, reached) in zip(numbers, zip(*parts, strict=True), strict=False):
        row = (int(number), tasks[number % len(tasks)], *map(int, counts), round(float(score), 6))
        rungs = [int(rung) for rung in reached if rung >= 0]
        rows.append((*row, rungs) if rungs else row)
    record.add(kind, rows)
