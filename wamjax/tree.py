"""Flattens parameter trees by path: "a/b/c" for the leaf ``tree["a"]["b"]["c"]``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Tree = Any


def path_str(path) -> str:
    """Formats a key path of JAX as "a/b/c", with attributes, dict keys and indices alike."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns leaves by path, in tree order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_str(path): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Builds nested dicts from leaves by path; the inverse of `flatten` for trees of dicts."""
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
    """Applies ``function(path, leaf, ...)`` to every leaf, with the path as "a/b/c"."""
    return jax.tree_util.tree_map_with_path(lambda p, *x: function(path_str(p), *x), tree, *rest)


def count(tree: Tree) -> int:
    """Returns the number of parameters; works on arrays and on `ShapeDtypeStruct`."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def count_by_expert(params: Tree) -> dict[str, int]:
    """Returns the parameters of each expert including its blocks, of shared parts, and in total."""
    out: dict[str, int] = {}
    for path, leaf in flatten(params).items():
        first, second = path.split("/")[:2]
        owner = second if first == "blocks" else first
        out[owner] = out.get(owner, 0) + count(leaf)
    return out | {"total": count(params)}


def nbytes(tree: Tree) -> int:
    """Returns the bytes of all leaves, unsharded."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def describe(params: Tree) -> str:
    """Returns a few lines: parameters by expert, total and megabytes."""
    lines = [f"  {name:<12}{number:>18,}" for name, number in count_by_expert(params).items()]
    return "\n".join(lines) + f"   {nbytes(params) / 1e6:,.1f} MB"
