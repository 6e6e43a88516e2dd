"""A ladder of ways to act, and a gate that says of every state how far it pays to climb.

    rung 0      n_0 proposals (1: act directly)
    rung h      n_h proposals: those of the rungs below and some more, on the same cache, made
                directly or on an imagined future, whose steps on lower rungs are not made again

On each rung a judge values the proposals so far, and the gate expects what the best of more of them
would return beyond the best of these. It goes on while that is more than what going on costs, both
in units of the return. So the gate is monotone in the price of time by construction, one gate
serves every price, and costs may be those of whatever machine acts.

What the gate learns is a mean over what came of proposals (a regression), not the sign of what came
of one: outcomes are noisy, and the sign of a noisy difference is biased towards what is frequent.
Source of the shape of the problem: value of computation, RISE (arXiv 2608.20430).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wamjax.models.layers import LayerNorm, Linear

WIDTH = 128  # of the gate
SCALE = 10.0  # values and spreads are tenths


class Decision(NamedTuple):
    """What was chosen, and why.

    Attributes:
      actions: the chosen chunk.
      rung: how far it was climbed.
      chosen: which proposal.
      proposals: all chunks; those that were not made are zero.
      values: what the judge expects of them; -inf of those that were not made.
      benefit: what the gate expected of going on at each rung, (b, rungs - 1), as far as it got;
        -inf beyond.
    """

    actions: Float[Array, "b j a"]
    rung: Int[Array, " b"]
    chosen: Int[Array, " b"]
    proposals: Float[Array, "b n j a"]
    values: Float[Array, "b n"]
    benefit: Float[Array, "b r"]


class Features(NamedTuple):
    """What a gate looks at on a rung; nothing of it is computed for the gate.

    Attributes:
      pooled: of the observation, as the cache of the policy holds it.
      numbers: best, mean and spread of the values so far, spread of the actions so far, and which
        rung it is.
    """

    pooled: Float[Array, "b d"]
    numbers: Float[Array, "b f"]


class Gate(nn.Module):
    """What the best proposal of each higher rung is expected to return beyond the best so far."""

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
    """Of the proposals of a rung."""
    numbers = jnp.stack(
        [jnp.max(values, axis=1), jnp.mean(values, axis=1), jnp.std(values, axis=1),
         spread(proposals)], axis=1,
    )  # fmt: skip
    which = jnp.broadcast_to(jnp.eye(rungs)[rung], (len(values), rungs))
    return Features(pooled, jnp.concatenate([SCALE * numbers, which], axis=1))


def spread(proposals: Float[Array, "b n j a"]) -> Float[Array, " b"]:
    """How far proposals of a state are from each other: mean standard deviation of an action."""
    return jnp.mean(jnp.std(proposals, axis=1), axis=(1, 2))


def climb(
    rungs: int,
    propose: Callable[[int, Any], tuple[Array, Array, Any]],
    goes_on: Callable[[int, Array, Array], tuple[Array, Array]],
    state: Any = None,
) -> Decision:
    """Acts as far up the ladder as pays, each example for itself, in one jittable program.

    What no example of a batch climbs to is not computed.

    Args:
      rungs: how many there are.
      propose: ``propose(rung, state)`` makes the proposals (b, n, j, a) that a rung adds, their
        values, and the state for the next rung.
      goes_on: ``goes_on(rung, proposals, values)``: who goes on, (b,), and the benefit expected.
      state: what rungs hand on, a tree of arrays that keep their shapes.
    """
    proposals, values, state = propose(0, state)
    b = len(values)
    going = jnp.ones(b, bool)
    rung, benefits = jnp.zeros(b, jnp.int32), []
    for h in range(1, rungs):
        asked, benefit = goes_on(h - 1, proposals, values)
        benefits.append(jnp.where(going, benefit, -jnp.inf))
        going &= asked
        shapes = jax.eval_shape(functools.partial(propose, h), state)[:2]

        def skip(state, shapes=shapes):
            return *(jnp.zeros(s.shape, s.dtype) for s in shapes), state

        more, worth, state = jax.lax.cond(
            jnp.any(going), functools.partial(propose, h), skip, state
        )
        more = jnp.where(going[:, None, None, None], more, 0)
        worth = jnp.where(going[:, None], worth, -jnp.inf)
        proposals = jnp.concatenate([proposals, more], axis=1)
        values = jnp.concatenate([values, worth], axis=1)
        rung += going
    chosen = jnp.argmax(values, axis=1)
    actions = jnp.take_along_axis(proposals, chosen[:, None, None, None], axis=1)[:, 0]
    benefit = jnp.stack(benefits, axis=1) if benefits else jnp.zeros((b, 0))
    return Decision(actions, rung, chosen, proposals, values, benefit)


def pays(
    rung: int, benefit: Float[Array, "b r"], costs: Float[Array, " r"]
) -> tuple[Bool[Array, " b"], Float[Array, " b"]]:
    """Whether any higher rung is expected to return more than it costs to get there.

    Args:
      benefit: of every rung beyond what the one at hand returns; lower ones do not matter.
      costs: of being on each rung, in units of the return.

    Returns:
      (who goes on, the greatest expected benefit after costs).
    """
    above = np.arange(benefit.shape[1]) > rung
    net = jnp.where(above, benefit - (costs - costs[rung]), -jnp.inf)
    best = jnp.max(net, axis=1)
    return best > 0, best


def outcomes(
    rungs: Sequence[int],
    values: Float[Array, "b n"],
    returns: Float[Array, "b n"],
    alike: Sequence[int] | None = None,
) -> Float[Array, "b r"]:
    """What came of the proposal that each rung would have chosen; the first n_h are those of rung
    h. Of a first rung of one proposal the mean over those made as it is: the same, less noisy.

    Args:
      alike: proposals that are made as the first; all by default.
    """
    picked = [jnp.argmax(values[:, :n], axis=1) for n in rungs]
    returned = [jnp.take_along_axis(returns, p[:, None], axis=1)[:, 0] for p in picked]
    if rungs[0] == 1:
        alike = range(values.shape[1]) if alike is None else alike
        returned[0] = jnp.mean(returns[:, jnp.asarray(alike)], axis=1)
    return jnp.stack(returned, axis=1)


def ways(rungs: Sequence[int], modes: Sequence[str], count: int) -> tuple[str, ...]:
    """How each of `count` proposals of a ladder is made; those beyond it as the last rung's.

    Args:
      modes: how those are made that each rung adds; none is "direct" for all.
    """
    modes = tuple(modes) or ("direct",) * len(rungs)
    return tuple(np.repeat(modes, np.diff((0, *rungs[:-1], max(count, rungs[-1])))).tolist())


def shuffled(key: Array, ways: Sequence[str], size: int) -> Int[Array, "b n"]:
    """An order of proposals for each of `size` states: those made in the same way change places.

    Args:
      ways: how each proposal is made.
    """
    kinds = np.unique(ways, return_inverse=True)[1]
    draw = jax.random.uniform(key, (size, len(ways)))
    ranked = jnp.argsort(kinds + draw / 2, axis=1)  # kind by kind, at random among equals
    return ranked[:, jnp.asarray(np.argsort(np.argsort(kinds, kind="stable")))]
