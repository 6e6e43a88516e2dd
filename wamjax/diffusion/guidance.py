"""Implements classifier-free guidance (Ho and Salimans, arXiv 2207.12598)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def guide(
    conditional: Array, unconditional: Array, scale: Array | float, channels: int | None = None
) -> Array:
    """Returns ``unconditional + scale (conditional - unconditional)``, for any kind of prediction.

    Args:
      conditional, unconditional: outputs (..., c) of the network with and without its condition.
      scale: 1 = no guidance. A scalar, so that it can come from the solver's `points`.
      channels: guide only the first `channels` and take the others from `conditional`: for a
        learned variance half of the outputs, or the 3 of 4 that DiT's public code guides.
    """
    guided = unconditional + scale * (conditional - unconditional)
    if channels is None:
        return guided
    first = np.arange(conditional.shape[-1]) < channels
    return jnp.where(first, guided, conditional)


def interval(
    levels: Float[np.ndarray, "..."], scale: float, low: float, high: float
) -> Float[np.ndarray, "..."]:
    """Returns scales along a grid that guide only for ``low < level <= high`` (arXiv 2404.07724).

    The paper gives the interval in EDM's sigma; here it is in levels of the grid.
    """
    levels = np.asarray(levels)
    return np.where((low < levels) & (levels <= high), scale, 1.0)
