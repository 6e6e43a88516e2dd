"""Shows an example of the data at the noise levels that sampling visits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wamjax.data import images
from wamjax.models.codec import Codec
from wamjax.viz import page
from wamjax.viz.video import grid
from wamjax.wam.loss import Denoises

MOST = 25  # maximum levels
FRAMES = 4  # maximum frames of a group
HEIGHT = 128  # maximum height of a picture in pixels


def ways(objective: Denoises, batch: dict[str, np.ndarray], seed: int = 0) -> list[dict[str, Any]]:
    """Returns the forward process of every noised group, for the first example that has it.

    Args:
      objective: its codec must have no parameters, since none are given.
      batch: a batch of its data.
    """
    spec = objective.batch_spec(len(next(iter(batch.values()))))
    batch = {k: jnp.asarray(batch[k], s.dtype) for k, s in spec.items()}
    out = {}
    for draw in objective.draw({}, batch, jax.random.key(seed)):
        for group, noise in draw.noise.items():
            clean = draw.clean[group].astype(jnp.float32)
            out.setdefault(group, (clean[:1], noise[:1]))
    return [_way(objective, group, *pair) for group, pair in out.items()]


def levels(objective: Denoises, group: str) -> dict[str, Any]:
    """Returns the sampling levels of a group, with alpha, sigma, weight and c_noise at each."""
    grid_ = np.asarray(objective.levels_of(group), np.float64)
    at = np.unique(np.linspace(0, len(grid_) - 1, min(len(grid_), MOST)).round().astype(int))
    grid_ = grid_[at]
    process = objective.process_of(group)
    alpha, sigma = process.alpha_sigma(grid_)
    return {
        "group": group,
        "process": type(process).__name__,
        "levels": grid_,
        "alpha": np.asarray(alpha),
        "sigma": np.asarray(sigma),
        "weight": np.asarray(process.weight(jnp.asarray(grid_, jnp.float32)), np.float64),
        "told": np.asarray(process.c_noise(jnp.asarray(grid_, jnp.float32)), np.float64),
    }


def _way(objective: Denoises, group: str, clean, noise) -> dict[str, Any]:
    process, out = objective.process_of(group), levels(objective, group)
    noisy = [np.asarray(process.corrupt(clean, noise, jnp.full((1, 1), level, jnp.float32)))
             for level in out["levels"]]  # fmt: skip
    if clean.ndim == 3:  # numbers
        reach = max(1.0, float(np.abs(clean).max()))
        return out | {"reach": reach, "steps": [{"values": x[0].round(3)} for x in noisy]}
    axes = _principal(np.asarray(clean))
    steps = [{"latent": _channels(x[0], axes), "picture": _decoded(objective.codec, x)}
             for x in noisy]  # fmt: skip
    return out | {"steps": steps}


def _decoded(codec: Codec, latents: np.ndarray) -> str | None:
    """Decodes latents (1, m, h, w, c) to pictures; None if the codec has no decoder."""
    if codec.key != "video":
        return None
    frames = np.asarray(codec.decode(jnp.asarray(latents)))[0]
    if frames.shape[-1] == 1:
        frames = frames.repeat(3, axis=-1)
    if frames.shape[1] > HEIGHT:
        size = (HEIGHT, round(frames.shape[2] * HEIGHT / frames.shape[1]))
        frames = np.stack([images.resize(x, size) for x in frames])
    return _strip(frames)


def _principal(clean: np.ndarray):
    """Returns the mean, the first three principal components of the channels, and their lower ends
    and extents."""
    x = clean.reshape(-1, clean.shape[-1])
    mean = x.mean(axis=0)
    rows = np.linalg.svd(x - mean, full_matrices=False)[2][:3]
    rows = np.concatenate([rows, np.zeros((3 - len(rows), x.shape[1]))])
    low, high = np.percentile((x - mean) @ rows.T, [1, 99], axis=0)
    return mean, rows, low, np.maximum(high - low, 1e-6)


def _channels(latents: np.ndarray, axes) -> str:
    mean, rows, low, extent = axes
    unit = ((latents - mean) @ rows.T - low) / extent
    return _strip((255 * unit.clip(0, 1)).astype(np.uint8))


def _strip(frames: np.ndarray) -> str:
    """Puts up to `FRAMES` frames side by side."""
    at = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), FRAMES)).round().astype(int))
    tiled = grid([frames[i : i + 1] for i in at], columns=len(at), gap=1)[0]
    return page.address(tiled, "jpeg" if tiled.shape[0] > 32 else "png")
