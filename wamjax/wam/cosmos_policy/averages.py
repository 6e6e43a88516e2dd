"""Averages the errors of slots into Cosmos Policy's loss and metrics.

The loss is the mean squared error of the velocity over all slots of all examples, times 10. A slot
without a loss counts as zero, as published, so the weight of an example depends on how many of its
slots have one. The public loss is that of EDM, 10 w(sigma) |x0 - D|^2 with w = ((1 + sigma) /
sigma)^2, which is the same (specification, 5.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wamjax.wam.cosmos_policy.layouts import Layout, name_of
from wamjax.wam.loss import Draw, SlotLosses
from wamjax.wam.uses import Use

SCALE = 10.0  # from the public code


class Rows(NamedTuple):
    """Holds the errors of every slot of every example, in the order of the draws.

    Attributes:
      velocity: mean squared error of the velocity.
      l1: mean absolute error of x0.
      weight: weight in the loss; 0 without a loss.
      use: index of the use that the example trains.
    """

    velocity: Float[Array, "b t"]
    l1: Float[Array, "b t"]
    weight: Float[Array, "b t"]
    use: Int[Array, " b"]


def rows(
    layout: Layout,
    action_weight: float,
    draws: Sequence[Draw],
    losses: Sequence[dict[str, SlotLosses]],
) -> Rows:
    """Arranges the errors of groups in the order of the slots."""
    columns = []
    for parts in losses:
        template = next(iter(parts.values())).error
        zeros = {g: jnp.zeros((template.shape[0], m)) for g, m in layout.sizes.items()}
        velocity, l1, weight = dict(zeros), dict(zeros), dict(zeros)
        for group, part in parts.items():
            factor = action_weight if group == "action" else 1.0
            velocity[group], l1[group], weight[group] = part.error, part.l1, factor * part.mask
        columns.append([jnp.concatenate(list(x.values()), axis=1) for x in (velocity, l1, weight)])
    arrays = (jnp.concatenate(x) for x in zip(*columns, strict=True))
    return Rows(*arrays, use=jnp.concatenate([draw.use for draw in draws]))


def loss(rows: Rows) -> Float[Array, ""]:
    """Computes the loss of a batch; see the module."""
    return SCALE * jnp.mean(rows.weight * rows.velocity)


def metrics(layout: Layout, uses: Sequence[Use], rows: Rows) -> dict[str, Array]:
    """Computes means over the examples of each use; NaN for a use without examples.

    Returns:
      loss_USE, which sum to the loss when weighted by the shares of the uses. For slots that have a
        loss also velocity/USE/SLOT, the mean squared error, and l1/USE/SLOT, the absolute error of
        x0, in which the published convergence targets are given.
    """
    out, total = {}, SCALE * jnp.mean(rows.weight * rows.velocity, axis=1)
    for i, use in enumerate(uses):
        mine = (rows.use == i) & jnp.any(rows.weight, axis=1)
        count = jnp.sum(mine)

        def mean(x, mine=mine, count=count):
            return jnp.where(count > 0, jnp.sum(jnp.where(mine, x, 0)) / count, jnp.nan)

        out[f"loss_{use.name}"] = mean(total)
        for t, slot in enumerate(layout.slots):
            if slot.group in use.trained:
                out[f"velocity/{use.name}/{name_of(slot)}"] = mean(rows.velocity[:, t])
                out[f"l1/{use.name}/{name_of(slot)}"] = mean(rows.l1[:, t])
    return out
