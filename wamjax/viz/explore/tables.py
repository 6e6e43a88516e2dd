"""Describes the slots of every use and the visibility tables, down to tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wamjax.models.visibility import Visibility, cacheable
from wamjax.wam.slots import Role
from wamjax.wam.uses import Use

CELLS = 2000  # maximum cells along a mask; with more tokens, a cell stands for several

def state(use: Use, group: str) -> str:
    """Returns the state of a group's slots in a use: "given", "predicted", "hidden" (predicted, but
    not trained) or "absent"."""
    role = dict(use.factorization.roles).get(group, Role.ABSENT)
    if role == Role.PREDICTED and group not in use.trained:
        return "hidden"
    return role.name.lower()


def slots(objective) -> dict[str, Any]:
    """Returns the slots of an objective and their states in each of its uses."""
    names = objective.slot_names
    return {
        "names": names,
        "uses": [
            {"name": u.name, "table": u.table.name, "states": [state(u, g) for _, g in names]}
            for u in objective.uses
        ],
    }


def tables(objective, tokens: Mapping[str, int]) -> list[dict[str, Any]]:
    """Returns the visibility table of each use, or the objective's tables if it has no uses.

    Args:
      tokens: number of tokens of every group that is present.
    """
    found = [(u.name, u.table, u.given) for u in objective.uses]
    found = found or [(t.name, t, ()) for t in objective.tables]
    counts = {g: sum(group == g for _, group in objective.slot_names) for g in tokens}
    return [_table(name, table, given, tokens, counts) for name, table, given in found]


def _table(
    use: str,
    table: Visibility,
    given: Sequence[str],
    tokens: Mapping[str, int],
    counts: Mapping[str, int],
) -> dict[str, Any]:
    table = table.restrict([g for g in table.groups if g in tokens])
    lengths = {g: tokens[g] for g in table.groups}
    each = math.ceil(sum(lengths.values()) / CELLS)
    cells = {g: math.ceil(n / each) for g, n in lengths.items()}
    return {
        "use": use,
        "name": table.name,
        "groups": table.groups,
        "tokens": list(lengths.values()),
        "slots": [max(counts[g], 1) for g in table.groups],
        "causal": table.causal,
        "each": each,
        "cells": list(cells.values()),
        "mask": runs(table.mask(cells)),
        "share": attended(table, lengths) / sum(lengths.values()) ** 2,
        "given": given,
        "keeps": cacheable(table, [g for g in given if g in table.groups]),
    }


def attended(table: Visibility, lengths: Mapping[str, int]) -> int:
    """Returns how many pairs of tokens attend: the sum of ``table.mask(lengths)``, without it."""
    pairs = sum(lengths[q] * lengths[k] for q in table.groups for k in table.keys(q))
    own = (lengths[g] for g in table.causal if table.sees(g, g))
    return pairs - sum(n * (n - 1) // 2 for n in own)


def runs(mask: np.ndarray) -> list[list[Any]]:
    """Encodes a boolean mask as ``[[rows, [[start, stop], ...]], ...]``, with equal rows merged."""
    out: list[list[Any]] = []
    for row in mask:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
        spans = edges.reshape(-1, 2).tolist()
        if out and out[-1][1] == spans:
            out[-1][0] += 1
        else:
            out.append([1, spans])
    return out
