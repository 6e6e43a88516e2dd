"""A world action model is masked denoising over typed slots.

A sample is an ordered list of slots (a latent frame, an action step). A factorization gives every
group of slots a role; a role array says it for every slot of every example, so that one compiled
step serves any mix of roles. What the network may see is a separate matter (`Visibility`).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wamjax.models.visibility import Visibility


class Role(enum.IntEnum):
    """What a slot is in one use of the model."""

    GIVEN = 0  # clean, noise level 0, no loss
    PREDICTED = 1  # noised, has a loss
    ABSENT = 2  # no loss; where a whole group is absent in a program it is not computed at all


@dataclasses.dataclass(frozen=True)
class Factorization:
    """A named assignment of roles to groups: policy, world model, inverse dynamics, ..."""

    name: str
    roles: tuple[tuple[str, Role], ...]

    def groups(self, role: Role) -> tuple[str, ...]:
        return tuple(g for g, r in self.roles if r == role)

    @property
    def present(self) -> tuple[str, ...]:
        return tuple(g for g, r in self.roles if r != Role.ABSENT)

    def array(self, slots: Mapping[str, int]) -> Int[np.ndarray, " slots"]:
        """The role of every slot, groups in order, `slots` slots each."""
        missing = set(slots) - {g for g, _ in self.roles}
        if missing:
            raise KeyError(f"factorization {self.name!r} gives no role to {sorted(missing)}")
        return np.concatenate([np.full(slots[g], r, np.int32) for g, r in self.roles if g in slots])


def factorization(name: str, **roles: Role) -> Factorization:
    """``factorization("policy", first=Role.GIVEN, action=Role.PREDICTED)``."""
    return Factorization(name, tuple(roles.items()))


@dataclasses.dataclass(frozen=True)
class Program:
    """What a segment of a batch is used for: a factorization under a visibility table."""

    factorization: Factorization
    visibility: Visibility

    @property
    def table(self) -> Visibility:
        """The visibility over the groups that are present."""
        return self.visibility.restrict(self.factorization.present)


def levels(roles: Int[Array, "b m"], sampled: Float[Array, "b m"]) -> Float[Array, "b m"]:
    """Noise level of every slot: the sampled one where predicted, 0 elsewhere."""
    return jnp.where(roles == Role.PREDICTED, sampled, 0.0)


def loss_mask(roles: Int[Array, "b m"], valid: Bool[Array, "b m"]) -> Bool[Array, "b m"]:
    """Slots that a loss is taken on."""
    return (roles == Role.PREDICTED) & valid


def masked_mean(x: Float[Array, "b m"], mask: Bool[Array, "b m"]) -> Float[Array, " b"]:
    """Mean over the valid slots of each example; 0 for an example without any."""
    return jnp.sum(x * mask, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)
