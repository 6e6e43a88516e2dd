import itertools

import numpy as np
import pytest

from wamjax.data.mixture import Schedule, counts, layout


def test_counts_are_proportional_and_exact():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(1, 6))
        weights = {f"s{i}": float(w) for i, w in enumerate(rng.uniform(0.5, 3, n))}
        size = int(rng.integers(24, 200))
        got = counts(weights, size)
        exact = np.array(list(weights.values())) * size / sum(weights.values())
        assert sum(got) == size and (np.abs(got - exact) < 1).all()
    assert counts({"a": 1, "b": 3}, 16) == (4, 12)
    assert counts({"a": 0.1, "b": 0.2, "c": 0.7}, 10) == (1, 2, 7)
    assert counts({"a": 10, "b": 30}, 16) == counts({"a": 0.25, "b": 0.75}, 16)


@pytest.mark.parametrize("weight", [0.001, 1e-9])
def test_a_source_without_examples_is_an_error_that_names_the_fix(weight):
    with pytest.raises(ValueError, match="sources.rare with weight .* no example in a batch of 8"):
        counts({"rare": weight, "common": 1.0}, 8)
    with pytest.raises(ValueError, match="batch_size to 1001"):
        counts({"rare": 0.001, "common": 1.0}, 8)
    assert counts({"rare": 0.001, "common": 1.0}, 1001) == (1, 1000)
    with pytest.raises(ValueError, match="sources.a.weight = 0 must be positive"):
        counts({"a": 0, "b": 1}, 8)


def test_every_shard_holds_its_share_of_every_source_where_divisible():
    rng = np.random.default_rng(0)
    cases = [tuple(rng.integers(1, 40, rng.integers(1, 6))) for _ in range(120)]
    for n in [(4, 12), (1, 1), (8, 3, 5), (16,), (2, 2, 4, 8), (1, 63), *cases]:
        n = tuple(int(x) for x in n)
        order, size = layout(n), sum(n)
        assert tuple(np.bincount(order, minlength=len(n))) == n
        for shards in (d for d in range(1, size + 1) if size % d == 0):
            for shard in order.reshape(shards, -1):
                for source, count in enumerate(n):
                    share = np.sum(shard == source)
                    assert abs(share - count / shards) < 2
                    if count % shards == 0:
                        assert share == count // shards


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_every_batch_without_gap_or_overlap(processes):
    n, batches = (5, 2, 1), 6
    parts = [Schedule(n, rows) for rows in np.split(np.arange(8), processes)]
    whole = Schedule(n)
    together = [
        parts[p][k * parts[p].size + i]
        for k in range(batches)
        for p in range(processes)
        for i in range(parts[p].size)
    ]
    assert together == [whole[i] for i in range(batches * whole.size)]
    for source, count in enumerate(n):
        mine = [index for s, index in together if s == source]
        assert mine == list(range(batches * count))
    assert len(set(itertools.chain(together))) == len(together)


def test_rows_need_not_be_neighbours_and_must_be_of_the_batch():
    n = (5, 2, 1)
    whole, some = Schedule(n), Schedule(n, [1, 2, 7])
    assert [some[i] for i in range(6)] == [whole[i] for i in (1, 2, 7, 9, 10, 15)]
    for rows in ([8], [-1], []):
        with pytest.raises(ValueError, match=r"must lie in 0 to 7, .* \(config.data.batch_size\)"):
            Schedule(n, rows)
