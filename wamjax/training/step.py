"""Defines one training step, a pure function ``(state, batch) -> (state, metrics)``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from wamjax import flops, tree
from wamjax.data import mixture
from wamjax.training import guards, optim, partition, sharding
from wamjax.training import state as states
from wamjax.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
KEPT_PRECISE = {"scale", "modulation", "head_table"}
Step = Callable[..., tuple[TrainState, Metrics]]


def make_train_step(objective, tx: optax.GradientTransformation, config) -> Step:
    """Returns the step of an objective (`wamjax.wam.protocols.Objective`).

    Randomness depends on (seed, step) only. A step with a non-finite loss or gradient changes
    nothing but the counters.

    Returns:
      ``(state, batch, seed) -> (state, metrics)``, to be jitted; the config's seed by default. Its
      metrics are the objective's and: loss, grad_norm (before clipping), learning_rate, skips (so
      far) and skips_in_a_row; all float32 scalars.
    """
    learning_rate = optim.schedule(config)
    is_trained = partition.trained(config.optim.freeze)
    value_and_grad = _accumulated(objective, config)

    def train_step(
        state: TrainState, batch: Batch, seed: int | jax.Array = config.seed
    ) -> tuple[TrainState, Metrics]:
        rng = states.key(seed, "train", state.step)
        old, frozen = partition.split(state.params, is_trained)
        average = None if state.ema is None else partition.merge(state.ema, frozen)
        (loss, metrics), grads = value_and_grad(old, frozen, batch, rng, average)
        norm = optax.tree.norm(grads)
        ok = guards.finite(loss, norm)
        updates, opt_state = tx.update(grads, state.opt_state, old)
        params = optax.apply_updates(old, updates)
        ema = update_ema(state.ema, params, *ema_weights(config, state.step - state.skips))
        params, opt_state, ema = guards.select(
            ok, (params, opt_state, ema), (old, state.opt_state, state.ema)
        )
        params = partition.merge(params, frozen)
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
    """Holds a step that is ready to be lowered.

    The seed is an argument, so runs that differ in it alone share one compiled program.

    Attributes:
      step: jitted, with output shardings, donating the state.
      state, batch, seed: the abstract arguments with their shardings.
    """

    step: Any
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    seed: jax.ShapeDtypeStruct

    @property
    def arguments(self) -> tuple[Any, Any, Any]:
        """Returns the abstract arguments of the step, in order."""
        return self.state, self.batch, self.seed


def plan(objective, tx: optax.GradientTransformation, config, mesh: Mesh) -> Plan:
    """Returns the training step of `objective` on `mesh`, not traced or allocated yet."""
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
        jax.ShapeDtypeStruct((), jnp.uint32, sharding=sharding.replicated(mesh)),
    )


def model_flops(objective, config, params: Any, batch: Any) -> int:
    """Returns the model's own FLOPs per step: the loss and its gradient, see
    `flops.count_training`.

    Rematerialization does not count. Parameters that are not trained cost no gradient: a frozen
    codec counts once, frozen layers that a gradient passes through count twice. `params` and
    `batch` may be abstract; a constrained objective needs the mesh to be set.
    """
    parts = partition.split(params, partition.trained(config.optim.freeze))
    with _plainly():
        return flops.count_training(_loss(objective, config), *parts, batch, _abstract_key())


def _plainly():
    """Traces a loss as for a CPU, since additions for a TPU, such as padding, are not useful
    work."""
    device = jax.sharding.AbstractDevice(device_kind="cpu", num_cores=None, platform="cpu")
    mesh = jax.sharding.get_abstract_mesh()
    return jax.sharding.use_abstract_mesh(mesh.update(abstract_device=device))


def forward_flops(objective, config, params: Any, batch: Any) -> int:
    """Returns FLOPs of the loss alone; arguments as for `model_flops`."""
    return flops.count(_loss(objective, config), params, {}, batch, _abstract_key())


def _abstract_key() -> Any:
    return jax.eval_shape(lambda: states.key(0, "train"))


def _loss(objective, config) -> Callable:
    """Returns the loss of the trained and the other parameters, merged into one tree."""

    def loss(trained, frozen, batch, rng):
        params = compute_cast(partition.merge(trained, frozen), config.precision.compute)
        return objective.loss(params, batch, rng)[0]

    return loss


def update_ema(ema: Any, params: Any, old: Any, new: Any) -> Any:
    """Returns ``old * ema + new * params``, or None if there is no average."""
    if ema is None:
        return None
    return jax.tree.map(
        lambda e, p: jnp.asarray(old, e.dtype) * e + jnp.asarray(new, e.dtype) * p, ema, params
    )


def ema_weights(config, updates: Any) -> tuple[Any, Any]:
    """Returns the weights of the old average and of the new parameters after this many updates.

    They are ``optim.ema_decay`` and the rest; with ``optim.ema_warmup`` the decay is at most ``(1 +
    n) / (10 + n)``, so the average always covers about the last tenth of the training, until that
    exceeds ``1 / (1 - decay)``. Without it, a run that is short compared with ``1 / (1 - decay)``
    averages mostly its own start.
    """
    decay = config.optim.ema_decay
    if not config.optim.ema_warmup:
        return decay, 1 - decay
    n = jnp.asarray(updates, jnp.result_type(float))
    # Both from their own formulas: one minus the other would lose digits.
    return jnp.minimum(decay, (1 + n) / (10 + n)), jnp.maximum(1 - decay, 9 / (10 + n))


def compute_cast(params: Any, dtype: str) -> Any:
    """Casts parameters to the compute dtype; gradients flow back to the masters' dtype.

    Scales of norms and modulation tables stay as they are: they are small, they enter float32
    arithmetic anyway, and Wan keeps them in float32 too.
    """
    dtype = jnp.dtype(dtype)
    return tree.map_with_path(
        lambda path, x: x if path.rsplit("/", 1)[-1] in KEPT_PRECISE else x.astype(dtype), params
    )


def _accumulated(objective, config) -> Callable:
    """Returns ``value_and_grad`` of the loss by the trained parameters, given those, the frozen
    ones and the moving average, over one batch or averaged over microbatches."""
    micro = config.optim.accumulate
    cast = functools.partial(compute_cast, dtype=config.precision.compute)

    def loss(trained, frozen, batch, rng, average):
        average = None if average is None else cast(average)
        params = cast(partition.merge(trained, frozen))
        value, metrics = objective.loss(params, batch, rng, average=average)
        return value.astype(jnp.promote_types(value.dtype, jnp.float32)), metrics

    whole = jax.value_and_grad(loss, has_aux=True)
    if micro == 1:
        return whole

    row = microbatch_row(objective, config)

    def averaged(trained, frozen, batch, rng, average):
        parts = {k: microbatches(v, micro, row) for k, v in batch.items()}

        def one(index, part):
            own = jax.random.fold_in(rng, index)
            (loss, metrics), grads = whole(trained, frozen, part, own, average)
            # A metric is NaN where a microbatch has nothing that it is about.
            counts = jax.tree.map(lambda x: 1.0 - jnp.isnan(x), metrics)
            metrics = jax.tree.map(lambda x: jnp.where(jnp.isnan(x), 0, x), metrics)
            return loss, metrics, counts, grads

        part = {k: v[0] for k, v in parts.items()}
        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, jnp.int32(0), part)
        )
        (loss, metrics, counts, grads), _ = jax.lax.scan(
            lambda total, inputs: (jax.tree.map(jnp.add, total, one(*inputs)), None),
            zeros,
            (jnp.arange(micro), parts),
        )
        metrics = jax.tree.map(jnp.divide, metrics, counts)
        return (loss / micro, metrics), jax.tree.map(lambda x: x / micro, grads)

    return averaged


def microbatch_row(objective, config) -> int:
    """Returns how many neighbours of a batch stay together in a microbatch.

    Sources and programs share a batch in a repeating pattern, so a microbatch of every n-th example
    could hold only one of them. If the pattern does not fit into a microbatch, all its examples are
    neighbours: its shares are right to an example or two, at the cost of moving examples between
    devices.

    Raises:
      ValueError: the batch does not divide into microbatches, or these not into exact shares.
    """
    size, micro, own = config.data.batch_size, config.optim.accumulate, objective.row
    each, rest = divmod(size, micro)
    if rest or each % own:
        raise ValueError(
            f"data.batch_size {size} does not divide by optim.accumulate {micro} into microbatches "
            f"of whole rows of {own}, which hold exact shares: make it a multiple of {micro * own}"
        )
    weights = {name: source.weight for name, source in config.data.sources.items()}
    row = math.lcm(own, mixture.period(mixture.counts(weights, size)) if weights else 1)
    return row if each % row == 0 else each


def microbatches(x: jax.Array, micro: int, row: int) -> jax.Array:
    """Reshapes (b, ...) to (micro, b / micro, ...), taking every micro-th row of `row` examples.

    A shard of the batch is contiguous, so each microbatch takes an equal share of every shard, and
    no example moves between devices, if its rows divide by `micro`.
    """
    x = x.reshape(-1, micro, row, *x.shape[1:])
    return x.swapaxes(0, 1).reshape(micro, -1, *x.shape[3:])
