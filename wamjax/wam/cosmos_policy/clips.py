"""Turns pictures into slots: builds the clip that a codec encodes, and decodes pictures from it.

A causal video codec encodes the first frame of a clip alone and the rest in groups of `k` (1 for
codecs of single pictures, 4 for Wan 2.1). So the first slot is one frame and every other slot is k
equal frames: 1 + k (T - 1) frames in total. Slots of numbers are black. Their latents are
overwritten, but those of later slots depend on them, so the whole clip is encoded in order. A
latent depends on no later frame: to act, only the slots up to the last picture of the present have
to be encoded.

Source: the public ``libero_dataset.py`` and ``cosmos_utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from wamjax.models.codec import Codec
from wamjax.wam.cosmos_policy.layouts import Layout

Images = Mapping[str, Array]


def split(video: UInt8[Array, "b f H W 3"], widths: Mapping[str, int]) -> dict[str, Array]:
    """Splits a composite into its cameras, (b, f, h, w, 3) each.

    Args:
      widths: camera -> width, in the order of the composite.
    """
    edges = np.cumsum([0, *widths.values()])
    if video.shape[3] != edges[-1]:
        raise ValueError(f"the picture is {video.shape[3]} pixels wide, the cameras "
                         f"{dict(widths)} side by side are {edges[-1]}")  # fmt: skip
    return {c: video[:, :, :, edges[i] : edges[i + 1]] for i, c in enumerate(widths)}


def assemble(layout: Layout, images: Images, slots: int, k: int) -> UInt8[Array, "b f h w 3"]:
    """Builds the clip of the first `slots` slots.

    Args:
      images: camera -> (b, 2, h, w, 3), now and at the end of the chunk; or (b, 1, h, w, 3), in
        which case the present fills the slots of the future.
      k: pixel frames of every slot but the first.
    """
    first = images[layout.cameras[0]][:, :1]
    frames = []
    for i, slot in enumerate(layout.slots[:slots]):
        frame = jnp.zeros_like(first)
        if slot.camera:
            picture = images[slot.camera]
            frame = picture[:, -1:] if slot.kind == "future_camera" else picture[:, :1]
        frames += [frame] * (k if i else 1)
    return jnp.concatenate(frames, axis=1)


def encode(layout: Layout, codec: Codec, images: Images, slots: int) -> Float[Array, "b t h w c"]:
    """Encodes the first `slots` slots; slots of numbers are encoded as black pictures."""
    return codec.encode(assemble(layout, images, slots, codec.temporal))


def decode(
    layout: Layout, codec: Codec, latents: Float[Array, "b t h w c"], images: Images
) -> dict[str, UInt8[Array, "b h w 3"]]:
    """Decodes the pictures of the future: camera -> (b, h, w, 3).

    If latents depend on earlier frames, slots of numbers are first replaced by black, as in
    encoding. The picture of a slot is the first of its frames.

    Args:
      latents: of all slots.
      images: the observation, see `assemble`.
    """
    k, positions = codec.temporal, layout.decoded
    if k == 1:
        present = jnp.concatenate([images[camera][:, :1] for camera in positions], axis=1)
        frames = codec.decode_after(latents[:, np.array(list(positions.values()))], present)
        return {camera: frames[:, i] for i, camera in enumerate(positions)}
    last = max(positions.values()) + 1
    pictures = np.array([bool(s.camera) for s in layout.slots[:last]])[:, None, None, None]
    black = encode(layout, codec, images, last)
    frames = codec.decode(jnp.where(pictures, latents[:, :last], black))
    return {camera: frames[:, k * (i - 1) + 1] for camera, i in positions.items()}
