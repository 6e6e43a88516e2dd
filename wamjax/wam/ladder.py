"""Acts on a ladder of increasing effort, with a gate that decides for every state how far to climb.

    rung 0      n_0 proposals (1: act directly)
    rung h      n_h proposals: those of the rungs below and some more, on the same cache, made
                directly or on an imagined future, which continues from the steps of lower rungs

On each rung a judge values the proposals so far, and the gate predicts how much more the best of a
larger number would return than the best of these. It continues while that exceeds the cost of
continuing; both are in units of the return. So by construction the gate is monotone in the price of
time, one gate serves every price, and costs can be those of the machine that acts.

The gate learns the mean over the outcomes of proposals (a regression), not the sign of a single
outcome: outcomes are noisy, and the sign of a noisy difference is biased towards the more frequent
sign. The formulation follows the value of computation, RISE (arXiv 2608.20430).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wamjax.models.layers import LayerNorm, Linear

WIDTH = 128  # of the gate
SCALE = 10.0  # values and spreads are of the order of 0.1


class Decision(NamedTuple):
    """Holds the chosen action and the reasons for it.

    Attributes:
      actions: the chosen chunk.
      rung: the highest rung that was reached.
      chosen: index of the chosen proposal.
      proposals: all chunks; zero for proposals that were not computed.
      values: the judge's values of them; -inf for proposals that were not computed.
      benefit: benefit of continuing that the gate predicted on each rung, (b, rungs - 1); -inf
        above the last rung reached.
    """

    actions: Float[Array, "b j a"]
    rung: Int[Array, " b"]
    chosen: Int[Array, " b"]
    proposals: Float[Array, "b n j a"]
    values: Float[Array, "b n"]
    benefit: Float[Array, "b r"]


class Terms(NamedTuple):
    """Says when a ladder is worth climbing.

    Attributes:
      price: price of a millisecond, in units of the return.
      budget: milliseconds that a plan may take.
    """

    price: float
    budget: float = math.inf


class Features(NamedTuple):
    """Holds a gate's input on a rung; all of it is computed anyway.

    Attributes:
      pooled: pooled observation, from the cache of the policy.
      numbers: best, mean and spread of the values so far, spread of the actions so far, and the
        rung as one-hot.
    """

    pooled: Float[Array, "b d"]
    numbers: Float[Array, "b f"]


class Gate(nn.Module):
    """Predicts how much more the best proposal of each higher rung returns than the best so far."""

    rungs: int

    @nn.compact
    def __call__(self, features: Features) -> Float[Array, "b r"]:
        x = Linear(WIDTH)(LayerNorm()(features.pooled)) + Linear(WIDTH)(features.numbers)
        x = nn.gelu(x)
        x = nn.gelu(Linear(WIDTH)(x))
        return Linear(self.rungs, kernel_init=nn.initializers.zeros)(x) / SCALE


def features(
    rung: int,
    rungs: int,
    pooled: Float[Array, "b d"],
    proposals: Float[Array, "b n j a"],
    values: Float[Array, "b n"],
) -> Features:
    """Computes the gate's input from the proposals of a rung."""
    numbers = jnp.stack(
        [jnp.max(values, axis=1), jnp.mean(values, axis=1), jnp.std(values, axis=1),
         spread(proposals)], axis=1,
    )  # fmt: skip
    which = jnp.broadcast_to(jnp.eye(rungs)[rung], (len(values), rungs))
    return Features(pooled, jnp.concatenate([SCALE * numbers, which], axis=1))


def spread(proposals: Float[Array, "b n j a"]) -> Float[Array, " b"]:
    """Measures how far a state's proposals are apart: the mean standard deviation of an action."""
    return jnp.mean(jnp.std(proposals, axis=1), axis=(1, 2))


def climb(
    rungs: int,
    propose: Callable[[int, Any], tuple[Array, Array, Any]],
    goes_on: Callable[[int, Array, Array], tuple[Array, Array]],
    state: Any = None,
) -> Decision:
    """Climbs the ladder as far as it pays, separately for each example, in one jittable program.

    A rung that no example of the batch reaches is not computed.

    Args:
      rungs: number of rungs.
      propose: ``propose(rung, state)`` returns the proposals (b, n, j, a) that a rung adds, their
        values, and the state for the next rung.
      goes_on: ``goes_on(rung, proposals, values)`` returns which examples continue, (b,), and the
        expected benefit.
      state: passed from rung to rung, a tree of arrays that keep their shapes.
    """
    proposals, values, state = propose(0, state)
    b = len(values)
    active = jnp.ones(b, bool)
    rung, benefits = jnp.zeros(b, jnp.int32), []
    for h in range(1, rungs):
        continues, benefit = goes_on(h - 1, proposals, values)
        benefits.append(jnp.where(active, benefit, -jnp.inf))
        active &= continues
        shapes = jax.eval_shape(functools.partial(propose, h), state)[:2]

        def skip(state, shapes=shapes):
            return *(jnp.zeros(s.shape, s.dtype) for s in shapes), state

        new_proposals, new_values, state = jax.lax.cond(
            jnp.any(active), functools.partial(propose, h), skip, state
        )
        new_proposals = jnp.where(active[:, None, None, None], new_proposals, 0)
        new_values = jnp.where(active[:, None], new_values, -jnp.inf)
        proposals = jnp.concatenate([proposals, new_proposals], axis=1)
        values = jnp.concatenate([values, new_values], axis=1)
        rung += active
    best = jnp.argmax(values, axis=1)
    actions = jnp.take_along_axis(proposals, best[:, None, None, None], axis=1)[:, 0]
    benefit = jnp.stack(benefits, axis=1) if benefits else jnp.zeros((b, 0))
    return Decision(actions, rung, best, proposals, values, benefit)


