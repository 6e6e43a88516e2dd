"""AdamW with linear warm-up and cosine decay, as optax transformations."""

from __future__ import annotations

import jax.numpy as jnp
import optax


def schedule(config) -> optax.Schedule:
    """Learning rate after n updates: linear from peak / warmup, then cosine to a final share.

    Equal to torch's ``SequentialLR([LinearLR(1 / W, 1, W), CosineAnnealingLR(N - W)])``, which
    is what Fast-WAM trains with (spec, section 5.2).
    """
    optim, total = config.optim, config.total_steps
    warmup = round(optim.warmup_fraction * total)
    decay = optax.cosine_decay_schedule(
        optim.learning_rate, max(total - warmup, 1), optim.final_fraction
    )
    if warmup == 0:
        return decay
    rise = optax.linear_schedule(optim.learning_rate / warmup, optim.learning_rate, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def make(config) -> optax.GradientTransformation:
    """Clip, AdamW with decay on every parameter, schedule.

    The structure of the optimiser state is the same for every value in the config, so that each
    of them may change on resume.
    """
    optim = config.optim
    clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm > 0 else optax.identity()
    dtype = jnp.dtype(config.precision.params)
    return optax.chain(
        clip,
        optax.scale_by_adam(optim.b1, optim.b2, eps=1e-8, mu_dtype=dtype),
        optax.add_decayed_weights(optim.weight_decay),
        optax.scale_by_learning_rate(schedule(config)),
    )
