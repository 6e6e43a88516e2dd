"""Training an autoencoder of one's own: an objective like those of `wamjax.wam`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from wamjax.models.layers import at_least_float32
from wamjax.models.vae.pixels import to_unit
from wamjax.models.vae.vae_codec import VAECodec

Batch = dict[str, Array]
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CodecObjective:
    """Reconstructs video through the bottleneck.

    Attributes:
      codec: unbound; its parameters are what is trained.
      frames, picture: of a training window.
    """

    codec: VAECodec
    frames: int
    picture: tuple[int, int]

    kind = "codec"

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a training batch; other entries of a batch are ignored."""
        self.codec.shape(self.frames, *self.picture)  # raises where the clip does not divide
        shape = (batch_size, self.frames, *self.picture, 3)
        return {self.codec.key: jax.ShapeDtypeStruct(shape, jnp.uint8)}

    row = 1
    tables = ()

    def describe(self) -> str:
        """Nothing: convolutions see what they reach."""
        return ""

    def derive(self, params: Params) -> Params:
        """All parameters stand for themselves."""
        return params

    def init(self, rng: Array) -> Params:
        return self.codec.init(rng)

    def loss(
        self, params: Params, batch: Batch, rng: Array, average: Params | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Mean square error per pixel value in [-1, 1], plus what the bottleneck adds.

        On pictures of few objects the absolute error learns slower: it starts with a long time at
        the median, the empty table (700 steps of tabletop crops: 17.2 dB, squares 20.2).

        Frames past the end of an episode repeat the last one, so they are pictures like others.

        Returns:
          (loss, metrics), float32: reconstruction (that error), psnr in dB, and the bottleneck's.
        """
        del average
        codec = self.codec
        x = to_unit(batch[codec.key])
        h = codec.network.apply({"params": params}, x, method="encode")
        z, extra, metrics = codec.bottleneck.train(params.get("codebook", {}), h, rng)
        y = at_least_float32(codec.network.apply({"params": params}, z, method="decode"))
        error = jnp.mean(jnp.square(y - x))
        return error + extra, metrics | {"reconstruction": error, "psnr": psnr(error)}


def psnr(square_error: Array) -> Array:
    """Peak signal-to-noise ratio in dB from a mean square error of values in [-1, 1]."""
    return 10 * jnp.log10(4 / square_error)
