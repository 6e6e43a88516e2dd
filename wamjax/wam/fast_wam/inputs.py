"""Describes what Fast-WAM reads from a window of an episode."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wamjax.models.codec import Codec
from wamjax.models.mot import MixtureOfTransformers


def windows(
    batch_size: int,
    network: MixtureOfTransformers,
    codec: Codec,
    frames: int,
    picture: tuple[int, int],
    chunk: int,
    action_dim: int,
    proprio_dim: int,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of a batch of windows; sizes as in `FastWAM`."""

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype)

    spec = {
        "proprio": array(jnp.float32, proprio_dim),
        "actions": array(jnp.float32, chunk, action_dim),
        "frame_valid": array(jnp.bool_, frames),
        "action_valid": array(jnp.bool_, chunk),
    }
    length, width = network.instruction_length, network.context_width
    if network.vocabulary:
        spec["instruction"] = array(jnp.int32, length)
    else:
        spec["context"] = array(jnp.bfloat16, length, width)
    if codec.key == "video":
        spec["video"] = array(jnp.uint8, frames, *picture, 3)
    else:
        spec[codec.key] = array(jnp.bfloat16, *codec.shape(frames, *picture))
    return spec
