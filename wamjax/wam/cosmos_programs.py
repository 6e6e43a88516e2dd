"""Cosmos Policy's uses of one network: policy, world model and value function.

They differ in which groups of slots are given alone (specification, section 5.1). Roles are data,
so one compiled step trains any mix of them; who sees whom is `bidirectional` for all, or `prefix`,
in which what is given can be cached.

A group that is predicted without a loss is hidden: as noisy as the rest, at a level that the
network is told. That is how V(s') and Q(s, a) leave out what they must not look at.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from wamjax.config import did_you_mean
from wamjax.models.visibility import Visibility, bidirectional, prefix
from wamjax.wam.layouts import Layout
from wamjax.wam.slots import Factorization, Role, factorization

GIVEN, PREDICTED = Role.GIVEN, Role.PREDICTED


@dataclasses.dataclass(frozen=True)
class Use:
    """What an example trains the network as.

    Attributes:
      factorization: which groups are given.
      trained: groups that have a loss.
      pure: those that have one without auxiliary losses.
    """

    factorization: Factorization
    trained: tuple[str, ...]
    pure: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.factorization.name

    @property
    def given(self) -> tuple[str, ...]:
        return self.factorization.groups(GIVEN)

    @property
    def predicted(self) -> tuple[str, ...]:
        return self.factorization.groups(PREDICTED)


def _use(name: str, given: str, trained: str, pure: str) -> Use:
    groups = "blank", "current", "action", "future", "value"
    roles = {g: GIVEN if g in given.split() else PREDICTED for g in groups}
    return Use(factorization(name, **roles), tuple(trained.split()), (pure,))


USES: dict[str, Use] = {
    u.name: u
    for u in (
        _use("policy", "blank current", "action future value", "action"),  # p(a, s', V | s)
        _use("world_model", "blank current action", "future value", "future"),  # p(s', V | s, a)
        _use("value", "blank current action future", "value", "value"),  # p(V | s, a, s')
        _use("value_v", "blank future", "value", "value"),  # V(s')
        _use("value_q", "blank current action", "value", "value"),  # Q(s, a)
    )
}
VALUES = tuple(name for name in USES if name.startswith("value"))
VISIBILITIES = ("bidirectional", "prefix")


def uses(value: str) -> tuple[Use, ...]:
    """Policy, world model and the kind of value function that `value` names.

    Raises:
      ValueError: there is no such kind.
    """
    if value not in VALUES:
        raise ValueError(f"objective.value {value!r} is not one of {VALUES}"
                         f"{did_you_mean(value, VALUES)}")  # fmt: skip
    return USES["policy"], USES["world_model"], USES[value]


def model_free(judge: Use) -> bool:
    """Whether a value function is Q(s, a), which looks at no future."""
    return "future" not in judge.given and "current" in judge.given


def visibility(kind: str, use: Use) -> Visibility:
    """Who sees whom in a use.

    Raises:
      ValueError: `kind` is not one of `VISIBILITIES`.
    """
    if kind == "bidirectional":
        return bidirectional(*(g for g, _ in use.factorization.roles))
    if kind == "prefix":
        return dataclasses.replace(prefix(use.given, use.predicted), name=f"prefix_{use.name}")
    raise ValueError(f"objective.visibility {kind!r} is not one of {VISIBILITIES}"
                     f"{did_you_mean(kind, VISIBILITIES)}")  # fmt: skip


def roles(layout: Layout, which: tuple[Use, ...]) -> Int[np.ndarray, "u t"]:
    """The role of every slot in every use."""
    return np.stack([u.factorization.array(layout.sizes) for u in which])


def trained(layout: Layout, which: tuple[Use, ...], auxiliary: bool) -> Bool[np.ndarray, "u t"]:
    """Which slots have a loss in every use."""
    groups = [u.trained if auxiliary else u.pure for u in which]
    return np.array([[s.group in g for s in layout.slots] for g in groups])


def describe(layout: Layout, which: tuple[Use, ...], auxiliary: bool = True) -> str:
    """The roles as a picture in text, slots across and uses down."""
    marks = np.where(
        roles(layout, which) == GIVEN,
        "given",
        np.where(trained(layout, which, auxiliary), "loss", "hidden"),
    )
    width = [max(len(n), 6) for n in layout.names]
    margin = max(len(u.name) for u in which)

    def line(first: str, cells) -> str:
        padded = (c.center(w) for c, w in zip(cells, width, strict=True))
        return f"{first:>{margin}}  {' '.join(padded)}".rstrip()

    return "\n".join(
        [line("", layout.names), *(line(u.name, m) for u, m in zip(which, marks, strict=True))]
    )


def assign(
    key: Array, counts: tuple[int, ...], rollout: Bool[Array, " b"]
) -> tuple[Int[Array, " b"], Int[Array, "r p"]]:
    """Which use each example of a batch trains, with the same counts in every row of it.

    Args:
      key: decides among equals.
      counts: columns of each use in a row, the policy first: rows as in `segments`.
      rollout: examples that are not to be imitated: demonstrations train the policy first, and what
        is left of them, and rollouts, the other uses.

    Returns:
      (index of the use of every example; for each row of the batch its columns, ordered by use).

    Raises:
      ValueError: the batch does not divide into rows.
    """
    size, period = rollout.shape[0], sum(counts)
    if size % period:
        raise ValueError(
            f"a batch of {size} cannot be shared exactly as {counts}; make data.batch_size a "
            f"multiple of {period}"
        )
    # Within rows, so that a shard keeps its examples; at random among demonstrations, rollouts.
    draw = jax.random.uniform(key, (size // period, period))
    order = jnp.argsort(rollout.reshape(-1, period) + draw, axis=1)
    by_rank = jnp.asarray(np.repeat(np.arange(len(counts)), counts))
    return jnp.take(by_rank, jnp.argsort(order, axis=1)).reshape(size), order


def ordered(use: Int[Array, " b"], period: int) -> Int[Array, "r p"]:
    """The columns of each row of a batch, ordered by the use that they train.

    Args:
      period: examples of a row.
    """
    return jnp.argsort(use.reshape(-1, period), axis=1)


def toss(key: Array, counts: tuple[int, ...], rollout: Bool[Array, " b"]) -> Int[Array, " b"]:
    """The same as published: by a coin for each example, so that shares hold in expectation only.

    Demonstrations train the policy and rollouts the rest, in shares by chance; if there are no
    rollouts, demonstrations train everything.
    """
    every, other = jax.random.split(key)
    weights = jnp.log(jnp.asarray(counts, jnp.float32))
    alike = jax.random.categorical(every, weights, shape=rollout.shape)
    rest = 1 + jax.random.categorical(other, weights[1:], shape=rollout.shape)
    return jnp.where(jnp.any(rollout), jnp.where(rollout, rest, 0), alike)