def pays(
    rung: int, benefit: Float[Array, "b r"], costs: Float[Array, " r"] | Float[Array, "b r"]
) -> tuple[Bool[Array, " b"], Float[Array, " b"]]:
    """Decides whether any higher rung is expected to return more than it costs to reach.

    Args:
      benefit: of every rung relative to the return of the current one; entries for lower rungs are
        ignored.
      costs: cost of each rung, in units of the return; the same for all examples or one row each.

    Returns:
      (which examples continue, the greatest expected benefit after costs).
    """
    above = np.arange(benefit.shape[1]) > rung
    net = jnp.where(above, benefit - (costs - costs[..., rung : rung + 1]), -jnp.inf)
    best = jnp.max(net, axis=1)
    return best > 0, best


def terms(mode: str) -> Terms:
    """Reads the terms from a mode, "adaptive:PRICE" or "adaptive:PRICE:BUDGET".

    Raises:
      ValueError: price or budget is missing, not a number, or negative; the budget is zero.
    """
    numbers = mode.split(":")[1:]
    try:
        price, budget = (*map(float, numbers), math.inf)[:2]
        valid = len(numbers) in (1, 2) and 0 <= price < math.inf and budget > 0
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(
            f"mode {mode!r} must be adaptive:PRICE or adaptive:PRICE:BUDGET: the price of a "
            "millisecond in units of the return, and the milliseconds that a plan may take, as "
            "adaptive:0.003:12"
        )
    return Terms(price, budget)


def affordable(
    costs: Float[Array, " r"],
    milliseconds: Float[Array, " r"],
    budget: float | Float[Array, " b"],
) -> Float[Array, " r"] | Float[Array, "b r"]:
    """Makes rungs that take longer than a budget infinitely expensive; the first rung is always
    taken.

    Args:
      budget: milliseconds that a plan may take, the same for all examples or one each.
    """
    over = milliseconds > jnp.asarray(budget)[..., None]
    return jnp.where(over & (np.arange(len(costs)) > 0), jnp.inf, costs)


def outcomes(
    rungs: Sequence[int],
    values: Float[Array, "b n"],
    returns: Float[Array, "b n"],
    alike: Sequence[int] | None = None,
) -> Float[Array, "b r"]:
    """Returns the outcome of the proposal that each rung would have chosen; the first n_h proposals
    are those of rung h. For a first rung with one proposal it is the mean over all proposals
    generated in the same way: the same expectation, but less noisy.

    Args:
      alike: proposals that are generated like the first one; all by default.
    """
    choices = [jnp.argmax(values[:, :n], axis=1) for n in rungs]
    results = [jnp.take_along_axis(returns, p[:, None], axis=1)[:, 0] for p in choices]
    if rungs[0] == 1:
        alike = range(values.shape[1]) if alike is None else alike
        results[0] = jnp.mean(returns[:, jnp.asarray(alike)], axis=1)
    return jnp.stack(results, axis=1)


def ways(rungs: Sequence[int], modes: Sequence[str], count: int) -> tuple[str, ...]:
    """Returns how each of `count` proposals of a ladder is generated; additional ones like the last
    rung's.

    Args:
      modes: modes of the proposals that each rung adds; () is "direct" for all.
    """
    modes = tuple(modes) or ("direct",) * len(rungs)
    return tuple(np.repeat(modes, np.diff((0, *rungs[:-1], max(count, rungs[-1])))).tolist())


def shuffled(key: Array, ways: Sequence[str], size: int) -> Int[Array, "b n"]:
    """Returns an order of proposals for each of `size` states, shuffled among those of the same
    kind.

    Args:
      ways: how each proposal is generated.
    """
    kinds = np.unique(ways, return_inverse=True)[1]
    draw = jax.random.uniform(key, (size, len(ways)))
    permutation = jnp.argsort(kinds + draw / 2, axis=1)  # kind by kind, at random among equals
    return permutation[:, jnp.asarray(np.argsort(np.argsort(kinds, kind="stable")))]
