"""The keys of Fast-WAM; see `wamjax.config_keys`."""

from __future__ import annotations

from typing import Any

from wamjax.models import keys as models

# (key, default, what it is).
TABLE: tuple[tuple[str, Any, str], ...] = (
    ("objective.variant", "fast", "fast, joint, idm, no_cotrain, optional_idm or ladder"),
    ("objective.preset", "2026-08", "published settings followed: paper or 2026-08; or none"),
    ("objective.action_shift", 1.0, "time shift of the noise level of actions (paper: 5)"),
    ("objective.video_weight", 1.0, "weight of the video loss"),
    ("objective.cond_noise_prob", 0.5, "how often idm's conditioning video is noised in training"),
    ("objective.idm_prob", 0.5, "share of a batch that optional_idm and ladder train as idm"),
    ("objective.anticipate_prob", 0.25, "share of a batch that ladder trains on learned tokens"),
    ("objective.anticipation_weight", 1.0, "weight of what learned tokens predict of the video"),
    ("objective.prefix_max", 0, "most first actions of a chunk that are given in training"),
    (
        "objective.action_from_video",
        False,
        "start the action expert as an interpolated video expert",
    ),
    ("objective.judge.width", 64, "of the expert that judges proposals"),
    ("objective.judge.ffn", 256, "hidden units of its feed-forward network"),
    ("objective.judge.branches", 8, "proposals of a state in an example of its training"),
    ("objective.judge.rungs", (1, 4, 8), "proposals on each rung of the ladder of mode adaptive"),
    ("objective.judge.modes", (), "how proposals that each rung adds are made; () is all direct"),
    ("objective.judge.discount", 0.9, "of the return that is judged, for each control step"),
    ("objective.judge.ranking", 1.0, "weight of differences between proposals of a state"),
)


def read_judged(config) -> tuple[str, ...]:
    """The same of Fast-WAM with a judge."""
    return (*read(config), "objective.judge.*")


def read(config) -> tuple[str, ...]:
    """Keys of ``config.objective`` and ``config.model`` that matter, as patterns."""
    variant = config.objective.variant
    return (
        "objective.variant",
        "objective.preset",
        "objective.*_shift",
        "objective.video_weight",
        "objective.action_weight",
        "objective.weighting",
        "objective.action_from_video",
        "objective.prefix_max",
        "objective.infer_steps",
        "objective.solver",
        *(["objective.cond_noise_prob"] if "idm" in variant or variant == "ladder" else []),
        *(["objective.idm_prob"] if variant in ("optional_idm", "ladder") else []),
        *(["objective.anticipat*"] if variant == "ladder" else []),
        *models.SHELL,
        "model.action.*",
        "model.patch",
        "model.context_width",
        "model.freq_dim",
        "model.text.kind",
        *models.codec(config.model.codec),
    )
