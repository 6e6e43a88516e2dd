"""Checks a Cosmos Policy, and a separate planner for it; see `cosmos_policy`."""

from __future__ import annotations

import dataclasses

from wamjax.config import did_you_mean
from wamjax.diffusion.solvers import SOLVERS
from wamjax.models.attention import grouped
from wamjax.wam.cosmos_policy import uses
from wamjax.wam.cosmos_policy.augment import STRENGTHS
from wamjax.wam.cosmos_policy.layouts import name_of, word_of

# Published behaviour that is not the default because it is a defect or costs accuracy.
COMPAT = {
    "bf16_times": "noise levels are rounded to bfloat16 before the network is told of them",
    "bf16_targets": "actions, states and values are rounded to bfloat16 in training",
    "erased_scores": "a partial score counts as full success in the value",
    "tossed_mix": "uses are drawn for each example: shares hold in expectation only, and where "
    "there are rollouts, all demonstrations train the policy",
    "zero_minority": "majority_mean is 0, not the mean of the others, where success is a minority",
}


# What a policy and a separate planner must share: its name in errors -> attribute.
SHARED = {
    "slots": "layout",
    "sizes of the network": "network",
    "codec": "codec",
    "cameras": "views",
    "visibility": "visibility",
}


def check(objective) -> None:
    """Checks that the choices of a `CosmosPolicy` exist and fit together.

    Raises:
      ValueError: names the key, the value and the alternatives.
    """
    for name, words, choices in (
        ("compat", objective.compat, COMPAT),
        ("augment", (objective.augment,), ("", *STRENGTHS)),
        ("visibility", (objective.visibility,), uses.VISIBILITIES),
        ("solver", (objective.solver,), SOLVERS),
    ):
        for word in words:
            if word not in choices:
                hint = f"{did_you_mean(word, choices)}; there are {sorted(choices)}"
                raise ValueError(f"objective.{name} {word!r} does not exist{hint}")
    for name, value, valid, requirement in (
        ("infer_steps", objective.steps, objective.steps >= 1, "at least 1"),
        ("sigma_min", objective.sigma_min, 0 < objective.sigma_min < objective.sigma_max,
         f"positive and below objective.sigma_max {objective.sigma_max}"),
        ("discount", objective.discount, 0 < objective.discount <= 1, "in (0, 1]"),
        ("action_weight", objective.action_weight, objective.action_weight >= 0, "at least 0"),
    ):  # fmt: skip
        if not valid:
            raise ValueError(f"objective.{name} {value} must be {requirement}")
    if objective.planning.depth > 1:
        check_depth(objective)
    if len(objective.mix) != len(objective.uses) or min(objective.mix) < 1:
        names = [u.name for u in objective.uses]
        raise ValueError(f"objective.mix = {objective.mix} must have a positive count for each of "
                         f"{names}")  # fmt: skip
    if objective.visibility != "bidirectional" and "tossed_mix" in objective.compat:
        raise ValueError(
            f"objective.compat 'tossed_mix' needs objective.visibility='bidirectional', not "
            f"{objective.visibility!r}, which has a table for each use and so needs fixed counts"
        )
    if objective.codec.key != "video":
        raise ValueError(
            f"Cosmos Policy cannot use the latents of {type(objective.codec).__name__}: it encodes "
            "clips that it builds from pictures; set model.codec.kind to 'pixel' or 'wan2.1'"
        )


def check_depth(objective) -> None:
    """Checks that planning can continue from imagined futures: each present slot needs a future
    slot."""
    depth = f"objective.plan.depth {objective.planning.depth}"
    if uses.model_free(objective.uses[2]):
        raise ValueError(f"{depth} needs imagined futures, and Q(s, a) does not imagine any: set "
                         "objective.plan.depth=1")  # fmt: skip
    present = (s for s in objective.layout.slots if s.group == "current")
    names = objective.layout.names
    missing = [f"future_{word_of(s)}" for s in present if f"future_{name_of(s)}" not in names]
    if missing:
        raise ValueError(
            f"{depth} needs imagined futures of all present slots, and objective.slots lacks "
            f"{missing}: add these slots, or set objective.plan.depth=1"
        )


def check_planner(policy, other) -> None:
    """Checks that `other` can plan for `policy`.

    Raises:
      ValueError: it was trained on other data or has other inputs; names the difference.
    """
    # The way of computing may differ.
    plain = dict(remat="none", unroll=1, attention=grouped, pad_slots="off")
    first, second = (
        dataclasses.replace(x, network=x.network.clone(**plain)) for x in (policy, other)
    )
    differences = [
        label for label, key in SHARED.items() if getattr(first, key) != getattr(second, key)
    ]
    if ("bf16_times" in policy.compat) != ("bf16_times" in other.compat):
        differences.append("objective.compat 'bf16_times'")
    if differences:
        raise ValueError(
            "choose a planner that matches the policy: they differ in "
            f"{', '.join(differences)}"
        )
