"""Describes who sees whom: attention structure as a small named table over groups of tokens.

A *group* is a run of tokens that are treated alike: the first frame, the future frames, an action
chunk. For every query group a table says which key groups it may attend to. It is the whole
description of an attention pattern: the grouped attention calls, the boolean mask of the reference
path, the KV cache and the picture are all derived from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Visibility:
    """Holds a named table ``group x group -> bool``; hashable, so it can be static under ``jit``.

    Build it with `table`. `rows` holds, for each group, the groups that it sees, in table order.
    Within a group of `causal`, a token sees only itself and the tokens before it.
    """

    name: str
    groups: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    causal: tuple[str, ...] = ()

    def keys(self, query: str) -> tuple[str, ...]:
        """Returns the groups that `query` attends to, in table order."""
        return self.rows[self._index(query)]

    def sees(self, query: str, key: str) -> bool:
        """Returns whether tokens of `query` attend to tokens of `key`."""
        self._index(key)
        return key in self.keys(query)

    def restrict(self, present: Iterable[str]) -> Visibility:
        """Returns the same table without the groups that are absent from a program."""
        present = set(present)
        for group in present:
            self._index(group)
        pairs = [(g, row) for g, row in zip(self.groups, self.rows, strict=True) if g in present]
        return Visibility(
            self.name,
            tuple(g for g, _ in pairs),
            tuple(tuple(k for k in row if k in present) for _, row in pairs),
            tuple(g for g in self.causal if g in present),
        )

    def calls(
        self, queries: Iterable[str], apart: Iterable[str] = ()
    ) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
        """Returns the dense attention calls that `queries` need, as (query groups, key groups).

        Groups that see the same keys share a call, except for causal ones and those in `apart`.
        """
        queries, apart = set(queries), {*apart, *self.causal}
        by_keys: dict[tuple, list[str]] = {}
        for group in self.groups:
            if group in queries:
                separate = group if group in apart else None
                by_keys.setdefault((self.keys(group), separate), []).append(group)
        return tuple((tuple(q), k) for (k, _), q in by_keys.items())

    def matrix(self) -> np.ndarray:
        """Returns the table as a boolean array whose rows are queries."""
        return np.array([[k in row for k in self.groups] for row in self.rows], bool)

    def mask(self, lengths: Mapping[str, int]) -> np.ndarray:
        """Returns the token-level boolean mask (l, s) for groups of the given lengths, in table
        order."""
        sizes = [lengths[g] for g in self.groups]
        mask = np.repeat(np.repeat(self.matrix(), sizes, axis=0), sizes, axis=1)
        starts = dict(zip(self.groups, np.cumsum([0, *sizes]), strict=False))
        for group in self.causal:
            block = slice(starts[group], starts[group] + lengths[group])
            mask[block, block] &= np.tri(lengths[group], dtype=bool)
        return mask

    def __str__(self) -> str:
        width = max(map(len, self.groups))
        lines = [f"{self.name} (row attends column)", " " * width + "  " + " ".join(self.groups)]
        for group in self.groups:
            diagonal = "\\" if group in self.causal else "x"
            cells = (
                (diagonal if k == group else "x") if self.sees(group, k) else "."
                for k in self.groups
            )
            row = " ".join(c.center(len(k)) for c, k in zip(cells, self.groups, strict=True))
            lines.append(f"{group:>{width}}  {row}")
        return "\n".join(lines)

    def _index(self, group: str) -> int:
        try:
            return self.groups.index(group)
        except ValueError:
            raise KeyError(
                f"visibility table {self.name!r} has no group {group!r}; it has {self.groups}"
            ) from None


def table(name: str, rows: Mapping[str, str], causal: Iterable[str] = ()) -> Visibility:
    """Builds a table from ``{query: "space separated keys"}``.

    Args:
      causal: groups in which attention is causal, token by token.

    Raises:
      KeyError: a row or `causal` names a group without a row.
    """
    groups, causal = tuple(rows), tuple(causal)
    if unknown := set(causal) - set(groups):
        raise KeyError(f"visibility table {name!r}: causal groups {sorted(unknown)} have no row")
    for query, keys in rows.items():
        for key in keys.split():
            if key not in rows:
                raise KeyError(f"visibility table {name!r}: {query!r} sees {key!r}, which has "
                               "no row")  # fmt: skip
    key_groups = tuple(tuple(g for g in groups if g in rows[q].split()) for q in groups)
    return Visibility(name, groups, key_groups, causal)


def cacheable(
    visibility: Visibility,
    given: Iterable[str],
    modulated_by: Mapping[str, Iterable[str]] | None = None,
) -> tuple[str, ...]:
    """Returns the groups whose keys and values cannot change while the others are denoised.

    This is the largest set of GIVEN groups that see, transitively, only members of the set. A
    group's modulation normally depends on its own noise level alone; `modulated_by` lists the
    exceptions (a model with one global timestep makes every group depend on every group).

    Args:
      visibility: the table, already restricted to the groups that are present.
      given: groups whose content and noise level stay constant.
      modulated_by: group -> further groups whose noise levels enter its modulation.
    """
    modulated_by = modulated_by or {}
    members = set(given)
    depends = {g: {*visibility.keys(g), *modulated_by.get(g, ())} for g in visibility.groups}
    while outsiders := {g for g in members if not depends[g] <= members}:
        members -= outsiders
    return tuple(g for g in visibility.groups if g in members)


def bidirectional(*groups: str) -> Visibility:
    """Returns a table in which everything sees everything: DiT, Wan, Cosmos."""
    return table("bidirectional", {g: " ".join(groups) for g in groups})


def causal(*groups: str) -> Visibility:
    """Returns a table in which each group sees itself and the ones before it: per-frame causal
    video, block autoregression."""
    return table("causal", {g: " ".join(groups[: i + 1]) for i, g in enumerate(groups)})


def prefix(given: tuple[str, ...], predicted: tuple[str, ...]) -> Visibility:
    """Returns a table in which given groups see only given groups, and predicted ones see
    everything; exactly cacheable."""
    rows = {g: " ".join(given) for g in given}
    return table("prefix", rows | {g: " ".join(given + predicted) for g in predicted})
