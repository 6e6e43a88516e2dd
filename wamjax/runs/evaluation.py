"""The evaluation of a run in closed loop, as files: eval.json, plot and video."""

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
    parts = [mode and mode.replace(":", "-"), shift if shift != "none" else None, step]
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
    if policy.adapts:
        result |= _climbed(policy, result["rungs"])
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


def _climbed(policy: Policy, shares: list[float]) -> dict[str, Any]:
    """What the rungs of a ladder are, what they take, and what was spent on average."""
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
