"""Tests tables against hand-written truth tables, and derived properties against brute force."""

import itertools

import numpy as np
import pytest
from models.helpers import random_table

from wamjax.models.visibility import bidirectional, cacheable, causal, prefix, table
from wamjax.wam.fast_wam import uses as programs
from wamjax.wam.slots import Role

# Rows of the tables in section 3.2 of the Fast-WAM spec; one letter per column, in row order.
TRUTH = {
    "FAST": """
        first  x..
        future xx.
        action x.x""",
    "JOINT": """
        first  x..
        future xx.
        action xxx""",
    "IDM_PUBLISHED": """
        first      x....
        future     xx...
        cond_first ..x..
        cond       ..xx.
        action     ..xxx""",
    # N0 and C0 are one group here.
    "IDM": """
        first  x...
        future xx..
        cond   x.x.
        action x.xx""",
    "LADDER": """
        first        x....
        future       xx...
        cond         x.x..
        anticipation x..x.
        action       x.xxx""",
}


def parse(text):
    lines = [line.split() for line in text.strip().splitlines()]
    return [g for g, _ in lines], np.array([[c == "x" for c in row] for _, row in lines])


@pytest.mark.parametrize("name", TRUTH)
def test_named_tables(name):
    groups, truth = parse(TRUTH[name])
    visibility = getattr(programs, name)
    assert visibility.groups == tuple(groups)
    np.testing.assert_array_equal(visibility.matrix(), truth)
    for q, k in itertools.product(groups, groups):
        assert visibility.sees(q, k) == truth[groups.index(q), groups.index(k)]


def test_every_table_of_the_programs_is_among_the_checked_ones():
    checked = {getattr(programs, name).name for name in TRUTH}
    used = {p.visibility.name for ps in programs.USES.values() for p in ps}
    assert used <= checked


def test_idm_is_the_published_table_with_the_two_first_frames_merged():
    published, merge = programs.IDM_PUBLISHED, {"cond_first": "first"}
    for q in published.groups:
        seen = {merge.get(k, k) for k in published.keys(q)}
        assert seen == set(programs.IDM.keys(merge.get(q, q)))


def test_generic_tables():
    abc = ("a", "b", "c")
    np.testing.assert_array_equal(bidirectional(*abc).matrix(), np.ones((3, 3), bool))
    np.testing.assert_array_equal(causal(*abc).matrix(), np.tril(np.ones((3, 3), bool)))
    got = prefix(("a", "b"), ("c",))
    assert got.groups == abc
    np.testing.assert_array_equal(got.matrix(), [[1, 1, 0], [1, 1, 0], [1, 1, 1]])


def test_programs_of_the_variants():
    given, predicted = Role.GIVEN, Role.PREDICTED
    want = {
        "fast": [("fast_wam", {"first": given, "future": predicted, "action": predicted})],
        "joint": [("fast_wam_joint", {"first": given, "future": predicted, "action": predicted})],
        "no_cotrain": [("fast_wam", {"first": given, "action": predicted})],
        "idm": [("fast_wam_idm", {"first": given, "future": predicted, "cond": given,
                                  "action": predicted})],
    }  # fmt: skip
    want["optional_idm"] = want["idm"] + want["fast"]
    two = {"first": given, "anticipation": predicted, "action": predicted}
    want["ladder"] = [("fast_wam_ladder", roles)
                      for roles in (want["idm"][0][1], two, want["fast"][0][1])]  # fmt: skip
    for variant, expected in want.items():
        got = []
        for program in programs.uses_of(variant):
            assert set(program.table.groups) == set(program.present)
            roles = {g: r for g, r in program.factorization.roles if r != Role.ABSENT}
            got.append((program.visibility.name, roles))
        assert got == expected, variant
    with pytest.raises(ValueError, match="fats.*fast"):
        programs.uses_of("fats")


