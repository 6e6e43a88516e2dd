"""Compares the frames and values that a policy predicts with what then happens.

    python -m wamjax.foresight --workdir=runs/cosmos
    python -m wamjax.foresight --workdir=runs/cosmos --mode=plan --planner=runs/planner

Executes whole chunks, so that the prediction for the end of a chunk can be compared with the
observation there. Writes foresight.json and, for whatever the policy predicts, media/futures.png
(now, predicted, real), media/values.png (predicted value against achieved return) and
media/levels.png (loss by noise level, on a batch of the run's data). For Cosmos Policy it also
reports how much mode "frozen" changes the actions.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Bool, Float, UInt8
from ml_collections import ConfigDict

from wamjax import cli, files, wam
from wamjax.console import say
from wamjax.envs.world import open_world
from wamjax.runs import closed_loop, trained
from wamjax.training import checkpoint
from wamjax.viz import figures, intervals
from wamjax.wam.cosmos_policy.sampling import frozen_error

BINS = 10
CHANGED = 0.1  # of a colour from 0 to 1, by which a pixel counts as changed
# Ratios of noise to signal: of a clip of 11 slots training draws a quarter above 80, up to 282
# evenly, and one in a hundred below 1.
SIGMAS = np.geomspace(0.05, 300, 14)
SHOWN = 6  # plans on the picture


class Plans(NamedTuple):
    """Holds the predictions at each plan of each episode, and what followed.

    Attributes:
      value: predicted return from the end of the chunk on; None if the policy predicts no values.
      achieved: that return.
      open: whether the task was not done yet when the plan was made; only such plans count.
      reuse: for mode "frozen" of Cosmos Policy, see `cosmos_sampling.frozen_error`: "mean" and
        "relative", over the batch of all episodes.
      now, predicted, real: the picture at the plan, the one predicted for the end of the chunk
        (None if the policy imagines nothing, or plans) and the one at the end of the chunk.
    """

    value: Float[np.ndarray, "e p"] | None
    achieved: Float[np.ndarray, "e p"]
    open: Bool[np.ndarray, "e p"]
    reuse: Float[np.ndarray, "e p 2"] | None
    now: UInt8[np.ndarray, "e p H W 3"]
    predicted: UInt8[np.ndarray, "e p H W 3"] | None
    real: UInt8[np.ndarray, "e p H W 3"]


def watch(policy: trained.Policy, config: ConfigDict, episodes: int) -> Plans:
    """Rolls out all episodes in one program, in the world without a shift.

    Args:
      config: config of the run; its ``eval`` part sets the tasks and their length, ``data.chunk``
        the number of executed actions per plan: all.
    """
    world, chunk = open_world(config.eval.env), config.data.chunk
    config = config.copy_and_resolve_references()
    # The end of every chunk is seen.
    config.eval.max_steps, config.eval.execute = config.eval.max_steps // chunk * chunk, chunk
    config.eval.join, config.eval.delay = "sync", 0
    tasks, numbers = closed_loop.task_names(config, world), np.arange(episodes)
    names = [tasks[i % len(tasks)] for i in numbers]
    policy = dataclasses.replace(policy, cameras=tuple(config.data.cameras))
    keys = closed_loop.episode_keys(config, "evaluate", numbers)
    recording = closed_loop.play(
        policy, config, world, names, keys, {}, record=True, function=_foresee
    )
    steps, frames = recording.steps[:, None], np.asarray(policy.see(recording.frames))
    start = np.arange(0, frames.shape[1] - 1, chunk)
    discount = policy.objective.discount
    to_go = np.maximum(steps - (start + chunk), 0)  # as `wamjax.data.windows.outcome` counts
    success = recording.success[:, None]
    foreseen = {k: np.swapaxes(x, 0, 1) for k, x in recording.extras.items()}
    return Plans(
        value=foreseen.get("value"),
        achieved=np.where(success, discount**to_go, 0.0),
        open=~success | (start < steps),
        reuse=foreseen.get("reuse"),
        now=frames[:, start],
        predicted=foreseen.get("picture"),
        real=frames[:, start + chunk],
    )


def _foresee(policy: trained.Policy, observation, key):
    """Returns actions and predictions; the sampling that they share is compiled once."""
    objective, arguments = policy.objective, (policy.params, policy.normalizers, observation, key)
    predictions = {}
    if objective.imagines and policy.mode != "plan":  # a plan may choose another future
        predictions["picture"] = objective.imagine(*arguments)[:, -1]
    if objective.judges:
        predictions["value"] = objective.expect(*arguments, policy.mode)
    if "frozen" in objective.modes:
        error = frozen_error(objective, *arguments)
        size = len(observation["proprio"])
        errors = jnp.stack([error["mean"], error["relative"]])
        predictions["reuse"] = jnp.broadcast_to(errors, (size, 2))
    return policy.actions(policy.params, observation, key), predictions


def calibration(value: np.ndarray, achieved: np.ndarray) -> dict[str, Any]:
    """Compares predicted values with achieved returns, both in [0, 1].

    Returns:
      {"plans", "correlation" (Pearson), "error" (mean over plans of the distance between the means
      of their bin), "rmse", "rmse_constant" (of the best constant), "bins": [{"predicted",
      "achieved", "low", "high", "plans"}]}; low and high are a 95 % interval of the bin's mean.
      Plans of one episode are not independent, so it is rather narrow.
    """
    bins, error = [], 0.0
    place = np.minimum((value * BINS).astype(int), BINS - 1)
    for b in np.unique(place):
        in_bin = place == b
        mean = intervals.bootstrap([[x] for x in achieved[in_bin]])
        error += in_bin.mean() * abs(value[in_bin].mean() - mean.mean)
        bins.append({"predicted": float(value[in_bin].mean()), "achieved": mean.mean,
                     "low": mean.low, "high": mean.high, "plans": int(in_bin.sum())})  # fmt: skip
    varies = value.std() > 0 and achieved.std() > 0
    return {
        "plans": len(value),
        "correlation": float(np.corrcoef(value, achieved)[0, 1]) if varies else None,
        "error": float(error),
        "rmse": float(np.sqrt(np.mean((value - achieved) ** 2))),
        "rmse_constant": float(achieved.std()),
        "bins": bins,
    }


def frames(plans: Plans) -> dict[str, float]:
    """Compares predicted frames with real ones, over all plans that count.

    Returns:
      {"psnr", "psnr_still": of what was seen when planning, as if nothing moved; "relative": mean
      squared error of the prediction over that of the still picture; "changed": the share of pixels
      that change by more than `CHANGED`, and "psnr_changed", "psnr_changed_still" of these}; in
      decibels. Most of a picture stays as it was, so over all pixels little can be told.
    """
    predicted, now, real = (
        np.float64(x[plans.open]) / 255 for x in (plans.predicted, plans.now, plans.real)
    )
    errors = {"": (predicted - real) ** 2, "_still": (now - real) ** 2}
    changed = np.abs(now - real).max(axis=-1) > CHANGED
    result = {f"psnr{name}": _decibels(x) for name, x in errors.items()}
    result["relative"] = float(errors[""].mean() / max(errors["_still"].mean(), 1e-10))
    result["changed"] = float(changed.mean())
    if changed.any():
        result |= {f"psnr_changed{name}": _decibels(x[changed]) for name, x in errors.items()}
    return result


def _decibels(squared: np.ndarray) -> float:
    return float(-10 * np.log10(max(squared.mean(), 1e-10)))


def by_level(policy: trained.Policy, config: ConfigDict) -> dict[str, list[float]]:
    """Returns losses at `SIGMAS`, on one batch of the run's data."""
    from wamjax.data import pipeline

    batch = next(pipeline.open_data(config, known=policy.words)[2])
    batch = {k: jnp.asarray(batch[k]) for k in policy.objective.batch_spec(1)}
    args = policy.params, batch, jax.random.key(0), jnp.asarray(SIGMAS, jnp.float32)
    found = jax.jit(policy.objective.by_level)(*args)
    losses = {k: v for k, v in found.items() if k.startswith("loss")}
    return {"sigma": SIGMAS.tolist()} | {k: np.asarray(v).tolist() for k, v in losses.items()}


