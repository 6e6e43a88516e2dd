"""Defines codecs, which turn pixels into latents and back behind the interface of a video VAE.

A codec maps uint8 video (b, f, H, W, 3) to latents (b, t, h, w, c). The first latent frame depends
only on the first picture, so conditioning on one image at test time matches training exactly.
Encoding and decoding are deterministic. Floats in [-1, 1] are accepted if their values can be
checked (`vae.pixels.to_unit`), and always by an autoencoder's `encode_unit`.

A codec with parameters is built without them: ``codec.init(rng)`` creates new ones, a checkpoint
holds trained ones, and ``codec.bind(params)`` is the codec that can encode and decode. Bind inside
the jitted function, or pass the bound codec in as an argument (it is a pytree); closing over it
would compile the weights into the program as constants.
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

STAYS = 0.15  # root mean square change, in [-1, 1], of a square whose content stays the same


class Codec(Protocol):
    """Converts between pixels and latents, as the objectives need it."""

    key: str  # name of the batch entry it reads
    temporal: int  # frames per latent after the first

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns the latent (t, h, w, c) of a clip."""

    def init(self, rng: Array) -> dict[str, Any]:
        """Returns new parameters; {} for a codec without any."""

    def bind(self, params: dict[str, Any]) -> Codec:
        """Returns the same codec with these parameters, ready to encode and decode."""

    def encode(self, video: Array) -> Array: ...

    def decode(self, latents: Array) -> Array: ...

    def decode_after(self, latents: Array, pictures: Array) -> Array:
        """Decodes the frames that follow known pictures (b, 1 or t, H, W, 3), and may use those."""


class Parameterless:
    """Implements `init` and `bind` for codecs without parameters that have one latent per frame."""

    temporal = 1

    def init(self, rng: Array) -> dict[str, Any]:
        del rng
        return {}

    def bind(self, params: dict[str, Any]):
        if params:
            raise ValueError(f"{type(self).__name__} has no parameters, got {sorted(params)}")
        return self

    def decode_after(self, latents: Array, pictures: Array) -> Array:
        """Decodes without the pictures; see `Codec`."""
        del pictures
        return self.decode(latents)


@dataclasses.dataclass(frozen=True)
class PixelCodec(Parameterless):
    """Turns each `patch` x `patch` square of pixels in [-1, 1] into one latent (space to depth)."""

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
    """Keeps the low frequencies of every square of pixels, each scaled to a variance of about one.

    This does without training what a trained VAE does for the published models: latents have far
    fewer numbers than pixels. A network can only predict noise that fits its width, and a token of
    raw pixels may hold more numbers than that (2 x 2 latents of 8 x 8 pixels are 768 numbers).

    Attributes:
      patch: side of a square.
      channels: number of coefficients to keep, out of the 3 patch^2 of a square; those that vary
        most in pictures.
    """

    patch: int
    channels: int
    key: str = "video"

    def __post_init__(self):
        maximum = 3 * self.patch**2
        if not 0 < self.channels <= maximum:
            raise ValueError(
                f"model.codec.channels = {self.channels} must be between 1 and {maximum}, the "
                f"number of values in a square of {self.patch} x {self.patch} pixels"
            )

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
        """Decodes the frames that follow known pictures, either one picture or as many as latents.

        A square that hardly changes is shown as before, with the details that the latents do not
        hold and without the noise of a prediction.
        """
        basis, scale = self._cosines()
        pixels = PixelCodec(self.patch).encode(pictures)
        before = pixels @ basis @ basis.T  # the part that the latents hold
        after = at_least_float32(latents) @ (basis * scale).T
        change = jnp.mean((after - before) ** 2, axis=-1, keepdims=True)
        weight = jnp.exp(-change / STAYS**2)
        return PixelCodec(self.patch).decode(after + weight * (pixels - after))

    def _cosines(self) -> tuple[np.ndarray, np.ndarray]:
        return tuple(part.astype(widest()) for part in cosines(self.patch, self.channels))


