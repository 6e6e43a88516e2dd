"""Paths and leaves of parameter trees: "a/b/c" for the leaf ``tree["a"]["b"]["c"]``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Tree = Any


def path_str(path) -> str:
    """A key path of JAX as "a/b/c"; attributes, dict keys and indices alike."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Tree) -> dict[str, Any]:
    """Leaves by path, in tree order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_str(path): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts from leaves by path; the inverse of `flatten` for trees of dicts."""
    out: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path!r} goes through {parent!r}, which is a leaf")
        if name in node:
            raise ValueError(f"{path!r} is both a leaf and a subtree")
        node[name] = leaf
    return out


def map_with_path(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """``function(path, leaf, ...)`` on every leaf, with the path as "a/b/c"."""
    return jax.tree_util.tree_map_with_path(lambda p, *x: function(path_str(p), *x), tree, *rest)


def count(tree: Tree) -> int:
    """Number of parameters; works on arrays and on `ShapeDtypeStruct`."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def count_by_prefix(tree: Tree, depth: int = 1) -> dict[str, int]:
    """Parameters below each of the first `depth` names of the paths, in tree order."""
    out: dict[str, int] = {}
    for path, leaf in flatten(tree).items():
        prefix = "/".join(path.split("/")[:depth])
        out[prefix] = out.get(prefix, 0) + int(np.prod(leaf.shape))
    return out


def nbytes(tree: Tree) -> int:
    """Bytes of all leaves, unsharded."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def describe(params: Tree) -> str:
    """A few lines: parameters by expert (blocks one level deeper), total and megabytes."""
    shown = {k: v for k, v in params.items() if k != "blocks"} if isinstance(params, dict) else {}
    counts = count_by_prefix(shown)
    if isinstance(params, dict) and "blocks" in params:
        counts |= {f"blocks/{k}": v for k, v in count_by_prefix(params["blocks"]).items()}
    lines = [f"  {name:<20}{number:>16,}" for name, number in counts.items()]
    total = f"  {'total':<20}{count(params):>16,}   {nbytes(params) / 1e6:,.1f} MB"
    return "\n".join([*lines, total])