def run(
    workdir, step=None, mode=None, planner=None, episodes: int = 96, ema: bool | None = None
) -> dict[str, Any]:
    """Measures everything that a run's policy predicts; see the module and `trained.load`.

    Returns:
      the contents of foresight.json.

    Raises:
      ValueError: the policy predicts neither frames nor values.
    """
    workdir = files.path(workdir, "--workdir")
    average = None if ema is None else checkpoint.name_of(ema)
    parts = mode, step, planner and files.name(planner), average
    suffix = "".join(f"_{x}" for x in parts if x is not None)
    policy, config, step = trained.load(workdir, step, mode, planner, ema)
    objective = policy.objective
    if not (objective.imagines or objective.judges):
        raise ValueError(f"{workdir}: {wam.label(config)!r} predicts neither frames nor "
                         "values, so there is nothing to compare")  # fmt: skip
    result: dict[str, Any] = {"step": step, "mode": mode, "episodes": episodes}
    if objective.denoises:  # first, since it wants the data
        result["levels"] = by_level(policy, config)
        draw_levels(result["levels"], workdir / "media" / f"levels{suffix}.png")
    plans = watch(policy, config, episodes)
    if plans.value is not None:
        result["values"] = calibration(plans.value[plans.open], plans.achieved[plans.open])
        draw_values(result["values"], workdir / "media" / f"values{suffix}.png")
        say("values: correlation {correlation}, rmse {rmse:.3f} (of a constant "
            "{rmse_constant:.3f})".format(**result["values"]))  # fmt: skip
    if plans.predicted is not None:
        result["frames"] = frames(plans)
        draw_futures(plans, workdir / "media" / f"futures{suffix}.png")
        say("frames: {psnr:.1f} dB, a still picture {psnr_still:.1f}".format(**result["frames"]))
        if "psnr_changed" in result["frames"]:
            say("of the {changed:.1%} of pixels that change: {psnr_changed:.1f} dB, a still "
                "picture {psnr_changed_still:.1f}".format(**result["frames"]))
    if plans.reuse is not None:
        mean, relative = plans.reuse.mean(axis=(0, 1))
        result["frozen"] = {"mean": float(mean), "relative": float(relative)}
        say(f"mode frozen: actions change by {relative:.1%} of how they vary")
    text = json.dumps(result, indent=2) + "\n"
    files.write_text(workdir / f"foresight{suffix}.json", text)
    return result


