"""Turns pictures and actions into tokens, and tokens into outputs, before and after the blocks.

Each expert owns its conditioning and its head, in the form that the modulation of its blocks needs
(`blocks.ExpertSpec`). The forms follow these public files: Wan's ``wan/modules/model.py``
("table"), DiT's ``models.py`` and diffusers' SD3 transformer ("linear"), Cosmos-Predict2's
``minimal_v4_dit.py`` ("lora"), and Fast-WAM's ``action_dit.py`` for the action expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from wamjax.models.blocks import ExpertSpec
from wamjax.models.layers import (
    LayerNorm,
    Linear,
    Mlp,
    RMSNorm,
    modulate,
    sinusoid,
    small_normal,
)


class Time(NamedTuple):
    """Holds the conditioning of a noise level.

    Attributes:
      embedding: (b | 1, m, d), for the head.
      modulation: for the blocks, in the form of `blocks.Stream.modulation`.
    """

    embedding: Float[Array, "b m d"]
    modulation: Any


class Conditioned(nn.Module):
    """Provides what every expert has: the time embedding and the text network.

    Attributes:
      text: "mlp" (Wan), "linear" (SD3), or "none" if the context enters the blocks unchanged.
      time_scale: input of the sinusoid for a level of 1: 1000 (Wan), 1 for integer timesteps.
    """

    spec: ExpertSpec
    freq_dim: int
    text: str = "mlp"
    time_scale: float = 1000.0

    def setup(self):
        width, bias = self.spec.width, self.spec.bias
        if self.text == "mlp":
            self.text_mlp = Mlp(width, width, kernel_init=small_normal)
        elif self.text == "linear":
            self.text_proj = Linear(width)
        if self.spec.modulation == "lora":
            # The sinusoid is the embedding; the network computes the term shared by all blocks.
            self.time_norm = RMSNorm()
            outputs = (2 + self.spec.gates) * width
        else:
            outputs = width
        self.time_mlp = Mlp(width, outputs, nn.silu, small_normal, bias)
        if self.spec.modulation == "table":
            self.time_proj = Linear(self.spec.chunks * width)

    def time(self, levels: Float[Array, "b m"], vector: Float[Array, "b d"] | None = None) -> Time:
        """Returns the conditioning of noise levels, one per slot.

        Args:
          vector: further conditioning that is added to the time embedding: a class, pooled text.
        """
        features = sinusoid(levels, self.freq_dim, self.time_scale)
        if self.spec.modulation == "lora":
            shared = self.time_mlp(features)
            shared = rearrange(shared, "b m (c d) -> b m c d", d=self.spec.width)
            embedding = self.time_norm(features)
            return Time(embedding, (embedding, shared))
        embedding = self.time_mlp(features)
        if vector is not None:
            embedding = embedding + vector[:, None]
        if self.spec.modulation == "table":
            rows = self.time_proj(nn.silu(embedding))
            return Time(embedding, rearrange(rows, "b m (c d) -> b m c d", d=self.spec.width))
        return Time(embedding, embedding if self.spec.modulation == "linear" else None)

    def context(self, context: Float[Array, "b s c"]) -> Float[Array, "b s d"]:
        """Returns text embeddings in the form that this expert's cross-attention reads."""
        if self.text == "none":
            return context
        return (self.text_mlp if self.text == "mlp" else self.text_proj)(context)


class VideoExpert(Conditioned):
    """Turns latent frames into tokens and back; patch (1, p, p), one slot per latent frame.

    An image is a clip of one frame. `channels` is the number of input channels, `outputs` that of
    output channels, and `learned` the number of tokens of `shell.ANTICIPATION`.
    """

    channels: int = 0
    outputs: int = 0
    patch: int = 2
    learned: int = 0

    def setup(self):
        super().setup()
        if self.learned:
            shape = self.learned, self.spec.width
            self.anticipation = self.param("anticipation", small_normal, shape)
        width, zeros = self.spec.width, nn.initializers.zeros
        self.patch_embed = Linear(width, self.spec.bias)
        self.head = Linear(self.outputs * self.patch**2, self.spec.bias, kernel_init=zeros)
        if self.spec.modulation == "table":
            init = nn.initializers.normal(width**-0.5)
            self.head_table = self.param("head_table", init, (2, width))
        elif self.spec.modulation == "linear":
            self.head_modulation = Linear(2 * width, kernel_init=zeros)
        elif self.spec.modulation == "lora":
            self.head_down = Linear(self.spec.lora_rank, use_bias=False)
            self.head_up = Linear(2 * width, use_bias=False, kernel_init=zeros)
        else:
            self.head_norm = LayerNorm()

    def embed(self, latents: Float[Array, "b t h w c"]) -> Float[Array, "b l d"]:
        # Channel slowest, like the weight of the convolution that this Linear replaces.
        patches = rearrange(
            latents, "b t (h p) (w q) c -> b (t h w) (c p q)", p=self.patch, q=self.patch
        )
        return self.patch_embed(patches)

    def unembed(
        self, x: Float[Array, "b l d"], time: Time, grid: tuple[int, int, int]
    ) -> Float[Array, "b t h w c"]:
        """Applies the final norm, modulated by the time embedding, the linear head, and
        unpatchifies."""
        t, h, w = grid
        return rearrange(
            self.head(self._norm(x, time)),
            "b (t h w) (p q c) -> b t (h p) (w q) c",
            t=t, h=h, w=w, p=self.patch, q=self.patch,
        )  # fmt: skip

    def _norm(self, x: Array, time: Time) -> Array:
        if self.spec.modulation == "none":
            return self.head_norm(x)
        if self.spec.modulation == "table":
            shift, scale = (self.head_table[i] + time.embedding for i in range(2))
        elif self.spec.modulation == "linear":
            shift, scale = jnp.split(self.head_modulation(nn.silu(time.embedding)), 2, axis=-1)
        else:
            embedding, shared = time.modulation
            rows = self.head_up(self.head_down(nn.silu(embedding)))
            parts = jnp.split(rows, 2, axis=-1)
            shift, scale = (part + shared[:, :, i] for i, part in enumerate(parts))
        return modulate(x, shift, scale)


class ActionExpert(Conditioned):
    """Turns action steps into tokens and back, each with one Linear on the residual stream."""

    action_dim: int = 0

    def setup(self):
        super().setup()
        self.encoder = Linear(self.spec.width)
        self.head = Linear(self.action_dim, kernel_init=nn.initializers.zeros)

    def embed(self, actions: Float[Array, "b j a"]) -> Float[Array, "b j d"]:
        return self.encoder(actions)

    def unembed(
        self, x: Float[Array, "b j d"], time: Time | None = None, grid: tuple[int, ...] = ()
    ) -> Float[Array, "b j a"]:
        """Applies the head, which depends neither on the noise level nor on a grid."""
        del time, grid
        return self.head(x)
