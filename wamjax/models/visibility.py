"""Who sees whom: attention structure as a small named table over groups of tokens.

A *group* is a run of tokens that share a fate: the first frame, the future frames, an action chunk.
A table says for every query group which key groups it may attend. It is the whole description of
an attention pattern: the grouped attention calls, the boolean mask of the reference path, the
KV cache and the picture are all derived from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Visibility:
    """A named table ``group x group -> bool``, hashable so that it can be static under ``jit``.

    Build it with `table`; `rows` holds, for each group, the groups it sees in table order. In the
    groups of `causal` a token sees, of its own group, only itself and the tokens before it.
    """

    name: str
    groups: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    causal: tuple[str, ...] = ()

    def keys(self, query: str) -> tuple[str, ...]:
        """The groups that `query` attends, in table order."""
        return self.rows[self._index(query)]

    def sees(self, query: str, key: str) -> bool:
        """True where tokens of `query` attend tokens of `key`."""
        self._index(key)
        return key in self.keys(query)

    def restrict(self, present: Iterable[str]) -> Visibility:
        """The same table over the groups that exist in a program; absent ones vanish."""
        present = set(present)
        for group in present:
            self._index(group)
        kept = [(g, row) for g, row in zip(self.groups, self.rows, strict=True) if g in present]
        return Visibility(
            self.name,
            tuple(g for g, _ in kept),
            tuple(tuple(k for k in row if k in present) for _, row in kept),
            tuple(g for g in self.causal if g in present),
        )

    def calls(
        self, queries: Iterable[str], apart: Iterable[str] = ()
    ) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
        """The dense attention calls that `queries` need, as (query groups, key groups).

        Groups that see the same keys share a call, except for causal ones and those in `apart`.
        """
        queries, apart = set(queries), {*apart, *self.causal}
        merged: dict[tuple, list[str]] = {}
        for group in self.groups:
            if group in queries:
                own = group if group in apart else None
                merged.setdefault((self.keys(group), own), []).append(group)
        return tuple((tuple(q), k) for (k, _), q in merged.items())

    def matrix(self) -> np.ndarray:
        """The table as a boolean array, rows are queries."""
        return np.array([[k in row for k in self.groups] for row in self.rows], bool)

    def mask(self, lengths: Mapping[str, int]) -> np.ndarray:
        """The token-level boolean mask (l, s) for groups of the given lengths, in table order."""
        sizes = [lengths[g] for g in self.groups]
        mask = np.repeat(np.repeat(self.matrix(), sizes, axis=0), sizes, axis=1)
        starts = dict(zip(self.groups, np.cumsum([0, *sizes]), strict=False))
        for group in self.causal:
            own = slice(starts[group], starts[group] + lengths[group])
            mask[own, own] &= np.tri(lengths[group], dtype=bool)
        return mask

    def __str__(self) -> str:
        width = max(map(len, self.groups))
        lines = [f"{self.name} (row attends column)", " " * width + "  " + " ".join(self.groups)]
        for group in self.groups:
            own = "\\" if group in self.causal else "x"
            cells = (
                (own if k == group else "x") if self.sees(group, k) else "." for k in self.groups
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
    """Makes a table from ``{query: "space separated keys"}``.

    Args:
      causal: groups that are causal inside, token by token.

    Raises:
      KeyError: a row names a group that has no row of its own.
    """
    groups, causal = tuple(rows), tuple(causal)
    if unknown := set(causal) - set(groups):
        raise KeyError(f"table {name!r}: causal groups {sorted(unknown)} have no row")
    for query, keys in rows.items():
        for key in keys.split():
            if key not in rows:
                raise KeyError(f"table {name!r}: {query!r} sees {key!r}, which has no row")
    seen = tuple(tuple(g for g in groups if g in rows[q].split()) for q in groups)
    return Visibility(name, groups, seen, causal)


def cacheable(
    visibility: Visibility,
    given: Iterable[str],
    modulated_by: Mapping[str, Iterable[str]] | None = None,
) -> tuple[str, ...]:
    """The groups whose keys and values cannot change while the others are denoised.

    The largest set of GIVEN groups that see, transitively, only members of the set. A group's
    modulation normally depends on its own noise level alone; `modulated_by` lists the exceptions
    (a model with one global timestep makes every group depend on every group).

    Args:
      visibility: the table, already restricted to the groups that are present.
      given: groups whose content and noise level stay constant.
      modulated_by: group -> further groups whose noise levels enter its modulation.
    """
    modulated_by = modulated_by or {}
    kept = set(given)
    depends = {g: {*visibility.keys(g), *modulated_by.get(g, ())} for g in visibility.groups}
    while dropped := {g for g in kept if not depends[g] <= kept}:
        kept -= dropped
    return tuple(g for g in visibility.groups if g in kept)


def bidirectional(*groups: str) -> Visibility:
    """Everything sees everything: DiT, Wan, Cosmos."""
    return table("bidirectional", {g: " ".join(groups) for g in groups})


def causal(*groups: str) -> Visibility:
    """Each group sees itself and the ones before: per-frame causal video, block autoregression."""
    return table("causal", {g: " ".join(groups[: i + 1]) for i, g in enumerate(groups)})


def prefix(given: tuple[str, ...], predicted: tuple[str, ...]) -> Visibility:
    """Given groups see given groups only; predicted ones see everything. Exactly cacheable."""
    rows = {g: " ".join(given) for g in given}
    return table("prefix", rows | {g: " ".join(given + predicted) for g in predicted})
