"""Codecs: pixels to latents and back, behind the interface of a video VAE.

A codec maps uint8 video (b, f, H, W, 3) to latents (b, t, h, w, c) whose first frame depends on
the first picture alone, so that conditioning on one image at test time is exactly what training
saw. Encoding and decoding are deterministic. Floats in [-1, 1] are taken where it can be seen that
they are (`vae.pixels.to_unit`), and by an autoencoder's `encode_unit`.

A codec with parameters is built without them: ``codec.init(rng)`` makes fresh ones, a checkpoint
has trained ones, and ``codec.bind(params)`` is the codec that can encode and decode. Bind inside
of the function that is jitted, or pass the bound codec in as an argument (it is a pytree);
closing over it would compile the weights into the program as constants.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, UInt8

from wamjax.models.layers import at_least_float32, widest
from wamjax.models.vae import published
from wamjax.models.vae.autoencoder import Sizes
from wamjax.models.vae.bottleneck import CodeBook, FiniteScalar, Gaussian
from wamjax.models.vae.pixels import to_bytes, to_unit
from wamjax.models.vae.vae_codec import VAECodec

STAYS = 0.15  # root mean square, in [-1, 1], by which a square moves that shows the same


class Codec(Protocol):
    """What the objectives need of a codec."""

    key: str  # name of the batch entry it reads
    temporal: int  # frames of a latent after the first

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Latent (t, h, w, c) of a clip."""

    def init(self, rng: Array) -> dict[str, Any]:
        """Fresh parameters; {} for a codec that has none."""

    def bind(self, params: dict[str, Any]) -> Codec:
        """The same codec with these parameters, ready to encode and decode."""

    def encode(self, video: Array) -> Array: ...

    def decode(self, latents: Array) -> Array: ...

    def decode_after(self, latents: Array, pictures: Array) -> Array:
        """Decodes what comes after known pictures (b, 1 or t, H, W, 3), with their help."""


class Parameterless:
    """`init` and `bind` of a codec that has no parameters, and a latent for each frame."""

    temporal = 1

    def init(self, rng: Array) -> dict[str, Any]:
        del rng
        return {}

    def bind(self, params: dict[str, Any]):
        if params:
            raise ValueError(f"{type(self).__name__} has no parameters, got {sorted(params)}")
        return self

    def decode_after(self, latents: Array, pictures: Array) -> Array:
        """See `Codec`; of itself it needs no help."""
        del pictures
        return self.decode(latents)


@dataclasses.dataclass(frozen=True)
class PixelCodec(Parameterless):
    """Space to depth: each `patch` x `patch` square of pixels in [-1, 1] becomes one latent."""

    patch: int
    key: str = "video"
    colours: int = 3

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"pictures of {height}x{width} do not divide by patch {self.patch}: resize each "
                "camera's by config.data.image_size = (HEIGHT, WIDTH)"
            )
        return frames, height // self.patch, width // self.patch, self.colours * self.patch**2

    def encode(self, video: UInt8[Array, "b f H W 3"]) -> Float[Array, "b t h w c"]:
        p = self.patch
        return rearrange(to_unit(video), "b f (h p) (w q) c -> b f h w (p q c)", p=p, q=p)

    def decode(self, latents: Float[Array, "b t h w c"]) -> UInt8[Array, "b f H W 3"]:
        p = self.patch
        return to_bytes(rearrange(latents, "b f h w (p q c) -> b f (h p) (w q) c", p=p, q=p))


@dataclasses.dataclass(frozen=True)
class CosineCodec(Parameterless):
    """The low frequencies of every square of pixels, each brought to a variance of about one.

    What a trained VAE does for the published models, without training: far fewer numbers than
    pixels. A network can only predict noise that fits its width, and a token of raw pixels may hold
    more of it (2 x 2 latents of 8 x 8 pixels are 768 numbers).

    Attributes:
      patch: side of a square.
      channels: coefficients kept, of the 3 patch^2 of a square; those that vary most in pictures.
    """

    patch: int
    channels: int
    key: str = "video"

    def __post_init__(self):
        most = 3 * self.patch**2
        if not 0 < self.channels <= most:
            raise ValueError(f"model.codec.channels {self.channels} of squares of {self.patch} "
                             f"pixels: between 1 and {most}")  # fmt: skip

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        t, h, w, _ = PixelCodec(self.patch).shape(frames, height, width)
        return t, h, w, self.channels

    def encode(self, video: UInt8[Array, "b f H W 3"]) -> Float[Array, "b t h w c"]:
        basis, scale = self._cosines()
        return PixelCodec(self.patch).encode(video) @ (basis / scale)

    def decode(self, latents: Float[Array, "b t h w c"]) -> UInt8[Array, "b f H W 3"]:
        basis, scale = self._cosines()
        return PixelCodec(self.patch).decode(at_least_float32(latents) @ (basis * scale).T)

    def decode_after(
        self, latents: Float[Array, "b t h w c"], pictures: UInt8[Array, "b f H W 3"]
    ) -> UInt8[Array, "b t H W 3"]:
        """Decodes what comes after known pictures, of which one or as many as latents are given.

        A square that hardly moves is shown as it was, with the details that latents know nothing
        of and without the noise of a prediction.
        """
        basis, scale = self._cosines()
        known = PixelCodec(self.patch).encode(pictures)
        before = known @ basis @ basis.T  # what the latents know of it
        after = at_least_float32(latents) @ (basis * scale).T
        moved = jnp.mean((after - before) ** 2, axis=-1, keepdims=True)
        kept = jnp.exp(-moved / STAYS**2)
        return PixelCodec(self.patch).decode(after + kept * (known - after))

    def _cosines(self) -> tuple[np.ndarray, np.ndarray]:
        return tuple(part.astype(widest()) for part in cosines(self.patch, self.channels))


