"""Rolls a trained policy out and reports what it did.

    python -m wamjax.evaluate --workdir=runs/quickstart
    python -m wamjax.evaluate --workdir=runs/quickstart --shift=lighting --mode=imagine
    python -m wamjax.evaluate --workdir=runs/quickstart --dials=colours=0.1,action_delay=2
    python -m wamjax.evaluate --workdir=runs/quickstart --tasks=pick_red --execute=4 --episodes=96
    python -m wamjax.evaluate --workdir=runs/cosmos --mode=plan --planner=runs/planner
    python -m wamjax.evaluate --workdir=runs/quickstart --latency

Writes eval.json (success_rate, episodes, per_task, latency_ms, ...), a plot, and a video in which
the predicted frames stand next to the real ones. All options go into the names of the files, so
what was measured after training is not overwritten.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import wamjax
from wamjax import checkpoint, cli
from wamjax import state as states
from wamjax.checkpoint import find, restore_params
from wamjax.config import did_you_mean
from wamjax.data.transforms import Resize
from wamjax.envs.outcomes import Outcomes
from wamjax.envs.world import Dials, Recording, World, composite, open_world, shift_of
from wamjax.metrics import say
from wamjax.step import compute_cast
from wamjax.viz import intervals

LATENCY_CALLS = 50
VIDEO_EPISODES = 4


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "normalizers"),
    meta_fields=("objective", "mode", "cameras", "sizes", "resize"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """A policy that is ready to act: objective, parameters in compute precision, normalisers.

    A pytree, so that one compiled program rolls out every checkpoint of a variant.

    Attributes:
      mode: how it acts; None: its own way.
      cameras: that it looks through in a world, in the order of its pictures.
      sizes, resize: of each camera's pictures, and how others become such; see
        `transforms.Resize`. '' = they are.
    """

    objective: Any
    params: Any
    normalizers: dict[str, Any]
    mode: str | None = None
    cameras: tuple[str, ...] = ()
    sizes: tuple[tuple[str, tuple[int, int]], ...] = ()
    resize: str = ""

    def actions(self, params, observation, key):
        """(b, j, a) in robot units; traceable."""
        return self.objective.policy(params, self.normalizers, observation, key, self.mode)

    def see(self, images):
        """Pictures of a world's cameras as one picture, in the sizes that the policy takes."""
        if self.resize:
            images = Resize(dict(self.sizes), self.resize).forward({"images": images})["images"]
        return composite(images, self.cameras)

    def act(self, observation, key):
        """The same with its own parameters."""
        return self.actions(self.params, observation, key)


def load(
    workdir,
    step: int | None = None,
    mode: str | None = None,
    planner: str | None = None,
    ema: bool | None = None,
):
    """Restores a run.

    Args:
      ema: the moving average, or not; by default if the run has one.
      planner: another run, of the same sizes, whose world model and value function plan for it.

    Returns:
      (`Policy`, the config it was trained with, the step of its checkpoint).

    Raises:
      FileNotFoundError, ValueError: there is no checkpoint, or the planner does not go with it.
    """
    from wamjax import wam
    from wamjax.data.normalize import check_same, normalizers

    found = find(workdir, step)
    spec = wam.spec_of(found.statistics["spec"])
    wam.check_kind(found.config, spec, workdir, wanted="policy")
    params, config, statistics, step = restore_params(workdir, step, ema)
    config.data.cameras = tuple(spec.cameras)  # those of the data, if the config names none
    objective = wam.build(config, spec)
    params = _for_acting(objective, params, config)
    normalise = normalizers(statistics, config.data.normalization)
    if planner:
        if not hasattr(objective, "with_planner"):
            raise ValueError(f"{config.objective.name!r} does not plan: --planner={planner} is for "
                             "Cosmos Policy")  # fmt: skip
        other, _, _ = load(planner)
        objective = objective.with_planner(other.objective)
        check_same(normalise, other.normalizers, f"the planner {planner}")
        params = params | {"planner": other.params}
    sizes = tuple(spec.cameras.items())
    acting = Policy(objective, params, normalise, mode, sizes=sizes, resize=spec.resize)
    return acting, config, step


def untrained(policy: Policy, config: ConfigDict) -> Policy:
    """The same policy before training: fresh parameters."""
    params = jax.jit(policy.objective.init)(states.key(config.seed, "init"))
    return dataclasses.replace(policy, params=_for_acting(policy.objective, params, config))


