"""Samples video of any length from a model trained on short clips, in constant memory.

A causal model with an independent level for every chunk ("blocks", "forcing_causal") samples chunk
after chunk from the keys and values of earlier chunks. Rolling keeps those of a fixed number of
chunks in buffers. Each iteration of one `lax.scan` prefills the newest chunk, denoises the next one
against the buffers, and drops the oldest.

Rotary attention sees only differences of positions, so the window moves rather than the video: the
new chunk is always at the last position of training, and keys that were rotated for one position
are rotated on to the next (`moved`). No position leaves the range of training.

There is one thing that moving does not undo: in layers after the first, cached keys and values come
from tokens that attended to chunks which have been dropped since. So the receptive field reaches
back further than the window, by one window per layer, and a cache recomputed from the window alone
would differ in these layers, but not in the first one. As long as nothing has been dropped, the
result is that of `Denoising.sample`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wamjax.models.blocks import KeyValue
from wamjax.models.rope import rotate, video_rope
from wamjax.models.shell import GroupSpec
from wamjax.models.transformer import Cache
from wamjax.wam import noise as noises
from wamjax.wam.video.objective import Batch, Denoising, Params, streams


def moved(keys: Float[Array, "... s k"], frames: int, style: str = "pairs") -> Array:
    """Rotates keys to where they would be if their tokens were `frames` later in time.

    Args:
      frames: latent frames; negative is earlier.
      style: see `models.rope.rotate`.
    """
    return rotate(keys, video_rope([frames], 1, 1, keys.shape[-1]), style)


def roll(
    objective: Denoising,
    params: Params,
    condition: Batch,
    rng: Array | None,
    frames: int,
    given: Float[Array, "b t h w c"] | None = None,
    count: int | None = None,
    window: int = 0,
    noise: Float[Array, "b m h w c"] | None = None,
) -> Float[Array, "b t h w c"]:
    """Samples latents of clips of any length, in one jittable program.

    Args:
      objective: a causal scheme with independent levels and chunks of one size, with rotary
        positions.
      params: parameters of the objective, or from its `prepare`.
      condition, count: as in `Denoising.sample`.
      rng: every chunk has its own key; up to the training length they are those of
        `Denoising.sample`.
      frames: latent frames of the result, whole chunks.
      given: the first latent frames, whole chunks; all are passed through the model, and the last
        window of them stays visible.
      window: number of earlier chunks that a chunk sees; 0 for as many as in training, the maximum.
      noise: as in `Denoising.sample`.

    Raises:
      ValueError: the scheme cannot roll, or frames are not whole chunks.
    """
    size, window, given_chunks = _check(objective, frames, given, window)
    b = count if count is not None else next(iter(condition.values())).shape[0]
    condition = objective.condition(condition)
    chunks = _chunks_of(noise, (b, frames - given_chunks * size, *objective.network.latent), size)

    def run(number, cache=None, last=None, **changes):
        """Samples chunk `number` after `last` and the cached past."""
        model = _windowed(objective, window, number, **changes)
        index = jnp.maximum(number - given_chunks, 0)
        key, stream = streams(rng, index)
        noise_key = None if stream is None else jax.random.fold_in(stream, 0)
        shape = b, size, *objective.network.latent
        start = noises.start(None if chunks is None else chunks[index], noise_key, shape)
        before = {} if last is None else {"last": last}
        sampler = model._sampler(params, condition, b)
        samples, cache = sampler(before, {"now": start}, cache, key)
        return samples["now"], cache.tokens

    def turn(past, last, number, **changes):
        """Does the same, and returns the chunk and the past with `last` as its newest chunk."""
        chunk, tokens = run(
            number, Cache({} if past is None else {"past": past}, {}), last, **changes
        )
        return chunk, past if past is None else _append(past, tokens["last"], size, style)

    def pass_by(past, inputs):
        return turn(past, *inputs, steps=1, solver="euler")[1], None

    def make(carry, number):
        chunk, past = turn(*carry, number)
        return (past, chunk), chunk

    style = objective.network.video_spec.rotary
    if given_chunks:
        first_chunks = jnp.moveaxis(given.reshape(b, given_chunks, size, *given.shape[2:]), 1, 0)
    else:
        first_chunks = run(0)[0][None]
    shapes = jax.eval_shape(lambda: run(1, None, first_chunks[0])[1]["last"])
    past = _room(shapes, window - 1) if window > 1 else None
    numbers = jnp.arange(1, frames // size)
    past, _ = jax.lax.scan(pass_by, past, (first_chunks[:-1], numbers[: len(first_chunks) - 1]))
    _, new_chunks = jax.lax.scan(make, (past, first_chunks[-1]), numbers[len(first_chunks) - 1 :])
    out = jnp.concatenate([first_chunks, new_chunks])
    return jnp.moveaxis(out, 0, 1).reshape(b, frames, *out.shape[3:])


def _chunks_of(noise: Array | None, shape: tuple[int, ...], size: int) -> Array | None:
    """Splits given noise into chunks, (chunks, b, size, h, w, c)."""
    if noise is None:
        return None
    if noise.shape != shape:
        raise ValueError(f"noise has shape {noise.shape}, the frames to sample have {shape}")
    return jnp.moveaxis(noise.reshape(shape[0], -1, size, *shape[2:]), 1, 0)


def _check(objective: Denoising, frames: int, given, window: int) -> tuple[int, int, int]:
    """Returns (frames of a chunk, chunks of the window, given chunks), or raises an error."""
    scheme, training_chunks = objective.scheme, len(objective.slots)
    if not (scheme.causal and scheme.independent and scheme.chunk) or scheme.first:
        raise ValueError(
            "rolling needs a causal scheme with independent levels and equal chunks ('blocks' or "
            f"'forcing_causal'), not {scheme}"
        )
    if objective.network.positions == "sincos":
        raise ValueError("rolling needs positions 'rope' or 'both', not 'sincos'")
    if not 0 <= window < training_chunks or training_chunks < 2:
        raise ValueError(
            f"window = {window} must be less than the {training_chunks} chunks of a training clip, "
            "of which there must be at least 2"
        )
    given_frames = 0 if given is None else given.shape[1]
    if frames % scheme.chunk or given_frames % scheme.chunk or not given_frames < frames:
        raise ValueError(
            f"{given_frames} given frames and {frames} frames in all must both be multiples of "
            f"{scheme.chunk}, the frames of a chunk, with at least one chunk to sample"
        )
    return scheme.chunk, window or training_chunks - 1, given_frames // scheme.chunk


def _windowed(objective: Denoising, window: int, number: int | Array, **changes) -> Denoising:
    """Returns the objective on the groups of a window that ends with chunk `number`.

    "past" are slots for window - 1 chunks, filled from the end, "last" is the newest clean chunk
    and "now" the chunk being sampled.
    """
    size, network = objective.scheme.chunk, objective.network
    ends = [0, (window - 1) * size, window * size, (window + 1) * size]
    groups = [
        GroupSpec(name, "video", tuple(range(*ends[i : i + 2])))
        for i, name in enumerate(("past", "last", "now"))
    ]
    cells = int(np.prod(network.latent[:2])) // network.patch**2
    slots = jnp.repeat(jnp.arange(window - 1), size * cells)
    filled = {"past": (slots >= window - number)[None]}

    def attention(q, k, v, visibility, valid, bias):
        return network.attention(q, k, v, visibility, {**(valid or {}), **filled}, bias)

    window_network = network.clone(groups=tuple(groups[window == 1 :]), attention=attention)
    return dataclasses.replace(objective, network=window_network, use_cache=True, **changes)


def _room(last: KeyValue, chunks: int) -> KeyValue:
    """Returns empty buffers for keys and values of `chunks` chunks like `last`."""

    def zeros(x):
        return jnp.zeros((*x.shape[:-2], chunks * x.shape[-2], x.shape[-1]), x.dtype)

    return jax.tree.map(zeros, last)


def _append(past: KeyValue, last: KeyValue, size: int, style: str) -> KeyValue:
    """Drops the oldest chunk of keys and values, appends the newest, and moves all one chunk
    back."""

    def push(x, new):
        return jnp.concatenate([x[..., new.shape[-2] :, :], new], axis=-2)

    keys, values = jax.tree.map(push, past, last)
    return jax.tree.map(lambda x: moved(x, -size, style), keys), values
