"""Lists the config keys of models of pictures and video; see `wamjax.config_keys`."""

from __future__ import annotations

from typing import Any

from wamjax.models import keys as models

# (key, default, description).
TABLE: tuple[tuple[str, Any, str], ...] = (
    ("objective.process", "flow", "flow, ddpm or edm, with options: video.builder.PROCESSES"),
    ("objective.scheme", "diffusion", "how frames are denoised, a key of schemes.SCHEMES"),
    ("objective.drop", 0.1, "share of examples trained without their condition, for guidance"),
    ("objective.guidance", 1.0, "classifier-free guidance scale; 1 = none"),
    ("objective.guidance_channels", 0, "latent channels with guidance; 0 = all, DiT: 3"),
    ("objective.guidance_interval", (), "noise levels (low, high] with guidance; () = all"),
    ("objective.temperature", 1.0, "sampling temperature of tokens; 0 takes the most likely one"),
    ("objective.top_k", 0, "sample from the k most likely tokens; 0 = all"),
    ("objective.top_p", 1.0, "sample from the most likely tokens that add up to this probability"),
)


def denoising(config) -> tuple[str, ...]:
    """Returns the keys of ``config.objective`` and ``config.model`` that matter, as patterns."""
    model = config.model
    flow = config.objective.process.partition(":")[0] == "flow"
    return (
        "objective.process",
        "objective.scheme",
        "objective.drop",
        "objective.guidance*",
        "objective.weighting",
        "objective.infer_steps",
        "objective.solver",
        *(["objective.video_shift"] if flow else []),
        *models.SHELL,
        "model.patch",
        "model.freq_dim",
        "model.conditioning",
        "model.label",
        "model.positions",
        *(["model.position_table"] if model.positions != "rope" else []),
        *models.text(model.text),
        *models.codec(model.codec),
    )


def autoregressive(config) -> tuple[str, ...]:
    """Returns the keys that matter for a model of tokens."""
    return (
        "objective.temperature",
        "objective.top_*",
        *models.TRANSFORMER,
        "model.positions",
        "model.label",
        "model.text.route",
        *models.codec(config.model.codec),
    )


def codec(config) -> tuple[str, ...]:
    """Returns the keys that matter for training a codec."""
    return models.codec(config.model.codec)
