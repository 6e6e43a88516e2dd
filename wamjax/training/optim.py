"""Builds AdamW or Muon with linear warm-up and cosine decay, as optax transformations."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wamjax import tree


def schedule(config) -> optax.Schedule:
    """Returns the learning rate after n updates: linear from peak / warmup, then cosine to a final
    share.

    Equal to torch's ``SequentialLR([LinearLR(1 / W, 1, W), CosineAnnealingLR(N - W)])``, the
    schedule of Fast-WAM's training (spec, section 5.2).
    """
    optim, total = config.optim, config.total_steps
    if optim.anchor_steps:
        return piecewise(optim.learning_rate, optim.anchor_steps, optim.anchor_factors)
    warmup = round(optim.warmup_fraction * total)
    decay = optax.cosine_decay_schedule(
        optim.learning_rate, max(total - warmup, 1), optim.final_fraction
    )
    if warmup == 0:
        return decay
    rise = optax.linear_schedule(optim.learning_rate / warmup, optim.learning_rate, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def piecewise(peak: float, steps: Sequence[int], factors: Sequence[float]) -> optax.Schedule:
    """Returns `peak` times factors at steps, linear in between and constant after the last one.

    Of two factors at one step the first is the rate of that step and the second that of the next:
    the step at which a cycle of Cosmos Policy's ``lr_scheduler.py`` ends still belongs to it.
    """
    if len(steps) != len(factors) or list(steps) != sorted(steps) or steps[0] != 0:
        raise ValueError(
            f"optim.anchor_steps {tuple(steps)} must ascend from 0, with a factor for each in "
            f"optim.anchor_factors, which are {tuple(factors)}"
        )
    # In numpy: an array on a device would be captured by the step, and it cannot be made at all
    # where the step is compiled for devices that are not here.
    last = len(steps) - 1
    at, values = np.asarray(steps, np.float32), np.asarray(factors, np.float32)

    def rate(count):
        begin, factor = jnp.asarray(at), jnp.asarray(values)
        left = jnp.maximum(jnp.searchsorted(begin, count, side="left") - 1, 0)
        right = jnp.minimum(left + 1, last)
        way = (count - begin[left]) / jnp.maximum(begin[right] - begin[left], 1)
        return peak * (factor[left] + (factor[right] - factor[left]) * way)

    return rate


def make(config) -> optax.GradientTransformation:
    """Builds the optimizer: clipping, AdamW or Muon with decay on every parameter, schedule.

    The structure of the optimizer state is the same for every value in the config except
    ``optim.name``, so the others may change on resume.
    """
    optim = config.optim
    clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm > 0 else optax.identity()
    adam = optax.scale_by_adam(
        optim.b1, optim.b2, eps=1e-8, mu_dtype=jnp.dtype(config.precision.params)
    )
    if optim.name not in ("adamw", "muon"):
        raise ValueError(f"optim.name {optim.name!r} is not 'adamw' or 'muon'")
    return optax.chain(
        clip,
        adam if optim.name == "adamw" else muon(adam),
        optax.add_decayed_weights(optim.weight_decay),
        optax.scale_by_learning_rate(schedule(config)),
    )


def muon(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies Muon to the matrices of the blocks and `adam` to everything else.

    It replaces Adam's step by an orthogonalized momentum (Jordan et al. 2024), scaled to the size
    of an Adam step, 0.2 per entry (arXiv 2502.16982), so one learning rate serves both. Stacked
    layers are orthogonalized one by one.
    """

    def kinds(params):
        matrix = re.compile(r"(blocks|final_block)/.*kernel")
        return tree.map_with_path(
            lambda path, x: "muon" if matrix.fullmatch(path) else "adam", params
        )

    def axes(params):
        dims = optax.contrib.MuonDimensionNumbers
        return jax.tree.map(lambda x: dims((x.ndim - 2,), (x.ndim - 1,)), params)

    def scale(updates, params):
        del params
        return jax.tree.map(lambda x: 0.2 * max(x.shape[-2:]) ** 0.5 * x, updates)

    orthogonal = optax.contrib.scale_by_muon(weight_dimension_numbers=axes)
    matrices = optax.chain(orthogonal, optax.stateless(scale))
    return optax.partition({"muon": matrices, "adam": adam}, kinds)
