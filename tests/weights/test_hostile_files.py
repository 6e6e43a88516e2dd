"""Tests that broken or malicious weight files give a one-line error, fast and in little memory.

Every format is mutated thousands of times with a fixed seed; `-m slow` tries many more with others.
"""

import functools
import io
import itertools
import json
import pickle
import pickletools
import random
import struct
import time
import zipfile

import numpy as np
import pytest
from weights.test_torch_files import REBUILD, STORE, archive, torch, view

from wamjax.data import embedding_pickle
from wamjax.weights import BadFile, files, pickles, safetensors, tensor, torch_files

library = pytest.importorskip("safetensors")
MANY, MORE = 2000, 40_000  # mutations of a format


def consume(path):
    """Reads everything that a conversion would read; returns the number of bytes."""
    contents = files.read(path)
    size = 0
    for x in contents.tensors.values():
        values = x.read()
        assert values.shape == x.shape and values.dtype == x.dtype
        size += values.nbytes
    return size + len(str(contents.plain))


def refused(path, read=consume):
    """Returns the error line of a file, which must come within seconds."""
    begin = time.perf_counter()
    with pytest.raises(BadFile) as error:
        read(path)
    assert time.perf_counter() - begin < 10
    message = str(error.value)
    assert len(message.splitlines()) == 1 and len(message) < 1500 and str(path.parent) in message
    return message


# ---- bombs ----

INT, END = b"K", b"."


def zipped(program):
    """Writes a torch zip file with this pickle, and one storage of 16 bytes."""
    return lambda path: archive(path, b"\x80\x02" + program)


def laughs(levels, width=10):
    """Returns a list of shared nested lists: width^levels values."""
    program = b"]q\x00K\x01a"
    for i in range(levels):
        program += b"]q" + bytes([i + 1]) + b"(" + (b"h" + bytes([i])) * width + b"e"
    return program


def pairs(levels):
    """Returns nested tuples, each twice the previous one; its hash takes 2^levels steps."""
    return b"K\x01" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(levels))


def collisions(count):
    """Returns a dict whose keys are multiples of the modulus of Python's hash of numbers."""
    keys = (k * (2**61 - 1) for k in range(1, count + 1))
    return b"}(" + b"".join(torch_files._Program()._value(k) + b"N" for k in keys) + b"u"


def repeated_calls(name, argument, count):
    """Passes one memoized argument to a function again and again."""
    return argument + b"q\x000c" + name + b"q\x010]" + b"h\x01h\x00\x85Ra" * count


def expanded(shape):
    return view(0, shape, (0,) * len(shape))[2:]