@pytest.mark.parametrize("seed", range(20))
def test_restrict_calls_and_mask_agree_with_the_matrix(seed):
    rng = np.random.default_rng(seed)
    full = random_table(rng, 5, density=rng.choice([0.3, 0.8]))
    present = [g for g in full.groups if rng.random() < 0.7] or ["g0"]
    small = full.restrict(reversed(present))
    index = [full.groups.index(g) for g in present]
    assert small.groups == tuple(present)
    np.testing.assert_array_equal(small.matrix(), full.matrix()[np.ix_(index, index)])

    queries = [g for g in present if rng.random() < 0.7]
    calls = small.calls(iter(queries))
    assert sorted(g for q, _ in calls for g in q) == sorted(queries)  # each exactly once
    key_sets = [keys for _, keys in calls]
    assert len(set(key_sets)) == len(key_sets)  # equal key sets share a call
    for call_queries, keys in calls:
        for q in call_queries:
            assert [small.sees(q, k) for k in small.groups] == [k in keys for k in small.groups]

    lengths = {g: int(rng.integers(1, 4)) for g in full.groups}
    mask = full.mask(lengths)
    owner = [g for g in full.groups for _ in range(lengths[g])]
    for i, j in itertools.product(range(len(owner)), repeat=2):
        assert mask[i, j] == full.sees(owner[i], owner[j])


def oracle(visibility, given, modulated_by):
    """Returns the largest subset of `given` that depends on nothing outside, by brute force."""
    for size in range(len(given), -1, -1):
        closed = [
            set(subset)
            for subset in itertools.combinations(given, size)
            if all(
                k in subset for g in subset for k in (*visibility.keys(g), *modulated_by.get(g, ()))
            )
        ]
        if closed:
            assert len(closed) == 1  # closed sets are closed under union
            return closed[0]


def test_cacheable_is_the_largest_closed_set():
    rng = np.random.default_rng(0)
    sizes = set()
    for _ in range(400):
        visibility = random_table(rng, 5, density=rng.choice([0.15, 0.3, 0.5]))
        given = [g for g in visibility.groups if rng.random() < 0.75]
        modulated = {
            g: [k for k in visibility.groups if rng.random() < 0.3]
            for g in visibility.groups
            if rng.random() < 0.3
        }
        got = cacheable(visibility, given, modulated)
        assert set(got) == oracle(visibility, given, modulated)
        assert list(got) == [g for g in visibility.groups if g in got]  # table order
        sizes.add(len(got))
    assert {0, 1, 2, 3} <= sizes  # the sample is not degenerate


def test_expected_caches():
    FAST, JOINT, IDM = programs.FAST, programs.JOINT, programs.IDM
    assert cacheable(FAST.restrict(["first", "action"]), ["first"]) == ("first",)
    assert cacheable(JOINT, ["first"]) == ("first",)
    # imagine: the first frame for the future; then all frames for the actions
    assert cacheable(IDM.restrict(["first", "future"]), ["first"]) == ("first",)
    acting = IDM.restrict(["first", "cond", "action"])
    assert cacheable(acting, ["first", "cond"]) == ("first", "cond")
    # inverse dynamics of Fast-WAM's table: a given future caches, although actions do not see it
    assert cacheable(FAST, ["first", "future"]) == ("first", "future")
    # given actions in the joint table see the future, which is being denoised
    assert cacheable(JOINT, ["first", "action"]) == ("first",)
    assert cacheable(bidirectional("a", "b", "c"), ["a", "b"]) == ()
    assert cacheable(bidirectional("a", "b"), ["a", "b"]) == ("a", "b")
    assert cacheable(prefix(("a", "b"), ("c",)), ["a", "b"]) == ("a", "b")
    assert cacheable(causal("a", "b", "c"), ["a", "c"]) == ("a",)
    # one global timestep: nothing is cacheable
    every = {g: FAST.groups for g in FAST.groups}
    assert cacheable(FAST, ["first"], every) == ()


def test_errors_name_the_group_and_the_table():
    with pytest.raises(KeyError, match="'demo'.*'a' sees 'c'"):
        table("demo", {"a": "a c", "b": "b"})
    visibility = table("demo", {"a": "a", "b": "a b"})
    for call in (
        lambda: visibility.keys("c"),
        lambda: visibility.sees("a", "c"),
        lambda: visibility.restrict(["a", "c"]),
    ):
        with pytest.raises(KeyError, match="'demo' has no group 'c'"):
            call()


def test_tables_hash_and_print():
    assert table("t", {"a": "a", "b": "a b"}) == table("t", {"a": "a", "b": "b a"})
    assert len({programs.FAST, programs.FAST.restrict(programs.FAST.groups)}) == 1
    rows = str(programs.FAST).splitlines()[2:]
    assert [[c for c in row if c in "x."] for row in (r.split(None, 1)[1] for r in rows)] == [
        list("x.."), list("xx."), list("x.x")
    ]  # fmt: skip
