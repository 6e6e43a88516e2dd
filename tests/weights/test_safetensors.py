"""Tests safetensors files against the library, and inconsistent files."""

import json
import mmap

import ml_dtypes
import numpy as np
import pytest

from wamjax.weights import files, safetensors, tensor

library = pytest.importorskip("safetensors.torch")
torch = pytest.importorskip("torch")

DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
    "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip


def examples():
    """Returns torch tensors in every dtype, also a scalar and an empty one."""
    generator = torch.Generator().manual_seed(0)
    out = {d: (3 * torch.randn(3, 2, 5, generator=generator)).to(getattr(torch, d)) for d in DTYPES}
    return out | {"scalar": torch.tensor(2.5), "empty": torch.zeros(3, 0, 2)}


def bits(x):
    """Returns the bytes of a tensor of torch or numpy."""
    if isinstance(x, torch.Tensor):
        return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return np.ascontiguousarray(x).tobytes()


def arrays(count=5):
    rng = np.random.default_rng(0)
    return {f"x.{i}": rng.standard_normal((4, i + 1)).astype(np.float32) for i in range(count)}


def lazily(values):
    return {k: tensor.of(v) for k, v in values.items()}


def test_reads_what_the_library_writes(tmp_path):
    want = examples()
    library.save_file(want, tmp_path / "x.safetensors", {"format": "pt"})
    got = safetensors.read(tmp_path / "x.safetensors")
    assert got.keys() == want.keys()
    for name, x in want.items():
        values = got[name].read()
        assert got[name].shape == values.shape == tuple(x.shape)
        assert got[name].dtype == values.dtype and got[name].nbytes == x.nbytes
        assert bits(values) == bits(x), name
    assert got["bfloat16"].dtype == ml_dtypes.bfloat16
    assert safetensors.metadata(tmp_path / "x.safetensors") == {"format": "pt"}


def test_the_library_reads_what_is_written(tmp_path):
    want = examples()
    library.save_file(want, tmp_path / "theirs.safetensors")
    safetensors.write(tmp_path / "x.safetensors", safetensors.read(tmp_path / "theirs.safetensors"))
    got = library.load_file(tmp_path / "x.safetensors")
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape
        assert bits(got[name]) == bits(x)


def test_values_are_mapped_one_tensor_at_a_time_and_read_only(tmp_path):
    safetensors.write(tmp_path / "x.safetensors", lazily(arrays()))
    x = safetensors.read(tmp_path / "x.safetensors")["x.4"].read()
    base = x
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, mmap.mmap) and len(base) < mmap.PAGESIZE
    with pytest.raises(ValueError, match="read-only"):
        x[0] = 1


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    alive, most = [], []

    class Watched(np.ndarray):
        def __del__(self):
            if self.base is None:
                alive.pop()

    def read():
        x = np.zeros(64).view(Watched).copy()
        alive.append(1)
        most.append(len(alive))
        return x

    one = tensor.Tensor((64,), np.dtype("f8"), read)
    safetensors.write(tmp_path / "x.safetensors", {str(i): one for i in range(6)})
    assert len(most) == 6 and max(most) <= 2


@pytest.mark.parametrize("limit", [1, 40, 10**6])
def test_shards_and_their_index(tmp_path, limit):
    want = arrays()
    files.write(tmp_path / "model", lazily(want), limit=limit)
    names = sorted(p.name for p in (tmp_path / "model").iterdir())
    if limit == 10**6:
        assert names == ["model.safetensors"]
    else:
        shards = [n for n in names if n.endswith(".safetensors")]
        assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
        index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in want.values())
        held = [safetensors.read(tmp_path / "model" / n) for n in shards]
        sizes = [sum(x.nbytes for x in shard.values()) for shard in held]
        assert all(s <= limit or len(h) == 1 for s, h in zip(sizes, held, strict=True))
    got = files.read(tmp_path / "model").tensors
    assert list(got) == list(want)
    assert all(np.array_equal(got[k].read(), v) for k, v in want.items())


