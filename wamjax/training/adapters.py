"""LoRA: low-rank corrections to chosen matrices (arXiv 2106.09685), for frozen backbones.

An adapter lies next to its kernel, as ``lora_down`` (..., in, r) and ``lora_up`` (..., r, out), and
`layers.Linear` computes ``x W + (x down) up`` if it finds one. So the weights keep their paths, a
frozen backbone needs no gradient of its own size, and everything that works on parameters works on
adapters. ``up`` starts at zero. There is no factor alpha / r: with Adam it would only amount to
another learning rate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wamjax import tree

Params = dict[str, Any]
DOWN, UP = "lora_down", "lora_up"


def is_adapter(path: str) -> bool:
    """Returns whether a parameter is part of an adapter."""
    return path.rsplit("/", 1)[-1] in (DOWN, UP)


def add(params: Params, rank: int, targets: Sequence[str], rng: jax.Array) -> Params:
    """Adds a fresh adapter next to every target kernel; the outputs do not change yet.

    Args:
      rank: r; 0 adds none.
      targets: regexes of whole paths of kernels, (in, out) or stacked (layers, in, out).

    Raises:
      ValueError: a target matches no kernel; lists the existing ones.
    """
    if not rank:
        return params
    flat = tree.flatten(params)
    # A kernel of three dimensions outside of the blocks is a convolution's.
    kernels = [p for p, x in flat.items() if p.endswith("/kernel") and _is_matrix(p, x)]
    idle = [t for t in targets if not any(re.fullmatch(t, p) for p in kernels)]
    if idle or not targets:
        shown = "".join(f"\n  {p}" for p in kernels)
        raise ValueError(f"config.lora.targets {list(targets)}: {idle or 'nothing'} matches no "
                         f"matrix; there are{shown}")  # fmt: skip
    new = {}
    for i, path in enumerate(kernels):
        if any(re.fullmatch(t, path) for t in targets):
            *stack, fan_in, fan_out = flat[path].shape
            place, dtype = path.removesuffix("kernel"), flat[path].dtype
            noise = jax.random.normal(jax.random.fold_in(rng, i), (*stack, fan_in, rank), dtype)
            new[place + DOWN] = noise * fan_in**-0.5
            new[place + UP] = jnp.zeros((*stack, rank, fan_out), dtype)
    return tree.unflatten(flat | new)


def _is_matrix(path: str, x: Any) -> bool:
    return x.ndim == 2 + path.startswith("blocks/")


def merge(params: Params) -> Params:
    """Returns parameters without adapters, with their corrections added to the kernels in
    float32."""
    flat = tree.flatten(params)
    out = {}
    for path, x in flat.items():
        down = flat.get(path.removesuffix("kernel") + DOWN) if path.endswith("/kernel") else None
        if down is not None:
            x = corrected(x, down, flat[path.removesuffix("kernel") + UP])
        if not is_adapter(path):
            out[path] = x
    return tree.unflatten(out)


def corrected(kernel, down, up):
    """Returns ``W + down up``, in float32 or wider, in the kernel's dtype; for numpy or jax
    arrays."""
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    product = down.astype(wide) @ up.astype(wide)
    return (kernel.astype(wide) + product).astype(kernel.dtype)
