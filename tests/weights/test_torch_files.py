"""Tests torch files against torch, read and written without it; malicious pickles."""

import collections
import io
import os
import pickle
import sys
import zipfile

import numpy as np
import pytest
from weights.test_safetensors import bits, examples

from wamjax.weights import files, pickles, tensor, torch_files

torch = pytest.importorskip("torch")

NAMES = [name for name in examples() if not name.startswith("float8")]


def torch_examples():
    """Returns every dtype that has a torch storage class, and views of all kinds."""
    out = {name: examples()[name] for name in NAMES}
    base = torch.arange(60.0).reshape(3, 4, 5)
    return out | {
        "transposed": base.permute(2, 0, 1),
        "part": base[1:, ::2, 3],
        "repeated": torch.arange(3.0)[:, None].expand(3, 4),
        "tied": base,
        "parameter": torch.nn.Parameter(base[0].clone()),
    }


def check(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        values = got[name].read()
        assert values.shape == got[name].shape == tuple(x.shape), name
        assert values.dtype == got[name].dtype
        assert str(values.dtype) == str(x.dtype).removeprefix("torch.")
        assert bits(values) == bits(x.detach()), name


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_reads_what_torch_saves(tmp_path, new):
    want = torch_examples()
    torch.save(want, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    contents = files.read(tmp_path / "x.pt")
    check(contents.tensors, want)
    assert contents.plain == {}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_reads_tensors_in_an_ordinary_pickle(tmp_path, protocol):
    """Tests the format of Cosmos Policy's text embeddings."""
    want = {f"pick up the {k}": v for k, v in torch_examples().items() if k != "empty"}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(want, protocol))
    check(files.read(tmp_path / "x.pkl").tensors, want)


def test_nested_dicts_plain_data_and_modules(tmp_path):
    """Tests the layout of Fast-WAM's released file, and other contents of training checkpoints."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    torch.save(
        {
            "mot": module.state_dict(),  # an OrderedDict with version attributes
            "proprio_encoder": {"weight": torch.ones(2, 3), "bias": torch.zeros(2)},
            "step": 21_700,
            "torch_dtype": "torch.bfloat16",
            "dtype": torch.bfloat16,
            "device": torch.device("cpu"),
            "size": torch.Size([2, 3]),
            "large": 2**40,
            "rates": [1e-4, True, None],
            "set": {1},
            "bytes": b"\x00\xff",
            "empty": {},
            "moments": [{"m": torch.ones(1)}, {"m": torch.zeros(1)}],
            "ordered": collections.OrderedDict(a=1),
        },
        tmp_path / "x.pt",
    )
    tensors, plain = files.read(tmp_path / "x.pt")
    want = {f"mot/{k}": v for k, v in module.state_dict().items()}
    want |= {"proprio_encoder/weight": torch.ones(2, 3), "proprio_encoder/bias": torch.zeros(2)}
    want |= {"moments/0/m": torch.ones(1), "moments/1/m": torch.zeros(1)}
    check(tensors, want)
    assert str(plain.pop("dtype")) == "torch.bfloat16"
    assert plain == {
        "step": 21_700, "torch_dtype": "torch.bfloat16", "device": "cpu", "size": (2, 3),
        "large": 2**40, "rates": [1e-4, True, None], "set": {1}, "bytes": b"\x00\xff", "empty": {},
        "ordered/a": 1,
    }  # fmt: skip


@pytest.mark.parametrize("map_it", [False, True])
def test_torch_reads_what_is_written(tmp_path, map_it):
    values = {k: v.detach().contiguous() for k, v in torch_examples().items()}
    torch.save({"mot": values}, tmp_path / "theirs.pt")
    tensors = files.read(tmp_path / "theirs.pt").tensors
    plain = {"step": 7, "mixed": [-1, 2.5, None, True, "é", (2**33, False)], "proprio/x": -129}
    files.write(tmp_path / "x.pth", tensors, plain)
    got = torch.load(tmp_path / "x.pth", weights_only=True, mmap=map_it)
    assert got["step"] == 7 and got["mixed"] == plain["mixed"] and got["proprio"] == {"x": -129}
    for name, x in values.items():
        assert got["mot"][name].dtype == x.dtype and got["mot"][name].shape == x.shape
        assert got["mot"][name].stride() == x.stride()
        assert bits(got["mot"][name]) == bits(x)
    again = files.read(tmp_path / "x.pth")
    check(again.tensors, {f"mot/{k}": v for k, v in values.items()})
    with zipfile.ZipFile(tmp_path / "x.pth") as archive, (tmp_path / "x.pth").open("rb") as file:
        for entry in archive.infolist():
            assert torch_files._data_offset(file, entry) % 64 == 0


def test_large_entries_have_sizes_of_64_bits(tmp_path, monkeypatch):
    """Tests what entries beyond 2 GB have, without writing one."""
    path, opened = tmp_path / "x.pt", zipfile.ZipFile.open

    def force(self, name, mode="r", **options):
        return opened(self, name, mode, **(options | {"force_zip64": True} if mode == "w" else {}))

    monkeypatch.setattr(zipfile.ZipFile, "open", force)
    files.write(path, {"x": tensor.of(np.arange(5.0))})
    monkeypatch.undo()
    assert torch.load(path, weights_only=True)["x"].tolist() == [0, 1, 2, 3, 4]
    assert files.read(path).tensors["x"].read().tolist() == [0, 1, 2, 3, 4]


def test_values_that_torch_files_do_not_hold(tmp_path):
    with pytest.raises(ValueError, match="float8_e5m2, which .* convert it to one of float64"):
        files.write(tmp_path / "x.pt", {"x": tensor.of(np.zeros(1, "float8_e5m2"))})
    with pytest.raises(ValueError, match="plain data, not <class 'set'>"):
        files.write(tmp_path / "x.pt", {}, {"x": {1}})


# ---- malicious pickles ----


class Calls:
    """Unpickles as ``function(*arguments)``."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments, state) if state else (function, arguments)

    def __reduce__(self):
        return self.reduced


def archive(path, program, storages=(("0", b"\0" * 16),), **options):
    with zipfile.ZipFile(path, "w", **options) as out:
        out.writestr("x/data.pkl", program)
        for key, data in storages:
            out.writestr(f"x/data/{key}", data)


def harmful(marker):
    import subprocess

    touch = f"open({str(marker)!r}, 'w')"
    return {
        "posix.system": Calls(os.system, f"touch {marker}"),
        "builtins.eval": Calls(eval, touch),
        "builtins.exec": Calls(exec, touch),
        "io.open": Calls(open, str(marker), "w"),
        "builtins.getattr": Calls(getattr, 1, "real"),
        "Popen": Calls(subprocess.Popen, ["touch", str(marker)]),
        "nested": {"mot": {"weight": [1, {"deep": Calls(eval, touch)}]}},
        "key": {Calls(eval, touch): 1},
        "after": [torch.ones(2), Calls(eval, touch)],
        "builtins.complex": 1j,
        "argparse.Namespace": __import__("argparse").Namespace(lr=1),
        "weights": collections.Counter("ab"),
    }


@pytest.mark.parametrize("name", harmful("x"))
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_no_code_is_executed_and_errors_name_the_function(tmp_path, name, kind):
    marker, path = tmp_path / "marker", tmp_path / "x.pt"
    value = {"fine": 1, "weights": harmful(marker)[name]}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=kind == "zip")
    known = {"nested": "eval", "key": "eval", "after": "eval", "weights": "collections.Counter"}
    with pytest.raises(ValueError, match=known.get(name, name)) as error:
        files.read(path)
    assert "None of its code was run" in str(error.value) and str(path) in str(error.value)
    assert not marker.exists()


