"""What surrounds the blocks: how video and actions become tokens and tokens become velocities.

Published shapes and semantics: Wan2.2-TI2V-5B (``wan/modules/model.py``) for the video expert,
Fast-WAM's ``action_dit.py`` for the action expert.
"""

from __future__ import annotations

import flax.linen as nn
from einops import rearrange
from jaxtyping import Array, Float

from wamjax.models.layers import Linear, Mlp, modulate, sinusoid, small_normal

Time = tuple[Array, Array]  # embedding (b, m, d) and six modulation rows (b, m, 6, d)


class TimeAndText(nn.Module):
    """The conditioning that every expert owns: time embedding, time projection, text network."""

    width: int
    freq_dim: int

    def setup(self):
        self.text_mlp = Mlp(self.width, self.width, kernel_init=small_normal)
        self.time_mlp = Mlp(self.width, self.width, activation=nn.silu, kernel_init=small_normal)
        self.time_proj = Linear(6 * self.width)

    def time(self, levels: Float[Array, "b m"]) -> Time:
        """Noise levels in [0, 1], one for each slot, to embedding and modulation."""
        embedding = self.time_mlp(sinusoid(levels, self.freq_dim))
        projected = self.time_proj(nn.silu(embedding))
        return embedding, rearrange(projected, "b m (six d) -> b m six d", six=6)

    def text(self, context: Float[Array, "b s c"]) -> Float[Array, "b s d"]:
        return self.text_mlp(context)


class VideoExpert(TimeAndText):
    """Latent frames to tokens and back; patch (1, p, p), one slot for each latent frame."""

    channels: int
    patch: int

    def setup(self):
        super().setup()
        self.patch_embed = Linear(self.width)
        self.head = Linear(self.channels * self.patch**2, kernel_init=nn.initializers.zeros)
        self.head_table = self.param(
            "head_table", nn.initializers.normal(self.width**-0.5), (2, self.width)
        )

    def embed(self, latents: Float[Array, "b t h w c"]) -> Float[Array, "b l d"]:
        # Channel slowest, like the weight of the Conv3d that this Linear stands for.
        patches = rearrange(
            latents, "b t (h p) (w q) c -> b (t h w) (c p q)", p=self.patch, q=self.patch
        )
        return self.patch_embed(patches)

    def unembed(
        self, x: Float[Array, "b l d"], time: Time, grid: tuple[int, int, int]
    ) -> Float[Array, "b t h w c"]:
        """Final modulated norm (by the time *embedding*), linear head, unpatchify."""
        shift, scale = (self.head_table[i] + time[0] for i in range(2))
        t, h, w = grid
        return rearrange(
            self.head(modulate(x, shift, scale)),
            "b (t h w) (p q c) -> b t (h p) (w q) c",
            t=t, h=h, w=w, p=self.patch, q=self.patch,
        )  # fmt: skip


class ActionExpert(TimeAndText):
    """Action steps to tokens and back, each by one Linear on the residual stream."""

    action_dim: int

    def setup(self):
        super().setup()
        self.encoder = Linear(self.width)
        self.head = Linear(self.action_dim, kernel_init=nn.initializers.zeros)

    def embed(self, actions: Float[Array, "b j a"]) -> Float[Array, "b j d"]:
        return self.encoder(actions)

    def unembed(self, x: Float[Array, "b j d"]) -> Float[Array, "b j a"]:
        return self.head(x)
