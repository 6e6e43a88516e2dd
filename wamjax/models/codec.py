"""Codecs: pixels to latents and back, behind the interface of a video VAE.

A codec maps uint8 video (b, f, H, W, 3) to latents (b, t, h, w, c) whose first frame depends on
the first picture alone, so that conditioning on one image at test time is exactly what training
saw. All are deterministic and frozen.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, UInt8


class Codec(Protocol):
    """What the objectives need of a codec."""

    key: str  # name of the batch entry it reads

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Latent (t, h, w, c) of a clip."""

    def encode(self, video: Array) -> Array: ...

    def decode(self, latents: Array) -> Array: ...


@dataclasses.dataclass(frozen=True)
class PixelCodec:
    """Space to depth: each `patch` x `patch` square of pixels in [-1, 1] becomes one latent."""

    patch: int
    key: str = "video"

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        if height % self.patch or width % self.patch:
            raise ValueError(f"pictures of {height}x{width} do not divide by patch {self.patch}")
        return frames, height // self.patch, width // self.patch, 3 * self.patch**2

    def encode(self, video: UInt8[Array, "b f H W 3"]) -> Float[Array, "b t h w c"]:
        x = video.astype(jnp.float32) / 127.5 - 1
        return rearrange(x, "b f (h p) (w q) c -> b f h w (p q c)", p=self.patch, q=self.patch)

    def decode(self, latents: Float[Array, "b t h w c"]) -> UInt8[Array, "b f H W 3"]:
        p = self.patch
        x = rearrange(latents, "b f h w (p q c) -> b f (h p) (w q) c", p=p, q=p)
        return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class CachedLatents:
    """For data that was encoded ahead of time: the batch carries `latents`, nothing is computed.

    Attributes:
      channels, spatial, temporal: of the VAE that made the latents (Wan2.2: 48, 16, 4).
    """

    channels: int
    spatial: int
    temporal: int
    key: str = "latents"

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        if (frames - 1) % self.temporal or height % self.spatial or width % self.spatial:
            raise ValueError(
                f"{frames} frames of {height}x{width}: the VAE wants 1 + {self.temporal}k frames "
                f"and sides divisible by {self.spatial}"
            )
        steps = 1 + (frames - 1) // self.temporal
        return steps, height // self.spatial, width // self.spatial, self.channels

    def encode(self, video: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        return video.astype(jnp.float32)

    def decode(self, latents: Array) -> Array:
        raise NotImplementedError(
            "latents that were cached from a published VAE need that VAE to become pictures"
        )


def build(config) -> Codec:
    """Makes the codec of ``config.model.codec``."""
    if config.kind == "pixel":
        return PixelCodec(config.patch)
    if config.kind == "cached":
        return CachedLatents(config.channels, config.spatial, config.temporal)
    raise ValueError(f"model.codec.kind {config.kind!r} is not 'pixel' or 'cached'")
