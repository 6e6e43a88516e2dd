"""A policy in closed loop with a world: what it is told and sees, and how often it succeeds.

What was asked is in ``config.eval``. The scenes and the policy's own keys come from the number of
an episode, so equal settings give equal episodes however they are batched or shared over processes.
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
    """That a policy can be rolled out as ``config.eval`` says.

    Raises:
      ValueError: it cannot; names the key, and what would go.
    """
    world, asked = world or open_world(config.eval.env), config.eval
    shift_of(world, "none", asked.shift)
    for key in ("episodes", "execute", "max_steps", "batch_size"):
        if asked[key] < 1:
            raise ValueError(f"config.eval.{key} = {asked[key]} must be at least 1")
    for task in (tasks := task_names(config, world)):
        if task not in world.tasks:
            raise ValueError(f"config.eval.tasks = {tuple(tasks)}: there is no task {task!r}"
                             f"{did_you_mean(task, world.tasks)}; there are "
                             f"{tuple(world.tasks)}")  # fmt: skip
    if objective.kind != "policy":
        raise ValueError(f"config.eval.episodes = {asked.episodes}: {config.objective.name!r} is "
                         "no policy, set it to 0")  # fmt: skip
    spec, cameras = objective.batch_spec(1), tuple(config.data.cameras)
    if unknown := [c for c in cameras if c not in world.cameras]:
        raise ValueError(f"config.data.cameras = {cameras}: {world.name} has no {unknown}, it has "
                         f"{tuple(world.cameras)}; set eval.episodes to 0")  # fmt: skip
    for key in ("video", "instruction"):
        if key not in spec and not (key == "instruction" and config.data.embeddings):
            raise ValueError(
                f"config.eval.episodes = {asked.episodes}: {world.name} shows pictures and says "
                f"words, and the policy takes {sorted(spec)}, no {key!r}: set it to 0"
            )
    shown = [world.cameras[c] for c in cameras]
    if any(config.data.image_size):  # the policy sees them resized
        shown = [tuple(config.data.image_size)] * len(cameras)
    whole = shown[0][0], sum(width for _, width in shown)
    if config.data.layout:
        whole = layouts.parse(config.data.layout).size
    sizes = {
        "video": (*whole, 3),
        "actions": (len(world.action_names),),
        "proprio": (len(world.proprio_names),),
    }
    for key, want in sizes.items():
        if key in spec and (have := spec[key].shape[-len(want) :]) != want:
            raise ValueError(f"config.eval.episodes = {asked.episodes}: {key} of the policy are "
                             f"{have}, of {world.name} {want}; set it to 0")  # fmt: skip
    if asked.execute > (chunk := spec["actions"].shape[1]):
        raise ValueError(f"config.eval.execute = {asked.execute}, and a plan has {chunk} actions "
                         "(data.chunk)")  # fmt: skip
    join = join_of(config, world)
    join.check(asked.execute, chunk)
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
    """Success rate over ``config.eval.episodes``, the tasks in equal shares.

    Args:
      shift: dials of the world that are not zero.
      record: of a run that may be killed; what it holds is not rolled out again.
      kind: of the policy, in the record.
      function: see `play`; `Policy.act`, or `Policy.decide` of one that adapts, by default.

    Returns:
      {"success_rate", "interval" (95 %, Wilson's), "episodes", "jerk" (mean, see `joins.jerk`),
      "per_task": {task: {"success_rate", "interval", "episodes", "steps", "jerk"}}, "outcomes",
      "crashes"}; and "blind_success_rate" if
      ``config.eval.blind``: that of the same actions in another scene of their task, without
      looking. Outcomes are 0 or 1 for each episode: equal settings give equal episodes, whatever
      acts in them, so that outcomes can be compared one by one.
    """
    world, record = world or open_world(config.eval.env), record or Outcomes()
    tasks = task_names(config, world)
    total = -(-config.eval.episodes // len(tasks)) * len(tasks)
    processes, process = jax.process_count(), jax.process_index()  # each rolls out its share
    size = min(config.eval.batch_size, -(-total // processes))
    blind = config.eval.blind and kind == "policy"
    for start in range(0, total, size * processes):
        counted = np.arange(start, min(start + size * processes, total))
        numbers = start + process * size + np.arange(size)  # some may fill the last batch up
        if all(record.has(k, counted) for k in ([kind, "blind"] if blind else [kind])):
            continue
        names = [tasks[i % len(tasks)] for i in numbers]
        keys = episode_keys(config, "evaluate", numbers)
        own = Policy.decide if policy.adapts else Policy.act
        done = play(policy, config, world, names, keys, shift, function=function or own)
        hold = _hold(config, world)
        _keep(record, kind, counted, tasks, done, hold, config.eval.execute)
        if blind:
            replayed = _blind(done, config, world, keys, shift)
            _keep(record, "blind", counted, tasks, replayed, hold, config.eval.execute)
        rate = np.mean([row["success"] for row in record.rows(kind, total)])
        say(f"  {counted[-1] + 1}/{total} episodes: success {rate:.1%}")
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


def play(
    policy: Policy,
    config: ConfigDict,
    world: World,
    tasks,
    keys,
    shift: Dials,
    record: bool = False,
    function: Callable = Policy.act,
    **saved: Any,
) -> Recording:
    """Episodes of a policy as ``config.eval`` says: one for each task of `tasks` and key.

    Args:
      config: also names the cameras that it looks through, in their order.
      function: ``function(policy, observation, keys)`` of an observation as the policy takes it
        gives its actions, or those and more; with a prefix as fourth argument where
        ``config.eval.join`` is "prefix".
      **saved: "start" and "save" of `World.roll_out`, in a world that restores.
    """
    policy = looking(policy, config)
    join = join_of(config, world)
    late = {} if join == SYNC else {"join": join}  # only such a world must be able to be late
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
        **late,
        **saved,
    )


def looking(policy: Policy, config: ConfigDict) -> Policy:
    """The policy as it looks through the cameras of a config, in their order."""
    return dataclasses.replace(policy, cameras=tuple(config.data.cameras))


@functools.cache
def seeing(function: Callable) -> Callable:
    """`function` of what a world shows and tells. One for each: a new one would compile anew."""

    def call(policy: Policy, observation, keys, *prefix):
        images = observation["images"]
        seen = {k: v for k, v in observation.items() if k != "images"}
        seen["video"] = policy.see(images)[:, None]
        return function(policy, seen, keys, *prefix)

    return call


def told(config: ConfigDict, policy: Policy, instructions) -> dict[str, np.ndarray]:
    """Instructions as a policy takes them, leading axis e: ids of words, or text embeddings.

    Raises:
      ValueError: an instruction that is too long, or that has no embedding.
    """
    from wamjax.data.embeddings import EmbeddingCache
    from wamjax.data.tokens import Vocabulary

    if "context" in policy.objective.batch_spec(1):
        cache = EmbeddingCache(files.below(files.path(config.data.root), config.data.embeddings))
        return {"context": np.stack([cache.lookup(text) for text in instructions])}
    length, vocabulary = config.data.instruction_length, Vocabulary(policy.words)
    return {"instruction": np.stack([vocabulary.tokenize(t, length) for t in instructions])}


def join_of(config: ConfigDict, world: World) -> Join:
    """How chunks are joined, as ``config.eval`` says."""
    return Join(config.eval.join, config.eval.delay, _hold(config, world))


def _hold(config: ConfigDict, world: World) -> tuple[bool, ...]:
    """Which actions keep their last command while a robot stands still, as behind the end of its
    demonstrations."""
    from wamjax.data.windows import GRIPPER, held, padding

    words = padding(config.data.padding)
    names = world.action_names
    return tuple(held((GRIPPER,) if words is None else words, names, len(names)).tolist())


def episode_keys(config: ConfigDict, purpose: str, indices: np.ndarray) -> jax.Array:
    """What decides the scenes of episodes, by their numbers."""
    key = functools.partial(states.key, config.eval.seed, purpose)
    return jax.vmap(key)(jnp.asarray(indices))


def task_names(config: ConfigDict, world: World | None = None) -> list[str]:
    """``eval.tasks``, else those that the data sources collect, else all."""
    tasks = config.eval.tasks or tuple(
        dict.fromkeys(t for s in config.data.sources.values() for t in s.collect.tasks)
    )
    return list(tasks or (world or open_world(config.eval.env)).tasks)


def _rates(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of episodes: rate, its interval, and the mean number of steps of those that succeeded."""
    success = [row["success"] for row in rows]
    reached = [row["steps"] for row in rows if row["success"]]
    rate = intervals.wilson(sum(success), len(success))
    return {
        "success_rate": float(rate.mean),
        "interval": [float(rate.low), float(rate.high)],
        "episodes": len(rows),
        "steps": float(np.mean(reached)) if reached else None,
        "jerk": float(np.mean([row["jerk"] for row in rows])),
    } | _climbed(rows)


def _rungs(done: Recording, execute: int) -> np.ndarray:
    """Of plans made before success, how far up its ladder a policy climbed, else -1; (e, plans),
    and (e, 0) of one without."""
    if not isinstance(done.extras, dict) or "rung" not in done.extras:
        return np.zeros((len(done.steps), 0), int)
    rungs = np.asarray(done.extras["rung"]).T
    made = np.arange(rungs.shape[1]) * execute < done.steps[:, None]
    return np.where(made, rungs, -1)


def _climbed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """{"rungs": the share of plans on each rung of the ladder}, where there is one."""
    rungs = [rung for row in rows for rung in row.get("rungs", ())]
    return {"rungs": (np.bincount(rungs) / len(rungs)).tolist()} if rungs else {}


def _blind(done: Recording, config: ConfigDict, world: World, keys, shift: Dials) -> Recording:
    """The actions of an episode carried out in the next one of its task, without looking."""
    source = np.arange(len(done.tasks))
    for task in set(done.tasks):
        mine = np.flatnonzero(np.array(done.tasks) == task)
        source[mine] = np.roll(mine, 1)
    steps = done.actions.shape[1]
    return world.roll_out(
        jax.tree_util.Partial(replay), done.tasks, keys, shift=shift,
        told={"actions": done.actions[source]}, cameras=tuple(config.data.cameras),
        max_steps=steps, execute=steps,
    )  # fmt: skip


def replay(observation, keys):
    """A policy that does what it is told to, as "actions", without looking."""
    del keys
    return observation["actions"]


def _keep(
    record: Outcomes, kind: str, numbers, tasks, done: Recording, hold, execute: int
) -> None:
    """Adds what came of the episodes of all processes, whose shares follow one another."""
    parts = [done.success, done.steps, done.crashes, jerk(done.actions, done.steps, hold)]
    parts.append(_rungs(done, execute))
    if jax.process_count() > 1:
        parts = [multihost_utils.process_allgather(x, tiled=True) for x in parts]
    rows = []
    for number, (*counts, jerky, climbed) in zip(numbers, zip(*parts, strict=True), strict=False):
        row = (int(number), tasks[number % len(tasks)], *map(int, counts), round(float(jerky), 6))
        rungs = [int(rung) for rung in climbed if rung >= 0]
        rows.append((*row, rungs) if rungs else row)
    record.add(kind, rows)
