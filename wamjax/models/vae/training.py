"""Trains a custom autoencoder, with an objective like those of `wamjax.wam`."""

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
      codec: unbound; its parameters are trained.
      frames, picture: frames and (height, width) of a training window.
    """

    codec: VAECodec
    frames: int
    picture: tuple[int, int]

    kind = "codec"

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of a training batch; other entries of a batch are ignored."""
        self.codec.shape(self.frames, *self.picture)  # raises if the clip does not divide
        shape = (batch_size, self.frames, *self.picture, 3)
        return {self.codec.key: jax.ShapeDtypeStruct(shape, jnp.uint8)}

    row = 1
    tables = ()

    def describe(self) -> str:
        """Returns nothing: there is no visibility table."""
        return ""

    def derive(self, params: Params) -> Params:
        """Returns the parameters unchanged."""
        return params

    def init(self, rng: Array) -> Params:
        return self.codec.init(rng)

    def loss(
        self, params: Params, batch: Batch, rng: Array, average: Params | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Computes the mean square error per pixel value in [-1, 1], plus the bottleneck's loss.

        On pictures with few objects the absolute error learns more slowly: it spends a long time at
        the median, the empty table (700 steps of tabletop crops: 17.2 dB, squares 20.2).

        Frames past the end of an episode repeat the last one and count like any other picture.

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
    """Returns the peak signal-to-noise ratio in dB from a mean square error of values in [-1,
    1]."""
    return 10 * jnp.log10(4 / square_error)
