"""Computes the one denoising loss: draw levels, corrupt, run, mask, weight; families choose the
average.

An objective that denoises computes its loss in three public steps:

    draws = objective.draw(params, batch, rng)        clean values, noise, levels, roles: all chance
    slots = objective.denoising_loss(params, draw)    the error of every slot, without chance
    loss, metrics = objective.loss_of(params, draws)  their mean, as in `loss`

So another implementation can be compared on the same numbers:
``dataclasses.replace(draw, noise=...)``. ``objective.example_losses(params, draws)`` returns those
of single examples; their mean is the loss.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wamjax.diffusion.process import Process, align
from wamjax.models.layers import at_least_float32, unconstrained, widest
from wamjax.models.visibility import Visibility
from wamjax.wam.objectives import bind
from wamjax.wam.slots import Role, masked_mean

Groups = dict[str, Array]
Params = dict[str, Any]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("clean", "noise", "level", "role", "mask", "condition", "use", "at"),
    meta_fields=("table",),
)
@dataclasses.dataclass(frozen=True)
class Draw:
    """Holds everything that determines the loss of examples that go through the network together.

    Attributes:
      clean: group -> (b, m, ...), latents and normalised numbers.
      noise: group -> standard normal of the same shape, for groups that are ever predicted.
      level: group -> (b, 1 or m), levels of the process; used where a slot is predicted, both to
        mix in noise and as the network's input.
      role: group -> (b, 1 or m), `slots.Role` of its slots.
      mask: group -> (b, m), slots that have a loss; only for groups that have one.
      condition: the network's other inputs, with leading b.
      use: index of each example's use, among the uses of the objective.
      at: indices of these examples in the batch.
      table: who sees whom.
    """

    clean: Groups
    noise: Groups
    level: Groups
    role: Groups
    mask: Groups
    condition: Groups
    use: Int[Array, " b"]
    at: Int[Array, " b"]
    table: Visibility


class SlotLosses(NamedTuple):
    """Holds the losses of a group.

    Attributes:
      error: the process's weighted loss of each slot, averaged over its elements.
      mask: slots that have a loss.
      l1: mean absolute error of x0.
    """

    error: Float[Array, "b m"]
    mask: Bool[Array, "b m"]
    l1: Float[Array, "b m"]

    def examples(self) -> Float[Array, " b"]:
        """Returns the mean over each example's slots that have a loss; 0 if there are none."""
        return masked_mean(self.error, self.mask)


def plain(values: Groups, given: dict[str, Array]) -> Groups:
    """Returns values unchanged: for networks that see which slots are given only by their
    levels."""
    del given
    return values


def denoising_loss(
    network: Callable[..., Groups],
    draw: Draw,
    process_of: Callable[[str], Process],
    encode: Callable[[Groups, Groups], Groups] = plain,
) -> dict[str, SlotLosses]:
    """Computes the losses of the slots of every group that has one; deterministic.

    Args:
      network: ``network(values, levels, condition, table, predict=...)``, as `Shell.evaluate`.
      process_of: returns the process of a group.
      encode: ``encode(values, given)`` returns groups in the form that the network takes; `given`
        is (b, 1 or m).
    """
    values, network_levels, given, noisy = {}, {}, {}, {}
    for group, clean in draw.clean.items():
        process, role = process_of(group), draw.role[group]
        given[group] = role == Role.GIVEN
        at_data = process.c_noise(jnp.asarray(process.schedule(1)[-1], widest()))
        if group not in draw.noise:
            values[group], network_levels[group] = clean, jnp.broadcast_to(at_data, role.shape)
            continue
        predicted, level = role == Role.PREDICTED, draw.level[group]
        noisy[group] = process.corrupt(clean, draw.noise[group], level)
        x = align(process.c_in(level), clean) * noisy[group]
        values[group] = jnp.where(align(predicted, clean), x, clean)
        network_levels[group] = jnp.where(predicted, process.c_noise(level), at_data)
    table, predict = draw.table, tuple(draw.mask)
    outputs = network(encode(values, given), network_levels, draw.condition, table, predict=predict)
    losses = {}
    for group, mask in draw.mask.items():
        process, clean, level = process_of(group), draw.clean[group], draw.level[group]
        output = at_least_float32(outputs[group])
        inner = tuple(range(2, clean.ndim))
        error = process.loss(output, clean, draw.noise[group], level).mean(axis=inner)
        x0 = process.data(noisy[group], output, level)
        losses[group] = SlotLosses(error, mask, jnp.abs(x0 - clean).mean(axis=inner))
    return losses


class Denoises:
    """Implements the loss of an objective that denoises, from its draws and its way of averaging.

    A sub-class has `network`, `steps` of sampling, and

        draw(params, batch, rng)   a `Draw` for each table under which the batch is seen
        process_of(group)          its process
        reduce(draws, losses)      (loss, metrics) of the losses of all draws
        examples(draws, losses)    the same for each example, in the order of the draws
    """

    encode = staticmethod(plain)
    denoises = True

    def bind(self, params: Params, constrain: Callable = unconstrained) -> Callable:
        """Returns the network as a function, see `objectives.bind`."""
        return bind(self.network, params, constrain)

    def levels_of(self, group: str) -> np.ndarray:
        """Returns the levels at which a group is sampled, from noise to data, (steps + 1,)."""
        return self.process_of(group).schedule(self.steps)

    def loss(
        self, params: Params, batch: Groups, rng: Array, average: Params | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Computes the loss of a batch, see `reduce`.

        Args:
          average: moving average of the parameters, for objectives with a teacher.

        Returns:
          (loss, metrics), float32.
        """
        del average
        return self.loss_of(params, self.draw(params, batch, rng))

    def denoising_loss(self, params: Params, draw: Draw) -> dict[str, SlotLosses]:
        """Computes the losses of the slots of each group that has one; deterministic."""
        evaluate = functools.partial(self.bind(params, self.network.constrain), "evaluate")
        return denoising_loss(evaluate, draw, self.process_of, self.encode)

    def loss_of(
        self, params: Params, draws: Sequence[Draw]
    ) -> tuple[Array, dict[str, Array]]:
        """Computes the loss of draws; `loss` is that of `draw`."""
        return self.reduce(draws, [self.denoising_loss(params, draw) for draw in draws])

    def example_losses(self, params: Params, draws: Sequence[Draw]) -> dict[str, Array]:
        """Computes "loss" of every example of the batch, whose mean is the loss, and its parts."""
        rows = self.examples(draws, [self.denoising_loss(params, draw) for draw in draws])
        index = jnp.concatenate([draw.at for draw in draws])
        return {name: jnp.zeros_like(x).at[index].set(x) for name, x in rows.items()}

    def by_level(
        self, params: Params, batch: Groups, rng: Array, ratios: Float[Array, " n"]
    ) -> dict[str, Array]:
        """Computes the metrics of `loss` at noise-to-signal ratios, each (n,); without a mesh."""
        alone = dataclasses.replace(self, network=self.network.clone(constrain=unconstrained))
        draws = alone.draw(params, batch, rng)

        def at(ratio: Array, draw: Draw) -> Draw:
            levels = {g: self.process_of(g).level_of(ratio) for g in draw.mask}
            same = {g: jnp.full_like(draw.level[g], level) for g, level in levels.items()}
            return dataclasses.replace(draw, level=draw.level | same)

        def one(ratio: Array) -> dict[str, Array]:
            return alone.loss_of(params, [at(ratio, draw) for draw in draws])[1]

        return jax.lax.map(one, jnp.asarray(ratios, widest()))
