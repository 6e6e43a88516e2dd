"""Tests that every flipped bit and missing chunk of a converted folder is detected."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from wamjax import tree, weights
from wamjax.training import init_from, integrity, sharding
from wamjax.training.integrity import Damaged
from wamjax.weights import files, store, tensor

rng = np.random.default_rng(0)
ARRAYS = {
    "blocks/kernel": rng.standard_normal((3, 16, 8)).astype("f4"),
    "half": rng.standard_normal((32, 6)).astype(ml_dtypes.bfloat16),
    "double": rng.standard_normal((5, 4)),
    "scalar": np.float32(3.5),
    "ids": rng.integers(0, 99, 17),
}


def slices():
    out = {(p, None): tensor.of(np.asarray(x)) for p, x in ARRAYS.items() if p != "blocks/kernel"}
    layers = ARRAYS["blocks/kernel"]
    return {("blocks/kernel", i): tensor.of(x) for i, x in enumerate(layers)} | out


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "ours"
    store.write(folder, slices(), {"family": "dit", "sizes": {"scale": (1.0, 3.0)}})
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "ours")


def want(dtype=None):
    mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    out = {}
    for path, x in ARRAYS.items():
        spec = jax.sharding.PartitionSpec(*(("fsdp",) if path == "half" else ()))
        kind = dtype or jax.dtypes.canonicalize_dtype(x.dtype)
        place = jax.sharding.NamedSharding(mesh, spec)
        out[path] = jax.ShapeDtypeStruct(np.shape(x), kind, sharding=place)
    return out


def stream(stored):
    for path, shape in stored.shapes.items():
        for layer in range(shape[0]) if path.startswith("blocks/") else (None,):
            stored.slice((path, layer)).read()


WAYS = {
    "verify": lambda stored: stored.verify(),
    "load": lambda stored: stored.load(want()),
    "cast": lambda stored: stored.load(want("float32")),
    "stream": stream,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_reading_checks(folder, way):
    WAYS[way](store.read(folder / store.PARAMS))
    for path in ARRAYS:
        place = folder / store.PARAMS / path.replace("/", ".")
        chunk = max(p for p in place.iterdir() if not p.name.startswith("."))
        text = chunk.read_bytes()
        chunk.unlink()  # reads as zeros
        with pytest.raises(Damaged, match=f"ours/params is damaged: '{path}'"):
            WAYS[way](store.read(folder / store.PARAMS))
        chunk.write_bytes(text)
    WAYS[way](store.read(folder / store.PARAMS))


def test_what_is_loaded_is_what_was_written(folder):
    stored = store.read(folder / store.PARAMS)
    for kind in (None, "float32"):
        got, places = stored.load(want(kind)), want(kind)
        for path, x in ARRAYS.items():
            assert got[path].dtype == places[path].dtype
            assert got[path].sharding == places[path].sharding
            assert np.array_equal(got[path], np.asarray(x).astype(places[path].dtype))


@pytest.mark.parametrize("way", ["verify", "load"])
def test_every_flipped_bit_is_an_error_or_changes_nothing(folder, way):
    """Flips bits in the files of arrays, and in those that describe them."""
    draw = np.random.default_rng(1)
    names = [p for p in (folder / store.PARAMS).rglob("*") if p.is_file()
             and p.name not in ("_sharding", "_CHECKPOINT_METADATA")]  # fmt: skip
    names.append(folder / store.ABOUT)
    noticed = 0
    for name in names * 2:
        text = name.read_bytes()
        bit = int(draw.integers(8 * len(text)))
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        name.write_bytes(flipped)
        try:
            stored = store.read(folder / store.PARAMS)
            WAYS[way](stored)
            stream(stored)
        except (Damaged, FileNotFoundError) as error:
            assert len(str(error).splitlines()) == 1 and str(folder) in str(error)
            noticed += 1
        except ValueError as error:  # another format, another shape
            assert "format" in str(error) or "shape" in str(error), error
            noticed += 1
        else:
            same(stored)
        name.write_bytes(text)
    assert noticed > len(names)


def same(stored):
    for path, x in ARRAYS.items():
        read = stored.slice((path, None)).read()
        assert read.dtype == x.dtype and np.array_equal(read, x), path


def test_digests_stored_elsewhere_are_checked(tmp_path):
    """Uses an Orbax step in its own format, with digests stored elsewhere."""
    params = {"a": {"kernel": np.arange(24, dtype=np.float32).reshape(4, 6)}, "b": np.ones(3)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
    digests = integrity.digests(params)
    stored = store.read(tmp_path / "params", digests)
    stored.verify()
    for layer in range(4):
        stored.slice(("a/kernel", layer)).read()
    stored.slice(("a/kernel", 2)).read()  # again
    wrong = store.read(tmp_path / "params", digests | {"a/kernel": "0" * 16})
    for layer in range(3):
        wrong.slice(("a/kernel", layer)).read()
    with pytest.raises(Damaged, match="'a/kernel'"):
        wrong.slice(("a/kernel", 3)).read()
    with pytest.raises(Damaged, match="has 2 arrays, expected 1; 'b'"):
        store.read(tmp_path / "params", {"a/kernel": digests["a/kernel"]})
    store.read(tmp_path / "params").verify()  # nothing to compare with


def earlier(folder):
    """Uses a folder written before digests existed."""
    about = json.loads((folder / store.ABOUT).read_text())
    for key in ("digests", "digest", "files"):
        del about[key]
    (folder / store.ABOUT).write_text(json.dumps(about | {"format": 1}))


def test_folders_without_digests_load_with_a_note(folder, caplog):
    earlier(folder)
    with caplog.at_level("WARNING"):
        stored = store.read(folder / store.PARAMS)
        store.read(folder / store.PARAMS)
    same(stored)
    stored.verify()
    assert sum("has no digests" in r.getMessage() for r in caplog.records) == 1
    (folder / store.PARAMS / "blocks.kernel" / "1.0.0").unlink()
    with pytest.raises(Damaged, match="1 of 3 chunks of 'blocks/kernel' are missing"):
        store.read(folder / store.PARAMS)


def test_runs_refuse_to_start_from_damaged_weights(folder):
    source = init_from.sources(f"x={folder}")
    assert source.digests.keys() == {f"x/{p}" for p in ARRAYS}
    (folder / store.PARAMS / "half" / "0.0").unlink()
    with pytest.raises(Damaged, match="'x/half'"):
        init_from.sources(f"x={folder}").load({f"x/{p}": x for p, x in want().items()})


def test_damage_in_accompanying_files_is_detected(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"pieces")
    store.write(tmp_path / "ours", slices(), {"family": "t5"}, tokenizer=tmp_path / "spiece.model")
    assert store.about(tmp_path / "ours")["family"] == "t5"
    (tmp_path / "ours" / store.TOKENIZER / "spiece.model").write_bytes(b"qieces")
    with pytest.raises(Damaged, match="spiece.model is damaged"):
        store.about(tmp_path / "ours")


def test_damage_is_not_exported(tmp_path):
    from weights.test_convert import DIT, published, save

    from wamjax import convert

    save(tmp_path / "dit.pt", published("dit"))
    convert.bring_in("dit", tmp_path / "dit.pt", tmp_path / "ours", DIT, progress=False)
    (tmp_path / "ours" / "params" / "blocks.video.ffn.in.kernel" / "1.0.0").unlink()
    with pytest.raises(Damaged, match="blocks/video/ffn/in/kernel"):
        convert.send_out("dit", tmp_path / "ours", tmp_path / "x.pt", progress=False)
    with pytest.raises(Damaged, match="blocks/video/ffn/in/kernel"):
        weights.load("dit", tmp_path / "ours")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dit.pt", "ours"]
    assert tree.flatten(files.read(tmp_path / "dit.pt").tensors)
