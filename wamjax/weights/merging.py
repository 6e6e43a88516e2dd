"""Merges a run's adapters into its parameters."""

from __future__ import annotations

from wamjax.training import adapters
from wamjax.weights import store
from wamjax.weights.tensor import Tensor


def merged(params: store.Stored):
    """Returns shapes and slices of parameters with the adapters merged into their kernels."""

    def get(key):
        path, layer = key
        x, place = params.slice(key), path.removesuffix("kernel")
        if place + adapters.DOWN not in params.arrays or place == path:
            return x
        down, up = (params.slice((place + part, layer)) for part in (adapters.DOWN, adapters.UP))
        return Tensor(
            x.shape, x.dtype, lambda: adapters.corrected(x.read(), down.read(), up.read())
        )

    return {p: s for p, s in params.shapes.items() if not adapters.is_adapter(p)}, get
