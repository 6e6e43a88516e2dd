"""What a denoising loss is a function of, and what it is made of.

An objective that denoises computes its loss in three steps, all of them public:

    draw = objective.draw(params, batch, rng)        clean values, noise, levels, uses: all chance
    slots = objective.denoising_loss(params, draw)   the error of every slot, without chance
    loss, metrics = objective.loss_of(params, draw)  their mean, as in `loss`

So another implementation can be compared with on the same numbers: ``draw._replace(noise=...)``.
``objective.example_losses(params, draw)`` are those of single examples; their mean is the loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wamjax.wam.slots import masked_mean

Groups = dict[str, Array]


class Draw(NamedTuple):
    """All that the loss of some examples depends on, beside the parameters.

    Attributes:
      clean: group -> (b, m, ...), latents and normalised numbers.
      noise: group -> standard normal of the same shape.
      level: group -> (b, 1 or m), of the process; told of what is predicted, 0 noise elsewhere.
      use: what the slots are used as, see the objective.
      condition: what else the network reads, with leading b.
      at: which examples of the batch these are.
    """

    clean: Groups
    noise: Groups
    level: Groups
    use: Any
    condition: Groups
    at: Int[Array, " b"]


class SlotLosses(NamedTuple):
    """Of a group.

    Attributes:
      error: loss of each slot, the mean over what it holds.
      mask: slots that a loss is taken on.
      weight: of the example at its noise level; the error does not have it yet.
    """

    error: Float[Array, "b m"]
    mask: Bool[Array, "b m"]
    weight: Float[Array, " b"]

    def examples(self) -> Float[Array, " b"]:
        """Weighted mean over the slots of each example that have a loss; 0 without any."""
        return masked_mean(self.error, self.mask) * self.weight


def in_order(values: Float[Array, "b ..."], at: Int[Array, " b"]) -> Float[Array, "b ..."]:
    """What belongs to the examples `at` of a batch, in the order of the batch."""
    return jnp.zeros_like(values).at[at].set(values)
