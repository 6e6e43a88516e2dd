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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from wamjax import hardware
from wamjax import state as states
from wamjax.checkpoint import find, restore_params
from wamjax.config import did_you_mean
from wamjax.metrics import quiet, say
from wamjax.step import compute_cast

LATENCY_CALLS = 50
VIDEO_EPISODES = 4


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "normalizers"),
    meta_fields=("objective", "mode", "cameras", "resize"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """A policy that is ready to act: objective, parameters in compute precision, normalisers.

    A pytree, so that one compiled program rolls out every checkpoint of a variant.
    """

    objective: Any
    params: Any
    normalizers: dict[str, Any]
    mode: str | None = None
    cameras: tuple[tuple[str, tuple[int, int]], ...] = ()
    resize: str = ""  # see `transforms.Resize`, to the sizes of `cameras`

    def actions(self, params, observation, key):
        """(b, j, a) in robot units; traceable."""
        if self.resize:
            observation = resized(observation, dict(self.cameras), self.resize)
        return self.objective.policy(params, self.normalizers, observation, key, self.mode)


def load(workdir, step: int | None = None, mode: str | None = None, planner: str | None = None):
    """Restores a run.

    Args:
      planner: another run, of the same sizes, whose world model and value function plan for it.

    Returns:
      (`Policy`, the config it was trained with, the step of its checkpoint).

    Raises:
      FileNotFoundError, ValueError: there is no checkpoint, or the planner does not go with it.
    """
    from wamjax import wam
    from wamjax.data.normalize import check_same, normalizers
    from wamjax.data.spec import DataSpec

    params, config, statistics, step = restore_params(workdir, step)
    spec = DataSpec.from_json(statistics["spec"])
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
    cameras = tuple(spec.cameras.items())
    return Policy(objective, params, normalise, mode, cameras, spec.resize), config, step


def resized(observation, cameras: dict[str, tuple[int, int]], how: str):
    """An observation of the tabletop as a policy of other picture sizes was trained to see it."""
    from wamjax.data.transforms import Composite, Resize
    from wamjax.envs import tabletop

    native = Composite({name: tabletop.CAMERAS[name] for name in cameras})
    whole = Composite(cameras)
    height, *_ = (h for h, _ in native.cameras.values())
    if observation["video"].shape[-3:-1] != (height, sum(w for _, w in native.cameras.values())):
        return observation  # an example, in the sizes of the policy
    images = Resize(cameras, how).forward(native.inverse({"video": observation["video"]}))
    return observation | whole.forward(images)


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
) -> dict[str, Any]:
    """Evaluates the checkpoint of a run and writes eval.json, plot and video.

    What is not as after training (mode, shift, step, planner) goes into the files' names.

    Args:
      config: its ``eval`` part says what to do; the model is built as the checkpoint says.
      workdir: of the run.
      step: which checkpoint, the newest by default.
      mode: how to act, see `wamjax.wam.programs.MODES`; the variant's default.
      shift: name of a shift of the world.
      planner: see `load`.
      label: what else is not as after training, for the files' names.

    Returns:
      what was written to eval.json.

    Raises:
      ValueError: see `check`.
    """
    from wamjax.viz import plots

    workdir = pathlib.Path(workdir)
    shifts = _shift(config, shift)
    parts = [mode, shift if shift != "none" else None, step]
    parts += [pathlib.Path(planner).name if planner else None, label or None]
    suffix = "".join(f"_{p}" for p in parts if p is not None)
    policy, trained, step = load(workdir, step, mode, planner)
    config = config.copy_and_resolve_references()
    config.data.cameras = trained.data.cameras
    config.data.image_size = trained.data.image_size
    check(config, policy.objective)
    result = {"step": step, "variant": trained.objective.variant, "mode": mode, "shift": shift}
    result |= roll_out(policy, config, shifts)
    if config.eval.untrained:
        fresh = roll_out(untrained(policy, trained), config, shifts)
        result["untrained_success_rate"] = fresh["success_rate"]
        say(f"untrained: success {fresh['success_rate']:.1%}")
    result["latency_ms"] = latency(policy, config)
    if jax.process_index() == 0:
        (workdir / "media").mkdir(exist_ok=True)
        path = workdir / f"eval{suffix}.json"
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(result, indent=2) + "\n")
        draft.replace(path)
        plots.success(result, workdir / "media" / f"success{suffix}.png")
        save_video(policy, config, shifts, workdir / "media" / f"rollout{suffix}.mp4")
    p50, p99 = result["latency_ms"]["p50"], result["latency_ms"]["p99"]
    say(f"success {result['success_rate']:.1%} of {result['episodes']} episodes, "
        f"latency p50 {p50:.1f} ms, p99 {p99:.1f} ms")  # fmt: skip
    return result


