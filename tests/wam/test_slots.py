"""Tests slots, roles, uses and shares: the data that determines what a model is used for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax.models.shell import GroupSpec
from wamjax.wam import uses
from wamjax.wam.shares import columns, order, split, use_of
from wamjax.wam.slots import Role, Slot, factorization, groups_of, levels, masked_mean
from wamjax.wam.uses import Use, use

GIVEN, PREDICTED, ABSENT = Role.GIVEN, Role.PREDICTED, Role.ABSENT


def test_role_arrays():
    f = factorization("f", first=GIVEN, future=ABSENT, action=PREDICTED)
    assert f.groups(PREDICTED) == ("action",) and f.present == ("first", "action")
    array = f.array({"first": 1, "future": 2, "action": 3})
    np.testing.assert_array_equal(array, [0, 2, 2, 1, 1, 1])
    np.testing.assert_array_equal(f.array({"action": 2, "first": 1}), [0, 1, 1])  # in role order
    with pytest.raises(KeyError, match="'f' gives no role to \\['value'\\]"):
        f.array({"first": 1, "value": 1})


def test_slots_of_a_group_and_an_expert_stand_together():
    early, late = (Slot("frame", "future", position=i) for i in (1, 2))
    slots = [Slot("frame", "first"), early, Slot("action", "action", "action", 0), late]
    assert groups_of(slots) == (
        GroupSpec("first", "video", (0,)),
        GroupSpec("future", "video", (1, 2)),
        GroupSpec("action", "action", (0,)),
    )


def test_a_use_restricts_its_table_and_says_what_has_a_loss():
    from wamjax.wam.fast_wam.uses import JOINT

    act = use(factorization("act", first=GIVEN, future=ABSENT, action=PREDICTED), JOINT)
    assert act.table.groups == ("first", "action") and act.trained == ("action",)
    assert act.table.keys("action") == ("first", "action")
    both = factorization("both", first=GIVEN, future=PREDICTED, action=PREDICTED)
    hidden = Use(both, JOINT, ("action",))
    sizes = {"first": 1, "future": 2, "action": 1}
    np.testing.assert_array_equal(uses.roles([act, hidden], sizes)["future"], [[2, 2], [1, 1]])
    trained = uses.has_loss([act, hidden], sizes)
    assert not trained["future"].any() and trained["action"].all()
    head, one, two = uses.describe([act, hidden], [(g, g) for g in sizes]).splitlines()
    assert head.split() == list(sizes) and one.split() == ["act", "given", "loss"]
    assert two.split() == ["both", "given", "hidden", "loss"]


def test_levels_and_masks_follow_roles_slot_by_slot():
    """Real-time chunking: the first steps of a chunk are committed, hence given."""
    roles = jnp.array([[GIVEN, GIVEN, PREDICTED, PREDICTED], [PREDICTED, ABSENT, GIVEN, PREDICTED]])
    got = levels(roles, jnp.array([[0.7], [0.2]]))
    np.testing.assert_allclose(got, [[0, 0, 0.7, 0.7], [0.2, 0, 0, 0.2]])
    per_slot = levels(roles, jnp.arange(8.0).reshape(2, 4))
    np.testing.assert_allclose(per_slot, [[0, 0, 2, 3], [4, 0, 0, 7]])
    valid = jnp.array([[True, True, True, False], [True, True, True, True]])
    mask = (roles == PREDICTED) & valid
    np.testing.assert_array_equal(mask, [[0, 0, 1, 0], [1, 0, 0, 1]])
    error = jnp.array([[9.0, 9, 2, 9], [1, 9, 9, 5]])
    np.testing.assert_allclose(masked_mean(error, mask), [2, 3])
    np.testing.assert_allclose(masked_mean(error, jnp.zeros_like(mask)), [0, 0])


@pytest.mark.parametrize("shares, counts", [
    ((1.0,), (1,)), ((0.5, 0.5), (1, 1)), ((0.25, 0.75), (1, 3)), ((1 / 3, 2 / 3), (1, 2)),
    ((0.5, 0.25, 0.25), (2, 1, 1)), ((0.2, 0.3, 0.5), (2, 3, 5)),
])  # fmt: skip
def test_columns(shares, counts):
    assert columns(shares) == counts


@pytest.mark.parametrize("shares", [(0.5, 0.6), (0.0, 1.0), (-0.5, 1.5), (0.3,)])
def test_shares_that_are_not_shares(shares):
    with pytest.raises(ValueError, match="positive and sum to 1"):
        columns(shares)


@pytest.mark.parametrize("shares", [(0.031, 0.969), (0.45, 0.55)])
def test_shares_without_an_exact_layout(shares):
    """They are not rounded: the first would lose a use, the second would be 5 : 6."""
    with pytest.raises(ValueError, match="denominators of at most 16"):
        columns(shares)


@pytest.mark.parametrize("counts", [(1, 1), (1, 3), (2, 1, 1)])
def test_exact_counts_in_every_row_and_every_shard(counts):
    period, size = sum(counts), 8 * sum(counts)
    batch = {"id": jnp.arange(size), "x": jnp.arange(2.0 * size).reshape(size, 2)}
    seen = [set() for _ in counts]
    for seed in range(40):
        places = order(jax.random.key(seed), counts, size)
        parts = split(batch, places, counts)
        of_use = np.asarray(use_of(places, counts))
        ids = [np.asarray(p["id"]) for p in parts]
        assert sorted(np.concatenate(ids)) == list(range(size))  # a partition
        for i, (part, chosen, count) in enumerate(zip(parts, ids, counts, strict=True)):
            np.testing.assert_array_equal(np.flatnonzero(of_use == i), np.sort(chosen))
            np.testing.assert_array_equal(part["x"][:, 0], 2 * chosen)  # leaves stay together
            for shards in (1, 2, 4, 8):  # contiguous shards of whole rows
                shard = np.bincount(chosen // (size // shards), minlength=shards)
                np.testing.assert_array_equal(shard, size // shards * count // period)
        for columns_seen, chosen in zip(seen, ids, strict=True):
            columns_seen.update(chosen % period)
    assert all(s == set(range(period)) for s in seen)  # every column reaches every use


def test_one_use_takes_the_batch_as_it_is():
    batch = {"id": jnp.arange(5)}
    assert split(batch, order(jax.random.key(0), (1,), 5), (1,)) == [batch]


def test_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match="batch of 6 .*data.batch_size a multiple of 4"):
        order(jax.random.key(0), (1, 3), 6)
