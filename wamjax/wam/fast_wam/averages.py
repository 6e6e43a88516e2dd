"""Averages the losses of slots into the loss of a batch, and of single examples.

Each loss is a mean over the examples that have it: an action-free video has no action loss, an
example that trains without a future has no video loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from wamjax.models.shell import ANTICIPATION
from wamjax.wam.loss import Draw, SlotLosses

FRAMES = ("future", ANTICIPATION)  # groups of the video that have a loss
Losses = Sequence[dict[str, SlotLosses]]


def reduce(
    draws: Sequence[Draw], losses: Losses, weights: Mapping[str, float], names: Sequence[str]
) -> tuple[Array, dict[str, Array]]:
    """Computes the weighted sum of all losses, and the metrics.

    Args:
      weights: weight of the loss of each group.
      names: name of the use of each draw.
    """
    video, action, has_action = _by_example(draws, losses)
    metrics = {}
    if len(draws) > 1:
        for name, errors, count in zip(names, action, has_action, strict=True):
            metrics[f"loss_action/{name}"] = jnp.sum(errors) / jnp.maximum(jnp.sum(count), 1)
    action, has_action = map(jnp.concatenate, (action, has_action))
    action_loss = jnp.sum(action) / jnp.maximum(jnp.sum(has_action), 1)
    metrics |= {"loss_video": _mean_over(video, "future"), "loss_action": action_loss}
    loss = weights["future"] * metrics["loss_video"] + weights["action"] * action_loss
    if any(ANTICIPATION in by_group for by_group in video):
        metrics["loss_anticipation"] = _mean_over(video, ANTICIPATION)
        loss += weights[ANTICIPATION] * metrics["loss_anticipation"]
    return loss, metrics


def examples(
    draws: Sequence[Draw], losses: Losses, weights: Mapping[str, float]
) -> dict[str, Array]:
    """Computes "video", "action" and "loss" of every example, whose mean is the loss.

    Each loss is scaled by the batch size over the number of examples that have it.
    """
    video, action, has_action = _by_example(draws, losses)
    action, has_action = map(jnp.concatenate, (action, has_action))
    size = has_action.shape[0]
    loss = weights["action"] * action * size / jnp.maximum(jnp.sum(has_action), 1)
    parts = {}
    for group in FRAMES:
        total = sum(by_group[group].shape[0] for by_group in video if group in by_group)
        parts[group] = jnp.concatenate([
            by_group.get(group, jnp.zeros(draw.at.shape[0]))
            for draw, by_group in zip(draws, video, strict=True)
        ])  # fmt: skip
        loss += weights[group] * parts[group] * size / max(total, 1)
    return {"video": parts["future"], "action": action, "loss": loss}


def _by_example(draws: Sequence[Draw], losses: Losses):
    """Returns lists with one item per draw: group -> losses of its frames, losses of actions, and
    which examples have actions."""
    video, action, has_action = [], [], []
    for draw, parts in zip(draws, losses, strict=True):
        zeros = jnp.zeros(draw.at.shape[0])
        video.append({g: parts[g].examples() for g in FRAMES if g in parts})
        action.append(parts["action"].examples() if "action" in parts else zeros)
        has_action.append(jnp.any(draw.mask["action"], axis=1))
    return video, action, has_action


def _mean_over(losses: Sequence[dict[str, Array]], group: str) -> Float[Array, ""]:
    """Returns the mean over the examples that have the group; 0 if there are none."""
    values = [by_group[group] for by_group in losses if group in by_group]
    return jnp.mean(jnp.concatenate(values)) if values else jnp.zeros(())
