"""Collects branches of a policy: it executes several proposals from one state and finishes each.

What an expert would do next does not show what a proposal is worth to the policy that made it, so
the policy itself continues. All branches of a state draw the same noise afterwards, so they differ
only in the proposal. The states are those that the policy visits, in other episodes than it is
evaluated on.
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
    """Selects the branches to collect.

    Attributes:
      states: number of states, one from each visited episode.
      proposals, continuations: proposals per state, and continuations per proposal.
      seed: seed of the episodes; must differ from that of the evaluation.
      rungs, modes: the ladder that makes these proposals, see `ladder.ways`; without modes all are
        made in the policy's own mode.
    """

    states: int
    proposals: int
    continuations: int = 1
    seed: int = 2000
    rungs: tuple[int, ...] = ()
    modes: tuple[str, ...] = ()

    def ways(self) -> tuple[str | None, ...]:
        """Returns the mode of each proposal of a state."""
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
    """Collects branches part by part and skips the parts that exist already.

    Args:
      policy: see `trained.load`; its mode makes the proposals and finishes the branches.
      config: its ``eval`` part sets how episodes run.
      statistics: those of the checkpoint.
      out: the folder, see `wamjax.data.branches`.
      about: describes the origin of the branches; a folder with another description is refused.

    Returns:
      the `summary` of the branches, with seconds.

    Raises:
      ValueError: the world does not restore states, the seed is that of the evaluation, the folder
      holds other branches, or the modes do not match the rungs.
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
    manifest = out / store.ABOUT
    has_parts = manifest.exists() and files.glob(out, "part-*.npz")
    if has_parts and (stored := json.loads(manifest.read_text())) != about:
        differ = sorted(k for k in about.keys() | stored.keys() if about.get(k) != stored.get(k))
        raise ValueError(f"{out} holds other branches, which differ in {differ}: name another "
                         "folder")  # fmt: skip
    files.make_folder(out, "name another folder")
    files.write_text(out / store.STATISTICS, json.dumps(statistics) + "\n")
    files.write_text(manifest, json.dumps(about) + "\n")
    start = time.perf_counter()
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
        "seconds": round(time.perf_counter() - start, 1)
    }


