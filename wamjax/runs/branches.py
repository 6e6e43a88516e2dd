"""Branches of a policy: several of its proposals in one state, each carried out and gone on from.

A value of what an expert would do next hides what a proposal is worth to the policy that made it,
so the policy itself goes on. Of a state all branches draw the same noise later: what differs is the
proposal. States are those that the policy visits, on other episodes than it is evaluated on.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from wamjax import files
from wamjax.data import branches as store
from wamjax.envs.world import World, open_world
from wamjax.runs import closed_loop
from wamjax.runs.trained import Policy
from wamjax.training import state as states
from wamjax.wam import ladder


class Cohort(NamedTuple):
    """Which branches.

    Attributes:
      states: how many states, one of each visited episode.
      proposals, continuations: of each state, and of each proposal.
      seed: of the episodes; not that of the evaluation.
      rungs, modes: of the ladder whose proposals these are, see `ladder.ways`; without modes all
        are made in the policy's own mode.
    """

    states: int
    proposals: int
    continuations: int = 1
    seed: int = 2000
    rungs: tuple[int, ...] = ()
    modes: tuple[str, ...] = ()

    def ways(self) -> tuple[str | None, ...]:
        """How each proposal of a state is made."""
        if not self.modes:
            return (None,) * self.proposals
        return ladder.ways(self.rungs, self.modes, self.proposals)


def grow(
    policy: Policy,
    config: ConfigDict,
    statistics: dict[str, Any],
    out: files.Path,
    cohort: Cohort,
    about: dict[str, Any],
    progress: bool = True,
) -> dict[str, Any]:
    """Makes branches, part by part; what is there already is not made again.

    Args:
      policy: see `trained.load`; its mode says how proposals are made and gone on from.
      config: its ``eval`` part says how episodes go.
      statistics: of the checkpoint.
      out: the folder, see `wamjax.data.branches`.
      about: what the branches are of; a folder of others is refused.

    Returns:
      `summary` of them, with seconds.

    Raises:
      ValueError: the world does not restore states, or the seed is that of the evaluation, or there
        are other branches in the folder, or the modes are not those of rungs.
    """
    _check(policy, cohort)
    world = open_world(config.eval.env)
    if not world.restores:
        raise ValueError(f"{world.name} does not begin from a state that another episode was in, "
                         "and branches do")  # fmt: skip
    if cohort.seed == config.eval.seed:
        raise ValueError(f"seed {cohort.seed} makes the episodes that config.eval.seed evaluates "
                         "on: use others")  # fmt: skip
    size = min(config.eval.batch_size, cohort.states)
    parts = -(-cohort.states // size)
    about = about | cohort._asdict() | {"parts": parts, "tasks": _tasks(config, world),
             "eval": json.loads(config.eval.to_json()), "world": dict(world.versions)}  # fmt: skip
    about = json.loads(json.dumps(about))
    place = out / store.ABOUT
    some = place.exists() and files.glob(out, "part-*.npz")
    if some and (there := json.loads(place.read_text())) != about:
        differ = sorted(k for k in about.keys() | there.keys() if about.get(k) != there.get(k))
        raise ValueError(f"{out} holds other branches, which differ in {differ}: name another "
                         "folder")  # fmt: skip
    files.make_folder(out, "name another folder")
    files.write_text(out / store.STATISTICS, json.dumps(statistics) + "\n")
    files.write_text(place, json.dumps(about) + "\n")
    begin = time.perf_counter()
    bar = tqdm.tqdm(total=parts * size, unit="state", desc="branches", disable=not progress)
    with bar:
        for number in range(parts):
            path = out / f"part-{number:05d}.npz"
            if not path.exists():
                part = _part(policy, config, world, cohort, number, size)
                with files.atomic(path, "wb") as file:
                    np.savez(file, **part)
            bar.update(size)
    _, _, arrays = store.read(out)
    return summary(arrays) | {
        "seconds": round(time.perf_counter() - begin, 1)
    }


def _part(
    policy: Policy, config: ConfigDict, world: World, cohort: Cohort, number: int, size: int
) -> dict[str, np.ndarray]:
    asked, n = config.eval, cohort.proposals
    episodes = np.arange(number * size, (number + 1) * size)
    tasks = _tasks(config, world)
    names = [tasks[i % len(tasks)] for i in episodes]
    visit, branch, go_on = (
        jax.vmap(functools.partial(states.key, cohort.seed, purpose))(episodes)
        for purpose in ("visit", "branch", "go_on")
    )
    visited = closed_loop.play(policy, config, world, names, visit, {}, record=True, save=True)
    # One state of each episode, of those before its end in which the policy looked.
    plans = -(-visited.steps // asked.execute)
    dice = np.random.default_rng([cohort.seed, number]).random(size)
    at = np.floor(dice * plans).astype(int) * asked.execute
    rows = np.arange(size)
    begin = jax.tree.map(lambda x: x[rows, at], visited.states)
    seen = dict(
        images={k: jnp.asarray(x[rows, at]) for k, x in visited.frames.items()},
        proprio=jnp.asarray(visited.proprio[rows, at]),
    )
    told = closed_loop.told(config, policy, [world.tasks[name] for name in names])
    seeing = closed_loop.seeing(_observed)
    looking = closed_loop.looking(policy, config)
    observation = jax.jit(seeing)(looking, seen | told, branch)
    parts, start = [], 0
    for way, alike in itertools.groupby(cohort.ways()):
        count = len(list(alike))
        # The first are those that the policy makes with its key, further ones of other noise.
        keys = jax.vmap(lambda k, i=start: jax.random.fold_in(k, i))(branch) if start else branch
        parts.append(_propose(looking, observation, keys, count, way))
        start += count
    proposals = np.concatenate(parts, axis=1)
    # Each carried out, as a policy that has decided before it looks ...
    many = [name for name in names for _ in range(n)]
    first = world.roll_out(
        jax.tree_util.Partial(closed_loop.replay), many, jnp.repeat(branch, n),
        shift={}, told={"actions": np.asarray(proposals).reshape(size * n, *proposals.shape[2:])},
        cameras=tuple(config.data.cameras), max_steps=asked.execute, execute=asked.execute,
        start=jax.tree.map(lambda x: np.repeat(x, n, axis=0), begin), save=True,
    )  # fmt: skip
    # ... and gone on from, with what is left of the episode.
    after = jax.tree.map(lambda x: x[:, -1], first.states)
    left = np.repeat(asked.max_steps - asked.execute - at, n)
    success, steps = [], []
    for m in range(cohort.continuations):
        keys = jnp.repeat(jax.vmap(functools.partial(jax.random.fold_in, data=m))(go_on), n)
        then = closed_loop.play(policy, config, world, many, keys, {}, start=after)
        later = then.success & (then.steps <= left)
        success.append(first.success | later)
        steps.append(np.where(first.success, first.steps, asked.execute + then.steps))
    return {
        **{k: np.asarray(x) for k, x in observation.items()},
        "actions": np.asarray(proposals, np.float32),
        "success": np.stack(success, axis=-1).reshape(size, n, -1),
        "steps": np.stack(steps, axis=-1).reshape(size, n, -1).astype(np.int32),
        "episode": episodes, "at": at, "tasks": np.array(names),
    }  # fmt: skip


def _observed(policy: Policy, observation, keys):
    del policy, keys
    return observation


@functools.partial(jax.jit, static_argnames=("count", "mode"))
def _propose(policy: Policy, observation, keys, count: int, mode: str | None):
    return policy.propose(observation, keys, count, mode)


def _check(policy: Policy, cohort: Cohort) -> None:
    rungs, modes = cohort.rungs, cohort.modes
    if not modes and not rungs:
        return
    growing = rungs and rungs[0] > 0 and list(rungs) == sorted(set(rungs))
    if len(modes) != len(rungs) or not growing or rungs[-1] > cohort.proposals:
        asked = f"--rungs={','.join(map(str, rungs))} --modes={','.join(modes)}"
        raise ValueError(f"{asked}: a rung has a mode and more proposals than the one below, the "
                         f"last at most --proposals={cohort.proposals}")  # fmt: skip
    for mode in modes:
        policy.objective.check_mode(mode)


def _tasks(config: ConfigDict, world: World) -> list[str]:
    return list(closed_loop.task_names(config, world))


def summary(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """What there is to gain by choosing, with the true outcome as judge.

    Returns:
      {"states", "proposals", "direct" (mean success), "headroom": {N: points that the best of N
      succeeds more often}, "choice" (share of states whose branches end differently)}.
    """
    success = arrays["success"].mean(axis=2)
    n = success.shape[1]
    return {
        "states": len(success),
        "proposals": n,
        "direct": round(float(success.mean()), 4),
        "headroom": {k: round(100 * best_of(success, success, k), 1) for k in _sizes(n)},
        "choice": round(float((success.max(axis=1) > success.min(axis=1)).mean()), 4),
    }


def best_of(
    scores: Float[np.ndarray, "s n"], outcomes: Float[np.ndarray, "s n"], count: int
) -> float:
    """How much better the best by `scores` of `count` branches is than one of them, on average;
    over disjoint groups of them."""
    groups = scores.shape[1] // count
    shape = len(scores) * groups, count
    scores, outcomes = (x[:, : groups * count].reshape(shape) for x in (scores, outcomes))
    best = np.take_along_axis(outcomes, scores.argmax(axis=1)[:, None], axis=1)
    return float(best.mean() - outcomes.mean())


def values_of(
    policy: Policy, arrays: dict[str, np.ndarray], size: int = 64
) -> Float[np.ndarray, "s n"]:
    """What a judge expects of every branch, `size` states in one call."""
    return _each(_value, policy, arrays, size)


def benefits_of(
    policy: Policy, arrays: dict[str, np.ndarray], size: int = 64
) -> Float[np.ndarray, "s h r"]:
    """What a gate expects on each rung of every higher one; branches come as they stand."""
    return _each(_benefits, policy, arrays, size)


def _each(function, policy: Policy, arrays: dict[str, np.ndarray], size: int) -> np.ndarray:
    seen, total, results = store.seen(arrays), len(arrays["actions"]), []
    for start in range(0, total, size):
        rows = np.minimum(np.arange(start, start + size), total - 1)  # the last call is filled up
        observation = {k: jnp.asarray(x[rows]) for k, x in seen.items()}
        results.append(np.asarray(function(policy, observation, arrays["actions"][rows])))
    return np.concatenate(results)[:total]


def judged(policy: Policy, arrays: dict[str, np.ndarray], discount: float) -> dict[str, Any]:
    """How well a judge tells branches of a state apart that it was not trained on.

    Args:
      discount: of the return that it expects, for each control step.

    Returns:
      {"rank_correlation" (Spearman's within a state, mean over states whose returns differ),
      "gain": {N: points by which its choice of N succeeds more often}, "share" of the headroom}.
    """
    from scipy.stats import spearmanr

    values = values_of(policy, arrays)
    success = arrays["success"].mean(axis=2)
    returns = (arrays["success"] * discount ** arrays["steps"]).mean(axis=2)
    differ = (returns.max(axis=1) > returns.min(axis=1)) & (values.max(1) > values.min(1))
    pairs = zip(values[differ], returns[differ], strict=True)
    ranks = [spearmanr(value, came).statistic for value, came in pairs]
    sizes = _sizes(success.shape[1])
    gain = {k: 100 * best_of(values, success, k) for k in sizes}
    most = {k: 100 * best_of(success, success, k) for k in sizes}
    return {
        "rank_correlation": round(float(np.mean(ranks)), 4) if ranks else None,
        "gain": {k: round(v, 1) for k, v in gain.items()},
        "share": {k: round(gain[k] / most[k], 3) if most[k] else None for k in sizes},
    }


def _sizes(most: int) -> list[int]:
    return [n for n in (2, 4, 8, 16, 32) if n <= most]


@jax.jit
def _value(policy: Policy, observation, proposals) -> Float[Array, "b n"]:
    return policy.objective.value(policy.params, policy.normalizers, observation, proposals)


@jax.jit
def _benefits(policy: Policy, observation, proposals) -> Float[Array, "b h r"]:
    return policy.objective.benefits(policy.params, policy.normalizers, observation, proposals)
