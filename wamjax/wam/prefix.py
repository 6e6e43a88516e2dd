"""The first actions of a chunk, given: those that a robot is committed to while it computes.

A role pattern like any other: a chunk is as many slots as it has steps, the first d of them are
GIVEN and the rest PREDICTED. Training draws d for each example (arXiv 2608.01880, "training-time"
real-time chunking); acting is told the actions and d, and both are data, so that one compiled
program serves every d.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wamjax.wam.slots import Role


class Prefix(NamedTuple):
    """Actions that a robot will carry out whatever is planned, from the observation on.

    Attributes:
      actions: of each example, in robot units; those from its count on do not matter.
      count: how many of them are committed; 0: none.
    """

    actions: Float[Array, "b d a"]
    count: Int[Array, " b"]


class Pin(NamedTuple):
    """Slots of a group that stay as they are while the rest of it is denoised.

    Attributes:
      values: clean ones, of all slots; those that are not pinned do not matter.
      mask: the slots that are.
    """

    values: Float[Array, "b m ..."]
    mask: Bool[Array, "b m"]


def first(count: Int[Array, " b"], steps: int) -> Bool[Array, "b steps"]:
    """Which of `steps` slots are among the first `count`."""
    return jnp.arange(steps) < jnp.asarray(count)[:, None]


def given(key: Array, role: Int[Array, "b j"], most: int) -> Int[Array, "b j"]:
    """Gives the first d predicted slots of each example, d uniform in 0 to `most`."""
    count = jax.random.randint(key, role.shape[:1], 0, most + 1)
    return jnp.where(
        first(count, role.shape[1]) & (role == Role.PREDICTED), Role.GIVEN, role
    )


def pin(prefix: Prefix, most: int, steps: int) -> Pin:
    """A prefix as slots of a chunk, in its own units.

    Args:
      most: counts beyond it count as it; of a policy, 0: it takes no prefix.
      steps: of the chunk.

    Raises:
      ValueError: there is to be no prefix, or actions and counts are not of these shapes.
    """
    if not most:
        raise ValueError("this policy takes no prefix: it was trained with "
                         "objective.prefix_max = 0")  # fmt: skip
    actions, count = map(jnp.asarray, prefix)
    if actions.ndim != 3 or count.shape != actions.shape[:1] or actions.shape[1] > steps:
        raise ValueError(f"prefix: actions {actions.shape} and count {count.shape} must be "
                         f"(b, d, a) and (b,), d at most {steps}")  # fmt: skip
    count = jnp.minimum(count, min(most, actions.shape[1]))
    rest = ((0, 0), (0, steps - actions.shape[1]), (0, 0))
    return Pin(jnp.pad(actions, rest), first(count, steps))


def describe(most: int) -> str:
    """What a prefix adds to the picture of `uses.describe`."""
    return f"\nof the actions the first 0 to {most} are given" if most else ""