@functools.cache
def cosines(patch: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """The orthonormal basis (3 patch^2, channels) of the discrete cosine transform (type II) on
    grey, red - blue and green - magenta, strongest first, and the standard deviations (channels,)
    expected of them.

    Deviations fall with frequency as in pictures (Field 1987: amplitude about 1 / f); their size is
    that of rendered scenes in [-1, 1].
    """
    at = np.arange(patch)
    waves = np.cos(np.pi * (2 * at + 1) * at[:, None] / (2 * patch)) * np.sqrt(2 / patch)
    waves[0] /= np.sqrt(2)
    colours = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
    basis = np.einsum("ip,jq,kc->ijkpqc", waves, waves, colours).reshape(3 * patch**2, -1)
    frequency = (at[:, None] + at)[..., None] + np.zeros(3)
    constant, varying = np.array([1.0, 0.17, 0.17]), np.array([0.3, 0.06, 0.06])
    falling = varying / np.maximum(frequency, 1) ** 1.2
    scale = patch * np.where(frequency == 0, constant, falling).ravel()
    best = np.argsort(-scale, kind="stable")[:channels]
    return basis[best].T, scale[best]


@dataclasses.dataclass(frozen=True)
class CachedLatents(Parameterless):
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
        return video.astype(widest())

    def decode(self, latents: Array) -> Array:
        raise NotImplementedError(
            "latents that were cached from a published VAE need that VAE to become pictures"
        )


def stable_diffusion() -> VAECodec:
    """The image autoencoder of Stable Diffusion and DiT (ft-mse): 8 x 8 pixels, 4 channels."""
    std = (1 / published.SD_SCALE,) * published.SD.channels
    return VAECodec(published.SD, Gaussian(published.SD.channels), (), std)


def wan21() -> VAECodec:
    """The video autoencoder of Wan 2.1 and Cosmos-Predict2: 4 frames, 8 x 8 pixels, 16 channels."""
    bottleneck = Gaussian(published.WAN_21.channels)
    return VAECodec(published.WAN_21, bottleneck, published.WAN_21_MEAN, published.WAN_21_STD)


def wan22() -> VAECodec:
    """The video autoencoder of Wan 2.2 TI2V: 4 frames, 16 x 16 pixels, 48 channels."""
    bottleneck = Gaussian(published.WAN_22.channels)
    return VAECodec(published.WAN_22, bottleneck, published.WAN_22_MEAN, published.WAN_22_STD)


def small(bottleneck, spatial: int, temporal: int, width: int) -> VAECodec:
    """A codec to train: pairs of pixels folded first, then halved until `spatial`.

    Args:
      bottleneck: `Gaussian`, `FiniteScalar` or `CodeBook`.
      spatial, temporal: pixels along each side, and frames, of a latent; powers of 2. With one
        frame to a latent, every frame is an image of its own.
      width: channels of the widest grid, a multiple of 8.
    """
    halvings, times = spatial.bit_length() - 2, temporal.bit_length() - 1
    if spatial != 2 ** (halvings + 1) or temporal != 2**times or not times <= halvings <= 3:
        raise ValueError(
            f"a latent of {temporal} frames and {spatial}x{spatial} pixels: spatial is 2, 4, 8 or "
            "16, and temporal a power of 2 that is at most half of it"
        )
    sizes = Sizes(
        "causal" if times else "image",
        bottleneck.channels,
        width,
        multipliers=(1, 2, 4, 4)[: halvings + 1],
        blocks=1,
        temporal=(False,) * (halvings - times) + (True,) * times,
        patch=2,
        groups=8,
    )
    return VAECodec(sizes, bottleneck)


PUBLISHED = {"sd": stable_diffusion, "wan2.1": wan21, "wan2.2": wan22}
TRAINED = {
    "kl": lambda config: Gaussian(config.channels),
    "fsq": lambda config: FiniteScalar(tuple(config.levels)),
    "vq": lambda config: CodeBook(config.codes, config.channels),
}


def build(config) -> Codec:
    """Makes the codec of ``config.model.codec``; one with parameters still wants `bind`."""
    if config.kind == "pixel":
        return PixelCodec(config.patch)
    if config.kind == "cosine":
        return CosineCodec(config.patch, config.channels)
    if config.kind == "cached":
        return CachedLatents(config.channels, config.spatial, config.temporal)
    if config.kind in PUBLISHED:
        return PUBLISHED[config.kind]()
    if config.kind in TRAINED:
        bottleneck = TRAINED[config.kind](config)
        codec = small(bottleneck, config.spatial, config.temporal, config.width)
        return codec.replace(mean=tuple(config.mean), std=tuple(config.std))
    known = ["pixel", "cosine", "cached", *PUBLISHED, *TRAINED]
    raise ValueError(f"model.codec.kind {config.kind!r} is not one of {known}")