def deflated(path):
    """Writes 4 MB that decompress to 4 GB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
        with out.open("x/data.pkl", "w", force_zip64=True) as entry:
            block = b"0" * 2**20
            for _ in range(64):  # the header says 4 GB, which is enough
                entry.write(block)
    raw = path.read_bytes()
    size = struct.pack("<I", 64 * 2**20)
    assert size in raw
    path.write_bytes(raw.replace(size, struct.pack("<I", 2**32 - 2)))


def many_entries(path):
    """Writes an archive that consists only of names."""
    with zipfile.ZipFile(path, "w") as out:
        for i in range(2):
            out.writestr(f"{i}", b"")
    raw = path.read_bytes()
    begin = raw.index(b"PK\x01\x02")
    entry = raw[begin : raw.index(b"PK\x01\x02", begin + 4)]
    count = 500_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2**16 - 2, 2**16 - 2, count * len(entry),
                      begin, 0)  # fmt: skip
    path.write_bytes(raw[:begin] + entry * count + end)


LIST = b"](" + b"K\x01" * 200_000 + b"e"
BOMBS = {
    "billion laughs": (zipped(laughs(30) + END), "repeated ones counted"),
    "laughing tuples": (zipped(pairs(60) + END), "repeated ones counted"),
    "tuple as key": (zipped(b"}" + pairs(60) + b"Ns."), "a tuple as the key"),
    "tuple in a set": (zipped(b"\x8f(" + pairs(60) + b"\x90."), "a tuple as the key"),
    "tuple as storage": (
        zipped(STORE.replace(b"X\x01\0\0\x000", pairs(60)) + END), "key of a storage"),
    "tuple as device": (zipped(b"ctorch\ndevice\n" + pairs(60) + b"\x85R."), "a device must"),
    "tuple as shape": (
        zipped(REBUILD + b"(" + STORE + b"K\0" + pairs(60) + b")tR."), "has offset 0, shape ((("),
    "tuple is called": (zipped(pairs(60) + b")R."), "a call of ((("),
    "deep": (zipped(b"]" * 200_000 + b"a" * 199_999 + END), "deeper than 64"),
    "deep tuples": (zipped(b"K\x01" + b"\x85" * 200_000 + END), "deeper than 64"),
    "holds itself": (zipped(b"]q\x00h\x00a."), "contains itself"),
    "colliding keys": (zipped(collisions(100_000) + END), "more than 60 bits"),
    "colliding items": (
        zipped(b"ccollections\nOrderedDict\n](" + b"".join(
            torch_files._Program()._value([k * (2**61 - 1), None]) for k in range(1, 50_000)
        ) + b"e\x85R."), "more than 60 bits"),
    "colliding memo": (
        zipped(b"N" + b"".join(b"p%d\n" % (k * (2**61 - 1)) for k in range(1, 100_000)) + END),
        "a memo entry has more than 32 bits"),
    "many opcodes": (zipped(b"N0" * 1_500_000 + b"N."), "more opcodes"),
    "copied lists": (zipped(repeated_calls(b"torch\nSize\n", LIST, 50_000) + END), "more items"),
    "copied text": (
        zipped(repeated_calls(b"_codecs\nencode\n", b"X\x40\x42\x0f\x00" + b"a" * 10**6, 9).replace(
            b"\x85R", b"X\x06\x00\x00\x00latin1\x86R") + END), "more characters"),
    "zero strides": (zipped(expanded((2**20, 2**20))), "exceeds the file"),
    "zero strides again": (
        zipped(b"]" + b"".join(expanded((2**17,))[:-1] + b"a" for _ in range(99)).replace(
            END + b"a", b"a") + END), "more nbytes"),
    "many dimensions": (zipped(expanded((1,) * 1000)), "a list of at most 64 sizes"),
    "huge shape": (zipped(view(0, (0, 2**62), (1, 1))[2:]), "from 0 to 2^48"),
    "long text": (zipped(b"\x8d" + b"\xff" * 6 + b"\x00\x00a."), "cut off"),
    "long bytes": (zipped(b"\x8e" + b"\xff" * 6 + b"\x00\x00a."), "cut off"),
    "long keys": (
        zipped(b"X\xa0\x0f\x00\x00" + b"a" * 4000 + b"q\x000" + b"}h\x00" * 60 + b"}" + b"s" * 60
               + END), "longer than the 4096 characters"),
    "unfolding zip": (deflated, "compressed"),
    "many entries": (many_entries, "a part of the archive has"),
    "entry twice": (lambda p: p.write_bytes(twice(p)), "an entry twice"),
}  # fmt: skip


def twice(path):
    with pytest.warns(UserWarning, match="Duplicate"):
        archive(path, view(0, (4,), (1,)), [("0", b"\0" * 16)] * 2)
    return path.read_bytes()


@pytest.mark.parametrize("name", BOMBS)
def test_pickle_and_archive_bombs_are_refused(tmp_path, name):
    make, said = BOMBS[name]
    make(tmp_path / "x.pt")
    assert said in refused(tmp_path / "x.pt")


def test_nested_pickles_are_refused(tmp_path):
    """Nests pickles, each as the bytes of a storage in the next."""
    program = b"N."
    for _ in range(3000):
        load = b"ctorch.storage\n_load_from_bytes\n"
        program = b"\x80\x03" + load + b"B" + struct.pack("<I", len(program)) + program + b"\x85R."
    (tmp_path / "x.pt").write_bytes(program)
    assert "torch.storage._load_from_bytes" in refused(tmp_path / "x.pt")


def headed(text, data=b"\0" * 4):
    """Returns the bytes of a safetensors file."""
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


ONE = json.dumps(entry())
HEADERS = {
    "keys again": ("{" + ",".join([f'"a":{ONE}'] * 100_000) + "}", "repeated keys ['a']"),
    "keys again in an entry": ('{"a":' + ONE[:-1] + ',"shape":[1]}}', "repeated keys ['shape']"),
    "dimensions": ({"a": entry(shape=(1,) * 1_000_000)}, "a list of at most 64 sizes"),
    "huge shape": ({"a": entry(shape=(0, 2**62), offsets=(0, 0))}, "from 0 to 2^48"),
    "true as a size": ({"a": entry(shape=(True,))}, "must be of whole numbers"),
    "entries": ("{" + ",".join(f'"{i}":{{}}' for i in range(300_000)) + "}", "300001 objects"),
    "lists": ("[" + "[]," * 900_000 + "0]", "900001 lists"),
    "deep": ("[" * 100_000, "deeper"),
    "deep objects": ('{"a":' * 1000, "deeper"),
    "path": ({"../../../etc/passwd": entry()}, "the name '../../../etc/passwd'"),
    "root": ({"/etc/passwd": entry()}, "parts that are empty"),
    "nothing": ({"": entry()}, "parts that are empty"),
    "control": ({"a\x1b[2J": entry()}, "must be printable"),
    "long name": ({"a" * 5000: entry()}, "at most 4096 characters"),
    "bom": (b"\xef\xbb\xbf{}", "header"),
    "other coding": (json.dumps({"a": entry()}).encode("utf-16"), "header"),
    "dtype": ({"a": entry(dtype=["F32"])}, "has dtype ['F32']"),
    "offsets": ({"a": entry(offsets=(0.0, 4.0))}, "must have data_offsets"),
    "offset": ({"a": {**entry(), "data_offsets": 4}}, "must have data_offsets"),
    "an entry": ({"a": 3}, "must have data_offsets"),
    "a list": ([], "must be a JSON object, not []"),
    "free": ({"__metadata__": {"a": 1}}, "must map names to texts"),
    "number": ('{"a":' + "9" * 5000 + "}", "header"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_header_bombs_are_refused(tmp_path, name):
    text, said = HEADERS[name]
    text = text.encode() if isinstance(text, str) else text
    (tmp_path / "x.safetensors").write_bytes(headed(text))
    assert said in refused(tmp_path / "x.safetensors")


def test_oversized_headers_are_not_read(tmp_path):
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write((2**32).to_bytes(8, "little"))
        file.truncate(2**32 + 8)  # sparse
    assert "more than the 16777216 allowed" in refused(tmp_path / "x.safetensors")


INDICES = {
    "itself": ({"weight_map": {"a": "x.safetensors.index.json"}}, "must end in one of"),
    "folder": ({"weight_map": {"a": "../x.safetensors"}}, "must be in the same folder"),
    "list": ({"weight_map": ["x.safetensors"]}, "must map keys to names"),
    "number": ({"weight_map": {"a": 3}}, "must map keys to names"),
    "none": ({}, "'weight_map' is missing"),
    "deep": ("[" * 100_000, "deeper"),
    "text": ("hello", "is not an index of shards"),
}


@pytest.mark.parametrize("name", INDICES)
def test_index_bombs_are_refused(tmp_path, name):
    value, said = INDICES[name]
    text = value if isinstance(value, str) else json.dumps(value)
    (tmp_path / "x.safetensors.index.json").write_text(text)
    assert said in refused(tmp_path / "x.safetensors.index.json")
    assert said in refused(tmp_path)


def test_colliding_keys_are_refused(tmp_path):
    torch.save({"a": {"b": torch.ones(1)}, "a/b": torch.zeros(1)}, tmp_path / "x.pt")
    assert "two entries have the key 'a/b'" in refused(tmp_path / "x.pt")


def test_inconsistent_legacy_storages_are_refused(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    raw = (tmp_path / "x.pt").read_bytes()
    end = len(raw) - 12 - 8
    (tmp_path / "x.pt").write_bytes(raw[:end] + (4).to_bytes(8, "little") + raw[end + 8 :])
    assert "does not have 3 elements" in refused(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(raw[: end + 8])
    assert "cut off" in refused(tmp_path / "x.pt")


# ---- mutations ----

EXTREMES = (0, 1, -1, 255, 2**31 - 1, 2**31, 2**32, 2**61 - 1, 2**63, 2**64, -(2**63), 10**30)
VALUES = (
    *EXTREMES, None, True, 1.5, float("nan"), float("inf"), "", "x", "a" * 5000, "../x", "\0", [],
    {}, [[]], {"a": {}}, [0] * 100, "F32", "I64",
)  # fmt: skip


def altered(data, draw):
    """Changes bytes in one to three places."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        at, size = draw.randrange(len(data) + 1), draw.choice((1, 1, 2, 4, 8, 40))
        match draw.randrange(6):
            case 0:
                data[at : at + 1] = bytes([data[at % max(len(data), 1)] ^ 1 << draw.randrange(8)]
                                          if data else [])  # fmt: skip
            case 1:
                data[at : at + size] = draw.randbytes(size)
            case 2:
                data[at : at + size] = b""
            case 3:
                data[at:at] = data[at : at + size]
            case 4:
                data[at : at + size] = draw.choice((b"\xff", b"\0", b"\x7f")) * size
            case 5:
                del data[at:]
        data = data or bytearray(b"\0")
    return bytes(data)


