"""Evaluates a trained policy in closed loop and reports its success rate.

    python -m wamjax.evaluate --workdir=runs/quickstart
    python -m wamjax.evaluate --workdir=runs/quickstart --shift=lighting --mode=imagine
    python -m wamjax.evaluate --workdir=runs/quickstart --dials=colours=0.1,action_delay=2
    python -m wamjax.evaluate --workdir=runs/quickstart --tasks=pick_red --execute=4 --episodes=96
    python -m wamjax.evaluate --workdir=runs/realtime --join=blend --delay=3 --execute=6
    python -m wamjax.evaluate --workdir=runs/cosmos --mode=plan --planner=runs/planner
    python -m wamjax.evaluate --workdir=runs/judge --mode=adaptive:0.01
    python -m wamjax.evaluate --workdir=runs/judge --mode=adaptive:0:12
    python -m wamjax.evaluate --workdir=runs/aloha --episodes=500 --workers=8
    python -m wamjax.evaluate --workdir=runs/aloha --env=remote:at=127.0.0.1:7000
    python -m wamjax.evaluate --workdir=runs/quickstart --latency

Writes eval.json (success_rate, episodes, per_task, latency_ms, ...), a plot, and a video that shows
predicted frames next to real ones. The names of the files contain the options, so the evaluation
after training is not overwritten.
"""

from __future__ import annotations

import json
import re

from absl import app, flags
from ml_collections import ConfigDict

from wamjax import cli
from wamjax.envs.worker import with_option
from wamjax.runs import evaluation, trained
from wamjax.training import checkpoint
from wamjax.training.checkpoint import find


def define_flags() -> None:
    """Defines the flags; not on import, since several entry points share flag names."""
    flags.DEFINE_string("workdir", None, "run to evaluate", required=True)
    flags.DEFINE_integer("step", None, "checkpoint; the newest by default")
    flags.DEFINE_string(
        "mode", None, "direct, joint, imagine, plan, ...; the policy's own by default"
    )
    flags.DEFINE_string("planner", None, "run whose world model and value function do the planning")
    flags.DEFINE_string("shift", "none", "named shift of the world, such as lighting")
    flags.DEFINE_list("dials", [], "strength of each change, such as lighting=0.3,distractors=1")
    flags.DEFINE_string(
        "env", None, "another world than config.eval.env, with the same cameras and state"
    )
    flags.DEFINE_list("tasks", None, "tasks; those of the training data by default")
    flags.DEFINE_integer("episodes", None, "number of episodes; config.eval.episodes by default")
    flags.DEFINE_integer("execute", None, "actions executed of each plan")
    flags.DEFINE_string("join", None, "how one chunk follows another: one of envs.joins.WAYS")
    flags.DEFINE_integer("delay", None, "control steps between an observation and its plan")
    flags.DEFINE_integer(
        "workers", None, "processes of a simulator; one per processor by default"
    )
    flags.DEFINE_bool("latency", False, "only measure the latency of one plan")
    checkpoint.define_ema_flag()


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    options, ema = flags.FLAGS, checkpoint.asked_ema()
    if options.latency:
        policy, config, _ = trained.load(
            options.workdir, options.step, options.mode, options.planner, ema
        )
        print(json.dumps({"latency_ms": trained.latency(policy, config)}))
        return
    config = find(options.workdir, options.step).config
    label = _choose(config, options)
    if config.eval.episodes < 1:
        raise app.UsageError(f"{config.eval.episodes} episodes: give --episodes")
    evaluation.run(
        config,
        options.workdir,
        options.step,
        options.mode,
        options.shift,
        options.planner,
        label,
        ema,
    )


def _choose(config: ConfigDict, options) -> str:
    """Puts the options into ``config.eval``; returns them as part of a file's name."""
    parts = []
    for key in ("env", "episodes", "execute", "tasks", "join", "delay"):
        if (value := options[key].value) is not None:
            config.eval[key] = tuple(value) if key == "tasks" else value
            text = "-".join(value) if key == "tasks" else f"{key}{value}"
            parts.append(re.sub(r"[^\w.-]+", "-", text))  # of a file's name
    if options.workers is not None:
        config.eval.env = with_option(config.eval.env, "workers", options.workers)
    for dial in options.dials:
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
