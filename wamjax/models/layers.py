"""Defines small layers shared by every network.

Letters in shape annotations mean the same everywhere in the project:

  b batch        t latent frames   h w latent grid    c channels       p proprioception
  l query tokens s key tokens      d width            n heads          k head dimension
  j action chunk a action dim      m modulation slots f raw frames     e environments

Parameters keep their dtype (float32 masters), and a matmul runs in the dtype of its kernel, so
casting the kernels is enough to compute in bfloat16. Norms, softmax, rotary embeddings and
modulation always compute in float32 (or float64 under x64).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

EPS = 1e-6  # of every norm in Wan and DiT

xavier = nn.initializers.xavier_uniform()
small_normal = nn.initializers.normal(0.02)


def at_least_float32(x: Array) -> Array:
    """Promotes half precision to float32 and leaves float32 and float64 alone."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def widest() -> np.dtype:
    """Returns the dtype of numbers that do not depend on parameters, such as noise levels: float32,
    or float64 under x64."""
    return jnp.zeros(()).dtype


def on_tpu() -> bool:
    """Returns whether the program being traced is for a TPU: by the devices of the current mesh,
    which may be absent, or by the default devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.platform) == "tpu"


def unconstrained(x: Array, *names: str | None) -> Array:
    """Leaves the sharding of `x` to the compiler; the default of every `constrain` argument.

    Training passes `training.sharding.constrain` instead; without it XLA spreads the shards of the
    weights over the width of the activations and splits the batch over one mesh axis only.
    """
    del names
    return x


class Linear(nn.Module):
    """Computes ``y = x W + b`` on the last axis, in the dtype of the kernel (in, out)."""

    features: int
    use_bias: bool = True
    kernel_init: Callable = xavier

    @nn.compact
    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = x.astype(kernel.dtype) @ kernel
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(y.dtype)
        if self.has_variable("params", "lora_up"):  # see `wamjax.training.adapters`
            down, up = (self.get_variable("params", f"lora_{x}") for x in ("down", "up"))
            y += (x.astype(down.dtype) @ down @ up).astype(y.dtype)
        return y


def gelu_tanh(x: Array) -> Array:
    """Computes the tanh approximation of GELU: Wan, DiT, T5 v1.1."""
    return nn.gelu(x, approximate=True)


def gelu(x: Array) -> Array:
    """Computes exact GELU: Cosmos-Predict2."""
    return nn.gelu(x, approximate=False)


class Mlp(nn.Module):
    """Applies Linear, activation, Linear: the feed-forward, text and time networks."""

    hidden: int
    features: int
    activation: Callable = gelu_tanh
    kernel_init: Callable = xavier
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        x = Linear(self.hidden, self.bias, kernel_init=self.kernel_init, name="in")(x)
        x = self.activation(checkpoint_name(x, "hidden"))
        if on_tpu():
            # Otherwise XLA fuses it into the next matmul and recomputes it for every output tile.
            x = jax.lax.optimization_barrier(x)
        return Linear(self.features, self.bias, kernel_init=self.kernel_init, name="out")(x)


class GatedMlp(nn.Module):
    """Computes ``out(activation(gate(x)) * in(x))``: the feed-forward network of T5 v1.1 and
    umT5."""

    hidden: int
    features: int
    activation: Callable = gelu_tanh
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        gate = checkpoint_name(Linear(self.hidden, self.bias, name="gate")(x), "hidden")
        y = checkpoint_name(Linear(self.hidden, self.bias, name="in")(x), "hidden")
        y = self.activation(gate) * y
        return Linear(self.features, self.bias, name="out")(y)


MLPS: dict[str, Callable] = {
    "gelu_tanh": Mlp,
    "gelu": functools.partial(Mlp, activation=gelu),
    "relu": functools.partial(Mlp, activation=nn.relu),
    "gated_gelu": GatedMlp,
    "gated_silu": functools.partial(GatedMlp, activation=nn.silu),
}


class RMSNorm(nn.Module):
    """Applies the root-mean-square norm over the last axis with a learned scale."""

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = at_least_float32(x)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + EPS)
        return (y * scale).astype(x.dtype)


def layer_norm(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Applies LayerNorm without affine parameters; returns float32 for the modulation that
    follows."""
    y = at_least_float32(x)
    mean = jnp.mean(y, axis=-1, keepdims=True)
    centred = y - mean
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + EPS)


