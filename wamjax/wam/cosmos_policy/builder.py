"""Builds Cosmos Policy from a config."""

from __future__ import annotations

import numpy as np

from wamjax.data import mixture
from wamjax.data.spec import DataSpec
from wamjax.diffusion import noise
from wamjax.diffusion.flow import RectifiedFlow
from wamjax.models import attention, blocks
from wamjax.models.blocks import ExpertSpec
from wamjax.models.dit import DiT
from wamjax.training.sharding import constrain
from wamjax.wam.codecs import codec_of
from wamjax.wam.cosmos_policy import keys, layouts
from wamjax.wam.cosmos_policy.layouts import Layout
from wamjax.wam.cosmos_policy.objective import CosmosPolicy
from wamjax.wam.cosmos_policy.planning import Planning, sample_bytes
from wamjax.wam.protocols import Method
from wamjax.wam.slots import groups_of

NO_PREFIX = (
    "config.objective.prefix_max = {}: Cosmos Policy cannot be given the first actions of a chunk. "
    "One slot is its whole chunk, repeated to fill a latent frame that has one noise level and is "
    "averaged over its copies, so no step of it is a slot of its own; set it to 0, or train "
    "objective.name='fast_wam'"
)


def build(config, spec) -> CosmosPolicy:
    """Builds Cosmos Policy from ``config.model``, ``config.objective`` and the sizes of the data.

    Raises:
      ValueError: data and config do not fit each other; names the key.
    """
    model, objective = config.model, config.objective
    if objective.prefix_max:
        raise ValueError(NO_PREFIX.format(objective.prefix_max))
    layout = layouts.parse(objective.slots)
    if not isinstance(spec, DataSpec):
        raise ValueError("objective.name='cosmos_policy' trains on episodes: set "
                         "config.data.kind='episodes'")  # fmt: skip
    layout.check_data(spec)
    _check_data(config, layout)
    codec = codec_of(config)
    network = _network(model, layout, codec, spec)
    plan = objective.plan.to_dict()
    if (memory := plan.pop("memory_gb")) < 0:
        raise ValueError(f"objective.plan.memory_gb = {memory} must be positive, or 0 for no limit")
    limit = memory * 2**30 / sample_bytes(network, len(layout))
    return CosmosPolicy(
        network=network,
        codec=codec,
        process=RectifiedFlow(
            weighting="uniform", law=noise.cosmos_policy(len(layout), objective.uniform)
        ),
        layout=layout,
        views=tuple((name, tuple(size)) for name, size in spec.cameras.items()),
        instruction_length=spec.instruction_length,
        judge=objective.value,
        mix=tuple(objective.mix),
        visibility=objective.visibility,
        auxiliary=objective.auxiliary,
        action_weight=objective.action_weight,
        discount=objective.discount,
        augment=objective.augment,
        compat=tuple(objective.compat),
        steps=objective.infer_steps,
        sigma_max=objective.sigma_max,
        sigma_min=objective.sigma_min,
        solver=objective.solver,
        planning=Planning(**plan, limit=max(int(limit), 1) if limit else 0),
    )


def _network(model, layout: Layout, codec, spec: DataSpec) -> DiT:
    """Builds the video model of Cosmos-Predict2; its sinusoid is as wide as the network."""
    frames = 1 + codec.temporal * (len(layout) - 1)
    slots, h, w, c = codec.shape(frames, *spec.cameras[layout.cameras[0]])
    assert slots == len(layout)
    sizes = dict(lora_rank=model.modulation_rank, context_rows=model.context_rows)
    return DiT(
        video_spec=ExpertSpec(
            "video", model.video.width, model.video.ffn, **blocks.COSMOS, **sizes
        ),
        groups=groups_of(layout.slots),
        latent=(h, w, c + 2),
        layers=model.layers,
        heads=model.heads,
        head_dim=model.head_dim,
        patch=model.patch,
        outputs=c,
        text="cross",
        text_net="none",
        context_width=model.context_width,
        vocabulary=spec.vocabulary.size if model.text.kind == "tokens" else 0,
        instruction_length=spec.instruction_length,
        positions=model.positions,
        rope_scale=tuple(model.rope_scale),
        freq_dim=model.video.width,
        time_scale=model.time_scale,
        remat=model.remat,
        unroll=model.unroll,
        attention=attention.named(model.attention),
        residual=model.residual,
        pad_slots=model.pad_slots,
        constrain=constrain,
    )


def _check_data(config, layout: Layout) -> None:
    """Checks that the pipeline produces what the objective reads."""
    data = config.data
    required = {"frames": 2, "frame_stride": layout.chunk, "outcome": True}
    for key, value in required.items():
        if data[key] != value:
            raise ValueError(
                f"config.data.{key} = {data[key]} must be {value}: Cosmos Policy reads the frames "
                "before and after each chunk, and the outcome"
            )
    if any(s.action_free for s in data.sources.values()):
        raise ValueError("Cosmos Policy cannot train on sources without actions: remove those with "
                         "action_free from config.data.sources")  # fmt: skip


def check(config) -> None:
    """Checks that policy, world model and value can share the sources as ``objective.mix`` says.

    Raises:
      ValueError: a part of a batch has too few demonstrations.
    """
    data, mix = config.data, tuple(config.objective.mix)
    sources = data.sources.values()
    if not any(s.rollout for s in sources) or "tossed_mix" in config.objective.compat:
        return
    counts = mixture.counts({n: s.weight for n, s in data.sources.items()}, data.batch_size)
    is_demo = np.array([not s.rollout for s in sources])[mixture.layout(counts)]
    rows = is_demo[: len(is_demo) // sum(mix) * sum(mix)].reshape(-1, sum(mix))
    if (per_row := rows.sum(axis=1)).size and per_row.min() < mix[0]:
        raise ValueError(
            f"objective.mix = {mix} needs {mix[0]} demonstrations in every {sum(mix)} consecutive "
            f"examples of a batch, and some have only {per_row.min()}, because demonstrations are "
            f"{is_demo.mean():.0%} of the batch: raise their weight in config.data.sources, or "
            "lower the first number of objective.mix"
        )


METHOD = Method(build, keys.read, check)
