"""Applies published settings of Cosmos Policy to a config."""

from __future__ import annotations

from collections.abc import Sequence

from wamjax import config as configs
from wamjax.wam.cosmos_policy import layouts
from wamjax.wam.fast_wam import presets as fast_wam

TEXT_ROWS = 512  # rows of T5 embeddings; padding is zero


def objective(config, layout: str | Sequence[str]) -> None:
    """Sets the objective on the slots of a layout, with the numbers that all benchmarks share.

    Args:
      layout: a key of `LAYOUTS`, or custom words, see `layouts`.
    """
    slot_layout, data = layouts.named(layout), config.data
    config.objective.name = "cosmos_policy"
    config.objective.slots = slot_layout.words
    config.objective.infer_steps, config.objective.solver = 5, "exponential"
    data.cameras, data.chunk = slot_layout.cameras, slot_layout.chunk
    data.frames, data.frame_stride, data.outcome = 2, slot_layout.chunk, True
    data.normalization, data.padding = "min_max", "hold:.*"


def predict2_2b(config) -> None:
    """Sets Cosmos-Predict2-2B-Video2World, its video codec and T5-11B embeddings of 64 rows."""
    model = config.model
    model.layers, model.heads, model.head_dim = 28, 16, 128
    model.video.width, model.video.ffn, model.modulation_rank = 2048, 8192, 256
    model.patch, model.time_scale, model.rope_scale = 2, 1.0, (1.0, 3.0, 3.0)
    model.codec.kind, model.remat = "wan2.1", "auto"
    model.residual = "compute"  # the public code runs all of it in bfloat16
    model.text.kind, model.context_width, model.context_rows = "context", 1024, TEXT_ROWS
    config.data.instruction_length = 64
    config.objective.augment = "strong"
    config.optim.freeze = ("codec/.*",)


def training(config, anchors: tuple[int, int]) -> None:
    """Sets optimiser and schedule of all published policies (specification, section 5.7).

    Args:
      anchors: steps at which the warm-up ends and at which the rate drops.
    """
    optim = config.optim
    optim.learning_rate, optim.b1, optim.b2, optim.weight_decay = 1e-4, 0.9, 0.99, 0.1
    optim.clip_norm, optim.ema_decay = 1.0, 0.0
    optim.anchor_steps = (0, anchors[0], anchors[1], anchors[1])
    optim.anchor_factors = (1e-6, 1.0, 0.3, 0.06)
    config.precision.compute = "bfloat16"
    config.mesh.fsdp, config.mesh.data = 8, -1


def declare(config, control_hz: float) -> None:
    """Declares the published data sizes, for the slots that `objective` set, so that the model can
    be built without data."""
    sizes, layout = config.data.declared, layouts.parse(config.objective.slots)
    sizes.camera_size, sizes.control_hz = (224, 224), control_hz
    sizes.action_dim = layout.statistics["actions"]
    sizes.proprio_dim = layout.statistics.get("proprio", 0)


def planner(config, rollouts: str = "") -> None:
    """Sets up fine-tuning of world model and V(s') on rollouts of policies (specification, section
    5.5).

    A tenth of a batch is demonstrations, for the policy; half of the rest trains the world model
    and half the value, on rollouts of which half failed.

    Args:
      rollouts: their folder; "" if the sources name some already.
    """
    config.objective.value, config.objective.mix = "value_v", (2, 9, 9)
    sources = config.data.sources
    for outcome in ("success", "failure"):
        name = {"success": "successes", "failure": "failures"}[outcome]
        if rollouts:
            sources[name] = configs.source(path=rollouts, rollout=True, ended=outcome)
        sources[name].weight = 9.0
    sources.demos.weight = 2.0
    config.data.batch_size = max(config.data.batch_size // 20, 1) * 20


def miniature(config) -> None:
    """Shrinks a published config for a laptop: small pictures, a codec of pixels."""
    model = config.model
    model.layers, model.heads, model.head_dim, model.remat = 2, 2, 12, "none"
    model.video.width, model.video.ffn, model.modulation_rank = 24, 48, 8
    model.context_width, model.codec.kind, model.codec.patch = 32, "pixel", 4
    config.optim.freeze = ()
    config.precision.compute = "float32"
    config.data.batch_size, config.mesh.fsdp, config.total_steps = 40, 1, 10
    # The chunk of 50 x 14 numbers has to fit a latent frame.
    config.data.declared.camera_size = (32, 32)


def stand_ins(config, path: str) -> None:
    """Replaces all sources by random data, without failures."""
    for name, entry in config.data.sources.items():
        options = dict(weight=entry.weight, rollout=entry.rollout)
        config.data.sources[name] = configs.source(path=path, stand_in=12, **options)
    config.data.embeddings = f"{path}-text"


def tabletop(config) -> None:
    """Sets a small model and its training on the embedded world, sized for two CPU cores."""
    config.objective.name = "cosmos_policy"
    fast_wam.tabletop(config)
    objective(config, "tabletop")


def tabletop_debug(config) -> None:
    """Sets everything to run in under a minute; the model learns nothing."""
    several = [s for s in config.data.sources.values() if s.rollout and s.collect.episodes]
    fast_wam.tabletop_debug(config)
    for source in several:  # with fewer episodes, none might fail
        source.collect.episodes = 24
    config.data.batch_size = 40
    config.model.head_dim, config.model.modulation_rank = 12, 8
    config.model.video.width, config.model.video.ffn = 24, 48
    plan = config.objective.plan
    plan.proposals, plan.futures, plan.values, plan.future_steps, plan.value_steps = 2, 1, 2, 1, 1
