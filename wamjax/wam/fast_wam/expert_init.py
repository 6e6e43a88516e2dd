"""Initialises the action expert from the video expert by interpolating every tensor (spec: Fast-WAM
2.1).

Each dimension whose size differs is resampled linearly with aligned corners, like the published
``scripts/preprocess_action_dit_backbone.py``; at the published sizes (3072 -> 1024) that is close
to keeping every third neuron. A tensor of two or more dimensions whose *last torch dimension*
shrank is scaled by sqrt(old / new), which preserves the variance of a sum over fewer inputs. Torch
weights are (out, in), so that dimension is the input of a kernel; for the modulation it is the
width, a quirk that is reproduced here.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from wamjax.tree import map_with_path

Params = dict[str, Any]

# Networks that the action expert takes over; its encoder and head keep their own initialisation.
NETWORKS = ("text_mlp", "time_mlp", "time_proj")


def action_from_video(params: Params) -> Params:
    """Replaces the action expert's parameters by interpolation of the video expert's.

    Args:
      params: of a `MixtureOfTransformers`, blocks stacked; arrays, or tracers under `jax.jit`.

    Returns:
      a new tree: ``blocks/action`` and the action expert's text and time networks are replaced,
        computed in float32 and returned in their previous dtype; every other leaf is the same
        object.

    Raises:
      KeyError: the tree has no stacked blocks of both experts.
      ValueError: the experts differ in more than the sizes that interpolation changes.
    """
    if not {"video", "action"} <= set(params.get("blocks", {})):
        raise KeyError(
            "expert initialization needs blocks/video and blocks/action, stacked over layers; "
            f"the parameters have {sorted(params)}: if they are unstacked, stack them first"
        )
    video, action = params["video"], params["action"]
    networks = {n: _interpolate_tree(n, video[n], action[n], stacked=False) for n in NETWORKS}
    blocks = params["blocks"]
    new = _interpolate_tree("blocks", blocks["video"], blocks["action"], stacked=True)
    return params | {"action": action | networks, "blocks": blocks | {"action": new}}


def interpolate(x: Array, size: int, axis: int) -> Array:
    """Resamples one axis linearly to `size` points with aligned end points, in float32.

    The positions are computed in float32, like torch; float64 positions would differ from its
    result by up to 2e-4 of a step at the published widths.
    """
    length = x.shape[axis]
    if length == size:
        return x
    scale = np.float32(length - 1) / np.float32(size - 1) if size > 1 else np.float32(0)
    position = np.arange(size, dtype=np.float32) * scale
    lower = np.minimum(position.astype(np.int32), length - 1)
    upper = np.minimum(lower + 1, length - 1)
    shape = [1] * x.ndim
    shape[axis] = size
    weight = np.clip(position - lower.astype(np.float32), 0, 1).reshape(shape)
    x = x.astype(jnp.float32)
    return (1 - weight) * jnp.take(x, lower, axis) + weight * jnp.take(x, upper, axis)


def _interpolate_tree(name: str, source: Params, target: Params, stacked: bool) -> Params:
    def leaf(path: str, new: Array, old: Array) -> Array:
        return _interpolate_leaf(f"{name}/{path}", old, new, stacked)

    if jax.tree.structure(source) != jax.tree.structure(target):
        raise ValueError(f"{name}: the video and action experts have different parameters")
    return map_with_path(leaf, target, source)


def _interpolate_leaf(path: str, old: Array, new: Array, stacked: bool) -> Array:
    """Returns `old` in the shape of `new`; the layer axis of `stacked` leaves is never
    resampled."""
    if old.ndim != new.ndim or (stacked and old.shape[0] != new.shape[0]):
        raise ValueError(
            f"{path}: cannot interpolate {old.shape} to {new.shape}; both experts need the same "
            "number of layers"
        )
    # Uses torch's order of dimensions, where a kernel (in, out) is a weight (out, in).
    kernel = path.endswith("kernel")
    axes = [a % old.ndim for a in ((-1, -2) if kernel else range(int(stacked), old.ndim))]
    y = old
    for axis in axes:
        y = interpolate(y, new.shape[axis], axis)
    last = axes[-1]
    if (kernel or path.endswith("modulation")) and old.shape[last] != new.shape[last]:
        y = y * np.float32((old.shape[last] / new.shape[last]) ** 0.5)
    return y.astype(new.dtype)
