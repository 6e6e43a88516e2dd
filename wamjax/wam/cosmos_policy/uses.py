"""Defines Cosmos Policy's uses of one network: policy, world model and value function.

They differ only in which groups of slots are given (specification, section 5.1). Roles are data, so
one compiled step trains any mix of them. The visibility table is `bidirectional` for all, or
`prefix`, under which given slots can be cached.

A group that is predicted without a loss is hidden: as noisy as the rest, at a level that the
network receives. That is how V(s') and Q(s, a) leave out what they must not see.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from wamjax.config import did_you_mean
from wamjax.models.visibility import Visibility, bidirectional, prefix
from wamjax.wam.slots import Factorization, Role, factorization
from wamjax.wam.uses import Use

GIVEN, PREDICTED = Role.GIVEN, Role.PREDICTED
GROUPS = ("blank", "current", "action", "future", "value")


def _factorization(name: str, given: str) -> Factorization:
    roles = {g: GIVEN if g in given.split() else PREDICTED for g in GROUPS}
    return factorization(name, **roles)


POLICY = _factorization("policy", "blank current")  # p(a, s', V | s)
WORLD_MODEL = _factorization("world_model", "blank current action")  # p(s', V | s, a)
# Value functions, by what they are given.
VALUES: dict[str, Factorization] = {
    "value": _factorization("value", "blank current action future"),  # p(V | s, a, s')
    "value_v": _factorization("value_v", "blank future"),  # V(s')
    "value_q": _factorization("value_q", "blank current action"),  # Q(s, a)
}
VISIBILITIES = ("bidirectional", "prefix")


@functools.cache
def uses(
    value: str = "value", visibility: str = "bidirectional", auxiliary: bool = True
) -> tuple[Use, ...]:
    """Returns policy, world model and the kind of value function that `value` names.

    Args:
      visibility: one of `VISIBILITIES`.
      auxiliary: whether all predicted groups have a loss, except those that a value function leaves
        out; otherwise only the main group of each use has one.

    Raises:
      ValueError: there is no such value function or visibility.
    """
    if value not in VALUES:
        raise ValueError(f"objective.value {value!r} is not one of {tuple(VALUES)}"
                         f"{did_you_mean(value, VALUES)}")  # fmt: skip
    trained = (
        (POLICY, ("action", "future", "value") if auxiliary else ("action",)),
        (WORLD_MODEL, ("future", "value") if auxiliary else ("future",)),
        (VALUES[value], ("value",)),
    )
    return tuple(Use(roles, table(visibility, roles), groups) for roles, groups in trained)


def model_free(judge: Use) -> bool:
    """Returns whether a value function is Q(s, a), which sees no future."""
    return "future" not in judge.given and "current" in judge.given


def table(visibility: str, roles: Factorization) -> Visibility:
    """Returns the visibility table of a use.

    Raises:
      ValueError: `visibility` is not one of `VISIBILITIES`.
    """
    if visibility == "bidirectional":
        return bidirectional(*GROUPS)
    if visibility == "prefix":
        prefix_table = prefix(roles.groups(GIVEN), roles.groups(PREDICTED))
        return dataclasses.replace(prefix_table, name=f"prefix_{roles.name}")
    raise ValueError(f"objective.visibility {visibility!r} is not one of {VISIBILITIES}"
                     f"{did_you_mean(visibility, VISIBILITIES)}")  # fmt: skip


def toss(key: Array, counts: tuple[int, ...], rollout: Bool[Array, " b"]) -> Int[Array, " b"]:
    """Draws the use of every example independently, as published: shares hold only in expectation.

    Demonstrations train the policy and rollouts the rest, in random shares; if there are no
    rollouts, demonstrations train everything.
    """
    key_any, key_rollout = jax.random.split(key)
    weights = jnp.log(jnp.asarray(counts, jnp.float32))
    any_use = jax.random.categorical(key_any, weights, shape=rollout.shape)
    rollout_use = 1 + jax.random.categorical(key_rollout, weights[1:], shape=rollout.shape)
    return jnp.where(jnp.any(rollout), jnp.where(rollout, rollout_use, 0), any_use)