def test_modules_are_not_even_imported(tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"cantigravity\nfly\n)R.")
    with pytest.raises(ValueError, match="antigravity.fly"):
        files.read(tmp_path / "x.pkl")
    assert "antigravity" not in sys.modules


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
)


def view(offset, shape, strides):
    """Returns a program that makes a tensor in a storage of four float32."""
    program = b"\x80\x02" + REBUILD + b"(" + STORE
    for numbers in (offset, shape, strides):
        program += torch_files._Program()._value(numbers)
    return program + b"\x89}tR."


@pytest.mark.parametrize(
    "offset, shape, strides",
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (0, (2, 2), (3, 2)),
        (-1, (2,), (1,)),
        (2, (2,), (-1,)),
        (0, (2,), (1, 1)),
        (2**62, (1,), (1,)),
        (0, (2,), (1.5,)),
        (0, (True,), (1,)),
        (5, (0,), (1,)),
    ],
)
def test_a_tensor_cannot_reach_beyond_its_storage(tmp_path, offset, shape, strides):
    archive(tmp_path / "x.pt", view(offset, shape, strides))
    with pytest.raises(ValueError, match=r"exceeds its storage|a tensor has offset"):
        files.read(tmp_path / "x.pt")


def test_a_valid_version_of_the_same_program_is_read(tmp_path):
    data = np.arange(4, dtype=np.float32)
    archive(tmp_path / "x.pt", view(1, (2, 2), (1, 1)), [("0", data.tobytes())])
    assert files.read(tmp_path / "x.pt").tensors[""].read().tolist() == [[1, 2], [2, 3]]


