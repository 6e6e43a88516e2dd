"""Holds helpers for tests of networks and objectives."""

from __future__ import annotations

import contextlib

import jax
import numpy as np

from wamjax.models.visibility import Visibility, table


def random_params(abstract, seed: int = 0, dtype=np.float32):
    """Draws every parameter, including heads, gates and biases, so nothing is compared at zero.

    Kernels keep the variance of their input; norm scales are around 1.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        x = rng.standard_normal(leaf.shape)
        if name == "kernel":
            x *= leaf.shape[-2] ** -0.5
        elif name == "scale":
            x = 1 + 0.3 * x
        elif name in ("modulation", "head_table"):
            x *= 0.5
        else:
            x *= 0.3
        return x.astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def random_table(rng: np.random.Generator, size: int, density: float = 0.4) -> Visibility:
    """Draws a table over g0, g1, ... in which every group sees at least one group."""
    groups = [f"g{i}" for i in range(size)]
    matrix = rng.random((size, size)) < density
    for i in np.flatnonzero(~matrix.any(axis=1)):
        matrix[i, rng.integers(size)] = True
    return table(
        "random", {g: " ".join(k for k, m in zip(groups, row, strict=True) if m)
                   for g, row in zip(groups, matrix, strict=True)}
    )  # fmt: skip


def assert_trees_close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def precision(double: bool):
    """Enables float64 inside the context if `double`."""
    return jax.enable_x64(True) if double else contextlib.nullcontext()
