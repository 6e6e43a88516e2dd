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
    video, action, labelled = _by_example(draws, losses)
    metrics = {}
    if len(draws) > 1:
        for name, mine, count in zip(names, action, labelled, strict=True):
            metrics[f"loss_action/{name}"] = jnp.sum(mine) / jnp.maximum(jnp.sum(count), 1)
    action, labelled = map(jnp.concatenate, (action, labelled))
    action_loss = jnp.sum(action) / jnp.maximum(jnp.sum(labelled), 1)
    metrics |= {"loss_video": _mean_over(video, "future"), "loss_action": action_loss}
    loss = weights["future"] * metrics["loss_video"] + weights["action"] * action_loss
    if any(ANTICIPATION in each for each in video):
        metrics["loss_anticipation"] = _mean_over(video, ANTICIPATION)
        loss += weights[ANTICIPATION] * metrics["loss_anticipation"]
    return loss, metrics


def examples(
    draws: Sequence[Draw], losses: Losses, weights: Mapping[str, float]
) -> dict[str, Array]:
    """Computes "video", "action" and "loss" of every example, whose mean is the loss.

    Each loss is scaled by the batch size over the number of examples that have it.
    """
    video, action, labelled = _by_example(draws, losses)
    action, labelled = map(jnp.concatenate, (action, labelled))
    size = labelled.shape[0]
    loss = weights["action"] * action * size / jnp.maximum(jnp.sum(labelled), 1)
    parts = {}
    for group in FRAMES:
        having = sum(each[group].shape[0] for each in video if group in each)
        parts[group] = jnp.concatenate([
            each.get(group, jnp.zeros(draw.at.shape[0]))
            for draw, each in zip(draws, video, strict=True)
        ])  # fmt: skip
        loss += weights[group] * parts[group] * size / max(having, 1)
    return {"video": parts["future"], "action": action, "loss": loss}


def _by_example(draws: Sequence[Draw], losses: Losses):
    """Returns lists with one item per draw: group -> losses of its frames, losses of actions, and
    which examples have actions."""
    video, action, labelled = [], [], []
    for draw, parts in zip(draws, losses, strict=True):
        none = jnp.zeros(draw.at.shape[0])
        video.append({g: parts[g].examples() for g in FRAMES if g in parts})
        action.append(parts["action"].examples() if "action" in parts else none)
        labelled.append(jnp.any(draw.mask["action"], axis=1))
    return video, action, labelled


def _mean_over(losses: Sequence[dict[str, Array]], group: str) -> Float[Array, ""]:
    """Returns the mean over the examples that have the group; 0 if there are none."""
    having = [each[group] for each in losses if group in each]
    return jnp.mean(jnp.concatenate(having)) if having else jnp.zeros(())