BROKEN = {
    "compressed": (lambda p: archive(p, view(0, (4,), (1,)), compression=8), "compressed"),
    "short storage": (lambda p: archive(p, view(0, (4,), (1,)), [("0", b"\0" * 12)]), "12 bytes"),
    "no storage": (lambda p: archive(p, view(0, (4,), (1,)), []), "x/data/0"),
    "no pickle": (lambda p: zipfile.ZipFile(p, "w").close(), "cannot be read as a torch file"),
    "cut pickle": (lambda p: archive(p, view(0, (4,), (1,))[:-5]), "not a pickle of plain data"),
    "unknown opcode": (lambda p: archive(p, b"\x80\x02\xfe."), "not a pickle of plain data"),
    "underflow": (lambda p: archive(p, b"\x80\x02R."), "not a pickle of plain data"),
    "call of a value": (lambda p: archive(p, b"\x80\x02K\x01)R."), "a call of 1"),
    "call of a dtype": (lambda p: archive(p, b"ctorch\nbfloat16\n)R."), "call of torch.bfloat16"),
    "new object": (lambda p: archive(p, b"\x80\x02ctorch\nSize\n)\x81."), "opcode NEWOBJ"),
    "instance": (lambda p: archive(p, b"(icollections\nOrderedDict\n."), "opcode INST"),
    "extension": (lambda p: archive(p, b"\x80\x02\x82\x01."), "opcode EXT1"),
    "state of a function": (
        lambda p: archive(p, b"\x80\x02ctorch\nSize\nN}X\x01\x00\x00\x00xK\x01s\x86b."),
        "state for a Name",
    ),
    "storage of an unknown kind": (
        lambda p: archive(p, view(0, (4,), (1,)).replace(b"FloatStorage", b"Size")),
        "a storage of type torch.Size",
    ),
    "holds itself": (lambda p: archive(p, b"\x80\x02}q\x00X\x01\x00\x00\x00xh\x00s."), "itself"),
    "text": (lambda p: p.write_bytes(b"hello"), "cannot be read as a torch file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(tmp_path, name):
    make, message = BROKEN[name]
    make(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        files.read(tmp_path / "x.pt")


def test_big_endian_files_are_refused(tmp_path):
    files.write(tmp_path / "x.pt", {"x": tensor.of(np.zeros(2))})
    data = (tmp_path / "x.pt").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        with zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
            for entry in old.infolist():
                swap = entry.filename.endswith("byteorder")
                new.writestr(entry.filename, b"big" if swap else old.read(entry))
    with pytest.raises(ValueError, match="big-endian"):
        files.read(tmp_path / "y.pt")


def test_plain_values_equal_pickle_in_every_protocol():
    value = {
        "a": [1, -1, 255, 65535, -(2**31), 2**31, 2**70, -(2**70), 1.5, True, False, None],
        "b": ("x", "é" * 300, b"", b"\x80" * 300, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "c": {"d": {}, 3: []}, "e": {1, 2}, "f": collections.OrderedDict(x=1),
    }  # fmt: skip
    value["again"] = value["a"]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        # Before protocol 2 a set is made by copyreg, which is refused.
        want = {k: v for k, v in value.items() if protocol > 1 or k != "e"}
        got = pickles.load(io.BytesIO(pickle.dumps(want, protocol)), {})
        assert got == want and got["again"] is got["a"]
