"""One training step, a pure function ``(state, batch) -> (state, metrics)``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from wamjax import flops, guards, optim, partition, sharding, tree
from wamjax import state as states
from wamjax.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
KEPT_PRECISE = {"scale", "modulation", "head_table"}
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(objective, tx: optax.GradientTransformation, config) -> Step:
    """The step of an objective (anything with ``loss(params, batch, rng)``).

    Randomness comes from (seed, step) alone. A step with a non-finite loss or gradient changes
    nothing but the counters.

    Returns:
      a function to be jitted. Its metrics are the objective's and: loss, grad_norm (before
      clipping), learning_rate, skips (so far) and skips_in_a_row; all float32 scalars.
    """
    learning_rate = optim.schedule(config)
    is_trained = partition.trained(config.optim.freeze)
    value_and_grad = _accumulated(objective, config)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = states.key(config.seed, "train", state.step)
        old, frozen = partition.split(state.params, is_trained)
        (loss, metrics), grads = value_and_grad(old, frozen, batch, rng)
        norm = optax.tree.norm(grads)
        ok = guards.finite(loss, norm)
        updates, opt_state = tx.update(grads, state.opt_state, old)
        params = optax.apply_updates(old, updates)
        old_ema, kept = (None, {}) if state.ema is None else partition.split(state.ema, is_trained)
        ema = update_ema(old_ema, params, config.optim.ema_decay)
        params, opt_state, ema = guards.select(
            ok, (params, opt_state, ema), (old, state.opt_state, old_ema)
        )
        params, ema = partition.merge(params, frozen), partition.merge(ema, kept)
        skipped = 1 - ok.astype(jnp.int32)
        skips, streak = state.skips + skipped, (state.streak + 1) * skipped
        metrics = {
            **metrics,
            "loss": loss,
            "grad_norm": norm,
            # The optimiser counts the updates it made, so a skipped step does not move it.
            "learning_rate": learning_rate(state.step - state.skips),
            "skips": skips,
            "skips_in_a_row": streak,
        }
        new = TrainState(state.step + 1, params, opt_state, ema, skips, streak)
        return new, {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}

    return train_step


class Plan(NamedTuple):
    """A step that is ready to be lowered.

    Attributes:
      step: jitted, with output shardings, donating the state.
      state, batch: the abstract arguments, which say where they live.
    """

    step: Any
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]


def plan(objective, tx: optax.GradientTransformation, config, mesh: Mesh) -> Plan:
    """The training step of `objective` on `mesh`, traced and allocated nowhere yet."""
    state = jax.eval_shape(functools.partial(states.create, objective, tx, config))
    places = sharding.state_shardings(state, state.params, mesh)
    batch = dict(objective.batch_spec(config.data.batch_size))
    step = jax.jit(
        make_train_step(objective, tx, config),
        out_shardings=(places, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    return Plan(
        step,
        sharding.with_shardings(state, places),
        sharding.with_shardings(batch, dict.fromkeys(batch, sharding.batch_sharding(mesh))),
    )


def model_flops(objective, config, params: Any, batch: Any) -> int:
    """FLOPs of a step that are the model's own: three forward passes.

    A backward pass costs two, and what rematerialisation repeats is not useful work. `params` and
    `batch` may be abstract; a constrained objective needs the mesh to be set.
    """

    def loss(params, batch, rng):
        return objective.loss(compute_cast(params, config.precision.compute), batch, rng)[0]

    return 3 * flops.count(loss, params, batch, jax.eval_shape(lambda: states.key(0, "train")))


def update_ema(ema: Any, params: Any, decay: float) -> Any:
    """``decay * ema + (1 - decay) * params``, or None where there is no average."""
    if ema is None:
        return None
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)


def compute_cast(params: Any, dtype: str) -> Any:
    """Parameters in the dtype of computation; gradients flow back to the masters' dtype.

    Scales of norms and modulation tables stay as they are: they are small, they enter float32
    arithmetic anyway, and Wan keeps them in float32 too.
    """
    dtype = jnp.dtype(dtype)
    return tree.map_with_path(
        lambda path, x: x if path.rsplit("/", 1)[-1] in KEPT_PRECISE else x.astype(dtype), params
    )


def _accumulated(objective, config) -> Callable:
    """``value_and_grad`` of the loss by the trained parameters, given those and the frozen ones,
    over one batch or averaged over microbatches."""
    micro = config.optim.accumulate

    def loss(trained, frozen, batch, rng):
        params = compute_cast(partition.merge(trained, frozen), config.precision.compute)
        value, metrics = objective.loss(params, batch, rng)
        return value.astype(jnp.promote_types(value.dtype, jnp.float32)), metrics

    whole = jax.value_and_grad(loss, has_aux=True)
    if micro == 1:
        return whole

    def averaged(trained, frozen, batch, rng):
        parts = {k: _microbatches(v, micro) for k, v in batch.items()}

        def body(total, inputs):
            index, part = inputs
            result = whole(trained, frozen, part, jax.random.fold_in(rng, index))
            return jax.tree.map(jnp.add, total, result), None

        part = {k: v[0] for k, v in parts.items()}
        first = jax.eval_shape(whole, trained, frozen, part, rng)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)
        total, _ = jax.lax.scan(body, zeros, (jnp.arange(micro), parts))
        return jax.tree.map(lambda x: x / micro, total)

    return averaged


def _microbatches(x: jax.Array, micro: int) -> jax.Array:
    """(b, ...) to (micro, b / micro, ...), taking every micro-th example.

    A shard of the batch is contiguous, so each microbatch takes an equal share of every shard and
    no example moves between devices.
    """
    if x.shape[0] % micro:
        raise ValueError(f"a batch of {x.shape[0]} does not divide by optim.accumulate {micro}")
    return jnp.swapaxes(x.reshape(x.shape[0] // micro, micro, *x.shape[1:]), 0, 1)