def _part(
    policy: Policy, config: ConfigDict, world: World, cohort: Cohort, number: int, size: int
) -> dict[str, np.ndarray]:
    options, n = config.eval, cohort.proposals
    episodes = np.arange(number * size, (number + 1) * size)
    tasks = _tasks(config, world)
    names = [tasks[i % len(tasks)] for i in episodes]
    visit, branch, go_on = (
        jax.vmap(functools.partial(states.key, cohort.seed, purpose))(episodes)
        for purpose in ("visit", "branch", "go_on")
    )
    visited = closed_loop.play(policy, config, world, names, visit, {}, record=True, save=True)
    # One state of each episode, at a step before its end at which the policy observed.
    plans = -(-visited.steps // options.execute)
    uniform = np.random.default_rng([cohort.seed, number]).random(size)
    when = np.floor(uniform * plans).astype(int) * options.execute
    rows = np.arange(size)
    initial = jax.tree.map(lambda x: x[rows, when], visited.states)
    views = dict(
        images={k: jnp.asarray(x[rows, when]) for k, x in visited.frames.items()},
        proprio=jnp.asarray(visited.proprio[rows, when]),
    )
    instructions = closed_loop.told(config, policy, [world.tasks[name] for name in names])
    as_input = closed_loop.seeing(_observed)
    viewer = closed_loop.looking(policy, config)
    observation = jax.jit(as_input)(viewer, views | instructions, branch)
    parts, start = [], 0
    for way, group in itertools.groupby(cohort.ways()):
        count = len(list(group))
        # The first proposals use the policy's own key, further ones other noise.
        keys = jax.vmap(lambda k, i=start: jax.random.fold_in(k, i))(branch) if start else branch
        parts.append(_propose(viewer, observation, keys, count, way))
        start += count
    proposals = np.concatenate(parts, axis=1)
    # Execute each proposal without observing ...
    branch_names = [name for name in names for _ in range(n)]
    first = world.roll_out(
        jax.tree_util.Partial(closed_loop.replay), branch_names, jnp.repeat(branch, n),
        shift={}, told={"actions": np.asarray(proposals).reshape(size * n, *proposals.shape[2:])},
        cameras=tuple(config.data.cameras), max_steps=options.execute, execute=options.execute,
        start=jax.tree.map(lambda x: np.repeat(x, n, axis=0), initial), save=True,
    )  # fmt: skip
    # ... then let the policy finish with the remaining steps of the episode.
    midway = jax.tree.map(lambda x: x[:, -1], first.states)
    remaining = np.repeat(options.max_steps - options.execute - when, n)
    success, steps = [], []
    for m in range(cohort.continuations):
        keys = jnp.repeat(jax.vmap(functools.partial(jax.random.fold_in, data=m))(go_on), n)
        rest = closed_loop.play(policy, config, world, branch_names, keys, {}, start=midway)
        success_later = rest.success & (rest.steps <= remaining)
        success.append(first.success | success_later)
        steps.append(np.where(first.success, first.steps, options.execute + rest.steps))
    return {
        **{k: np.asarray(x) for k, x in observation.items()},
        "actions": np.asarray(proposals, np.float32),
        "success": np.stack(success, axis=-1).reshape(size, n, -1),
        "steps": np.stack(steps, axis=-1).reshape(size, n, -1).astype(np.int32),
        "episode": episodes, "at": when, "tasks": np.array(names),
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
    increasing = rungs and rungs[0] > 0 and list(rungs) == sorted(set(rungs))
    if len(modes) != len(rungs) or not increasing or rungs[-1] > cohort.proposals:
        flags = f"--rungs={','.join(map(str, rungs))} --modes={','.join(modes)}"
        raise ValueError(f"{flags}: a rung has a mode and more proposals than the one below, the "
                         f"last at most --proposals={cohort.proposals}")  # fmt: skip
    for mode in modes:
        policy.objective.check_mode(mode)


def _tasks(config: ConfigDict, world: World) -> list[str]:
    return list(closed_loop.task_names(config, world))


def summary(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns what choosing among the proposals could gain, judged by the true outcomes.

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
    """Returns how much better the best of `count` branches by `scores` is than an average one,
    averaged over disjoint groups of branches."""
    groups = scores.shape[1] // count
    shape = len(scores) * groups, count
    scores, outcomes = (x[:, : groups * count].reshape(shape) for x in (scores, outcomes))
    best = np.take_along_axis(outcomes, scores.argmax(axis=1)[:, None], axis=1)
    return float(best.mean() - outcomes.mean())


def values_of(
    policy: Policy, arrays: dict[str, np.ndarray], size: int = 64
) -> Float[np.ndarray, "s n"]:
    """Returns the judge's value of every branch, `size` states per call."""
    return _each(_value, policy, arrays, size)


def benefits_of(
    policy: Policy, arrays: dict[str, np.ndarray], size: int = 64
) -> Float[np.ndarray, "s h r"]:
    """Returns the gate's expected benefit of every higher rung, on each rung, with branches in
    stored order."""
    return _each(_benefits, policy, arrays, size)


def _each(function, policy: Policy, arrays: dict[str, np.ndarray], size: int) -> np.ndarray:
    observations, total, results = store.seen(arrays), len(arrays["actions"]), []
    for start in range(0, total, size):
        rows = np.minimum(np.arange(start, start + size), total - 1)  # the last call is padded
        observation = {k: jnp.asarray(x[rows]) for k, x in observations.items()}
        results.append(np.asarray(function(policy, observation, arrays["actions"][rows])))
    return np.concatenate(results)[:total]


def judged(policy: Policy, arrays: dict[str, np.ndarray], discount: float) -> dict[str, Any]:
    """Evaluates how well a judge ranks the branches of states that it was not trained on.

    Args:
      discount: discount of the predicted return per control step.

    Returns:
      {"rank_correlation" (Spearman's within a state, mean over states whose returns differ),
      "gain": {N: points by which its choice of N succeeds more often}, "share": of the headroom}.
    """
    from scipy.stats import spearmanr

    values = values_of(policy, arrays)
    success = arrays["success"].mean(axis=2)
    returns = (arrays["success"] * discount ** arrays["steps"]).mean(axis=2)
    differ = (returns.max(axis=1) > returns.min(axis=1)) & (values.max(1) > values.min(1))
    pairs = zip(values[differ], returns[differ], strict=True)
    ranks = [spearmanr(value, result).statistic for value, result in pairs]
    sizes = _sizes(success.shape[1])
    gain = {k: 100 * best_of(values, success, k) for k in sizes}
    headroom = {k: 100 * best_of(success, success, k) for k in sizes}
    return {
        "rank_correlation": round(float(np.mean(ranks)), 4) if ranks else None,
        "gain": {k: round(v, 1) for k, v in gain.items()},
        "share": {k: round(gain[k] / headroom[k], 3) if headroom[k] else None for k in sizes},
    }


def _sizes(most: int) -> list[int]:
    return [n for n in (2, 4, 8, 16, 32) if n <= most]


@jax.jit
def _value(policy: Policy, observation, proposals) -> Float[Array, "b n"]:
    return policy.objective.value(policy.params, policy.normalizers, observation, proposals)


@jax.jit
def _benefits(policy: Policy, observation, proposals) -> Float[Array, "b h r"]:
    return policy.objective.benefits(policy.params, policy.normalizers, observation, proposals)
