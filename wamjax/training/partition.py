"""Which parameters are trained: by rules on their paths.

``optim.freeze`` holds regexes; a parameter whose whole path one of them matches gets no gradient,
no moments and no decay, and keeps every bit. Adapters (`training.adapters`) are trained in any
case.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from wamjax import tree
from wamjax.training import adapters

Tree = Any


def trained(rules: Sequence[str]) -> Callable[[str], bool]:
    """Whether the parameter of a path is trained."""
    patterns = [re.compile(rule) for rule in rules]
    return lambda path: adapters.is_adapter(path) or not any(p.fullmatch(path) for p in patterns)


def split(params: Tree, keep: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """The parameters to keep, and the others, as trees of what each of them has."""
    flat = tree.flatten(params)
    if all(map(keep, flat)):
        return params, {}
    parts = {True: {}, False: {}}
    for path, x in flat.items():
        parts[keep(path)][path] = x
    return tree.unflatten(parts[True]), tree.unflatten(parts[False])


def merge(first: Tree, second: Tree) -> Tree:
    """The reverse of `split`."""
    return tree.unflatten(tree.flatten(first) | tree.flatten(second)) if second else first


def check(rules: Iterable[str], params: Tree, key: str) -> None:
    """Raises ValueError, which names them all, for rules that no parameter matches."""
    paths = list(tree.flatten(params))
    idle = [r for r in rules if not any(re.fullmatch(r, p) for p in paths)]
    if idle:
        shown = "".join(f"\n  {p}" for p in paths)
        raise ValueError(f"config.{key}: no parameter matches {idle}; they are{shown}")
