"""Describes uses of a network: which slots are given, who sees whom, and what has a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from wamjax.models.visibility import Visibility
from wamjax.wam.slots import Factorization, Role


@dataclasses.dataclass(frozen=True)
class Use:
    """Combines a factorization with a visibility table; a batch trains one or more uses.

    Attributes:
      factorization: the role of every group.
      visibility: who sees whom, over the groups of all uses.
      trained: groups that have a loss. A predicted group without a loss is hidden: as noisy as the
        rest, at a level that the network receives.
    """

    factorization: Factorization
    visibility: Visibility
    trained: tuple[str, ...]

    @property
    def name(self) -> str:
        """Returns the name of the factorization."""
        return self.factorization.name

    @property
    def given(self) -> tuple[str, ...]:
        """Returns the groups that are given."""
        return self.factorization.groups(Role.GIVEN)

    @property
    def predicted(self) -> tuple[str, ...]:
        """Returns the groups that are noised."""
        return self.factorization.groups(Role.PREDICTED)

    @property
    def present(self) -> tuple[str, ...]:
        """Returns the groups that are computed."""
        return self.factorization.present

    @property
    def table(self) -> Visibility:
        """Returns the visibility table over the present groups."""
        return self.visibility.restrict(self.present)


def use(factorization: Factorization, visibility: Visibility) -> Use:
    """Returns a use in which every predicted group has a loss."""
    return Use(factorization, visibility, factorization.groups(Role.PREDICTED))


def roles(uses: Sequence[Use], sizes: Mapping[str, int]) -> dict[str, Int[np.ndarray, "u m"]]:
    """Returns the role of every slot in every use: group -> (uses, slots)."""
    role_of = [dict(u.factorization.roles) for u in uses]
    return {
        group: np.array([[row[group]] * size for row in role_of], np.int32)
        for group, size in sizes.items()
    }


def has_loss(uses: Sequence[Use], sizes: Mapping[str, int]) -> dict[str, Bool[np.ndarray, "u m"]]:
    """Returns which slots have a loss in every use: group -> (uses, slots)."""
    return {
        group: np.array([[group in u.trained] * size for u in uses])
        for group, size in sizes.items()
    }


def describe(uses: Sequence[Use], slots: Sequence[tuple[str, str]]) -> str:
    """Draws the roles of slots as text, with slots across and uses down.

    Args:
      slots: (name, group) of each slot.
    """
    names = [name for name, _ in slots]
    width = [max(len(name), 6) for name in names]
    margin = max(len(u.name) for u in uses)

    def mark(use: Use, group: str) -> str:
        role = dict(use.factorization.roles).get(group, Role.ABSENT)
        if role == Role.PREDICTED:
            return "loss" if group in use.trained else "hidden"
        return {Role.GIVEN: "given", Role.ABSENT: ""}[role]

    def line(first: str, cells: Sequence[str]) -> str:
        padded = (c.center(w) for c, w in zip(cells, width, strict=True))
        return f"{first:>{margin}}  {' '.join(padded)}".rstrip()

    rows = [line(u.name, [mark(u, group) for _, group in slots]) for u in uses]
    return "\n".join([line("", names), *rows])