@functools.cache
def cosines(patch: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the orthonormal basis (3 patch^2, channels) of the discrete cosine transform (type
    II) on grey, red - blue and green - magenta, strongest first, and the expected standard
    deviations (channels,) of its coefficients.

    Deviations fall with frequency as in pictures (Field 1987: amplitude about 1 / f); their size is
    that of rendered scenes in [-1, 1].
    """
    index = np.arange(patch)
    waves = np.cos(np.pi * (2 * index + 1) * index[:, None] / (2 * patch)) * np.sqrt(2 / patch)
    waves[0] /= np.sqrt(2)
    colours = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
    basis = np.einsum("ip,jq,kc->ijkpqc", waves, waves, colours).reshape(3 * patch**2, -1)
    frequency = (index[:, None] + index)[..., None] + np.zeros(3)
    constant, variable = np.array([1.0, 0.17, 0.17]), np.array([0.3, 0.06, 0.06])
    decay = variable / np.maximum(frequency, 1) ** 1.2
    scale = patch * np.where(frequency == 0, constant, decay).ravel()
    best = np.argsort(-scale, kind="stable")[:channels]
    return basis[best].T, scale[best]


@dataclasses.dataclass(frozen=True)
class CachedLatents(Parameterless):
    """Reads latents that were encoded ahead of time: the batch holds `latents`, and nothing is
    computed.

    Attributes:
      channels, spatial, temporal: sizes of the VAE that encoded them (Wan2.2: 48, 16, 4).
    """

    channels: int
    spatial: int
    temporal: int
    key: str = "latents"

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        if (frames - 1) % self.temporal or height % self.spatial or width % self.spatial:
            raise ValueError(
                f"a clip of {frames} frames of {height}x{width} pixels cannot be encoded: the VAE "
                f"takes {self.temporal} k + 1 frames with sides divisible by {self.spatial}; "
                "change config.data.frames or config.data.image_size"
            )
        steps = 1 + (frames - 1) // self.temporal
        return steps, height // self.spatial, width // self.spatial, self.channels

    def encode(self, video: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        return video.astype(widest())

    def decode(self, latents: Array) -> Array:
        raise NotImplementedError(
            "cached latents have no decoder: to get pictures, decode them by the VAE that encoded "
            "them"
        )


def stable_diffusion() -> VAECodec:
    """Returns the image autoencoder of Stable Diffusion and DiT (ft-mse): 8 x 8 pixels, 4
    channels."""
    std = (1 / published.SD_SCALE,) * published.SD.channels
    return VAECodec(published.SD, Gaussian(published.SD.channels), (), std)


def wan21() -> VAECodec:
    """Returns the video autoencoder of Wan 2.1 and Cosmos-Predict2: 4 frames, 8 x 8 pixels, 16
    channels."""
    bottleneck = Gaussian(published.WAN_21.channels)
    return VAECodec(published.WAN_21, bottleneck, published.WAN_21_MEAN, published.WAN_21_STD)


def wan22() -> VAECodec:
    """Returns the video autoencoder of Wan 2.2 TI2V: 4 frames, 16 x 16 pixels, 48 channels."""
    bottleneck = Gaussian(published.WAN_22.channels)
    return VAECodec(published.WAN_22, bottleneck, published.WAN_22_MEAN, published.WAN_22_STD)


def small(bottleneck, spatial: int, temporal: int, width: int) -> VAECodec:
    """Returns a codec to train: it folds pairs of pixels first, then halves the grid until
    `spatial`.

    Args:
      bottleneck: `Gaussian`, `FiniteScalar` or `CodeBook`.
      spatial, temporal: pixels along each side, and frames, per latent; powers of 2. With one frame
        per latent, every frame is encoded as a separate image.
      width: channels of the widest grid, a multiple of 8.
    """
    halvings, times = spatial.bit_length() - 2, temporal.bit_length() - 1
    if spatial != 2 ** (halvings + 1) or temporal != 2**times or not times <= halvings <= 3:
        raise ValueError(
            f"model.codec.spatial = {spatial} must be 2, 4, 8 or 16, and model.codec.temporal = "
            f"{temporal} must be a power of 2 that is at most half of it"
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
    """Builds the codec of ``config.model.codec``; a codec with parameters still needs `bind`."""
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
    kinds = ["pixel", "cosine", "cached", *PUBLISHED, *TRAINED]
    raise ValueError(f"model.codec.kind {config.kind!r} is not one of {kinds}")
