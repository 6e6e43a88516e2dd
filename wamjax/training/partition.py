"""Selects the trained parameters by rules on their paths.

``optim.freeze`` holds regexes; a parameter whose full path matches one of them gets no gradient,
no moments and no decay, and keeps every bit. Adapters (`training.adapters`) are always trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from wamjax import tree
from wamjax.training import adapters

Tree = Any


def trained(rules: Sequence[str]) -> Callable[[str], bool]:
    """Returns whether the parameter at a path is trained."""
    patterns = [re.compile(rule) for rule in rules]
    return lambda path: adapters.is_adapter(path) or not any(p.fullmatch(path) for p in patterns)


def split(params: Tree, keep: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Splits a tree into the parameters to keep and the others."""
    flat = tree.flatten(params)
    if all(map(keep, flat)):
        return params, {}
    parts = {True: {}, False: {}}
    for path, x in flat.items():
        parts[keep(path)][path] = x
    return tree.unflatten(parts[True]), tree.unflatten(parts[False])


def merge(first: Tree, second: Tree) -> Tree:
    """Reverses `split`."""
    return tree.unflatten(tree.flatten(first) | tree.flatten(second)) if second else first


def check(rules: Iterable[str], params: Tree, key: str) -> None:
    """Raises ValueError for rules that match no parameter; names them all."""
    paths = list(tree.flatten(params))
    idle = [r for r in rules if not any(re.fullmatch(r, p) for p in paths)]
    if idle:
        shown = "".join(f"\n  {p}" for p in paths)
        raise ValueError(f"config.{key}: no parameter matches {idle}; they are{shown}")
