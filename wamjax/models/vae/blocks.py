"""Defines residual blocks and resampling of the autoencoders.

Sources: diffusers ``autoencoder_kl.py`` / ``autoencoder_kl_wan.py`` and Wan's public
``wan/modules/vae.py`` / ``vae2_2.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float

from wamjax.models.vae.layers import Conv, FrameAttention, kernel_and_bias, with_past


class Residual(nn.Module):
    """Applies norm, SiLU, convolution, twice; a 1 x 1 shortcut if the width changes."""

    features: int
    kernel: tuple[int, ...]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w i"], first: bool) -> Float[Array, "b t h w o"]:
        y = nn.silu(self.norm(name="norm_1")(x))
        y = Conv(self.features, self.kernel, name="conv_1")(y, first)
        y = nn.silu(self.norm(name="norm_2")(y))
        y = Conv(self.features, self.kernel, name="conv_2")(y, first)
        if x.shape[-1] != self.features:
            x = Conv(self.features, (1,) * len(self.kernel), name="shortcut")(x, first)
        return x + y


class Middle(nn.Module):
    """Applies a residual block, attention within each frame, and another residual block."""

    kernel: tuple[int, ...]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Float[Array, "b t h w c"]:
        block = Residual(x.shape[-1], self.kernel, self.norm, name="res_0")
        x = FrameAttention(self.norm, name="attn")(block(x, first))
        return Residual(x.shape[-1], self.kernel, self.norm, name="res_1")(x, first)


class TimeDown(nn.Module):
    """Halves the frames after the first of a clip, which stays unchanged.

    Frame k >= 1 of the result is a convolution of frames 2k - 2, 2k - 1 and 2k.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Float[Array, "b t2 h w c"]:
        c = x.shape[-1]
        kernel, bias = kernel_and_bias(self, (3, 1, 1, c, c))
        x = x.astype(kernel.dtype)
        longer, _ = with_past(self, x, 1, first)
        steps = (longer.shape[1] - 1) // 2
        if not steps:
            return x
        y = sum(longer[:, i : i + 2 * steps - 1 : 2] @ kernel[i, 0, 0] for i in range(3)) + bias
        return jnp.concatenate([x[:, :1], y], axis=1) if first else y


class Down(nn.Module):
    """Halves each side with a strided convolution, then the frames if `time`."""

    time: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Float[Array, "b t2 h2 w2 c"]:
        x = Conv(x.shape[-1], (3, 3), stride=2, name="space")(x)
        return TimeDown(name="time")(x, first) if self.time else x


class Up(nn.Module):
    """Doubles the frames after the first of a clip if `time`, then each side.

    The convolution in time does not see the first frame of the clip.
    """

    features: int
    time: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w i"], first: bool) -> Float[Array, "b t2 h2 w2 o"]:
        if self.time:
            head, tail = jnp.split(x, [int(first)], axis=1)
            tail = Conv(2 * x.shape[-1], (3, 1, 1), name="time")(tail, first)
            tail = rearrange(tail, "b t h w (s c) -> b (t s) h w c", s=2)
            x = jnp.concatenate([head.astype(tail.dtype), tail], axis=1)
        x = repeat(x, "b t h w c -> b t (h 2) (w 2) c")
        return Conv(self.features, (3, 3), name="space")(x)


def average_down(
    x: Float[Array, "b t h w i"], features: int, time: int, space: int, first: bool
) -> Float[Array, "b t2 h2 w2 o"]:
    """Moves space-time to channels and averages groups of channels: Wan 2.2's shortcut around
    `Down`.

    The first frame of a clip is averaged with zeros in front of it.
    """
    if first:
        x = jnp.pad(x, [(0, 0), (time - 1, 0), *[(0, 0)] * 3])
    x = rearrange(x, "b (t r) (h p) (w q) c -> b t h w (c r p q)", r=time, p=space, q=space)
    return jnp.mean(rearrange(x, "b t h w (o g) -> b t h w o g", o=features), axis=-1)


def repeat_up(
    x: Float[Array, "b t h w i"], features: int, time: int, space: int, first: bool
) -> Float[Array, "b t2 h2 w2 o"]:
    """Repeats channels and moves them to space-time: Wan 2.2's shortcut around `Up`."""
    repeats = features * time * space**2 // x.shape[-1]
    x = repeat(x, "b t h w i -> b t h w (i n)", n=repeats)
    x = rearrange(x, "b t h w (c r p q) -> b (t r) (h p) (w q) c", r=time, p=space, q=space)
    return x[:, time - 1 :] if first else x
