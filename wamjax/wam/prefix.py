"""Handles given first actions of a chunk: those to which a robot is committed while it computes.

This is an ordinary pattern of roles: a chunk has one slot per step, the first d of them are GIVEN
and the rest PREDICTED. Training draws d for each example (arXiv 2608.01880, "training-time"
real-time chunking). Acting receives the actions and d as data, so one compiled program serves every
d.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wamjax.wam.slots import Role


class Prefix(NamedTuple):
    """Holds actions that a robot will execute whatever is planned, from the observation on.

    Attributes:
      actions: of each example, in robot units; entries from its count on are ignored.
      count: how many of them are committed; 0: none.
    """

    actions: Float[Array, "b d a"]
    count: Int[Array, " b"]


class Pin(NamedTuple):
    """Holds slots of a group that stay unchanged while the rest of it is denoised.

    Attributes:
      values: clean values of all slots; those of slots that are not pinned are ignored.
      mask: the pinned slots.
    """

    values: Float[Array, "b m ..."]
    mask: Bool[Array, "b m"]


def first(count: Int[Array, " b"], steps: int) -> Bool[Array, "b steps"]:
    """Returns which of `steps` slots are among the first `count`."""
    return jnp.arange(steps) < jnp.asarray(count)[:, None]


def given(key: Array, role: Int[Array, "b j"], most: int) -> Int[Array, "b j"]:
    """Makes the first d predicted slots of each example GIVEN, with d uniform in 0 to `most`."""
    count = jax.random.randint(key, role.shape[:1], 0, most + 1)
    return jnp.where(
        first(count, role.shape[1]) & (role == Role.PREDICTED), Role.GIVEN, role
    )


def pin(prefix: Prefix, most: int, steps: int) -> Pin:
    """Returns a prefix as pinned slots of a chunk, in the prefix's own units.

    Args:
      most: upper bound of the counts, which are clipped to it; 0: the policy takes no prefix.
      steps: steps of the chunk.

    Raises:
      ValueError: the policy takes no prefix, or actions and counts do not have these shapes.
    """
    if not most:
        raise ValueError("this policy takes no prefix: it was trained with "
                         "objective.prefix_max = 0")  # fmt: skip
    actions, count = map(jnp.asarray, prefix)
    if actions.ndim != 3 or count.shape != actions.shape[:1] or actions.shape[1] > steps:
        raise ValueError(f"prefix: actions {actions.shape} and count {count.shape} must be "
                         f"(b, d, a) and (b,), d at most {steps}")  # fmt: skip
    count = jnp.minimum(count, min(most, actions.shape[1]))
    padding = ((0, 0), (0, steps - actions.shape[1]), (0, 0))
    return Pin(jnp.pad(actions, padding), first(count, steps))


def describe(most: int) -> str:
    """Returns the line about a prefix in the text of `uses.describe`."""
    return f"\nof the actions the first 0 to {most} are given" if most else ""
