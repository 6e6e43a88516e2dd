"""Builds the training targets of Cosmos Policy: the clean latents of all slots of a batch."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from wamjax.models.codec import Codec
from wamjax.wam.cosmos_policy import clips, injection
from wamjax.wam.cosmos_policy.augment import Strength, augment
from wamjax.wam.cosmos_policy.layouts import Layout

Batch = dict[str, Array]


def latents(
    layout: Layout,
    codec: Codec,
    images: Mapping[str, Array],
    values: Mapping[str, Array],
    strength: Strength | None,
    key: Array,
) -> Float[Array, "b t h w c"]:
    """Returns the clean latents of all slots.

    Nothing after the last picture is encoded: no latent depends on later frames, and numbers
    overwrite the rest. On LIBERO this saves one slot of nine.

    Args:
      codec: bound.
      images: camera -> (b, 2, h, w, 3).
      values: from `numbers`.
      strength: strength of random changes to the pictures, the same for all cameras of a sample;
        None for no changes.
    """
    if strength:
        images = {c: augment(key, x, strength) for c, x in images.items()}
    pictures = layout.pictures
    frames = clips.encode(layout, codec, images, pictures)
    padding = [(0, 0), (0, len(layout) - pictures)] + [(0, 0)] * 3
    return injection.inject(layout, jnp.pad(frames, padding), values)


def numbers(
    layout: Layout, batch: Batch, discount: float, compat: tuple[str, ...] = ()
) -> dict[str, Array]:
    """Returns the numbers to write into slots, normalised.

    The last action is repeated if an episode ends within the chunk. The value is the return from
    the end of the chunk on: the score, partial or not, discounted by the steps until it is given.
    """
    valid = batch["action_valid"]
    last = jnp.maximum(jnp.sum(valid, axis=1, keepdims=True) - 1, 0)
    index = jnp.minimum(jnp.arange(valid.shape[1]), last)
    score = batch["score"]
    if "erased_scores" in compat:
        score = (score > 0).astype(score.dtype)
    out = {
        "action": jnp.take_along_axis(batch["actions"], index[:, :, None], axis=1),
        "value": injection.value_target(score * discount ** batch["to_go"]),
        **{n: batch[n] for n in ("proprio", "future_proprio") if n in layout.numbers},
    }
    if "bf16_targets" in compat:
        out = {n: x.astype(jnp.bfloat16).astype(x.dtype) for n, x in out.items()}
    return out
