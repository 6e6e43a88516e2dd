"""Tests which slots are given, which see which, and which examples train which use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax.models.visibility import cacheable
from wamjax.wam import uses as framework
from wamjax.wam.cosmos_policy.layouts import LAYOUTS, name_of, parse
from wamjax.wam.cosmos_policy.uses import POLICY, VALUES, WORLD_MODEL, table, toss, uses
from wamjax.wam.shares import order, use_of
from wamjax.wam.slots import Role

ALL = (*uses(), *(uses(value)[2] for value in VALUES if value != "value"))
FACTORIZATIONS = (POLICY, WORLD_MODEL, *VALUES.values())
# Section 5.1, by index of slot for LIBERO (nine slots) and RoboCasa (eleven): given, with a loss.
TABLE = {
    "libero": {
        "policy": ([0, 1, 2, 3], [4, 5, 6, 7, 8]),
        "world_model": ([0, 1, 2, 3, 4], [5, 6, 7, 8]),
        "value": ([0, 1, 2, 3, 4, 5, 6, 7], [8]),
        "value_v": ([0, 5, 6, 7], [8]),
        "value_q": ([0, 1, 2, 3, 4], [8]),
    },
    "robocasa": {
        "policy": ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10]),
        "world_model": ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10]),
        "value": ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [10]),
        "value_v": ([0, 6, 7, 8, 9], [10]),
        "value_q": ([0, 1, 2, 3, 4, 5], [10]),
    },
}
PURE = {"policy": ("action",), "world_model": ("future",), "value": ("value",)}


@pytest.mark.parametrize("name", TABLE)
def test_masks_are_the_published_ones(name):
    layout = parse(LAYOUTS[name])
    role, loss = (
        np.concatenate(list(f(ALL, layout.sizes).values()), axis=1)
        for f in (framework.roles, framework.has_loss)
    )
    for i, use in enumerate(ALL):
        given, predicted = TABLE[name][use.name]
        np.testing.assert_array_equal(np.flatnonzero(role[i] == Role.GIVEN), given)
        np.testing.assert_array_equal(np.flatnonzero(loss[i]), predicted)
        assert not np.any(loss[i] & (role[i] == Role.GIVEN))
    assert {u.name: u.trained for u in uses(auxiliary=False)} == PURE


def test_the_picture_in_text_says_the_roles():
    slots = [(name_of(s), s.group) for s in parse(LAYOUTS["tabletop"]).slots]
    text = framework.describe([uses()[0], uses("value_v")[2]], slots)
    head, policy, value = (line.split() for line in text.splitlines())
    assert head[0] == "blank" and head[-1] == "value" and len(head) == 9
    assert policy == ["policy", *["given"] * 4, *["loss"] * 5]
    assert value == ["value_v", "given", *["hidden"] * 4, *["given"] * 3, "loss"]


@pytest.mark.parametrize("roles", FACTORIZATIONS, ids=lambda f: f.name)
def test_tables_bidirectional_sees_all_and_prefix_can_be_cached(roles):
    whole, prefix = (table(kind, roles) for kind in ("bidirectional", "prefix"))
    use = framework.use(roles, whole)
    assert whole.matrix().all() and not cacheable(whole, use.given)
    for query in whole.groups:
        for key in whole.groups:
            want = key in use.given or query not in use.given
            assert prefix.sees(query, key) == want
    assert set(cacheable(prefix, use.given)) == set(use.given)
    assert {*use.given, *use.predicted} == set(prefix.groups)


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="objective.value 'value_s' is not one of"):
        uses("value_s")
    with pytest.raises(ValueError, match="'prefx' is not one of .*, did you mean 'prefix'"):
        table("prefx", POLICY)
    assert [uses(v)[2].name for v in VALUES] == list(VALUES)


@pytest.mark.parametrize("mix", [(2, 1, 1), (2, 9, 9), (1, 1, 1)])
def test_shares_are_exact_in_every_row(mix):
    period = sum(mix)
    rollout = jnp.zeros(6 * period, bool)
    seen = []
    for seed in range(20):
        places = order(jax.random.key(seed), mix, 6 * period, last=rollout)
        use = use_of(places, mix)
        rows = np.asarray(use).reshape(6, period)
        for row in rows:
            np.testing.assert_array_equal(np.bincount(row, minlength=3), mix)
        # The columns come ordered by use.
        np.testing.assert_array_equal(
            np.take_along_axis(rows, np.asarray(places), 1), [np.repeat(np.arange(3), mix)] * 6
        )
        seen.append(np.asarray(use))
    share = np.stack([np.bincount(column, minlength=3) for column in np.stack(seen, 1)])
    # Random: no position of a batch always has the same use.
    assert (share.max(axis=1) < 20).all()
    with pytest.raises(ValueError, match=f"make data.batch_size a multiple of {period}"):
        order(jax.random.key(0), mix, period + 1, last=jnp.zeros(period + 1, bool))


def test_demonstrations_train_the_policy_and_rollouts_the_rest():
    rollout = jnp.asarray(np.tile([False, True, True, False], 8))
    for seed in range(10):
        use = use_of(order(jax.random.key(seed), (2, 1, 1), 32, last=rollout), (2, 1, 1))
        np.testing.assert_array_equal(np.asarray(use) == 0, ~np.asarray(rollout))
        tossed = np.asarray(toss(jax.random.key(seed), (2, 1, 1), rollout))
        np.testing.assert_array_equal(tossed == 0, ~np.asarray(rollout))


def test_tossing_holds_the_shares_in_expectation_only():
    key = jax.random.key(0)
    alone = np.asarray(toss(key, (2, 1, 1), jnp.zeros(8000, bool)))
    np.testing.assert_allclose(np.bincount(alone) / 8000, [0.5, 0.25, 0.25], atol=0.02)
    mixed = np.asarray(toss(key, (2, 1, 3), jnp.arange(8000) % 2 == 0))
    np.testing.assert_allclose(np.bincount(mixed) / 8000, [0.5, 0.125, 0.375], atol=0.02)
    small = [np.bincount(np.asarray(toss(jax.random.key(i), (2, 1, 1), jnp.zeros(8, bool))),
                         minlength=3).tolist() for i in range(8)]  # fmt: skip
    assert len(set(map(tuple, small))) > 1
