"""Times a training step and an action chunk of every variant of Fast-WAM.

    python -m wamjax.bench fast_wam --variants=fast,idm --scale=2

The report compares them with the matmul rate of the same run, and with the public PyTorch code at
the same shape. The VAE and the text encoder are excluded on both sides.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from typing import Any

import jax

from wamjax import config as configs
from wamjax import flops, hardware
from wamjax.bench.timing import random_batch, seconds_of
from wamjax.data.spec import DataSpec
from wamjax.training import optim, sharding
from wamjax.training import state as states
from wamjax.training.step import make_train_step, model_flops
from wamjax.wam import build
from wamjax.wam.fast_wam import presets
from wamjax.wam.fast_wam.uses import MODES

# The official PyTorch code on an idle 2-core machine at this shape: seconds of a training step and
# of an action chunk, (fastest, slowest) of the repeats. no_cotrain and optional_idm have no code of
# their own: the first is fast's code with a zero weight, the second idm's training and fast's
# acting. There is no code for ladder.
TORCH_SECONDS = {
    ("fast", "train"): (1.4, 1.8),
    ("joint", "train"): (1.4, 1.8),
    ("no_cotrain", "train"): (1.4, 1.8),
    ("idm", "train"): (2.9, 3.3),
    ("optional_idm", "train"): (2.9, 3.3),
    ("fast", "direct"): (0.23, 0.25),
    ("no_cotrain", "direct"): (0.23, 0.25),
    ("optional_idm", "direct"): (0.23, 0.25),
    ("joint", "joint"): (1.3, 1.4),
    ("idm", "imagine"): (1.3, 1.6),
    ("optional_idm", "imagine"): (1.3, 1.6),
}
TRAIN_BATCH = 4


def fast_wam_config(variant: str, scale: int = 1) -> configs.ConfigDict:
    """Returns the benchmark's config: LIBERO's token counts, widths 384 and 128 (times `scale`), 8
    layers."""
    config = configs.base_config()
    presets.fast_wam(config, variant, "2026-08")
    presets.wan22_5b(config)
    presets.wan22_windows(config)
    model = config.model
    model.layers, model.heads, model.head_dim, model.remat = 8, 6, 64 * scale, "none"
    model.video.width, model.video.ffn = 384 * scale, 1536 * scale
    model.action.width, model.action.ffn = 128 * scale, 512 * scale
    model.context_width, model.unroll = 512, 8
    config.data.batch_size = TRAIN_BATCH
    return config


def run(variants: list[str], scale: int, repeats: int, act_batch: int = 1) -> dict[str, Any]:
    """Times all variants and returns the report.

    Args:
      variants: variants to time.
      scale: factor of all widths.
      repeats: timed training steps; action chunks are timed twice as often.
      act_batch: observations per call of the policy.
    """
    spec = DataSpec(
        cameras={"image": (224, 224), "wrist_image": (224, 224)},
        proprio_dim=8, action_dim=7, chunk=32, frames=9, frame_stride=4,
        instruction_length=128, control_hz=20.0,
    )  # fmt: skip
    # One device, as for the matmul.
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    rate = hardware.measure_matmul_rate(seconds=1.0)
    rows = []
    for variant in variants:
        config = fast_wam_config(variant, scale)
        objective = build(config, spec)
        with jax.set_mesh(mesh):
            train = _train(objective, config, repeats)
        rows.append({"variant": variant, "what": "train", **train})
        for mode in MODES[variant]:
            rows.append(
                {"variant": variant, "what": mode, **_act(objective, mode, repeats, act_batch)}
            )
        gc.collect()
    rate = max(rate, hardware.measure_matmul_rate(seconds=1.0))
    for row in rows:
        row["flop_utilisation"] = row["flops"] / row["seconds"] / rate
        torch = TORCH_SECONDS.get((row["variant"], row["what"]))
        # The public code was timed only at scale 1, and acting only at batch 1.
        same = scale == 1 and (act_batch == 1 or row["what"] == "train")
        known = same and torch
        row["times_faster_than_torch"] = [t / row["seconds"] for t in torch] if known else None
    return {
        "benchmark": "fast_wam",
        "device": jax.devices()[0].device_kind,
        "matmul_flops_per_second": rate,
        "denominator": "float32 1024^3 matmul, best of the run",
        "scale": scale,
        "act_batch": act_batch,
        "rows": rows,
    }


def _train(objective, config, repeats: int) -> dict[str, float]:
    tx = optim.make(config)
    state = jax.jit(functools.partial(states.create, objective, tx, config))()
    batch = random_batch(objective.batch_spec(TRAIN_BATCH))
    step = jax.jit(make_train_step(objective, tx, config), donate_argnums=0)
    work = model_flops(objective, config, state.params, batch)

    def call():
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    return {"flops": work, **seconds_of(call, repeats)}


def _act(objective, mode: str, repeats: int, size: int) -> dict[str, float]:
    params = jax.jit(lambda: objective.prepare(objective.init(jax.random.key(0))))()
    spec = objective.batch_spec(size)
    observation = random_batch({k: spec[k] for k in ("latents", "context", "proprio")})
    observation["latents"] = observation["latents"][:, :1]
    identity = Identity()
    act = jax.jit(
        lambda p, o, k: objective.policy(p, {"actions": identity, "proprio": identity}, o, k, mode)
    )
    arguments = params, observation, jax.random.key(0)
    work = flops.count(act, *arguments)
    return {"flops": work, **seconds_of(lambda: act(*arguments), 2 * repeats)}


@dataclasses.dataclass(frozen=True)
class Identity:
    """Stands in for normalization, since the benchmark has no data."""

    def forward(self, x):
        """Returns x unchanged."""
        return x

    inverse = forward


def show(report: dict[str, Any]) -> None:
    """Prints the report as a table."""
    print(f"{report['benchmark']} on {report['device']}, {report['denominator']}: "
          f"{report['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s")  # fmt: skip
    print(f"{'variant':<14}{'what':<10}{'GFLOP':>9}{'best s':>9}{'median s':>10}{'of matmul':>11}"
          f"{'vs torch':>14}")  # fmt: skip
    for row in report["rows"]:
        torch = row["times_faster_than_torch"]
        ratio = f"{torch[0]:.1f}-{torch[1]:.1f}x" if torch else "-"
        print(f"{row['variant']:<14}{row['what']:<10}{row['flops'] / 1e9:>9.1f}"
              f"{row['seconds']:>9.3f}{row['median_seconds']:>10.3f}"
              f"{row['flop_utilisation']:>11.1%}{ratio:>14}")  # fmt: skip