@functools.cache
def opcodes(program):
    """Returns the parts of a pickle, each an opcode with its argument."""
    places = [place for *_, place in pickletools.genops(program)] + [len(program)]
    return [program[a:b] for a, b in itertools.pairwise(places)]


def altered_program(program, draw):
    """Returns a pickle with opcodes removed, repeated, moved, or with other arguments."""
    parts = list(opcodes(program))
    for _ in range(draw.choice((1, 1, 2, 3))):
        i, j = draw.randrange(len(parts)), draw.randrange(len(parts))
        match draw.randrange(6):
            case 0:
                del parts[i]
            case 1:
                parts[i:i] = parts[i : i + draw.choice((1, 1, 5))]
            case 2:
                parts[i], parts[j] = parts[j], parts[i]
            case 3:
                parts[i] = pickle.dumps(draw.choice(VALUES), 4)[2:-1]
            case 4:
                parts[i] = bytes([draw.randrange(256)]) + parts[i][1:]
            case 5:
                parts[i] = altered(parts[i], draw)
        parts = parts or [b"N"]
    return b"".join(parts)


def altered_json(value, draw):
    """Returns a JSON value with something removed, renamed or replaced."""
    value = json.loads(json.dumps(value))
    nodes = [value]
    for node in nodes:
        children = node.values() if isinstance(node, dict) else node
        nodes += [x for x in children if isinstance(x, dict | list) and x]
    node = draw.choice(nodes)
    key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
    match draw.randrange(4):
        case 0:
            del node[key]
        case 1:
            node[key] = draw.choice(VALUES)
        case 2:
            other = draw.choice(nodes)
            node[key] = json.loads(json.dumps(other))
        case 3 if isinstance(node, dict):
            node[draw.choice(("", "../a", "a/b", "x" * 5000, "__metadata__"))] = node[key]
    return value


