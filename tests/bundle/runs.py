"""Runs of tiny policies, written without training, and observations for them."""

from __future__ import annotations

import jax
import numpy as np
import toy

from wamjax import wam
from wamjax.data import normalize
from wamjax.data.spec import DataSpec
from wamjax.training import state as states
from wamjax.training.checkpoint import Checkpoints

SPEC = DataSpec({"overhead": (16, 24), "gripper": (16, 16)}, toy.P, toy.A, 8, 3, 1, toy.N, 10.0)


def fast_wam(variant="fast", **changes):
    """Returns the config of a tiny Fast-WAM that reads words and pixels."""
    return toy.config(**{
        "model.layers": 1, "model.heads": 4, "model.head_dim": 8, "model.video.width": 32,
        "model.video.ffn": 64, "model.action.width": 16, "model.action.ffn": 32,
        "model.context_width": 16, "model.freq_dim": 32, "objective.variant": variant,
        "objective.infer_steps": 2, "precision.compute": "bfloat16",
    } | changes)  # fmt: skip


def statistics(spec):
    rng = np.random.default_rng(0)
    rows = {"actions": [rng.normal(size=(50, spec.action_dim)).astype(np.float32)],
            "proprio": [rng.normal(size=(50, spec.proprio_dim)).astype(np.float32)]}  # fmt: skip
    return normalize.statistics(rows)


def drawn(abstract, seed=0):
    """Returns random parameters, since fresh ones have zero heads, which hide earlier layers."""
    rng = np.random.default_rng(seed)
    arrays = jax.tree.map(lambda x: np.asarray(0.3 * rng.normal(size=x.shape), x.dtype), abstract)
    return jax.device_put(arrays)


def save(workdir, config, spec=SPEC, steps=(3, 5), seed=0):
    """Writes a run with checkpoints at `steps`, each with different parameters."""
    objective = wam.build(config, spec)
    abstract = jax.eval_shape(lambda: states.init_params(objective, config))
    zero = jax.numpy.int32(0)
    said = statistics(spec) | {"spec": spec.to_json()}
    with Checkpoints(workdir, keep=len(steps)) as checkpoints:
        for step in steps:
            params = drawn(abstract, seed + step)
            half = jax.tree.map(lambda x: jax.device_put(0.5 * np.asarray(x)), params)
            ema = half if config.optim.ema_decay else None
            now = states.TrainState(jax.numpy.int32(step), params, {"none": zero}, ema, zero, zero)
            checkpoints.save(now, toy.iterator(8), config, said)
            checkpoints.wait()
    return workdir


def observation(spec=SPEC, batch=0, text="lift the block", seed=0):
    rng = np.random.default_rng(seed)
    lead = (batch,) if batch else ()
    return {
        "images": {name: rng.integers(0, 256, (*lead, *size, 3), dtype=np.uint8)
                   for name, size in spec.cameras.items()},
        "proprio": rng.normal(size=(*lead, spec.proprio_dim)).astype(np.float32),
        "instruction": [" ".join(text.split()[: 3 - i]) for i in range(batch)] if batch else text,
    }  # fmt: skip
