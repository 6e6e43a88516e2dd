"""Tests arrays of examples as training data: order, processes, resuming, makers."""

import dataclasses
import json
import signal
import sys
import types
from collections import Counter

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import toy

from wamjax import train
from wamjax.config import base_config
from wamjax.data import arrays, makers, pipeline, tensors
from wamjax.data.arrays import Arrays, ArraySpec
from wamjax.envs.tabletop import clips
from wamjax.training import metrics
from wamjax.wam.protocols import Objective

N = 37


@pytest.fixture
def root(tmp_path):
    """Returns a data root with latents that identify their example."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 4, 4, 2)).astype(np.float32)
    x[:, 0, 0, 0] = np.arange(N)
    stored = {"latents": x, "label": np.arange(N) % 5, "extra": np.arange(N, dtype=np.uint8)}
    tensors.write(tmp_path / "train.safetensors", stored, {})
    np.savez(tmp_path / "train.npz", **stored)
    (tmp_path / "train").mkdir()
    for key, value in stored.items():
        np.save(tmp_path / "train" / f"{key}.npy", value)
    return tmp_path


def config(root, which="latents:path=train.safetensors", batch_size=4, **changes):
    out = base_config()
    out.data.root, out.data.kind, out.data.arrays = str(root), "arrays", which
    out.data.batch_size = batch_size
    out.update_from_flattened_dict(changes)
    return out


def iterate(*args, **kwargs):
    return pipeline.open_data(*args, **kwargs)[2]


def numbers(batch):
    """Returns the examples of a batch."""
    return batch["extra"].astype(int).tolist()


def equal(a, b):
    assert a.keys() == b.keys()
    return all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


# ---- order, processes, resuming ----


@pytest.mark.parametrize("batch_size", [4, 37, 50])
def test_an_epoch_is_a_permutation_of_all_examples_and_epochs_differ(root, batch_size):
    iterator = iterate(config(root, batch_size=batch_size))
    seen = [i for _ in range(-(-3 * N // batch_size)) for i in numbers(next(iterator))]
    epochs = [seen[i * N : (i + 1) * N] for i in range(3)]
    assert all(Counter(epoch) == Counter(range(N)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


def test_keys_of_an_example_stay_together(root):
    for _, batch in zip(range(12), iterate(config(root)), strict=False):
        assert batch["latents"][:, 0, 0, 0, 0].tolist() == numbers(batch)
        assert batch["label"].tolist() == [i % 5 for i in numbers(batch)]


def test_the_seed_decides_the_order_and_neighbouring_seeds_share_no_epoch(root):
    def epochs(seed):
        iterator = iterate(config(root, batch_size=N, seed=seed))
        return [tuple(numbers(next(iterator))) for _ in range(3)]

    assert epochs(0) == epochs(0)
    assert len({*epochs(0), *epochs(1)}) == 6


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_make_disjoint_parts_of_the_same_batches(root, processes):
    whole = iterate(config(root, batch_size=8))
    rows = np.split(np.arange(8), processes)
    parts = [iterate(config(root, batch_size=8), some) for some in rows]
    for _ in range(12):
        pieces = [next(part) for part in parts]
        assert {len(p["label"]) for p in pieces} == {8 // processes}
        joined = {k: np.concatenate([p[k] for p in pieces]) for k in pieces[0]}
        assert equal(joined, next(whole))
    with pytest.raises(ValueError, match="must lie in 0 to 7"):
        iterate(config(root, batch_size=8), [7, 8])


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("cut", [3, 9, 10])  # an epoch is 9.25 batches
def test_resuming_is_bitwise_the_uninterrupted_run(root, prefetch, cut):
    whole = iterate(config(root))
    wanted = [next(whole) for _ in range(24)]
    first = iterate(config(root, **{"data.prefetch": prefetch}))
    for _ in range(cut):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = iterate(config(root))
    next(second)  # not at the start
    second.set_state(state)
    assert all(equal(next(second), wanted[i]) for i in range(cut, 24))


# ---- tables ----


def test_the_spec_describes_what_is_served():
    stored = {
        "latents": np.ones((3, 2, 2), np.float16), "context": np.ones((3, 4, 5), np.float64),
        "video": np.ones((3, 1, 2, 2, 3), np.uint8), "label": np.array([0, 2, 1]),
        "level": np.ones(3), "rounded": np.ones((3, 2), ml_dtypes.bfloat16),
    }  # fmt: skip
    table = Arrays(stored, {"label": 3})
    want = {"latents": "bfloat16", "context": "bfloat16", "video": "uint8", "label": "int32",
            "level": "float32", "rounded": "bfloat16"}  # fmt: skip
    assert table.spec == ArraySpec(
        {k: v.shape[1:] for k, v in stored.items()}, want, {"label": 3}, 3
    )
    batch = table.take(np.array([2, 0]))
    assert {k: v.dtype.name for k, v in batch.items()} == want
    assert {k: v.shape[1:] for k, v in batch.items()} == table.spec.shapes
    assert batch["label"].tolist() == [1, 0]
    copy = ArraySpec.from_json(json.loads(json.dumps(table.spec.to_json())))
    assert copy == table.spec


@pytest.mark.parametrize(
    ("stored", "sizes", "message"),
    [
        ({}, {}, "not empty"),
        ({"a": np.ones((0, 2))}, {}, "equally long, and not empty"),
        ({"a": np.ones(3), "b": np.ones(4)}, {}, r"\{'a': 3, 'b': 4\}"),
        ({"label": np.array([0, 3])}, {"label": 3}, "'label' has values from 0 to 3"),
        ({"label": np.array([-1, 2])}, {"label": 3}, "'label' has values from -1"),
        ({"id": np.array([2**40])}, {}, "'id' holds numbers that do not fit int32"),
    ],
)
def test_arrays_that_do_not_fit_are_named(stored, sizes, message):
    with pytest.raises(ValueError, match=message):
        Arrays(stored, sizes)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("", "there is no ''; there are .*'digits'"),
        ("digts", "there is no 'digts', did you mean 'digits'"),
        ("digits:sise=8", "'digits:sise=8': .*'sise' does not exist, did you mean 'size'"),
        ("digits:size=big", "size='big' is not a int"),
        ("digits:size=6", "size = 6 must be even and at least 8"),
        ("latents", "latents:path=FILE"),
    ],
)
def test_a_wrong_name_or_option_is_an_error_with_a_suggestion(root, which, message):
    if which.endswith("=6"):
        pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match=message):
        iterate(config(root, which))


def test_unknown_kinds_and_splits_are_errors(root):
    with pytest.raises(ValueError, match="config.data.kind = 'array' is not one of"):
        iterate(config(root, **{"data.kind": "array"}))
    with pytest.raises(ValueError, match="split 'val' is not"):
        arrays.open_table(config(root).data, "val")


# ---- latents from files ----


@pytest.mark.parametrize("file", ["train.safetensors", "train.npz", "train", "{split}.npz"])
def test_the_same_latents_from_every_kind_of_file(root, file):
    made = config(root, f"latents:path={file}")
    spec, statistics, iterator = pipeline.open_data(made)
    assert spec.shapes == {"latents": (1, 4, 4, 2), "label": (), "extra": ()} and not statistics
    assert spec.dtypes == {"latents": "bfloat16", "label": "int32", "extra": "uint8"}
    assert spec.sizes == {"label": 5} and spec.count == N and pipeline.spec_of(made) == spec
    # The same examples; the order depends on the name.
    table, reference = arrays.open_table(made.data), arrays.open_table(config(root).data)
    assert equal(table.take(np.arange(N)), reference.take(np.arange(N)))
    assert next(iterator)["latents"].shape == (4, 1, 4, 4, 2)


def test_big_files_are_mapped_and_not_read(root):
    for file in ("train.safetensors", "train"):
        assert isinstance(makers.load(root / file)["latents"], np.memmap)


def test_files_that_hold_no_latents_are_named(root):
    for file, message in {
        "none.npz": "none.npz does not exist: correct config.data.arrays",
        "label.npz": r"label.npz holds no 'latents'.*'label': \(3,\)",
        "flat.npz": r"flat.npz holds no 'latents'.*\(3, 4\)",
        "objects.npz": "objects.npz cannot be read: Object arrays cannot be loaded",
        "text.txt": "text.txt must be a .safetensors file, a .npz file or a folder",
        "cut.npz": "cut.npz cannot be read",
    }.items():
        np.savez(root / "label.npz", label=np.arange(3))
        np.savez(root / "flat.npz", latents=np.ones((3, 4)))
        np.savez(root / "objects.npz", latents=np.array([{}], object))
        (root / "text.txt").write_text("latents")
        (root / "cut.npz").write_text("not a zip")
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            iterate(config(root, f"latents:path={file}"))
    with pytest.raises(ValueError, match="no test split of .*; put '{split}' into the path"):
        arrays.open_table(config(root).data, "test")


# ---- digits, scenes, clips, TFDS ----


def test_digits_are_those_of_scikit_learn_each_once(tmp_path):
    datasets = pytest.importorskip("sklearn.datasets")
    tables = [arrays.open_table(config(tmp_path, "digits").data, s) for s in ("train", "test")]
    assert [t.spec.count for t in tables] == [1500, 297]
    assert tables[0].spec.shapes == {"video": (1, 16, 16, 1), "label": ()}
    assert tables[0].spec.dtypes == {"video": "uint8", "label": "int32"}
    rows = [t.take(np.arange(t.spec.count)) for t in tables]
    assert all(Counter(r["label"].tolist()).keys() == set(range(10)) for r in rows)
    inner = np.concatenate([r["video"][:, 0, 4:12, 4:12, 0] for r in rows])
    labels = np.concatenate([r["label"] for r in rows])
    found = datasets.load_digits()
    key = lambda x, y: Counter((a.tobytes(), int(b)) for a, b in zip(x, y, strict=True))  # noqa: E731
    back = np.round(inner / 255 * 16).astype(np.uint8)
    assert key(back, labels) == key(found.images.astype(np.uint8), found.target)
    assert not rows[0]["video"][:, :, :4].any() and not rows[0]["video"][:, :, :, 12:].any()
    small = arrays.open_table(config(tmp_path, "digits:size=8").data)
    assert np.array_equal(small.take(np.arange(1500))["video"][:, 0, ..., 0], inner[:1500])


def test_scenes_have_captions_and_their_splits_differ(tmp_path):
    made = config(tmp_path, "scenes:count=12,size=24,length=14")
    table, test = (arrays.open_table(made.data, split) for split in ("train", "test"))
    assert table.spec.shapes == {"video": (1, 24, 24, 3), "instruction": (14,)}
    batch, other = table.take(np.arange(12)), test.take(np.arange(12))
    assert batch["instruction"].max() < table.spec.sizes["instruction"]
    assert batch["instruction"].any() and not equal(batch, other)
    assert equal(batch, arrays.open_table(made.data).take(np.arange(12)))


def test_clips_are_those_of_the_tabletop(tmp_path, monkeypatch):
    asked = []

    def ensure_clips(settings, root):
        asked.append((settings, root))
        shape = (settings.count, settings.frames, settings.size, settings.size, 3)
        return {"video": np.zeros(shape, np.uint8), "task": np.arange(settings.count) % 8}

    monkeypatch.setattr(clips, "ensure_clips", ensure_clips)
    made = config(tmp_path, "clips:count=16,frames=5,size=16,seed=3")
    table, _ = (arrays.open_table(made.data, split) for split in ("train", "test"))
    assert table.spec.shapes == {"video": (5, 16, 16, 3), "label": ()}
    assert table.spec.sizes == {"label": 8}
    (first, root), (second, _) = asked
    assert first.seed == 3 != second.seed and first._replace(seed=0) == second._replace(seed=0)
    assert (first.count, first.frames, first.size, root) == (16, 5, 16, str(tmp_path))


def fake_tfds(monkeypatch, splits=("train", "validation"), features=("image", "label")):
    """Fakes the used part of tensorflow_datasets."""
    rng = np.random.default_rng(0)
    rows = [{"image": rng.integers(0, 256, (20 + i, 30, 3 - 2 * (i % 2)), np.uint8), "label": i % 3}
            for i in range(6)]  # fmt: skip
    label = types.SimpleNamespace(num_classes=3)
    info = types.SimpleNamespace(splits=list(splits), features=dict.fromkeys(features, label))
    asked = []

    def as_data_source(split):
        asked.append(split)
        return rows

    builder = types.SimpleNamespace(info=info, as_data_source=as_data_source)
    library = types.SimpleNamespace(builder=lambda name, **options: builder)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", library)
    return rows, asked


def test_tfds_pictures_are_cut_square_like_those_of_dit(tmp_path, monkeypatch):
    rows, asked = fake_tfds(monkeypatch)
    made = config(tmp_path, "tfds:name=toy,size=8", batch_size=6)
    table = arrays.open_table(made.data)
    arrays.open_table(made.data, "test")
    assert asked == ["train", "validation"]
    assert table.spec.shapes == {"video": (1, 8, 8, 3), "label": ()} and table.spec.count == 6
    batch = next(iterate(made))
    assert batch["video"].dtype == np.uint8 and batch["video"].shape == (6, 1, 8, 8, 3)
    assert sorted(batch["label"].tolist()) == [0, 0, 1, 1, 2, 2]
    grey = table.take(np.array([1]))["video"]
    assert (grey[..., 0] == grey[..., 1]).all()
    # A picture of the right size is unchanged; a wider one is cropped to its middle.
    same = rows[0]["image"][:8, :8]
    assert np.array_equal(makers.square(same, 8), same)
    wide = rows[0]["image"][:8, :12]
    assert np.array_equal(makers.square(wide, 8), wide[:, 2:10])
    # Twice as large: means over squares.
    twice = rows[0]["image"][:16, :16].reshape(8, 2, 8, 2, 3).mean((1, 3))
    assert (
        np.abs(makers.square(rows[0]["image"][:16, :16], 8) - twice).max() <= 1
    )  # rounded once in each direction


def test_tfds_without_labels_or_library_says_so(tmp_path, monkeypatch):
    fake_tfds(monkeypatch, features=("image",))
    with pytest.raises(ValueError, match=r"TFDS 'toy' has .*features \['image'\]; it needs"):
        iterate(config(tmp_path, "tfds:name=toy"))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"need tensorflow-datasets: .*wamjax\[data\]"):
        iterate(config(tmp_path, "tfds:name=toy"))


# ---- in the training loop ----


class Classify(Objective):
    """Implements logistic regression of the label from pixels: an objective without actions."""

    kind = "toy"

    def init(self, rng):
        return {"action": {"head": {"kernel": 0.01 * jax.random.normal(rng, (64, 10)),
                                    "bias": jnp.zeros(10)}}}  # fmt: skip

    def batch_spec(self, b):
        return {"video": jax.ShapeDtypeStruct((b, 1, 8, 8, 1), jnp.uint8),
                "label": jax.ShapeDtypeStruct((b,), jnp.int32)}  # fmt: skip

    def loss(self, params, batch, rng, average=None):
        x = batch["video"].reshape(-1, 64).astype(jnp.float32) / 127.5 - 1
        logits = jax.nn.log_softmax(toy.linear(params["action"]["head"], x))
        loss = -jnp.mean(jnp.take_along_axis(logits, batch["label"][:, None], axis=1))
        return loss, {}


def test_the_loop_trains_on_arrays_and_an_interruption_changes_nothing(tmp_path):
    pytest.importorskip("sklearn")
    made = config(
        tmp_path, "digits:size=8", 64, total_steps=60, log_every=20,
        **{"checkpoint.every": 20, "optim.learning_rate": 0.05},
    )  # fmt: skip

    def run(workdir, make_data=train.build_data):
        devices = jax.devices()[:2]
        return train.run(made, tmp_path / workdir, make_data, lambda *_: Classify(), devices)

    def losses(workdir):
        return [row["loss"] for row in metrics.read(tmp_path / workdir)]

    def interrupted(config, rows):
        data = train.build_data(config, rows)
        trap = toy.Trap(data.iterator, 33, lambda: signal.raise_signal(signal.SIGTERM))
        return dataclasses.replace(data, iterator=trap)

    assert run("whole")
    whole = losses("whole")
    assert whole[0] > 2 and np.mean(whole[-5:]) < 0.5
    assert run("parts", interrupted) is False
    assert run("parts") and losses("parts") == whole
    (tmp_path / "parts" / "DONE").unlink()
    made.data.arrays = "digits:size=10"
    with pytest.raises(ValueError, match="config.data.arrays was 'digits:size=8'"):
        run("parts")
