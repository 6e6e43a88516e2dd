"""Defines the train state and the random keys of a run."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wamjax.training import adapters, partition

Tree = Any
PURPOSES = ("init", "train", "picture", "evaluate", "visit", "branch", "go_on")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Holds everything that a step changes.

    Attributes:
      step: int32, steps done, skipped ones included. A jax array, since Orbax restores no numpy
        scalar.
      params: master parameters.
      opt_state: state of the optimizer.
      ema: moving average of the trained parameters, or None; `partition.merge` puts it over
        `params`, whose frozen ones are their own average.
      skips: int32, steps skipped since the start because of a non-finite loss or gradient.
      streak: int32, current number of steps skipped in a row.
    """

    step: jax.Array
    params: Tree
    opt_state: Tree
    ema: Tree | None
    skips: jax.Array
    streak: jax.Array


def seed_of(config) -> np.uint32:
    """Returns ``config.seed`` as an argument of compiled programs, with the same keys as the
    integer."""
    return np.uint32(config.seed % 2**32)


def key(seed: int | jax.Array, purpose: str, index: int | jax.Array = 0) -> jax.Array:
    """Returns the random key of a purpose and a step. A run has no other randomness, so nothing is
    saved."""
    base = jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))
    return jax.random.fold_in(base, index)


def create(
    objective, tx: optax.GradientTransformation, config, seed: int | jax.Array | None = None
) -> TrainState:
    """Returns a fresh state; traceable, so `jax.eval_shape` gives the abstract one.

    Args:
      seed: the config's by default.
    """
    return start(init_params(objective, config, seed), tx, config)


def init_params(objective, config, seed: int | jax.Array | None = None) -> Tree:
    """Returns fresh parameters, with the adapters of ``config.lora``.

    Args:
      seed: the config's by default.
    """
    rng = key(config.seed if seed is None else seed, "init")
    params = objective.init(rng)
    params = adapters.add(params, config.lora.rank, config.lora.targets, jax.random.fold_in(rng, 1))
    dtype = jnp.dtype(config.precision.params)
    return jax.tree.map(lambda x: x.astype(dtype), params)


def start(params: Tree, tx: optax.GradientTransformation, config) -> TrainState:
    """Returns the state of step 0; only trained parameters have moments and an average."""
    partition.check(config.optim.freeze, params, "optim.freeze")
    trained, _ = partition.split(params, partition.trained(config.optim.freeze))
    # The average starts at the parameters. Added zeros keep it a buffer of its own: an aliased
    # output cannot be donated.
    ema = jax.tree.map(lambda x: x + 0, trained) if config.optim.ema_decay > 0 else None
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, tx.init(trained), ema, zero, zero)
