"""Provides parts that objectives share: a network as a function, and checks of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array

from wamjax.models.codec import Codec
from wamjax.models.layers import unconstrained


def bind(network: nn.Module, params: dict[str, Any], constrain: Callable = unconstrained):
    """Returns a network as a function of method name and arguments.

    Only a loss is constrained to a mesh; acting, sampling and counting work without one.

    Args:
      params: as trained, or with one tree per layer, as an objective's `prepare` returns them.
      constrain: see `layers.unconstrained`.
    """
    network = network.clone(constrain=constrain)
    if "blocks" not in params:  # from `prepare`
        network = network.clone(unroll=0, remat="none")
    return lambda method, *args, **kwargs: network.apply(
        {"params": params}, *args, method=method, **kwargs
    )


def codec_params(codec: Codec, rng: Array) -> dict[str, Any]:
    """Returns the parameters of a codec in their place among those of an objective; {} if it has
    none."""
    params = codec.init(rng)
    return {"codec": params} if params else {}


def bound_codec(codec: Codec, params: dict[str, Any]) -> Codec:
    """Returns the codec with its parameters in ``params["codec"]``, if it has any; they get no
    gradient, and ``optim.freeze`` keeps the optimiser from changing them."""
    parameters = params.get("codec")
    return codec.bind(jax.lax.stop_gradient(parameters)) if parameters else codec


def check_batch(
    batch: Mapping[str, Array], batch_spec: Callable[[int], dict[str, jax.ShapeDtypeStruct]]
) -> None:
    """Compares a batch with the one that an objective expects.

    Raises:
      KeyError, ValueError: a key is missing or has another shape; names it.
    """
    size = next(iter(batch.values())).shape[0]
    for key, entry in batch_spec(size).items():
        if key not in batch:
            raise KeyError(f"the batch has no {key!r}; it has {sorted(batch)}")
        if batch[key].shape != entry.shape:
            raise ValueError(f"batch[{key!r}] has shape {batch[key].shape}, the model takes "
                             f"{entry.shape}")  # fmt: skip
