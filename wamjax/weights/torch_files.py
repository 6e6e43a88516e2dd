"""Reads and writes torch's own files, ``.pt`` and ``.pth``, without torch or running their pickles.

Since torch 1.6 a file is a zip archive without compression: ``NAME/data.pkl``, a pickle with the
layout of tensors in storages, and ``NAME/data/KEY``, the storages. Earlier files, and tensors
inside an ordinary pickle, are pickles one after the other, then the storages.

Sources: torch ``serialization.py``, ``_utils.py`` (``_rebuild_tensor_v2``), ``storage.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import os
import pathlib
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from wamjax.weights import bounds, pickles, tensor
from wamjax.weights.bounds import BadFile
from wamjax.weights.tensor import Tensor

STORAGES = {
    "DoubleStorage": np.dtype("<f8"), "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"), "BFloat16Storage": tensor.BFLOAT16,
    "LongStorage": np.dtype("<i8"), "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"), "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"), "BoolStorage": np.dtype(bool),
}  # fmt: skip
_DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_RESAVE = (
    "None of its code was run. If you trust it, load it with torch in a sandbox and save only its "
    "tensors, as safetensors or by torch.save of a dict"
)


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Holds a run of elements; `at(offset, dtype, shape, strides)` is a tensor in it."""

    dtype: np.dtype
    elements: int
    at: Callable[..., Tensor]


def read(path: str | os.PathLike) -> Any:
    """Returns the contents of a file: nested dicts whose leaves are `Tensor` or plain data.

    Raises:
      BadFile: the file has another format, or holds something else; names it.
    """
    path = pathlib.Path(path)
    with bounds.reading(path, "cannot be read as a torch file"):
        budget = pickles.Budget(bounds.size_of(path))
        try:
            if zipfile.is_zipfile(path):
                return _read_zip(path, budget)
            with path.open("rb") as file:
                return _read_pickles(file, lambda at: (tensor.in_file, path, at), budget)
        except pickles.Refused as error:
            raise BadFile(f"{path} holds {bounds.line(error)}, which is neither a tensor nor plain "
                          f"data. {_RESAVE}") from error  # fmt: skip


# ---- reading ----


class _Parts:
    """Wraps a file so that a reader requests at most `bounds.HEADER` bytes at once."""

    def __init__(self, file: IO[bytes], size: int):
        self.file, self.size = file, size
        self.seek, self.tell = file.seek, file.tell

    def seekable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        count = self.size - self.tell() if count is None or count < 0 else count
        if count > bounds.HEADER:
            raise ValueError(f"a part of the archive has {count} bytes, more than the "
                             f"{bounds.HEADER} allowed")  # fmt: skip
        return self.file.read(count)


def _read_zip(path: pathlib.Path, budget: pickles.Budget) -> Any:
    with path.open("rb") as file, zipfile.ZipFile(_Parts(file, budget.size)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            raise ValueError("the archive has an entry twice")
        (pickle,) = [n for n in entries if n.endswith("/data.pkl") and n.count("/") == 1] or [None]
        if pickle is None:
            raise ValueError("the archive has no NAME/data.pkl")
        root = pickle.removesuffix("data.pkl")
        if f"{root}byteorder" in entries:
            if _text(archive, entries[f"{root}byteorder"]) != b"little":
                raise ValueError("it is big-endian; save it again on a little-endian machine")

        def storage(identity) -> _Storage:
            _, kind, key, _, elements = identity
            dtype, entry = _storage_dtype(kind), entries[f"{root}data/{_storage_key(key)}"]
            size = _elements(elements) * dtype.itemsize
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"storage {key} is compressed: save it again by torch.save")
            if entry.file_size < size:
                raise ValueError(f"storage {key} has {entry.file_size} bytes, expected {size}: "
                                 f"{elements} elements of {dtype}")  # fmt: skip
            begin = _data_offset(file, entry)
            if begin + size > budget.size:
                raise ValueError(f"it is cut off: storage {key} ends at byte {begin + size} of "
                                 f"{budget.size}")  # fmt: skip
            return _placed(dtype, elements, lambda: (tensor.in_file, path, begin))

        program = io.BytesIO(_text(archive, entries[pickle]))
        return pickles.load(program, _known(budget), storage, budget)