def check(config: ConfigDict, objective) -> None:
    """That a policy can be rolled out as ``config.eval`` says.

    Raises:
      ValueError: it cannot; names the key, and what would go.
    """
    from wamjax.envs import tabletop

    _shift(config, "none")
    asked = config.eval
    for key in ("episodes", "execute", "max_steps", "batch_size"):
        if asked[key] < 1:
            raise ValueError(f"config.eval.{key} = {asked[key]} must be at least 1")
    for task in (tasks := task_names(config)):
        if task not in tabletop.TASKS:
            raise ValueError(f"config.eval.tasks = {tuple(tasks)}: there is no task {task!r}"
                             f"{did_you_mean(task, tabletop.TASKS)}; there are "
                             f"{tuple(tabletop.TASKS)}")  # fmt: skip
    if not hasattr(objective, "policy"):
        raise ValueError(f"config.eval.episodes = {asked.episodes}: {config.objective.name!r} is "
                         "no policy, set it to 0")  # fmt: skip
    spec, cameras = objective.batch_spec(1), senses(config)["cameras"]
    if unknown := [c for c in cameras if c not in tabletop.CAMERAS]:
        raise ValueError(f"config.data.cameras = {cameras}: the tabletop has no {unknown}, it has "
                         f"{tuple(tabletop.CAMERAS)}; set eval.episodes to 0")  # fmt: skip
    for key in ("video", "instruction"):
        if key not in spec:
            raise ValueError(
                f"config.eval.episodes = {asked.episodes}: the tabletop shows pictures and says "
                f"words, and the policy takes {sorted(spec)}, no {key!r}: set it to 0"
            )
    sizes = [tabletop.CAMERAS[c] for c in cameras]
    if any(config.data.image_size):  # the policy sees them resized
        sizes = [tuple(config.data.image_size)] * len(cameras)
    world = {
        "video": (sizes[0][0], sum(width for _, width in sizes), 3),
        "actions": (tabletop.ACTION_DIM,),
        "proprio": (tabletop.PROPRIO_DIM,),
    }
    for key, want in world.items():
        if key in spec and (have := spec[key].shape[-len(want) :]) != want:
            raise ValueError(f"config.eval.episodes = {asked.episodes}: {key} of the policy are "
                             f"{have}, of the tabletop {want}; set it to 0")  # fmt: skip
    if asked.execute > (chunk := spec["actions"].shape[1]):
        raise ValueError(f"config.eval.execute = {asked.execute}, and a plan has {chunk} actions "
                         "(data.chunk)")  # fmt: skip


def senses(config: ConfigDict) -> dict[str, Any]:
    """What a policy is shown and told in the world: arguments of `tabletop.rollout`.

    ``config.data.cameras`` are named, as in a config from `load`.
    """
    return {
        "cameras": tuple(config.data.cameras),
        "instruction_length": config.data.instruction_length,
    }


