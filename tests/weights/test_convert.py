"""Tests the converter: round trips through our checkpoints, low memory, all or nothing."""

import json
import re
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from wamjax import convert, tree, weights
from wamjax.bench import conversion
from wamjax.training import adapters
from wamjax.weights import families, files, safetensors, store, tensor

FAST_WAM = families.named(
    layers=2, heads=2, head_dim=12, width=16, ffn=24, action_width=8, action_ffn=12, channels=3,
    context_width=10, freq_dim=6, action_dim=5, proprio_dim=4,
)  # fmt: skip
DIT = families.named(layers=2, width=16, heads=2, ffn=32, classes=3)
SMALL = {"fast_wam": FAST_WAM, "dit": DIT}


def published(family, layout=None, dtype=tensor.BFLOAT16, config=None):
    """Returns random tensors of a published file; copies are equal."""
    kind = families.family(family)
    layout = layout or next(iter(kind.layouts))
    plan = families.plans(family, config or SMALL[family])[layout]
    rng = np.random.default_rng(0)
    out = {k: rng.standard_normal(s).astype(dtype) for k, s in plan.published.items()}
    for p in plan.pieces:
        out |= {copy: out[p.theirs] for copy in p.copies}
    return out


def save(path, arrays, plain=None):
    files.write(path, {k: tensor.of(v) for k, v in arrays.items()}, plain)


def same(tensors, arrays):
    assert tensors.keys() == arrays.keys()
    for k, x in arrays.items():
        assert tensors[k].dtype == x.dtype and np.array_equal(tensors[k].read(), x), k


def equal(a, b):
    a, b = tree.flatten(a), tree.flatten(b)
    assert a.keys() == b.keys()
    assert all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


CASES = [
    ("fast_wam", None, "released.pt", "again.pt"),
    ("dit", None, "dit.safetensors", "again.safetensors"),
    ("dit", "diffusers", "folder", "again"),
]


@pytest.mark.parametrize("chunk", [store.CHUNK, 100])
@pytest.mark.parametrize("family, layout, name, again", CASES)
def test_round_trips_are_bit_identical(tmp_path, monkeypatch, family, layout, name, again, chunk):
    monkeypatch.setattr(store, "CHUNK", chunk)
    arrays, config = published(family, layout), SMALL[family]
    plain = {"step": 21_700, "torch_dtype": "torch.bfloat16"} if family == "fast_wam" else None
    save(tmp_path / name, arrays, plain)
    convert.bring_in(family, tmp_path / name, tmp_path / "ours", config, progress=False)
    about = store.about(tmp_path / "ours")
    assert about["family"] == family and about["sizes"]["model.layers"] == 2
    # Any Orbax checkpointer reads it, and it is what `load` gives.
    with ocp.StandardCheckpointer() as checkpointer:
        got = checkpointer.restore(tmp_path / "ours" / "params")
    equal(got, weights.load(family, tmp_path / name, config))
    convert.send_out(family, tmp_path / "ours", tmp_path / again, progress=False)
    contents = files.read(tmp_path / again)
    same(contents.tensors, arrays)
    assert contents.plain == (plain or {})
    convert.bring_in(family, tmp_path / again, tmp_path / "twice", config, progress=False)
    with ocp.StandardCheckpointer() as checkpointer:
        equal(checkpointer.restore(tmp_path / "twice" / "params"), got)


def test_checkpoints_restore_onto_a_mesh(tmp_path):
    from wamjax.training import sharding

    save(tmp_path / "dit.pt", published("dit"))
    convert.bring_in("dit", tmp_path / "dit.pt", tmp_path / "ours", DIT, progress=False)
    want = weights.load("dit", tmp_path / "dit.pt", DIT)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
    places = sharding.params_shardings(want, mesh)
    with ocp.StandardCheckpointer() as checkpointer:
        got = checkpointer.restore(
            tmp_path / "ours" / "params", sharding.with_shardings(want, places)
        )
    equal(got, want)
    assert jax.tree.map(lambda x: x.sharding, got) == places