def edit(path, change):
    """Applies `change` to the header of a file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = change(raw[8 : 8 + length].decode()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


LIES = {
    "is cut off or too long": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "cut off": lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()[8:]),
    "no valid safetensors header": lambda p: edit(p, lambda t: t.replace("{", "[", 1)),
    "'x.0' has dtype 'F7'": lambda p: edit(p, lambda t: t.replace("F32", "F7", 1)),
    r"'x.0' of shape \(4, 2\) and dtype float32 must fill bytes 0 to 32": lambda p: edit(
        p, lambda t: t.replace("[4, 1]", "[4, 2]", 1)
    ),
    "'x.1' .* must fill bytes 16 to 48": lambda p: edit(p, lambda t: t.replace("16,", "17,", 1)),
    r"repeated keys \['x.0'\]": lambda p: edit(p, lambda t: t.replace("x.1", "x.0", 1)),
    "entry of 'x.0' must have data_off": lambda p: edit(p, lambda t: t.replace("data_o", "o", 1)),
}


@pytest.mark.parametrize("message", LIES)
def test_inconsistent_headers_are_refused(tmp_path, message):
    path = tmp_path / "x.safetensors"
    safetensors.write(path, lazily(arrays()))
    LIES[message](path)
    with pytest.raises(ValueError, match=message):
        safetensors.read(path)


def test_an_index_and_its_shards_must_agree(tmp_path):
    folder = tmp_path / "model"
    files.write(folder, lazily(arrays(3)), limit=1)
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace('"x.1"', '"y.1"'))
    with pytest.raises(ValueError, match=r"lacks 'y\.1'.*has 'x\.1'"):
        files.read(folder)
    index.write_text(text.replace("model-00002-of", "../model-00002-of"))
    with pytest.raises(ValueError, match="must be in the same folder"):
        files.read(folder)
    index.write_text(text)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003"):
        files.read(folder)


def test_ambiguous_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no file of weights .*, only nothing"):
        files.read(tmp_path)
    for name in ("a", "b"):
        files.write(tmp_path / f"{name}.safetensors", lazily(arrays(1)))
    with pytest.raises(ValueError, match=r"give one of \['a.safetensors', 'b.safetensors'\]"):
        files.read(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    (tmp_path / "old.bin").touch()
    assert list(files.read(tmp_path).tensors) == ["x.0"]
    with pytest.raises(ValueError, match="must end in one of .safetensors"):
        files.read(tmp_path / "x.txt")


def test_writing_is_all_or_nothing(tmp_path):
    def fail():
        raise OSError("no more")

    good = lazily(arrays(1))
    bad = good | {"y": tensor.Tensor((2,), np.dtype("f4"), fail)}
    for name in ("x.safetensors", "x.pt", "folder"):
        with pytest.raises(OSError, match="no more"):
            files.write(tmp_path / name, bad)
        assert not list(tmp_path.iterdir())
        files.write(tmp_path / name, good)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(FileExistsError, match="exists; remove it"):
            files.write(tmp_path / name, good)
        assert sorted(tmp_path.rglob("*")) == before
        assert np.array_equal(files.read(tmp_path / name).tensors["x.0"].read(), arrays(1)["x.0"])
        (tmp_path / name).rename(tmp_path.parent / f"{tmp_path.name}-{name}")
    wrong = {"x": tensor.Tensor((2,), np.dtype("f4"), lambda: np.zeros(2))}
    with pytest.raises(ValueError, match="declared as float32"):
        files.write(tmp_path / "x.safetensors", wrong)
    with pytest.raises(ValueError, match="only a torch file"):
        files.write(tmp_path / "x.safetensors", good, {"step": 3})
    with pytest.raises(ValueError, match="'c' is complex64"):
        files.write(tmp_path / "x.safetensors", {"c": tensor.of(np.zeros(1, np.complex64))})
