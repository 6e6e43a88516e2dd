"""Runs long clips through a causal autoencoder in bounded memory, as a scan over chunks.

What a chunk needs from the clip before it is a pytree, `past`: the last two input frames of every
convolution that looks back, and one of every convolution that halves the frames. The result is that
of the whole clip in one pass, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wamjax.models.vae.autoencoder import Autoencoder
from wamjax.models.vae.layers import PAST

Past = dict[str, Any]
Step = Callable[[Array, Past | None], tuple[Array, Past]]


def encode_step(
    net: Autoencoder, params: Past, x: Float[Array, "b f H W 3"], past: Past | None
) -> tuple[Float[Array, "b t h w o"], Past]:
    """Encodes the next frames of a clip; with ``past=None`` the first ones, one more than a
    multiple.

    For clips without an end: carry `past` (constant shapes) from call to call.
    """
    return _step(net, params, x, past, "encode")


def decode_step(
    net: Autoencoder, params: Past, z: Float[Array, "b t h w c"], past: Past | None
) -> tuple[Float[Array, "b f H W 3"], Past]:
    """Decodes the next latents of a clip; with ``past=None`` the first ones."""
    return _step(net, params, z, past, "decode")


def _step(net, params, x, past, method):
    y, variables = net.apply(
        {"params": params, PAST: past or {}}, x, past is None, method=method, mutable=[PAST]
    )
    return y, variables.get(PAST, {})


def over_chunks(step: Step, x: Float[Array, "b s *x"], size: int) -> Float[Array, "b t *y"]:
    """Applies `step` to the first entry of axis 1, then to chunks of `size`, in one scan.

    The remaining entries at the end form one shorter chunk.
    """
    y, past = step(x[:, :1], None)
    outputs, steps = [y], (x.shape[1] - 1) // size

    def body(past, i):
        y, past = step(jax.lax.dynamic_slice_in_dim(x, 1 + i * size, size, axis=1), past)
        return past, y

    if steps:
        past, y = jax.lax.scan(body, past, jnp.arange(steps))
        outputs.append(jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, *y.shape[3:]))
    if 1 + steps * size < x.shape[1]:
        outputs.append(step(x[:, 1 + steps * size :], past)[0])
    return jnp.concatenate(outputs, axis=1)