# ---- pictures ----


def draw_values(found: dict[str, Any], path: files.Path) -> None:
    """Plots achieved over predicted values, one dot per bin, sized by its number of plans."""
    figure = figures.figure(4.6, 4.2)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=figures.MUTED, lw=1, ls="--")
    for b in found["bins"]:
        arms = [[b["achieved"] - b["low"]], [b["high"] - b["achieved"]]]
        axes.errorbar(b["predicted"], b["achieved"], yerr=arms, color=figures.COLORS[0], lw=1)
        size = 12 + 300 * b["plans"] / found["plans"]
        axes.scatter(b["predicted"], b["achieved"], size, color=figures.COLORS[0], alpha=0.7)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted value", ylabel="achieved return")
    correlation = found["correlation"]
    said = "" if correlation is None else f", correlation {correlation:.2f}"
    axes.set_title(f"{found['plans']} plans{said}", loc="left", fontsize=10)
    figures.plain(axes)
    figures.write(figure, path)


def draw_futures(plans: Plans, path: files.Path) -> None:
    """Draws now, predicted and real for the plans during which the picture changed most."""
    from wamjax.viz import sheet

    change = np.abs(np.float32(plans.real) - plans.now).mean((2, 3, 4)) * plans.open
    best = np.sort(np.argsort(-change.max(axis=1))[:SHOWN])  # an episode each
    rows = [(e, int(change[e].argmax())) for e in best]
    clips = np.stack([[plans.now[r], plans.predicted[r], plans.real[r]] for r in rows])
    titles = [f"episode {e}, plan {p}: now, predicted, real" for e, p in rows]
    sheet.save(clips, path, titles)


def draw_levels(found: dict[str, list[float]], path: files.Path) -> None:
    """Plots loss over the noise-to-signal ratio, one line per use."""
    figure = figures.figure(6, 3.6)
    axes = figure.add_subplot()
    for colour, (name, values) in zip(figures.COLORS, list(found.items())[1:], strict=False):
        axes.plot(found["sigma"], values, ".-", color=colour, label=name.removeprefix("loss_"))
    axes.set(xscale="log", yscale="log", xlabel="noise-to-signal ratio", ylabel="loss")
    axes.legend(frameon=False, fontsize=8)
    figures.plain(axes)
    figures.write(figure, path)


def define_flags() -> None:
    """Defines the flags; not on import, since several entry points share flag names."""
    flags.DEFINE_string("workdir", None, "run to analyze", required=True)
    flags.DEFINE_integer("step", None, "checkpoint; the newest by default")
    flags.DEFINE_string("mode", None, "mode of the policy; its own by default")
    flags.DEFINE_string("planner", None, "run whose world model and value function do the planning")
    flags.DEFINE_integer("episodes", 96, "number of episodes, cycling through the evaluation tasks")
    checkpoint.define_ema_flag()


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    options = flags.FLAGS
    ema = checkpoint.asked_ema()
    run(options.workdir, options.step, options.mode, options.planner, options.episodes, ema)


if __name__ == "__main__":
    cli.run(main, define_flags, huge_pages=True)