def roll_out(policy: Policy, config: ConfigDict, shift) -> dict[str, Any]:
    """Success rate over ``config.eval.episodes``, the tasks in equal shares.

    Returns:
      {"success_rate", "episodes", "per_task": {task: {"success_rate", "episodes", "steps"}},
      "outcomes"}, the last with 0 or 1 for each episode. Equal settings give equal episodes,
      whatever acts in them, so that outcomes can be compared one by one.
    """
    from wamjax.envs import tabletop

    tasks = task_names(config)
    ids = np.array([tabletop.task_id(t) for t in tasks])
    total = -(-config.eval.episodes // len(tasks)) * len(tasks)
    size = min(config.eval.batch_size, total)
    order = ids[np.arange(-(-total // size) * size) % len(tasks)]
    success, steps = [], []
    for start in range(0, len(order), size):
        keys = episode_keys(config, "evaluate", np.arange(start, start + size))
        done = _roll_out(policy, config, keys, jnp.asarray(order[start : start + size]), shift)
        success.append(np.asarray(done.success))
        steps.append(np.asarray(done.steps))
        say(f"  {min(start + size, total)}/{total} episodes: success "
            f"{np.concatenate(success)[:total].mean():.1%}")  # fmt: skip
    success, steps = np.concatenate(success)[:total], np.concatenate(steps)[:total]
    order = order[:total]
    per_task = {}
    for task, index in zip(tasks, ids, strict=True):
        mine = order == index
        reached = steps[mine][success[mine]]
        per_task[task] = {
            "success_rate": float(success[mine].mean()),
            "episodes": int(mine.sum()),
            "steps": float(reached.mean()) if reached.size else None,
        }
    return {
        "success_rate": float(success.mean()),
        "episodes": total,
        "per_task": per_task,
        "outcomes": "".join(map(str, success.astype(int))),
    }


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


def save_video(policy: Policy, config: ConfigDict, shift, path: pathlib.Path) -> None:
    """A few episodes of the policy, see `wamjax.viz.foreseen`."""
    from wamjax.envs import tabletop
    from wamjax.viz import foreseen

    tasks = task_names(config)
    names = [tasks[i % len(tasks)] for i in range(VIDEO_EPISODES)]
    ids = jnp.asarray([tabletop.task_id(name) for name in names])
    keys = episode_keys(config, "picture", np.arange(VIDEO_EPISODES))
    done = _roll_out(policy, config, keys, ids, shift, record=True)
    foreseen.save(policy, config, done, names, path)


def _roll_out(policy: Policy, config: ConfigDict, keys, ids, shift, record: bool = False):
    """The closed loop with the policy inside, one jitted program."""
    from wamjax.envs import tabletop

    return tabletop.rollout(
        jax.tree_util.Partial(_act, policy),
        keys,
        ids,
        shift,
        max_steps=config.eval.max_steps,
        execute=config.eval.execute,
        record=record,
        **senses(config),
    )


def _act(policy: Policy, observation, key):
    return policy.actions(policy.params, observation, key)


def episode_keys(config: ConfigDict, purpose: str, indices: np.ndarray) -> jax.Array:
    """What decides the scenes of episodes, by their numbers."""
    key = functools.partial(states.key, config.eval.seed, purpose)
    return jax.vmap(key)(jnp.asarray(indices))


def task_names(config: ConfigDict) -> list[str]:
    """``eval.tasks``, else those that the data sources collect, else all."""
    from wamjax.envs import tabletop

    tasks = config.eval.tasks or tuple(
        dict.fromkeys(t for s in config.data.sources.values() for t in s.collect.tasks)
    )
    return list(tasks or tabletop.TASKS)


def _shift(config: ConfigDict, name: str):
    """A named shift, with single dials overridden by ``config.eval.shift``."""
    from wamjax.envs import tabletop

    if config.eval.env != "tabletop":
        raise ValueError(f"eval.env {config.eval.env!r} is not 'tabletop', the one world so far")
    if name not in tabletop.SHIFTS:
        raise ValueError(f"shift {name!r} does not exist{did_you_mean(name, tabletop.SHIFTS)}; "
                         f"there are {sorted(tabletop.SHIFTS)}")  # fmt: skip
    shift, dials = tabletop.SHIFTS[name], dict(config.eval.shift)
    known = [f.name for f in dataclasses.fields(shift)]
    for dial in dials:
        if dial not in known:
            raise ValueError(f"eval.shift.{dial} is no dial{did_you_mean(dial, known)}; "
                             f"there are {known}")  # fmt: skip
    return dataclasses.replace(shift, **dials)


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


def main(argv: list[str]) -> None:
    """Entry point for absl."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; did you forget a '--'?")
    quiet()
    asked = flags.FLAGS
    if asked.latency:
        policy, config, _ = load(asked.workdir, asked.step, asked.mode, asked.planner)
        print(json.dumps({"latency_ms": latency(policy, config)}))
        return
    config = find(asked.workdir, asked.step).config
    label = _choose(config, asked)
    if config.eval.episodes < 1:
        raise app.UsageError(f"{config.eval.episodes} episodes: give --episodes")
    run(config, asked.workdir, asked.step, asked.mode, asked.shift, asked.planner, label)


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
    hardware.restart_with_huge_pages()
    define_flags()
    app.run(main)
