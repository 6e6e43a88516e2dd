"""Describes a world action model as masked denoising over typed slots.

A sample is an ordered list of slots: a latent frame, an action step, a state, a value. A
factorization gives every group of slots a role. A role array holds the role of every slot of every
example, so one compiled step serves any mix of roles. Which slots see each other is a separate
matter (`Visibility`). A `uses.Use` combines both with the groups that have a loss.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wamjax.models.shell import GroupSpec


class Role(enum.IntEnum):
    """Names the role of a slot in one use of the model."""

    GIVEN = 0  # clean, at the noise level of data, no loss
    PREDICTED = 1  # noised; has a loss, unless it is only hidden from others
    ABSENT = 2  # no loss; a group that is absent as a whole in a use is not computed at all


@dataclasses.dataclass(frozen=True)
class Slot:
    """Describes one place in a sample.

    Attributes:
      kind: content: "frame", "action", or a kind of `cosmos_policy.layouts`.
      group: slots of a group share their role and what they see.
      expert: expert of the network.
      position: position in time: of the latent frame in its clip, or of the step in its chunk.
      camera: camera of a picture.
      shape: shape of its numbers, if they are written into a latent frame.
    """

    kind: str
    group: str
    expert: str = "video"
    position: int = 0
    camera: str = ""
    shape: tuple[int, ...] = ()


def groups_of(slots: Iterable[Slot]) -> tuple[GroupSpec, ...]:
    """Returns the groups of slots in the form that a network takes, ordered by their first
    slots."""
    places: dict[tuple[str, str], list[int]] = {}
    for slot in slots:
        places.setdefault((slot.group, slot.expert), []).append(slot.position)
    return tuple(
        GroupSpec(group, expert, tuple(positions)) for (group, expert), positions in places.items()
    )


def names_of(groups: Iterable[GroupSpec]) -> tuple[tuple[str, str], ...]:
    """Returns (name, group) of every slot of groups; the name has the position if the group has
    several."""
    return tuple(
        (f"{g.name} {p}" if len(g.positions) > 1 else g.name, g.name)
        for g in groups
        for p in g.positions
    )


@dataclasses.dataclass(frozen=True)
class Factorization:
    """Assigns roles to groups under a name: policy, world model, inverse dynamics, ...

    Attributes:
      name: name of the use that it describes.
      roles: (group, role) of every group.
    """

    name: str
    roles: tuple[tuple[str, Role], ...]

    def groups(self, role: Role) -> tuple[str, ...]:
        """Returns the groups with a role."""
        return tuple(g for g, r in self.roles if r == role)

    @property
    def present(self) -> tuple[str, ...]:
        """Returns the groups that are not absent."""
        return tuple(g for g, r in self.roles if r != Role.ABSENT)

    def array(self, slots: Mapping[str, int]) -> Int[np.ndarray, " slots"]:
        """Returns the role of every slot, groups in order, with ``slots[group]`` slots each.

        Raises:
          KeyError: a group of `slots` has no role.
        """
        missing = set(slots) - {g for g, _ in self.roles}
        if missing:
            raise KeyError(f"factorization {self.name!r} gives no role to {sorted(missing)}")
        return np.concatenate([np.full(slots[g], r, np.int32) for g, r in self.roles if g in slots])


def factorization(name: str, **roles: Role) -> Factorization:
    """Builds one by keywords:
    ``factorization("policy", first=Role.GIVEN, action=Role.PREDICTED)``."""
    return Factorization(name, tuple(roles.items()))


def levels(roles: Int[Array, "b m"], sampled: Float[Array, "b m"]) -> Float[Array, "b m"]:
    """Returns the noise level of every slot: the sampled one if it is predicted, else 0."""
    return jnp.where(roles == Role.PREDICTED, sampled, 0.0)


def masked_mean(x: Float[Array, "b m"], mask: Bool[Array, "b m"]) -> Float[Array, " b"]:
    """Returns the mean over the valid slots of each example; 0 for an example without any."""
    return jnp.sum(x * mask, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)