@pytest.mark.parametrize("item", ["params", "ema"])
def test_a_run_is_exported_from_its_newest_checkpoint(tmp_path, item):
    """Orbax writes it in its default format; the average takes precedence over the parameters."""
    save(tmp_path / "released.pt", published("fast_wam", dtype=np.float32))
    params = weights.load("fast_wam", tmp_path / "released.pt", FAST_WAM)
    params = jax.tree.map(np.asarray, params)
    folder = tmp_path / "run" / "checkpoints"
    with ocp.StandardCheckpointer() as checkpointer:
        for step in (9, 10):
            wrong = jax.tree.map(lambda x: x + 1, params)
            checkpointer.save(folder / str(step) / "params", params if step == 10 else wrong)
            if item == "ema":
                checkpointer.wait_until_finished()
                checkpointer.save(folder / str(step) / "ema", jax.tree.map(lambda x: 2 * x, params))
            checkpointer.wait_until_finished()
    convert.send_out("fast_wam", tmp_path / "run", tmp_path / "x.pt", FAST_WAM, progress=False)
    got = files.read(tmp_path / "x.pt")
    factor = 2 if item == "ema" else 1
    want = {
        k: (factor * v).astype(np.float32)
        for k, v in published("fast_wam", dtype=np.float32).items()
    }
    same(got.tensors, want)  # in the run's dtype, not the published file's
    assert got.plain == {"step": 10, "torch_dtype": "torch.float32"}


def test_dtypes(tmp_path):
    save(tmp_path / "released.pt", published("fast_wam"))
    for dtype in ("float32", "float16"):
        convert.bring_in(
            "fast_wam", tmp_path / "released.pt", tmp_path / dtype, FAST_WAM, None, dtype, False
        )
        arrays = store.read(tmp_path / dtype / "params").arrays
        assert {a.dtype.name for a in arrays.values()} == {dtype}
    convert.send_out(
        "fast_wam", tmp_path / "float32", tmp_path / "x.pt", None, None, "float32", False
    )
    x = files.read(tmp_path / "x.pt")
    assert {t.dtype for t in x.tensors.values()} == {np.dtype("f4")}
    assert x.plain["torch_dtype"] == "torch.float32"


def test_a_failed_conversion_leaves_nothing(tmp_path):
    arrays = published("dit")
    del arrays["x_embedder.proj.bias"]
    save(tmp_path / "x.pt", arrays)
    with pytest.raises(weights.Mismatch, match="x_embedder.proj.bias"):
        convert.bring_in("dit", tmp_path / "x.pt", tmp_path / "ours", DIT, progress=False)
    save(tmp_path / "good.pt", published("dit"))
    convert.bring_in("dit", tmp_path / "good.pt", tmp_path / "ours", DIT, progress=False)
    before = sorted(tmp_path.iterdir())
    for family, config, error, text in (
        ("fast_wam", None, ValueError, "weights of 'dit', not of 'fast_wam'"),
        ("dit", DIT | {"model.layers": 3}, weights.Mismatch, r"is \(2, 32\), expected \(3"),
    ):
        with pytest.raises(error, match=text):
            convert.send_out(family, tmp_path / "ours", tmp_path / "y", config, progress=False)
    with pytest.raises(FileExistsError):
        convert.bring_in("dit", tmp_path / "good.pt", tmp_path / "ours", DIT, progress=False)
    with pytest.raises(FileNotFoundError, match="neither a folder of wamjax.convert"):
        convert.send_out("dit", tmp_path, tmp_path / "y", progress=False)
    assert sorted(tmp_path.iterdir()) == before


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    save(tmp_path / "x.pt", published("dit"))
    filled = store._fill

    def fail(array, one, *more):
        if one.shape == (32, 16):
            raise OSError("disk full")
        return filled(array, one, *more)

    monkeypatch.setattr(store, "_fill", fail)
    with pytest.raises(OSError, match="disk full"):
        convert.bring_in("dit", tmp_path / "x.pt", tmp_path / "ours", DIT, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def sparse(path, shapes, dtype="BF16", size=2):
    """Writes a sparse safetensors file of zeros; returns its size in bytes."""
    header, begin = {}, 0
    for name, shape in shapes.items():
        end = begin + int(np.prod(shape)) * size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + begin)
    return begin


