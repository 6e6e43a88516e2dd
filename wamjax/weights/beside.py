"""Lists the tensors that published files hold besides the weights, and why each may be left out.

A layout names such tensors by patterns of their keys, each with a check. Tensors that a network
computes itself are compared with those of the file, so a file that was trained with other values,
or changed, is an error instead of a different model under the same name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from wamjax.models import dit
from wamjax.models.rope import split_axes
from wamjax.weights.tensor import Tensors

# (key, tensors of the file) -> an error, or "".
Check = Callable[[str, Tensors], str]
TOLERANCE = 1e-5  # for tables in float32: the public code computes them in float32 or float64


def other_network(key: str, tensors: Tensors) -> str:
    """Accepts weights of a part that is not converted, such as a decoder or a loss."""
    del key, tensors
    return ""


def counter(key: str, tensors: Tensors) -> str:
    """Accepts one number that a trainer counted."""
    shape = tensors[key].shape
    return "" if math.prod(shape) == 1 else f"has shape {shape}, expected one number, a counter"


def opaque(key: str, tensors: Tensors) -> str:
    """Accepts the state of a library as bytes, which holds no weights."""
    x = tensors[key]
    fine = x.dtype == np.uint8 or not math.prod(x.shape)
    return "" if fine else f"is {x.dtype} {x.shape}, expected uint8, a library's state"


def twin(stem: str, of: str, dots: bool = True, also: tuple[str, ...] = ()) -> Check:
    """Accepts a moving average of the weights: the same keys and shapes below another stem.

    Args:
      dots: whether the keys of the average keep their dots.
      also: further keys of the average.
    """

    def check(key: str, tensors: Tensors) -> str:
        name = key.removeprefix(stem)
        if name in also:
            return counter(key, tensors)
        names = [of + name]
        if not dots:
            below = (k for k in tensors if k.startswith(of))
            names = [k for k in below if k[len(of) :].replace(".", "") == name]
        if not any(k in tensors and tensors[k].shape == tensors[key].shape for k in names):
            return f"has shape {tensors[key].shape}, expected that of a weight below {of!r}"
        return ""

    return check


def table(compute: Callable[[tuple[int, ...]], np.ndarray]) -> Check:
    """Compares numbers that the network computes.

    Args:
      compute: returns the numbers for the shape of the file's tensor; raises ValueError if it has
        none of that shape.
    """

    def check(key: str, tensors: Tensors) -> str:
        x = tensors[key]
        try:
            expected = compute(x.shape)
        except ValueError as error:
            return f"has shape {x.shape}: {error}"
        eps = float(jnp.finfo(x.dtype).eps) if jnp.issubdtype(x.dtype, jnp.floating) else 0.0
        error = np.max(
            np.abs(x.read().astype(np.float64) - expected) / np.maximum(np.abs(expected), 1)
        )
        if error <= max(2 * eps, TOLERANCE):  # false for NaN
            return ""
        return (
            f"differs by up to {error:.2g} from the table that the network computes: models with "
            "other positions are not supported"
        )

    return check


def sincos(sizes: Mapping[str, Any]) -> Check:
    """Computes DiT's and SD3's table of positions, (1, tokens, width)."""

    def compute(shape: tuple[int, ...]) -> np.ndarray:
        side = math.isqrt(shape[1]) if len(shape) == 3 else 0
        if shape != (1, side * side, sizes["width"]):
            raise ValueError(f"it must be (1, side^2, {sizes['width']}), for square pictures")
        cut = tuple(sizes.get("position_table", (0, 0)))
        return dit.sincos(side, side, sizes["width"], cut)[None]

    return table(compute)


def cosmos_positions(sizes: Mapping[str, Any]) -> dict[str, Check]:
    """Computes Cosmos-Predict2's position numbers, and the exponents of its rotary frequencies."""
    time, side, _ = split_axes(sizes["width"] // sizes["heads"])

    def counts(shape):
        return np.arange(math.prod(shape), dtype=np.float64).reshape(shape)

    def exponents(dim: int):
        def compute(shape):
            if shape != (dim // 2,):
                raise ValueError(f"it must be {(dim // 2,)}, the exponents of {dim} dimensions")
            return np.arange(0, dim, 2) / dim

        return compute

    stem = r"net\.pos_embedder\."
    return {
        f"{stem}seq": table(counts),
        f"{stem}dim_spatial_range": table(exponents(side)),
        f"{stem}dim_temporal_range": table(exponents(time)),
    }