def run(
    config: ConfigDict,
    workdir: str | os.PathLike,
    step: int | None = None,
    mode: str | None = None,
    shift: str = "none",
    planner: str | None = None,
    label: str = "",
    ema: bool | None = None,
) -> dict[str, Any]:
    """Evaluates the checkpoint of a run and writes eval.json, plot and video.

    What is not as after training (mode, shift, step, planner, ema) goes into the files' names.

    Args:
      config: its ``eval`` part says what to do; the model is built as the checkpoint says.
      workdir: of the run.
      step: which checkpoint, the newest by default.
      mode: how to act, see `wamjax.wam.programs.MODES`; the variant's default.
      shift: name of a shift of the world.
      planner, ema: see `load`.
      label: what else is not as after training, for the files' names.

    Returns:
      what was written to eval.json; in a process that is not the first, without the latency.

    Raises:
      ValueError: see `check`.
    """
    from wamjax.viz import plots

    workdir = pathlib.Path(workdir)
    world = open_world(config.eval.env)
    dials = shift_of(world, shift, config.eval.shift)
    parts = [mode, shift if shift != "none" else None, step]
    parts += [pathlib.Path(planner).name if planner else None, label or None]
    parts += [None if ema is None else checkpoint.name_of(ema)]
    suffix = "".join(f"_{p}" for p in parts if p is not None)
    policy, trained, step = load(workdir, step, mode, planner, ema)
    config = config.copy_and_resolve_references()
    config.data.cameras = trained.data.cameras
    config.data.image_size = trained.data.image_size
    check(config, policy.objective, world)
    result = {"step": step, "variant": trained.objective.variant, "mode": mode, "shift": shift}
    about = {"env": world.name, "seed": config.eval.seed, "versions": versions(world)}
    asked = result | about | {"planner": planner, "eval": json.loads(config.eval.to_json())}
    path = workdir / f"eval{suffix}.json"
    record = Outcomes(workdir / f"episodes{suffix}.jsonl", asked, anew=path.exists())
    result |= roll_out(policy, config, dials, world, record)
    if config.eval.untrained:
        fresh = untrained(policy, trained)
        rate = roll_out(fresh, config, dials, world, record, "untrained")["success_rate"]
        result["untrained_success_rate"] = rate
        say(f"untrained: success {rate:.1%}")
    if "blind_success_rate" in result:
        say(f"without looking: success {result['blind_success_rate']:.1%}")
    result |= about
    if jax.process_index() == 0:
        result["latency_ms"] = latency(policy, config)
        (workdir / "media").mkdir(exist_ok=True)
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(result, indent=2) + "\n")
        draft.replace(path)
        plots.success(result, workdir / "media" / f"success{suffix}.png")
        video = workdir / "media" / f"rollout{suffix}.mp4"
        save_video(policy, config, world, dials, result["outcomes"], video)
        p50, p99 = result["latency_ms"]["p50"], result["latency_ms"]["p99"]
        say(f"success {result['success_rate']:.1%} of {result['episodes']} episodes, "
            f"latency p50 {p50:.1f} ms, p99 {p99:.1f} ms")  # fmt: skip
    return result


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
    if not hasattr(objective, "policy"):
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
    sizes = {
        "video": (shown[0][0], sum(width for _, width in shown), 3),
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


def roll_out(
    policy: Policy,
    config: ConfigDict,
    shift: Dials,
    world: World | None = None,
    record: Outcomes | None = None,
    kind: str = "policy",
) -> dict[str, Any]:
    """Success rate over ``config.eval.episodes``, the tasks in equal shares.

    Args:
      shift: dials of the world that are not zero.
      record: of a run that may be killed; what it holds is not rolled out again.
      kind: of the policy, in the record.

    Returns:
      {"success_rate", "interval" (95 %, Wilson's), "episodes", "per_task": {task: {"success_rate",
      "interval", "episodes", "steps"}}, "outcomes", "crashes"}; and "blind_success_rate" if
      ``config.eval.blind``: that of the same actions in another scene of their task, without
      looking. Outcomes are 0 or 1 for each episode: equal settings give equal episodes, whatever
      acts in them, so that outcomes can be compared one by one.
    """
    world, record = world or open_world(config.eval.env), record or Outcomes()
    tasks = task_names(config, world)
    total = -(-config.eval.episodes // len(tasks)) * len(tasks)
    processes, process = jax.process_count(), jax.process_index()  # each rolls out its share
    size = min(config.eval.batch_size, -(-total // processes))
    policy = dataclasses.replace(policy, cameras=tuple(config.data.cameras))
    blind = config.eval.blind and kind == "policy"
    for start in range(0, total, size * processes):
        counted = np.arange(start, min(start + size * processes, total))
        numbers = start + process * size + np.arange(size)  # some may fill the last batch up
        if all(record.has(k, counted) for k in ([kind, "blind"] if blind else [kind])):
            continue
        names = [tasks[i % len(tasks)] for i in numbers]
        keys = episode_keys(config, "evaluate", numbers)
        done = play(policy, config, world, names, keys, shift)
        _keep(record, kind, counted, tasks, done)
        if blind:
            replayed = _blind(done, config, world, keys, shift)
            _keep(record, "blind", counted, tasks, replayed)
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
) -> Recording:
    """Episodes of a policy as ``config.eval`` says: one for each task of `tasks` and key.

    Args:
      function: ``function(policy, observation, keys)`` of an observation as the policy takes it
        gives its actions, or those and more.
    """
    return world.roll_out(
        jax.tree_util.Partial(seeing(function), policy),
        tasks,
        keys,
        shift=shift,
        told=told(config, policy.objective, [world.tasks[task] for task in tasks]),
        cameras=tuple(config.data.cameras),
        max_steps=config.eval.max_steps,
        execute=config.eval.execute,
        record=record,
    )


def told(config: ConfigDict, objective, instructions) -> dict[str, np.ndarray]:
    """Instructions as a policy takes them, leading axis e: ids of words, or text embeddings.

    Raises:
      ValueError: an instruction that is too long, or that has no embedding.
    """
    from wamjax.data.embeddings import EmbeddingCache
    from wamjax.data.tokens import tokenize

    if hasattr(objective, "batch_spec") and "context" in objective.batch_spec(1):
        cache = EmbeddingCache(pathlib.Path(config.data.root) / config.data.embeddings)
        return {"context": np.stack([cache.lookup(text) for text in instructions])}
    length = config.data.instruction_length
    return {"instruction": np.stack([tokenize(text, length) for text in instructions])}


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
    }


def _blind(done: Recording, config: ConfigDict, world: World, keys, shift: Dials) -> Recording:
    """The actions of an episode carried out in the next one of its task, without looking."""
    source = np.arange(len(done.tasks))
    for task in set(done.tasks):
        mine = np.flatnonzero(np.array(done.tasks) == task)
        source[mine] = np.roll(mine, 1)
    steps = done.actions.shape[1]
    return world.roll_out(
        jax.tree_util.Partial(_replay), done.tasks, keys, shift=shift,
        told={"actions": done.actions[source]}, cameras=tuple(config.data.cameras),
        max_steps=steps, execute=steps,
    )  # fmt: skip


def _replay(observation, keys):
    del keys
    return observation["actions"]


def _keep(record: Outcomes, kind: str, numbers, tasks, done: Recording) -> None:
    """Adds what came of the episodes of all processes, whose shares follow one another."""
    parts = (done.success, done.steps, done.crashes)
    if jax.process_count() > 1:
        parts = (multihost_utils.process_allgather(x, tiled=True) for x in parts)
    rows = zip(numbers, *parts, strict=False)
    record.add(kind, [(int(n), tasks[n % len(tasks)], *map(int, rest)) for n, *rest in rows])


def latency(policy: Policy, config: ConfigDict, calls: int = LATENCY_CALLS) -> dict[str, float]:
    """Milliseconds of one jitted call of the policy at batch 1, input to actions on the host."""
    observation = observe_example(policy, 1)
    act = jax.jit(policy.actions)
    key = jax.random.key(0)
    np.asarray(act(policy.params, observation, key))
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        np.asarray(act(policy.params, observation, key))
        times.append(1e3 * (time.perf_counter() - start))
    return {"p50": float(np.percentile(times, 50)), "p99": float(np.percentile(times, 99))}


def observe_example(policy: Policy, size: int) -> dict[str, jax.Array]:
    """A blank observation in the shapes that the policy takes."""
    spec = policy.objective.batch_spec(size)
    key = policy.objective.codec.key
    keep = {k: spec[k] for k in (key, "proprio", "instruction", "context") if k in spec}
    observation = {k: jnp.zeros(s.shape, s.dtype) for k, s in keep.items()}
    observation[key] = observation[key][:, :1]
    return observation


def save_video(
    policy: Policy, config: ConfigDict, world: World, shift: Dials, outcomes: str, path
) -> None:
    """Successes and failures of those that were counted, see `wamjax.viz.foreseen`."""
    from wamjax.viz import foreseen

    marks = np.array([mark == "1" for mark in outcomes])
    some = [np.flatnonzero(marks == good)[: VIDEO_EPISODES // 2] for good in (True, False)]
    rest = np.setdiff1d(np.arange(len(marks)), np.concatenate(some))
    numbers = np.concatenate([*some, rest])[:VIDEO_EPISODES]
    tasks = task_names(config, world)
    names = [tasks[i % len(tasks)] for i in numbers]
    policy = dataclasses.replace(policy, cameras=tuple(config.data.cameras))
    keys = episode_keys(config, "evaluate", numbers)
    done = play(policy, config, world, names, keys, shift, record=True)
    foreseen.save(policy, config, done, path)


@functools.cache
def seeing(function: Callable) -> Callable:
    """`function` of what a world shows and tells. One for each: a new one would compile anew."""

    def call(policy: Policy, observation, keys):
        images = observation["images"]
        seen = {k: v for k, v in observation.items() if k != "images"}
        seen["video"] = policy.see(images)[:, None]
        return function(policy, seen, keys)

    return call


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


def versions(world: World) -> dict[str, str]:
    """Of what was measured: this package, JAX, and what simulates."""
    return {"wamjax": wamjax.__version__, "jax": jax.__version__} | dict(world.versions)


def _for_acting(objective, params, config: ConfigDict):
    """Parameters cast for compute and laid out for sampling, once, outside of any loop."""
    cast = functools.partial(compute_cast, dtype=config.precision.compute)
    params = jax.device_put(params, jax.local_devices()[0])  # fresh ones as restored ones
    return jax.jit(lambda p: objective.prepare(cast(p)))(params)


def define_flags() -> None:
    """Not on import: several entry points define flags of the same names."""
    flags.DEFINE_string("workdir", None, "the run to evaluate", required=True)
    flags.DEFINE_integer("step", None, "checkpoint; the newest by default")
    flags.DEFINE_string("mode", None, "direct, joint, imagine, plan, ...; the default is its own")
    flags.DEFINE_string("planner", None, "a run whose world model and value function plan for it")
    flags.DEFINE_string("shift", "none", "a shift of the world, by name")
    flags.DEFINE_list("dials", [], "of the shift, as lighting=0.3,distractors=1")
    flags.DEFINE_list("tasks", None, "tasks; those of the training data by default")
    flags.DEFINE_integer("episodes", None, "episodes; config.eval.episodes by default")
    flags.DEFINE_integer("execute", None, "actions of each plan that are executed")
    flags.DEFINE_bool("latency", False, "only measure the latency of one plan")
    checkpoint.define_ema_flag()


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    asked, ema = flags.FLAGS, checkpoint.asked_ema()
    if asked.latency:
        policy, config, _ = load(asked.workdir, asked.step, asked.mode, asked.planner, ema)
        print(json.dumps({"latency_ms": latency(policy, config)}))
        return
    config = find(asked.workdir, asked.step).config
    label = _choose(config, asked)
    if config.eval.episodes < 1:
        raise app.UsageError(f"{config.eval.episodes} episodes: give --episodes")
    run(config, asked.workdir, asked.step, asked.mode, asked.shift, asked.planner, label, ema)


def _choose(config: ConfigDict, asked) -> str:
    """Puts what is asked for into ``config.eval``; returns it as part of a file's name."""
    parts = []
    for key in ("episodes", "execute", "tasks"):
        if (value := asked[key].value) is not None:
            config.eval[key] = tuple(value) if key == "tasks" else value
            parts.append("-".join(value) if key == "tasks" else f"{key}{value}")
    for dial in asked.dials:
        name, _, text = dial.partition("=")
        try:
            number = float(text)
        except ValueError:
            raise app.UsageError(f"--dials={dial} is not of the form DIAL=NUMBER") from None
        config.eval.shift[name] = int(number) if number.is_integer() else number
        parts.append(f"{name}{text}")
    return "_".join(parts)


if __name__ == "__main__":
    cli.run(main, define_flags, huge_pages=True)