ARRAYS = {"a": np.arange(6, dtype="f4").reshape(2, 3), "b.c": np.ones(3, "f8"),
          "d": np.zeros((2, 0), "i4"), "e": np.ones((), tensor.BFLOAT16)}  # fmt: skip


@functools.cache
def example(kind, new=True):
    """Writes a small torch file with nested, shared and plain values."""
    base = torch.arange(24.0).reshape(2, 3, 4)
    value = {"net": {"w": base, "v": base[:, 1], "b": torch.ones(3).bfloat16()}, "step": 3,
             "list": [{"m": torch.zeros(2)}, {"m": torch.zeros(2)}], "rate": 1e-4}  # fmt: skip
    out = io.BytesIO()
    if kind == "pickle":
        texts = {f"text {i}": torch.rand(1, 3, 4).bfloat16() for i in range(2)}
        return pickle.dumps(texts, 4)
    torch.save(value, out, _use_new_zipfile_serialization=new)
    return out.getvalue()


def legacy(path, draw):
    """Mutates the old format: its bytes, and the program of one of its pickles."""
    raw = example("torch", False)
    if draw.random() < 0.4:
        path.write_bytes(altered(raw, draw))
        return
    file, ends = io.BytesIO(raw), [0]
    for _ in range(5):
        for _ in pickletools.genops(file):
            pass
        ends.append(file.tell())
    which = draw.choice((0, 1, 2, 3, 3, 3, 4))
    a, b = ends[which : which + 2]
    path.write_bytes(raw[:a] + altered_program(raw[a:b], draw) + raw[b:])


