"""Defines layers of the autoencoders, on channels-last clips (b, t, h, w, c).

Time is always causal. A clip may come whole or in chunks. With chunks, every layer that looks back
stores its last input frames in the variable collection `past`, which the caller makes mutable and
carries from call to call. ``first`` says that the chunk starts the clip; a whole clip is one first
chunk whose past is not stored.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wamjax.models import attention
from wamjax.models.layers import Linear, at_least_float32

PAST = "past"  # the variable collection of a chunked pass


def with_past(
    module: nn.Module, x: Float[Array, "b t h w c"], frames: int, first: bool
) -> tuple[Array, int]:
    """Prepends the frames that `module` stored from the clip so far, and stores the last `frames`.

    Returns:
      (the longer clip, number of prepended frames: 0 for a first chunk).
    """
    if not frames or not module.is_mutable_collection(PAST):
        return x, 0
    b, _, *sizes = x.shape
    past = module.variable(PAST, "frames", lambda: jnp.zeros((b, frames, *sizes), x.dtype))
    before = jnp.zeros_like(past.value) if first else past.value
    longer = jnp.concatenate([before, x], axis=1)
    past.value = longer[:, -frames:]
    return (x, 0) if first else (longer, frames)


class Conv(nn.Module):
    """Convolves with bias, zero-padded in space and causal in time.

    Attributes:
      kernel: (kh, kw) acts on every frame separately; (kt, kh, kw) also sees kt - 1 frames before
        it.
      stride: in space; 2 pads only below and to the right, as both public families do.
    """

    features: int
    kernel: tuple[int, ...] = (3, 3, 3)
    stride: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w i"], first: bool = True
    ) -> Float[Array, "b t h2 w2 o"]:
        kernel, bias = kernel_and_bias(self, (*self.kernel, x.shape[-1], self.features))
        taps = kernel if kernel.ndim == 5 else kernel[None]
        x, past = with_past(self, x.astype(kernel.dtype), len(taps) - 1, first)
        return causal(x, taps, past, self.stride) + bias


def kernel_and_bias(module: nn.Module, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Creates parameters of a convolution, the kernel as (time?, height, width, in, out)."""
    kernel = module.param("kernel", nn.initializers.lecun_normal(), shape)
    bias = module.param("bias", nn.initializers.zeros, shape[-1:])
    return kernel, bias.astype(kernel.dtype)


def causal(
    x: Float[Array, "b s h w i"], taps: Float[Array, "k kh kw i o"], past: int, stride: int = 1
) -> Float[Array, "b t h2 w2 o"]:
    """Convolves in time over the last ``s - past`` frames of `x`, with one 2-D convolution per tap.

    There are two reasons not to call a 3-D convolution. A tap that reaches before the start of the
    clip is left out instead of multiplying zeros: one frame costs a third, three frames two thirds.
    And XLA's 3-D convolution is slow on CPU: this sum is 1.4 to 7 times as fast forward, 1.1 to 5
    times forward and backward (3x3x3, 16 to 384 channels, two cores).
    """
    b, frames, h, w, _ = x.shape
    out = b, frames - past, -(-h // stride), -(-w // stride), taps.shape[-1]
    y = jnp.zeros(out, x.dtype)
    for back in range(min(len(taps), frames)):
        outside = max(back - past, 0)  # outputs whose tap reaches before the clip
        part = per_frame(x[:, past - back + outside : frames - back], taps[-1 - back], stride)
        y = part if back == 0 else y + jnp.pad(part, [(0, 0), (outside, 0), *[(0, 0)] * 3])
    return y


def per_frame(
    x: Float[Array, "b t h w i"], kernel: Float[Array, "kh kw i o"], stride: int = 1
) -> Float[Array, "b t h2 w2 o"]:
    """Applies a 2-D convolution to every frame."""
    if kernel.shape[:2] == (1, 1):  # 1.6 times as fast as a convolution on CPU
        return x @ kernel[0, 0]
    b, t, h, w, c = x.shape
    y = jax.lax.conv_general_dilated(
        x.reshape(b * t, h, w, c),
        kernel,
        (stride, stride),
        [(1, 1), (1, 1)] if stride == 1 else [(0, 1), (0, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(b, t, *y.shape[1:])


class ChannelNorm(nn.Module):
    """Applies Wan's norm: x / max(|x|, 1e-12) sqrt(c) over the channels, times a learned scale."""

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = at_least_float32(x)
        squares = jnp.sum(y * y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.maximum(squares, 1e-24)) * x.shape[-1] ** 0.5
        return (y * scale).astype(x.dtype)


class GroupNorm(nn.Module):
    """Applies group norm to every frame: statistics over space and groups of channels; eps 1e-6."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        if x.shape[-1] % self.groups:
            raise ValueError(f"{x.shape[-1]} channels do not divide into {self.groups} groups")
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = at_least_float32(x).reshape(*x.shape[:-1], self.groups, -1)
        axes = 2, 3, 5
        y -= jnp.mean(y, axis=axes, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=axes, keepdims=True) + 1e-6)
        return (y.reshape(x.shape) * scale + bias).astype(x.dtype)


class FrameAttention(nn.Module):
    """Applies residual self-attention with one head over the positions of each frame."""

    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        b, t, h, w, c = x.shape
        y = self.norm(name="norm")(x)
        q, k, v = (Linear(c, name=name)(y).reshape(b * t, 1, h * w, c) for name in ("q", "k", "v"))
        y = attention.attend(q, k, v, kernel="auto").reshape(x.shape)
        return x + Linear(c, name="o")(y)
