"""Combines an autoencoder, its bottleneck and the statistics of its latents into a codec."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt8

from wamjax.models.layers import at_least_float32, widest
from wamjax.models.vae import streaming
from wamjax.models.vae.autoencoder import Autoencoder, Sizes
from wamjax.models.vae.pixels import to_bytes, to_unit

Params = dict[str, Any]
static = functools.partial(struct.field, pytree_node=False)


@struct.dataclass
class VAECodec:
    """Implements `wamjax.models.codec.Codec`; everything but `params` is static.

    Attributes:
      bottleneck: see `wamjax.models.vae.bottleneck`; defines the latents.
      mean, std: statistics of the latents per channel; encoding returns (z - mean) / std. (): 0 and
        1.
      chunk: latents computed at a time, for long clips; 0: the whole clip.
      params: None until `bind`.
    """

    sizes: Sizes = static()
    bottleneck: Any = static()
    mean: tuple[float, ...] = static(default=())
    std: tuple[float, ...] = static(default=())
    chunk: int = static(default=0)
    key: str = static(default="video")
    params: Params | None = None

    @property
    def network(self) -> Autoencoder:
        return Autoencoder(self.sizes, self.bottleneck.features)

    @property
    def temporal(self) -> int:
        """Returns the frames per latent after the first."""
        return self.sizes.time_stride

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        return self.sizes.latent_shape(frames, height, width)

    def init(self, rng: Array) -> Params:
        """Returns new float32 parameters, with a "codebook" next to the network if there is one."""
        side, frames = self.sizes.space_stride, 1 + self.sizes.time_stride
        pixels = jnp.zeros((1, frames, side, side, 3))
        network, codes = jax.random.split(rng)
        params = self.network.init(network, pixels, mutable=["params"])["params"]
        codebook = self.bottleneck.init(codes)
        return params | ({"codebook": codebook} if codebook else {})

    def bind(self, params: Params) -> VAECodec:
        return self.replace(params=params)

    def encode(self, video: UInt8[Array, "b f H W 3"]) -> Float[Array, "b t h w c"]:
        """Encodes bytes, or floats in [-1, 1] outside jit, see `pixels.to_unit`."""
        if video.dtype != jnp.uint8:  # outside jit: one program, not one per operation
            return jax.jit(VAECodec.encode_unit)(self, to_unit(video))
        return self._encode(video, to_unit)

    def encode_unit(self, x: Float[Array, "b f H W 3"]) -> Float[Array, "b t h w c"]:
        """Encodes floats in [-1, 1], as the published pipelines pass them; the range is not
        checked."""
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"encode_unit takes floats in [-1, 1], not {x.dtype}: use encode")
        return self._encode(x, at_least_float32)

    def _encode(self, video: Array, numbers: Callable[[Array], Array]) -> Float[Array, "b t h w c"]:
        if not self.chunk:
            h = self.network.apply({"params": self._bound()}, numbers(video), method="encode")
            return self._latents(h)

        def step(video, past):
            x = numbers(video)
            h, past = streaming.encode_step(self.network, self._bound(), x, past)
            return self._latents(h), past

        return streaming.over_chunks(step, video, self.chunk * self.sizes.time_stride)

    def decode(self, latents: Float[Array, "b t h w c"]) -> UInt8[Array, "b f H W 3"]:
        z = latents * self._array(self.std, 1) + self._array(self.mean, 0)
        if not self.chunk:
            x = self.network.apply({"params": self._bound()}, z, method="decode")
            return to_bytes(x)

        def step(z, past):
            x, past = streaming.decode_step(self.network, self._bound(), z, past)
            return to_bytes(x), past

        return streaming.over_chunks(step, z, self.chunk)

    def decode_after(self, latents: Array, pictures: Array) -> Array:
        """Decodes without the pictures; see `models.codec.Codec`."""
        del pictures
        return self.decode(latents)

    def sample(self, video: UInt8[Array, "b f H W 3"], rng: Array) -> Float[Array, "b t h w c"]:
        """Samples latents from the posterior; for a Gaussian bottleneck."""
        return self._normalise(self.bottleneck.sample(self._features(video), rng))

    @property
    def vocabulary(self) -> int:
        """Returns the number of token ids; for a discrete bottleneck."""
        return self.bottleneck.vocabulary

    def tokens(self, video: UInt8[Array, "b f H W 3"]) -> Int[Array, "b t h w"]:
        """Returns token ids; for a discrete bottleneck."""
        return self.bottleneck.ids(self._codebook(), self._features(video))

    def from_tokens(self, ids: Int[Array, "b t h w"]) -> Float[Array, "b t h w c"]:
        """Returns the latents of token ids, as `decode` expects them."""
        return self._normalise(self.bottleneck.lookup(self._codebook(), ids))

    def standardised(self, video: UInt8[Array, "b f H W 3"]) -> VAECodec:
        """Returns this codec with `mean` and `std` set to those of its latents of `video`, per
        channel.

        Diffusion needs latents of unit variance; those of a trained codec can have any.
        """
        bare = self.replace(mean=(), std=())
        encode = jax.jit(VAECodec.encode) if video.dtype == jnp.uint8 else VAECodec.encode
        z = np.asarray(encode(bare, video), np.float64)
        mean, std = z.mean(axis=(0, 1, 2, 3)), z.std(axis=(0, 1, 2, 3))
        if std.min() < 1e-6:
            raise ValueError(f"latent channels {np.flatnonzero(std < 1e-6)} are constant, so they "
                             "cannot be normalized: use more varied pictures, or train the codec "
                             "longer")  # fmt: skip
        return self.replace(mean=tuple(mean.tolist()), std=tuple(std.tolist()))

    def _bound(self) -> Params:
        if self.params is None:
            raise ValueError("this codec has no parameters yet: use codec.bind(params)")
        return self.params

    def _codebook(self) -> Params:
        return self._bound().get("codebook", {})

    def _features(self, video: Array) -> Array:
        return self.network.apply({"params": self._bound()}, to_unit(video), method="encode")

    def _latents(self, h: Array) -> Array:
        return self._normalise(self.bottleneck.latents(self._codebook(), h))

    def _normalise(self, z: Array) -> Array:
        return (z - self._array(self.mean, 0)) / self._array(self.std, 1)

    def _array(self, values: tuple[float, ...], default: float) -> Array:
        return jnp.asarray(values or (default,), widest())
