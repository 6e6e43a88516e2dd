import json
from collections import Counter

import grain.checkpoint
import numpy as np
import orbax.checkpoint as ocp
import pytest
from data import synthetic

from wamjax.data import pipeline
from wamjax.data.mixture import Schedule
from wamjax.data.spec import DataSpec

STEPS = sum(synthetic.LENGTHS)  # windows of the synthetic set: 32


@pytest.fixture
def root(tmp_path):
    synthetic.write(tmp_path / "demos", shard_bytes=20000)
    synthetic.write(tmp_path / "videos", (6, 2, 9), first=50, action_free=True)
    return tmp_path


def one(root, **changes):
    return synthetic.config(root, demos={"path": "demos"}, **changes)


def mixed(root, **changes):
    return synthetic.config(
        root,
        demos={"path": "demos"},
        videos={"path": "videos", "action_free": True, "weight": 3.0},
        **changes,
    )


def iterate(config, rows=None):
    return pipeline.train_iterator(config, *pipeline.open_sources(config.data), rows)


def starts(batch, lengths=synthetic.LENGTHS):
    """Returns (episode, step) of each example, read from its picture."""
    return [tuple(v[0, 0, 0, :2].tolist()) for v in batch["video"]]


def equal(a, b):
    assert a.keys() == b.keys()
    return all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


def test_the_batch_is_what_objectives_expect(root):
    config = one(root, batch_size=8)
    spec, statistics, sources = pipeline.open_sources(config.data)
    batch = next(pipeline.train_iterator(config, spec, statistics, sources))
    got = {k: (v.dtype.name, v.shape) for k, v in batch.items()}
    assert got == {
        "video": ("uint8", (8, 3, 8, 16, 3)),
        "proprio": ("float32", (8, 3)),
        "actions": ("float32", (8, 4, 2)),
        "instruction": ("int32", (8, 12)),
        "frame_valid": ("bool", (8, 3)),
        "action_valid": ("bool", (8, 4)),
        "episode": ("int32", (8,)),
    }
    assert DataSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert list(DataSpec.from_json(spec.to_json()).cameras) == list(spec.cameras)
    assert pipeline.spec_of(config) == spec
    assert spec.composite == (8, 16) and spec.action_dim == 2
    assert np.abs(batch["actions"]).max() <= 1 and np.abs(batch["proprio"]).max() <= 1
    # After the end: 0 in robot units, which is the minimum of both actions.
    assert (batch["actions"][~batch["action_valid"]] == -1).all()


@pytest.mark.parametrize("batch_size", [4, 5])
def test_an_epoch_is_a_permutation_of_all_windows_and_epochs_differ(root, batch_size):
    """Also if the batch size does not divide the epoch: nothing is dropped at its end."""
    iterator = iterate(one(root, batch_size=batch_size))
    seen = [s for _ in range(-(-3 * STEPS // batch_size)) for s in starts(next(iterator))]
    everything = Counter((e, t) for e, n in enumerate(synthetic.LENGTHS) for t in range(n))
    epochs = [seen[i * STEPS : (i + 1) * STEPS] for i in range(3)]
    assert all(Counter(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


def test_the_seed_decides_the_order_and_neighbouring_seeds_share_no_epoch(root):
    def order(seed, batches):
        config = one(root)
        config.seed = seed
        iterator = iterate(config)
        return [s for _ in range(batches) for s in starts(next(iterator))]

    assert order(0, 8) == order(0, 8)
    both = order(0, 16), order(1, 16)
    epochs = {tuple(o[i * STEPS : (i + 1) * STEPS]) for o in both for i in range(2)}
    assert len(epochs) == 4


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_make_disjoint_parts_of_the_same_batches(root, processes):
    config = mixed(root, batch_size=8)
    whole = iterate(config)
    rows = np.split(np.arange(8), processes)
    parts = [iterate(config, some) for some in rows]
    for _ in range(12):
        pieces = [next(p) for p in parts]
        joined = {k: np.concatenate([p[k] for p in pieces]) for k in pieces[0]}
        assert equal(joined, next(whole))
    config = one(root, batch_size=8)
    parts = [iterate(config, some) for some in rows]
    seen = [[s for _ in range(STEPS // 8) for s in starts(next(p))] for p in parts]
    assert len(set(sum(seen, []))) == sum(map(len, seen)) == STEPS


def test_mixtures_have_exact_counts_in_every_batch_and_shard(root):
    iterator = iterate(mixed(root, batch_size=8))
    videos = Counter()
    for _ in range(17 * 3):
        batch = next(iterator)
        free = batch["episode"] >= len(synthetic.LENGTHS)
        assert free.sum() == 6
        assert (free.reshape(2, 4).sum(1) == 3).all()  # two devices
        assert not batch["action_valid"][free].any() and not batch["actions"][free].any()
        assert batch["action_valid"][~free, 0].all()
        videos.update(s for s, f in zip(starts(batch), free, strict=True) if f)
    # 51 batches x 6 are 18 epochs of the 17 windows.
    assert len(videos) == 17 and set(videos.values()) == {18}


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("cut", [3, 7, 8, 11])  # an epoch is 8 batches
def test_resuming_is_bitwise_the_uninterrupted_run(root, prefetch, cut):
    config = mixed(root, batch_size=8) if cut % 2 else one(root)
    whole = iterate(config)
    wanted = [next(whole) for _ in range(20)]
    config.data.prefetch = prefetch  # may change between the runs
    first = iterate(config)
    for _ in range(cut):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = iterate(config)
    next(second)  # not at the start
    second.set_state(state)
    assert all(equal(next(second), wanted[i]) for i in range(cut, 20))


def test_grain_checkpoints_save_and_restore_the_iterator(root, tmp_path):
    config = mixed(root, batch_size=8)
    iterator = iterate(config)
    for _ in range(5):
        next(iterator)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        wanted = next(iterator)
        other = iterate(config)
        manager.restore(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(other)))
    assert equal(next(other), wanted)


def test_a_source_of_a_single_window_repeats(root):
    synthetic.write(root / "single", (1,), first=9)
    config = synthetic.config(root, a={"path": "single"}, batch_size=3)
    iterator = iterate(config)
    assert all(starts(next(iterator)) == [(9, 0)] * 3 for _ in range(4))


def test_a_schedule_prints_the_same_in_every_process():
    assert repr(Schedule((2, 2))) == repr(Schedule((2, 2))) and "0x" not in repr(Schedule((2, 2)))


def test_describe_says_type_shape_and_range(root):
    lines = pipeline.describe(next(iterate(one(root))))
    assert lines["video"].startswith("uint8[4, 3, 8, 16, 3] from 0 to")
    assert "true" in lines["action_valid"]
    assert "NON-FINITE 50.00%" in pipeline.describe({"x": np.array([1.0, np.nan])})["x"]