class LayerNorm(nn.Module):
    """Applies LayerNorm with learned scale and bias."""

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return (layer_norm(x) * scale + bias).astype(x.dtype)


def by_slot(x: Float[Array, "b l d"], size: int) -> Float[Array, "b m s d"]:
    """Splits tokens into slots of `size` tokens."""
    b, _, d = x.shape
    return x.reshape(b, -1, size, d)


def per_slot(
    x: Float[Array, "b *l d"], function: Callable, *values: Float[Array, "b m d"]
) -> Float[Array, "b *l d"]:
    """Applies ``function(x, *values)`` with values given per slot.

    If `x` is already `by_slot`, (b, m, s, d), no array of its size is built for the values. If it
    is (b, l, d) with slots of ``l / m`` tokens, a TPU builds one: XLA moves the reshape to the
    values.
    """
    if x.ndim == 4:
        return function(x, *(v[:, :, None] for v in values))
    l, m = x.shape[1], values[0].shape[1]
    if l % m:
        raise ValueError(f"{l} tokens do not divide evenly into {m} modulation slots")
    return per_slot(by_slot(x, l // m), function, *values).reshape(x.shape)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """Applies adaptive layer norm: ``LN(x) (1 + scale) + shift``, per slot."""
    return per_slot(x, lambda x, a, s: layer_norm(x) * (1 + s) + a, shift, scale)


def gated_add(x: Array, gate: Array, y: Array) -> Array:
    """Returns the residual ``x + gate * y``, per slot, in the dtype of the residual stream."""
    return (x + per_slot(y, jnp.multiply, gate)).astype(x.dtype)


def sinusoid(
    level: Float[Array, "..."], dim: int, scale: float = 1000.0
) -> Float[Array, "... dim"]:
    """Returns timestep features ``[cos, sin](scale level / 10000^(2i/dim))``.

    With the default scale a level is in [0, 1]; integer timesteps up to 1000 need a scale of 1.

    The result is as accurate as the official Wan code, which multiplies in float64: a float32 angle
    near 1000 rad is already off by 3e-5 before its cosine is taken.
    """
    frequencies = scale * np.power(10000.0, -np.arange(dim // 2) / (dim // 2))
    level = at_least_float32(level)[..., None]
    if level.dtype == jnp.float64:
        angles = level * frequencies
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    quarter, angles = _quarters(level, frequencies / (2 * np.pi))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    odd, back = quarter % 2 == 1, quarter >= 2
    first, second = jnp.where(odd, -sin, cos), jnp.where(odd, cos, sin)
    return jnp.concatenate([jnp.where(back, -x, x) for x in (first, second)], axis=-1)


def _quarters(level: Array, turns: np.ndarray) -> tuple[Array, Array]:
    """Returns the angle of ``level * turns`` full turns in float32: (quarter turns 0 to 3, the
    remainder in rad).

    Both factors are cut into parts of 12 bits. The products of the large parts are then exact, and
    so are their remainders after whole quarters are removed; no large number is ever rounded. Bits
    are masked because a compiler may undo a splitting by sums. The gradient goes through `low`.
    """
    bits = jax.lax.bitcast_convert_type(level, jnp.int32) & np.int32(-(1 << 12))
    high = jax.lax.stop_gradient(jax.lax.bitcast_convert_type(bits, jnp.float32))
    low = level - high
    parts, residual = [], turns
    for _ in range(3):
        mantissa, exponent = np.frexp(residual)
        parts.append(np.ldexp(np.round(np.ldexp(mantissa, 12)), exponent - 12))
        residual = residual - parts[-1]
    a, b, c = (jnp.asarray(part, jnp.float32) for part in parts)
    # The three products that may exceed a quarter, each without its whole quarters.
    total, remainder = 0, low * c + high * c + low * b
    for product in (high * b, low * a, high * a):
        quarters = jnp.round(4 * product)
        total, remainder = total + quarters, remainder + (product - quarters / 4)
    quarters = jnp.round(4 * remainder)  # the three remainders may add up to one more quarter
    remainder = remainder - quarters / 4
    return (total + quarters).astype(jnp.int32) % 4, remainder * (2 * np.pi)
