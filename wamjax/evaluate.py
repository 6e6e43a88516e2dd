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

import json
import os
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

import wamjax
from wamjax import cli, closed_loop, files, trained, wam
from wamjax.console import say
from wamjax.envs.outcomes import Outcomes
from wamjax.envs.world import Dials, World, open_world, shift_of
from wamjax.trained import Policy
from wamjax.training import checkpoint
from wamjax.training.checkpoint import find

VIDEO_EPISODES = 4


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
      mode: how to act, see `wamjax.wam.fast_wam.uses.MODES`; the variant's default.
      shift: name of a shift of the world.
      planner, ema: see `load`.
      label: what else is not as after training, for the files' names.

    Returns:
      what was written to eval.json; in a process that is not the first, without the latency.

    Raises:
      ValueError: see `check`.
    """
    from wamjax.viz import plots

    workdir = files.path(workdir, "--workdir")
    world = open_world(config.eval.env)
    dials = shift_of(world, shift, config.eval.shift)
    parts = [mode, shift if shift != "none" else None, step]
    parts += [files.name(planner) if planner else None, label or None]
    parts += [None if ema is None else checkpoint.name_of(ema)]
    suffix = "".join(f"_{p}" for p in parts if p is not None)
    policy, own, step = trained.load(workdir, step, mode, planner, ema)
    config = config.copy_and_resolve_references()
    config.data.cameras = own.data.cameras
    config.data.image_size = own.data.image_size
    closed_loop.check(config, policy.objective, world)
    result = {"step": step, "variant": wam.label(own), "mode": mode, "shift": shift}
    about = {"env": world.name, "seed": config.eval.seed, "versions": versions(world)}
    asked = result | about | {"planner": planner, "eval": json.loads(config.eval.to_json())}
    path = workdir / f"eval{suffix}.json"
    record = Outcomes(workdir / f"episodes{suffix}.jsonl", asked, anew=path.exists())
    result |= closed_loop.roll_out(policy, config, dials, world, record)
    if config.eval.untrained:
        fresh = trained.untrained(policy, own)
        fresh = closed_loop.roll_out(fresh, config, dials, world, record, "untrained")
        result["untrained_success_rate"] = fresh["success_rate"]
        say(f"untrained: success {fresh['success_rate']:.1%}")
    if "blind_success_rate" in result:
        say(f"without looking: success {result['blind_success_rate']:.1%}")
    result |= about
    if jax.process_index() == 0:
        result["latency_ms"] = trained.latency(policy, config)
        (workdir / "media").mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps(result, indent=2) + "\n")
        plots.success(result, workdir / "media" / f"success{suffix}.png")
        video = workdir / "media" / f"rollout{suffix}.mp4"
        save_video(policy, config, world, dials, result["outcomes"], video)
        p50, p99 = result["latency_ms"]["p50"], result["latency_ms"]["p99"]
        say(f"success {result['success_rate']:.1%} of {result['episodes']} episodes, "
            f"latency p50 {p50:.1f} ms, p99 {p99:.1f} ms")  # fmt: skip
    return result


def save_video(
    policy: Policy, config: ConfigDict, world: World, shift: Dials, outcomes: str, path
) -> None:
    """Successes and failures of those that were counted, see `wamjax.viz.foreseen`."""
    from wamjax.viz import foreseen

    marks = np.array([mark == "1" for mark in outcomes])
    some = [np.flatnonzero(marks == good)[: VIDEO_EPISODES // 2] for good in (True, False)]
    rest = np.setdiff1d(np.arange(len(marks)), np.concatenate(some))
    numbers = np.concatenate([*some, rest])[:VIDEO_EPISODES]
    tasks = closed_loop.task_names(config, world)
    names = [tasks[i % len(tasks)] for i in numbers]
    keys = closed_loop.episode_keys(config, "evaluate", numbers)
    done = closed_loop.play(policy, config, world, names, keys, shift, record=True)
    foreseen.save(policy, config, done, path)


def versions(world: World) -> dict[str, str]:
    """Of what was measured: this package, JAX, and what simulates."""
    return {"wamjax": wamjax.__version__, "jax": jax.__version__} | dict(world.versions)


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
        policy, config, _ = trained.load(asked.workdir, asked.step, asked.mode, asked.planner, ema)
        print(json.dumps({"latency_ms": trained.latency(policy, config)}))
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