# Runs commands one after the other in one process, and prints its peak memory after each.
RUNS = """
import json, resource, sys
from absl import flags
from wamjax import convert

convert.define_flags()
for arguments in json.loads(sys.argv[1]):
    flags.FLAGS(["convert", *arguments])
    convert.main([])
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)
"""


def peaks(*commands):
    """Returns the peak memory in megabytes until the end of each command."""
    command = [sys.executable, "-c", RUNS, json.dumps(commands)]
    _, said = conversion.peak_of(command)
    each = re.findall(r"(.*?)^peak (\S+)$", said, re.MULTILINE | re.DOTALL)
    assert len(each) == len(commands) and all("wrote" in x and "100%" in x for x, _ in each)
    return [float(used) for _, used in each]


def test_conversion_needs_the_memory_of_a_tensor_not_of_the_model(tmp_path):
    """Uses a stack of 40 layers, whose parameters together are as large as the file."""
    big = families.named(layers=40, width=768, heads=6, ffn=3072, context_width=64)
    for name, config in (("small", big | families.named(layers=1)), ("big", big)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        shapes = families.plans("wan21_t2v", config)["official"].published
        size = sparse(tmp_path / f"{name}.safetensors", shapes)
    one, whole, export = peaks(
        *([f"--source={tmp_path}/{n}.safetensors", f"--output={tmp_path}/{n}", "--family=wan21_t2v",
           f"--config={tmp_path}/{n}.json", "--direction=import"] for n in ("small", "big")),
        [f"--source={tmp_path}/big", f"--output={tmp_path}/out", "--direction=export"],
    )  # fmt: skip
    assert size > 700e6
    largest = 3072 * 768 * 2 / 2**20
    assert whole - one < 20 * largest < size / 2**20 / 6, (one, whole, export)
    assert export - whole < 20 * largest, (one, whole, export)
    written = safetensors.read(tmp_path / "out" / "model.safetensors")
    assert {k: x.shape for k, x in written.items()} == shapes


def test_the_families_are_listed():
    text = convert.listing()
    assert all(f"{name}: " in text for name in weights.FAMILIES)
    assert "umt5: transformers | wan" in text


# ---- converted folders as a source ----


def test_a_converted_folder_loads_as_the_file_does(tmp_path):
    save(tmp_path / "dit.pt", published("dit"))
    convert.bring_in("dit", tmp_path / "dit.pt", tmp_path / "ours", DIT, progress=False)
    want = weights.load("dit", tmp_path / "dit.pt", DIT)
    equal(weights.load("dit", tmp_path / "ours"), want)  # it knows its sizes
    wide = weights.load("dit", tmp_path / "ours", dtype="float32")
    equal(wide, jax.tree.map(lambda x: x.astype(np.float32), want))
    with pytest.raises(ValueError, match="weights of 'dit', not of 'sd3'"):
        weights.load("sd3", tmp_path / "ours")
    with pytest.raises(weights.Mismatch, match=r"is \(2, 32\), expected \(5, 32\)"):
        weights.load("dit", tmp_path / "ours", DIT | {"model.layers": 5})


@pytest.mark.parametrize("source", ["file", "folder"])
def test_the_host_holds_one_shard_of_a_parameter_at_a_time(tmp_path, monkeypatch, source):
    """Loads onto eight devices; equal shards are made once, and the dtype changes on the way."""
    from wamjax.training import sharding

    sizes = DIT | families.named(width=32, ffn=128)
    save(tmp_path / "dit.safetensors", published("dit", config=sizes))
    convert.bring_in("dit", tmp_path / "dit.safetensors", tmp_path / "ours", sizes, progress=False)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    want = weights.load("dit", tmp_path / "dit.safetensors", sizes, dtype="float32")
    places, made, put = sharding.params_shardings(want, mesh), [], jax.device_put

    def watch(x, device):
        if isinstance(x, np.ndarray):
            made.append(x.nbytes)
        return put(x, device)

    monkeypatch.setattr(jax, "device_put", watch)
    path = tmp_path / ("ours" if source == "folder" else "dit.safetensors")
    got = weights.load("dit", path, sizes, dtype="float32", shardings=places)
    equal(got, want)
    assert jax.tree.map(lambda x: x.sharding, got) == places
    flat = tree.flatten(want)
    # Data-parallel copies are not made again: the parts of a parameter together are its size; of a
    # folder in its own dtype, in which it is checked, and the dtype changes on the devices.
    host, size = ("float32", 4) if source == "file" else ("bfloat16", 2)
    assert sum(made) == size * sum(x.size for x in flat.values())
    assert max(made) == size * flat["blocks/video/modulation/kernel"].size // 2  # fsdp alone
    from wamjax.bench import weights as bench

    shapes = {p: x.shape for p, x in flat.items()}
    plan = bench._load(shapes, bench.Shape(dict(mesh.shape)), "")
    assert plan["host_bytes"][host] == max(made)
    on_one = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(got))
    assert plan["device_bytes"]["float32"] == on_one


