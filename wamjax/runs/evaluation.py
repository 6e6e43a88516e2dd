"""Evaluates a run in closed loop and writes eval.json, a plot and a video."""

from __future__ import annotations

import json
import os
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import wamjax
from wamjax import files, wam
from wamjax.console import say
from wamjax.envs.outcomes import Outcomes
from wamjax.envs.world import Dials, World, open_world, shift_of
from wamjax.runs import closed_loop, trained
from wamjax.runs.trained import Policy
from wamjax.training import checkpoint

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

    Settings that differ from training (mode, shift, step, planner, ema) become part of the file
    names.

    Args:
      config: its ``eval`` part holds the settings; the model is built from the checkpoint's config.
      workdir: folder of the run.
      step: checkpoint to evaluate; the newest by default.
      mode: how to act, see `wamjax.wam.fast_wam.uses.MODES`; the variant's default if None.
      shift: name of a shift of the world.
      planner, ema: see `load`.
      label: other differences from training, for the file names.

    Returns:
      the contents of eval.json; without the latency in processes other than the first.

    Raises:
      ValueError: see `check`.
    """
    from wamjax.viz import plots

    workdir = files.path(workdir, "--workdir")
    world = open_world(config.eval.env)
    dials = shift_of(world, shift, config.eval.shift)
    parts = [mode and mode.replace(":", "-"), shift if shift != "none" else None, step]
    parts += [files.name(planner) if planner else None, label or None]
    parts += [None if ema is None else checkpoint.name_of(ema)]
    suffix = "".join(f"_{p}" for p in parts if p is not None)
    policy, trained_config, step = trained.load(workdir, step, mode, planner, ema)
    config = config.copy_and_resolve_references()
    config.data.cameras = trained_config.data.cameras
    config.data.image_size = trained_config.data.image_size
    closed_loop.check(config, policy.objective, world)
    result = {"step": step, "variant": wam.label(trained_config), "mode": mode, "shift": shift}
    about = {"env": world.name, "seed": config.eval.seed, "versions": versions(world)}
    settings = result | about | {"planner": planner, "eval": json.loads(config.eval.to_json())}
    path = workdir / f"eval{suffix}.json"
    record = Outcomes(workdir / f"episodes{suffix}.jsonl", settings, anew=path.exists())
    result |= closed_loop.roll_out(policy, config, dials, world, record)
    if policy.adapts:
        result |= _climbed(policy, result["rungs"])
    if config.eval.untrained:
        fresh = trained.untrained(policy, trained_config)
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


def _climbed(policy: Policy, shares: list[float]) -> dict[str, Any]:
    """Returns the proposals and milliseconds of each rung, its share of plans, and the mean
    time."""
    proposals, milliseconds = list(policy.objective.rungs), np.asarray(policy.milliseconds)
    shares = shares + [0.0] * (len(proposals) - len(shares))
    mean = float(np.dot(shares, milliseconds))
    say(f"{proposals} proposals in {', '.join(f'{x:.0%}' for x in shares)} of the plans, "
        f"{mean:.1f} ms on average")  # fmt: skip
    rungs = {"rungs": shares, "rung_proposals": proposals, "mean_ms": mean}
    return rungs | {"rung_ms": [round(float(x), 3) for x in milliseconds]}


def save_video(
    policy: Policy, config: ConfigDict, world: World, shift: Dials, outcomes: str, path
) -> None:
    """Writes a video of successes and failures among the counted episodes, see
    `wamjax.viz.foreseen`."""
    from wamjax.viz import foreseen

    marks = np.array([mark == "1" for mark in outcomes])
    chosen = [np.flatnonzero(marks == good)[: VIDEO_EPISODES // 2] for good in (True, False)]
    rest = np.setdiff1d(np.arange(len(marks)), np.concatenate(chosen))
    numbers = np.concatenate([*chosen, rest])[:VIDEO_EPISODES]
    shown = len(numbers)
    if world.jitted:  # the program of the evaluation, if it is filled up to as many episodes
        numbers = np.resize(numbers, max(shown, closed_loop.batch_size(config, len(marks))))
    tasks = closed_loop.task_names(config, world)
    names = [tasks[i % len(tasks)] for i in numbers]
    keys = closed_loop.episode_keys(config, "evaluate", numbers)
    recording = closed_loop.play(policy, config, world, names, keys, shift, record=shown)
    foreseen.save(policy, config, recording.first(shown), path)


def versions(world: World) -> dict[str, str]:
    """Returns the versions of this package, JAX and the simulator."""
    return {"wamjax": wamjax.__version__, "jax": jax.__version__} | dict(world.versions)