def new(path, draw):
    """Mutates the zip format: its bytes, its program, its entries."""
    raw, choice = example("torch"), draw.random()
    if choice < 0.3:
        path.write_bytes(altered(raw, draw))
        return
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(path, "w") as out:
        names = old.namelist()
        chosen = draw.choice(names)
        for name in names:
            data = old.read(name)
            if choice < 0.8 and name.endswith("data.pkl"):
                data = altered_program(data, draw)
            elif choice >= 0.8 and name == chosen:
                match draw.randrange(4):
                    case 0:
                        continue
                    case 1:
                        data = altered(data or b"\0", draw)
                    case 2:
                        name = draw.choice(("x", "../x", "", "a/data.pkl", name + "1"))
                    case 3:
                        data = data[: len(data) // 2]
            method = 8 if choice > 0.95 else 0
            out.writestr(zipfile.ZipInfo(name or "x"), data, method)


def pickled(path, draw):
    raw = example("pickle")
    path.write_bytes((altered if draw.random() < 0.4 else altered_program)(raw, draw))


@functools.cache
def header():
    text, begin = {"__metadata__": {"format": "pt"}}, 0
    for name, x in ARRAYS.items():
        text[name] = entry(safetensors._NAMES[x.dtype], x.shape, (begin, begin + x.nbytes))
        begin += x.nbytes
    return text, b"".join(x.tobytes() for x in ARRAYS.values())


def tensors(path, draw):
    """Mutates a safetensors file: its JSON values, its text, its bytes."""
    text, data = header()
    choice = draw.random()
    if choice < 0.6:
        raw = headed(altered_json(text, draw), data)
    elif choice < 0.85:
        raw = headed(altered(json.dumps(text).encode(), draw), data)
    else:
        raw = altered(headed(text, data), draw)
    path.write_bytes(raw)


def index(path, draw):
    """Mutates an index of two shards."""
    for i in range(2):
        shard = path.parent / f"{i}.safetensors"
        if not shard.exists():
            safetensors.write(shard, {n: tensor.of(ARRAYS[n]) for n in list(ARRAYS)[i::2]})
    names = {n: f"{i % 2}.safetensors" for i, n in enumerate(ARRAYS)}
    value = {"metadata": {}, "weight_map": names}
    if draw.random() < 0.6:
        path.write_text(json.dumps(altered_json(value, draw)))
    else:
        path.write_bytes(altered(json.dumps(value).encode(), draw))


FORMATS = {
    "legacy": ("x.pt", legacy, consume),
    "zip": ("x.pt", new, consume),
    "pickle": ("x.pkl", pickled, embedding_pickle.read),
    "safetensors": ("x.safetensors", tensors, consume),
    "index": ("x.safetensors.index.json", index, consume),
}


def attack(folder, kind, seed, count):
    """Returns how many of `count` mutations are refused; any other failure fails the test."""
    name, mutate, read = FORMATS[kind]
    path, bad = folder / name, 0
    for i in range(count):
        mutate(path, random.Random(f"{kind} {seed} {i}"))
        begin = time.perf_counter()
        try:
            read(path)
        except (BadFile, FileNotFoundError) as error:
            bad += 1
            message = str(error)
            assert str(folder) in message and len(message.splitlines()) == 1, (seed, i, message)
            assert len(message) < 1500 + 10 * len(str(path)), (seed, i)
        except Exception as error:
            error.add_note(f"mutation {i} of {kind}, seed {seed}")
            raise
        if kind == "safetensors":
            agree(path, (seed, i))
        assert time.perf_counter() - begin < 5, (seed, i)
    return bad


def agree(path, which):
    """Files that the library refuses are refused, and the values read equal the library's."""
    try:
        with library.safe_open(path, "np") as file:
            theirs = {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118
    except Exception as error:
        with pytest.raises(BadFile):
            safetensors.read(path)
            raise AssertionError((which, "the library refuses it", error)) from error
        return
    try:
        ours = {k: list(x.shape) for k, x in safetensors.read(path).items()}
    except BadFile:
        return
    assert ours == theirs, which


@pytest.mark.parametrize("kind", FORMATS)
def test_mutations(tmp_path, kind):
    bad = attack(tmp_path, kind, 0, MANY)
    assert MANY // 3 < bad < MANY


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("kind", FORMATS)
def test_many_mutations(tmp_path, kind, seed):
    assert attack(tmp_path, kind, seed, MORE) > MORE // 3


def test_every_prefix_is_refused(tmp_path):
    """Tests truncated copies."""
    for name, raw in (("x.pt", example("torch")), ("y.pt", example("torch", False)),
                      ("x.safetensors", headed(*header()))):  # fmt: skip
        for end in range(0, len(raw), 1 + len(raw) // 150):
            (tmp_path / name).write_bytes(raw[:end])
            refused(tmp_path / name)


def test_errors_abbreviate_values_of_any_shape():
    value = [1]
    for _ in range(60):
        value = [value, value, value]
    with pytest.raises(ValueError, match="repeated ones counted"):
        pickles.check(value)
    pickles.check({"a": [[(1, 2)] * 1000] * 100})
