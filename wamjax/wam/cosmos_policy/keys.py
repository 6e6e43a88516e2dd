"""The keys of Cosmos Policy; see `wamjax.config_keys`."""

from __future__ import annotations

from typing import Any

from wamjax.models import keys as models

# (key, default, what it is).
TABLE: tuple[tuple[str, Any, str], ...] = (
    ("objective.slots", (), "what the latent frames of Cosmos Policy are, words of wam.layouts"),
    (
        "objective.value",
        "value",
        "what is judged: value V(s, a, s'), value_v V(s') or value_q Q(s, a)",
    ),
    ("objective.mix", (2, 1, 1), "examples of policy, world model and value in a row of a batch"),
    ("objective.visibility", "bidirectional", "or prefix: what is given sees nothing else"),
    ("objective.auxiliary", True, "whether all that is predicted has a loss"),
    ("objective.discount", 0.99, "of the return, for each control step"),
    ("objective.uniform", 0.3, "share of uniform noise levels among log-normal ones"),
    ("objective.sigma_max", 80.0, "noise that sampling starts at, as a ratio to the signal"),
    ("objective.sigma_min", 4.0, "noise of the last network call"),
    ("objective.augment", "", "random crops, turns and colours in training: weak or strong"),
    ("objective.compat", (), "published defects to keep, keys of cosmos_policy.COMPAT"),
    ("objective.plan.proposals", 8, "action chunks that planning chooses from"),
    ("objective.plan.futures", 3, "futures of each"),
    ("objective.plan.values", 5, "values of each future"),
    ("objective.plan.future_steps", 5, "solver steps of a future"),
    ("objective.plan.value_steps", 5, "solver steps of a value"),
    ("objective.plan.aggregate", "majority_mean", "of the values, one of planning.AGGREGATES"),
    ("objective.plan.depth", 1, "chunks that are imagined"),
    ("objective.plan.over_depth", "last", "of several depths: last or mean"),
    ("objective.plan.memory_gb", 0.0, "memory of a network call while planning; 0 = any"),
)


def read(config) -> tuple[str, ...]:
    """Keys of ``config.objective`` and ``config.model`` that matter, as patterns."""
    return (
        *(key for key, _, _ in TABLE),
        "objective.prefix_max",  # to say why it must be 0
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