def test_the_tokenizer_is_part_of_the_output(tmp_path):
    save(tmp_path / "dit.pt", published("dit"))
    (tmp_path / "google").mkdir()
    (tmp_path / "google" / "spiece.model").write_bytes(b"pieces")
    (tmp_path / "google" / "README.md").write_text("no part of it")
    for i, given in enumerate(("google", "google/spiece.model")):
        out = tmp_path / f"ours{i}"
        convert.bring_in(
            "dit", tmp_path / "dit.pt", out, DIT, progress=False, tokenizer=tmp_path / given
        )
        assert [p.name for p in (out / "tokenizer").iterdir()] == ["spiece.model"]
        assert (out / "tokenizer" / "spiece.model").read_bytes() == b"pieces"
    with pytest.raises(FileNotFoundError, match="README.md must be one of the files spiece.model"):
        convert.bring_in("dit", tmp_path / "dit.pt", tmp_path / "no", DIT, progress=False,
                         tokenizer=tmp_path / "google" / "README.md")  # fmt: skip
    assert not (tmp_path / "no").exists()


def test_adapters_are_merged_into_what_is_exported(tmp_path):
    save(tmp_path / "dit.pt", published("dit", dtype=np.float32))
    params = weights.load("dit", tmp_path / "dit.pt", DIT)
    targets = ("blocks/video/self_attn/(q|v)/kernel", "video/patch_embed/kernel")
    grown = tree.flatten(adapters.add(params, 2, targets, jax.random.key(0)))
    grown = {p: x + 0.3 if p.endswith(adapters.UP) else x for p, x in grown.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run/checkpoints/3/params", tree.unflatten(grown))
    convert.send_out("dit", tmp_path / "run", tmp_path / "x.safetensors", DIT, progress=False)
    got = weights.load("dit", tmp_path / "x.safetensors", DIT)
    want = adapters.merge(tree.unflatten(grown))
    changed = set()
    for path, x in tree.flatten(want).items():
        np.testing.assert_allclose(tree.flatten(got)[path], x, rtol=1e-6, atol=1e-6)
        if not np.array_equal(x, tree.flatten(params)[path]):
            changed.add(path)
    assert len(changed) == 3
