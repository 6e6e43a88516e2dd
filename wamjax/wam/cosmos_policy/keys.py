"""Lists the config keys of Cosmos Policy; see `wamjax.config_keys`."""

from __future__ import annotations

from typing import Any

from wamjax.models import keys as models

# (key, default, description).
TABLE: tuple[tuple[str, Any, str], ...] = (
    ("objective.slots", (), "the latent frames of Cosmos Policy, words of cosmos_policy.layouts"),
    (
        "objective.value",
        "value",
        "value function: value V(s, a, s'), value_v V(s') or value_q Q(s, a)",
    ),
    ("objective.mix", (2, 1, 1), "examples of policy, world model and value per row of a batch"),
    (
        "objective.visibility",
        "bidirectional",
        "bidirectional, or prefix: given slots attend to given slots only",
    ),
    ("objective.auxiliary", True, "train all predicted slots, not only the main one of each use"),
    ("objective.discount", 0.99, "discount of the return per control step"),
    ("objective.uniform", 0.3, "share of uniform noise levels among log-normal ones"),
    ("objective.sigma_max", 80.0, "sigma at which sampling starts"),
    ("objective.sigma_min", 4.0, "sigma of the last network call"),
    (
        "objective.augment",
        "",
        "random crops, rotations and colors in training: weak or strong; '' = none",
    ),
    ("objective.compat", (), "published defects to keep, keys of cosmos_policy.checks.COMPAT"),
    ("objective.plan.proposals", 8, "action chunks that planning chooses from"),
    ("objective.plan.futures", 3, "futures per chunk"),
    ("objective.plan.values", 5, "values per future"),
    ("objective.plan.future_steps", 5, "solver steps per future"),
    ("objective.plan.value_steps", 5, "solver steps per value"),
    (
        "objective.plan.aggregate",
        "majority_mean",
        "how values are aggregated, one of planning.AGGREGATES",
    ),
    ("objective.plan.depth", 1, "chunks to imagine ahead"),
    ("objective.plan.over_depth", "last", "value used when depth > 1: last or mean"),
    (
        "objective.plan.memory_gb",
        0.0,
        "memory limit of a network call while planning; 0 = no limit",
    ),
)


def read(config) -> tuple[str, ...]:
    """Returns the keys of ``config.objective`` and ``config.model`` that matter, as patterns."""
    return (
        *(key for key, _, _ in TABLE),
        "objective.prefix_max",  # read to explain why it must be 0
        "objective.action_weight",
        "objective.infer_steps",
        "objective.solver",
        *models.SHELL,
        "model.patch",
        "model.time_scale",
        "model.modulation_rank",
        "model.positions",
        "model.rope_scale",
        "model.context_*",
        "model.text.kind",
        *models.codec(config.model.codec),
    )
