"""Lists the config keys of Fast-WAM; see `wamjax.config_keys`."""

from __future__ import annotations

from typing import Any

from wamjax.models import keys as models

# (key, default, description).
TABLE: tuple[tuple[str, Any, str], ...] = (
    ("objective.variant", "fast", "fast, joint, idm, no_cotrain, optional_idm or ladder"),
    ("objective.preset", "2026-08", "published settings to follow: paper or 2026-08; or none"),
    ("objective.action_shift", 1.0, "time shift of the action noise level (paper: 5)"),
    ("objective.video_weight", 1.0, "weight of the video loss"),
    (
        "objective.cond_noise_prob",
        0.5,
        "probability that the conditioning video of idm and ladder is noised in training",
    ),
    ("objective.idm_prob", 0.5, "share of a batch that optional_idm and ladder train as idm"),
    ("objective.anticipate_prob", 0.25, "share of a batch that ladder trains on learned tokens"),
    (
        "objective.anticipation_weight",
        1.0,
        "weight of the loss of the future that learned tokens predict in one pass",
    ),
    (
        "objective.prefix_max",
        0,
        "maximum number of first actions of a chunk that are given in training",
    ),
    (
        "objective.prefix_noise",
        0.0,
        "standard deviation of the noise on given first actions in training, normalized",
    ),
    (
        "objective.action_from_video",
        False,
        "initialize the action expert by interpolating the video expert",
    ),
    ("objective.judge.width", 64, "width of the expert that judges proposals"),
    ("objective.judge.ffn", 256, "hidden units of its feed-forward network"),
    ("objective.judge.branches", 8, "proposals per state in a training example"),
    ("objective.judge.rungs", (1, 4, 8), "proposals at each rung of mode adaptive"),
    ("objective.judge.modes", (), "mode of the proposals that each rung adds; () is all direct"),
    ("objective.judge.discount", 0.9, "discount of the judged return per control step"),
    ("objective.judge.ranking", 1.0, "weight of the differences between proposals of a state"),
)


def read_judged(config) -> tuple[str, ...]:
    """Returns the keys of Fast-WAM with a judge, as patterns."""
    return (*read(config), "objective.judge.*")


def read(config) -> tuple[str, ...]:
    """Returns the keys of ``config.objective`` and ``config.model`` that matter, as patterns."""
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
        *(["objective.prefix_noise"] if config.objective.prefix_max else []),
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