def _text(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Returns the bytes of an entry that torch never compresses; compressed ones may expand to any
    size."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > bounds.HEADER:
        raise ValueError(f"{bounds.short(entry.filename)} of {entry.file_size} bytes must not be "
                         f"compressed, nor have more than {bounds.HEADER} bytes")  # fmt: skip
    return archive.read(entry)


def _data_offset(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Returns where the bytes of an entry begin; its local header may differ from the central
    one."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04" or len(header) < 30:
        raise ValueError(f"the archive gives a wrong place of {bounds.short(entry.filename)}")
    name, extra = struct.unpack("<HH", header[26:])
    return entry.header_offset + 30 + name + extra


def _read_pickles(file: IO[bytes], place, budget: pickles.Budget, inside: bool = False) -> Any:
    """Reads a legacy torch file, or an ordinary pickle.

    Args:
      place: maps the start of the storages to a function that creates tensors in them.
      inside: whether this is inside a pickle already.
    """
    known = _known(budget, inside)

    def load(persistent=None) -> Any:
        return pickles.load(file, known, persistent, budget)

    first = load()
    if type(first) is not int or first != _LEGACY_MAGIC:
        return first
    load()  # version
    system = load()
    if not isinstance(system, dict) or not system.get("little_endian", True):
        raise ValueError("it is big-endian; save it again on a little-endian machine")
    begins: dict[str, int] = {}  # filled after the tensors, which read it when they are read
    storages: dict[str, tuple[int, int]] = {}  # elements and bytes of each

    def storage(identity) -> _Storage:
        _, kind, key, _, elements, view = identity
        if view is not None:
            raise ValueError("it has views of storages, from before torch 0.4: save it again")
        dtype, key, elements = _storage_dtype(kind), _storage_key(key), _elements(elements)
        shape = elements, elements * dtype.itemsize
        if storages.setdefault(key, shape) != shape:
            raise ValueError(f"storage {key} has two different sizes")
        return _placed(dtype, elements, lambda: place(begins[key]))

    value, keys = load(storage), load()
    if not isinstance(keys, list) or len(keys) != len(storages) or set(keys) != storages.keys():
        raise ValueError("its list of storages differs from the storages of its tensors")
    end = file.tell()
    for key in keys:
        elements, size = storages[key]
        begins[key] = end + 8  # the number of elements comes first
        if file.read(8) != elements.to_bytes(8, "little"):
            raise ValueError(f"it is cut off, or storage {key} does not have {elements} elements")
        end = file.seek(begins[key] + size)
    if end > file.seek(0, os.SEEK_END):
        raise ValueError(f"it is cut off: its storages end at byte {end}")
    return value


def _placed(dtype: np.dtype, elements: int, place) -> _Storage:
    def at(offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        def read() -> np.ndarray:
            make, where, begin = place()
            begin += offset * dtype.itemsize
            return make(where, begin, dtype, shape, strides).read()

        return Tensor(shape, dtype, read)

    return _Storage(dtype, elements, at)


def _storage_dtype(kind: Any) -> np.dtype:
    if not isinstance(kind, str | pickles.Name):
        raise pickles.Refused(f"a storage of type {bounds.short(kind)}")
    name = str(kind).removeprefix("torch.").removeprefix("storage.")
    if name not in STORAGES:
        raise pickles.Refused(f"a storage of type {kind!r}")
    return STORAGES[name]


def _storage_key(key: Any) -> str:
    if not isinstance(key, str) or len(key) > 64:
        raise ValueError("the key of a storage must be a text of at most 64 characters, not "
                         f"{bounds.short(key)}")  # fmt: skip
    return key


def _elements(count: Any) -> int:
    if type(count) is not int or not 0 <= count < 2**48:
        raise ValueError("the number of elements of a storage must be a whole number from 0 to "
                         f"2^48 - 1, not {bounds.short(count)}")  # fmt: skip
    return count


def _rebuild_tensor(budget: pickles.Budget, storage, offset, shape, strides, *_) -> Tensor:
    """Returns a view of a storage after checking the file's claims about it."""
    if not isinstance(storage, _Storage):
        raise pickles.Refused("a tensor without a storage")
    said = f"offset {bounds.short(offset)}, shape {bounds.short(shape)}, strides "
    said = (
        f"a tensor has {said}{bounds.short(strides)}: they must be whole numbers that are not "
        "negative, with a stride for each size"
    )
    if not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError(said)
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(said)
    bounds.check_shape(shape)
    if offset + tensor.extent(shape, strides) > storage.elements:
        raise ValueError(f"a tensor of shape {shape}, strides {bounds.short(strides)} and offset "
                         f"{offset} exceeds its storage of {storage.elements} elements"
                         )  # fmt: skip
    nbytes = math.prod(shape) * storage.dtype.itemsize
    if nbytes > max(budget.size, 2**20):
        raise ValueError(f"a tensor of shape {shape} with strides {strides} exceeds the file")
    budget.take("nbytes", nbytes)
    return storage.at(offset, shape, strides)


def _storage_from_bytes(budget: pickles.Budget, data: bytes) -> _Storage:
    """Returns a storage inside an ordinary pickle, which is a legacy file of its own."""
    if not isinstance(data, bytes):
        raise ValueError("a storage in a pickle must be bytes")
    value = _read_pickles(io.BytesIO(data), lambda at: (tensor.in_buffer, data, at), budget, True)
    if not isinstance(value, _Storage):
        raise ValueError("the bytes of a storage in a pickle do not hold a storage")
    return value


def _device(*name: Any) -> str:
    if not all(isinstance(part, str | int) for part in name):
        raise ValueError(f"a device must be named by texts and numbers, not {bounds.short(name)}")
    return ":".join(map(str, name))


def _known(budget: pickles.Budget, inside: bool = False) -> pickles.Known:
    """Returns the names in pickles of torch; inside another pickle there is only a storage."""
    known: dict[str, Any] = {
        "torch._utils._rebuild_tensor_v2": functools.partial(_rebuild_tensor, budget),
        "torch._utils._rebuild_tensor": functools.partial(_rebuild_tensor, budget),
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch.storage._load_from_bytes": functools.partial(_storage_from_bytes, budget),
        "torch.Size": tuple,
        "torch.device": _device,
        **{f"torch.{name}": None for name in (*STORAGES, *_DTYPES)},
    }
    if inside:
        del known["torch.storage._load_from_bytes"]
    return known


# ---- writing ----


def write(path: str | os.PathLike, value: Mapping[str, Any]) -> None:
    """Writes nested dicts of `Tensor` and plain data; ``torch.load(weights_only=True)`` reads it.

    One tensor is in memory at a time. Not atomic: see `wamjax.files.draft`.

    Raises:
      ValueError: torch's storages do not support a dtype, or a value is not plain data.
    """
    path = pathlib.Path(path)
    program = _Program()
    text = program.whole(value)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _add(archive, "archive/data.pkl", text)
        _add(archive, "archive/byteorder", b"little")
        for key, x in enumerate(program.tensors):
            _add(archive, f"archive/data/{key}", tensor.raw(x))
        _add(archive, "archive/version", b"3\n")
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _add(archive: zipfile.ZipFile, name: str, data) -> None:
    """Adds an entry whose bytes begin at a multiple of 64, like torch's, so that it can be
    mapped."""
    size = memoryview(data).nbytes
    large = size >= 2**31  # zipfile then adds 20 bytes of its own to the header
    header = archive.fp.tell() + 30 + len(name.encode()) + 20 * large
    entry = zipfile.ZipInfo(name)
    gap = -(header + 4) % 64
    entry.extra = struct.pack("<2sH", b"FB", gap) + b"Z" * gap
    with archive.open(entry, "w", force_zip64=large) as out:
        out.write(data)


class _Program:
    """Writes the pickle, protocol 2, and collects the tensors in the order of their storages."""

    def __init__(self):
        self.tensors: list[Tensor] = []

    def whole(self, value: Any) -> bytes:
        return b"\x80\x02" + self._value(value) + b"."

    def _value(self, x: Any) -> bytes:
        if isinstance(x, Tensor):
            return self._tensor(x)
        if isinstance(x, Mapping):
            return b"}(" + b"".join(self._value(v) for item in x.items() for v in item) + b"u"
        if isinstance(x, list | tuple):
            items = b"(" + b"".join(self._value(v) for v in x)
            return items + b"t" if isinstance(x, tuple) else b"]" + items + b"e"
        if x is None or isinstance(x, bool):
            return {None: b"N", True: b"\x88", False: b"\x89"}[x]
        if isinstance(x, int):
            size = x.bit_length() // 8 + 1
            return b"\x8a" + bytes([size]) + x.to_bytes(size, "little", signed=True)
        if isinstance(x, float):
            return b"G" + struct.pack(">d", x)
        if isinstance(x, str):
            text = x.encode()
            return b"X" + len(text).to_bytes(4, "little") + text
        raise ValueError(f"a torch file can hold tensors and plain data, not {type(x)}")

    def _tensor(self, x: Tensor) -> bytes:
        kind = next((name for name, dtype in STORAGES.items() if dtype == x.dtype), None)
        if kind is None:
            known = ", ".join(str(dtype) for dtype in STORAGES.values())
            raise ValueError(f"a tensor is {x.dtype}, which a torch file cannot hold: convert it "
                             f"to one of {known}")  # fmt: skip
        elements = int(np.prod(x.shape))
        strides, step = [], 1
        for n in reversed(x.shape):
            strides.insert(0, step)
            step *= max(n, 1)
        key, values = str(len(self.tensors)), self._value
        self.tensors.append(x)
        storage = (
            b"(" + values("storage") + f"ctorch\n{kind}\n".encode() + values(key)
            + values("cpu") + values(elements) + b"tQ"
        )  # fmt: skip
        rest = values(0) + values(tuple(x.shape)) + values(tuple(strides)) + values(False)
        empty = b"ccollections\nOrderedDict\n)R"
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + empty + b"tR"
