"""torch's own files, ``.pt`` and ``.pth``, without torch and without running their pickles.

Since torch 1.6 a file is a zip archive without compression: ``NAME/data.pkl``, a pickle that says
how tensors lie in storages, and ``NAME/data/KEY``, the storages. Earlier files, and tensors inside
of an ordinary pickle, are pickles one after the other, then the storages.

Sources: torch ``serialization.py``, ``_utils.py`` (``_rebuild_tensor_v2``), ``storage.py``.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from wamjax.weights import pickles, tensor
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
    "Nothing of it was run. In a sandbox, load it with torch and save its tensors alone, as "
    "safetensors or by torch.save of a dict"
)


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A run of elements; `at(offset, dtype, shape, strides)` is a tensor in it."""

    dtype: np.dtype
    elements: int
    at: Callable[..., Tensor]


def read(path: str | os.PathLike) -> dict[str, Any]:
    """What a file holds: nested dicts whose leaves are `Tensor` or plain data.

    Raises:
      ValueError: it is no such file, or holds something else; names it.
    """
    path = pathlib.Path(path)
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        with path.open("rb") as file:
            return _read_pickles(file, lambda offset: (tensor.in_file, path, offset))
    except pickles.Refused as error:
        raise ValueError(
            f"{path} holds {error}, which is neither a tensor nor plain data. {_RESAVE}"
        ) from error
    except (ValueError, zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{path} is no torch file that can be read: {error}") from error


# ---- reading ----


def _read_zip(path: pathlib.Path) -> Any:
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = {entry.filename: entry for entry in archive.infolist()}
        (pickle,) = [n for n in entries if n.endswith("/data.pkl") and n.count("/") == 1] or [None]
        if pickle is None:
            raise ValueError("the archive has no data.pkl")
        root = pickle.removesuffix("data.pkl")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("it is big-endian; save it again on a little-endian machine")

        def storage(identity) -> _Storage:
            _, kind, key, _, elements = identity
            dtype, entry = _storage_dtype(kind), entries[f"{root}data/{key}"]
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"storage {key} is compressed, which torch never does")
            if entry.file_size < elements * dtype.itemsize:
                raise ValueError(f"storage {key} should hold {elements} {dtype}, it has "
                                 f"{entry.file_size} bytes")  # fmt: skip
            begin = _data_offset(file, entry)
            return _placed(dtype, elements, lambda: (tensor.in_file, path, begin))

        return pickles.load(io.BytesIO(archive.read(pickle)), _KNOWN, storage)


def _data_offset(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin; its local header may differ from the central one."""
    file.seek(entry.header_offset)
    header = file.read(30)
    name, extra = struct.unpack("<HH", header[26:])
    return entry.header_offset + 30 + name + extra


def _read_pickles(file: IO[bytes], place) -> Any:
    """A legacy torch file, or an ordinary pickle.

    Args:
      place: maps the byte that the storages start at to how tensors there are made.
    """
    first = pickles.load(file, _KNOWN)
    if first != _LEGACY_MAGIC:
        return first
    pickles.load(file, _KNOWN)  # version
    if not pickles.load(file, _KNOWN).get("little_endian", True):
        raise ValueError("it is big-endian; save it again on a little-endian machine")
    begins: dict[str, int] = {}  # known after the tensors: they look when they are read
    sizes: dict[str, int] = {}

    def storage(identity) -> _Storage:
        _, kind, key, _, elements, view = identity
        if view is not None:
            raise ValueError("views of storages are from before torch 0.4")
        dtype = _storage_dtype(kind)
        sizes[key] = elements * dtype.itemsize
        return _placed(dtype, elements, lambda: place(begins[key]))

    value = pickles.load(file, _KNOWN, storage)
    for key in pickles.load(file, _KNOWN):
        begins[key] = file.tell() + 8  # the number of elements comes first
        file.seek(begins[key] + sizes[key])
    end = file.seek(0, os.SEEK_END)
    if begins and end < max(b + sizes[k] for k, b in begins.items()):
        raise ValueError("it is cut off")
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
    name = str(kind).removeprefix("torch.").removeprefix("storage.")
    if name not in STORAGES:
        raise pickles.Refused(f"a storage {kind!r}")
    return STORAGES[name]


def _rebuild_tensor(storage, offset, shape, strides, *_) -> Tensor:
    """A view of a storage. What a file says of it is not to be trusted."""
    if not isinstance(storage, _Storage):
        raise pickles.Refused("a tensor without a storage")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"a tensor has offset {offset}, shape {shape}, strides {strides}")
    if offset + tensor.extent(shape, strides) > storage.elements:
        raise ValueError(f"a tensor {shape} with strides {strides} at {offset} leaves its storage "
                         f"of {storage.elements}")  # fmt: skip
    return storage.at(offset, tuple(shape), tuple(strides))


def _storage_from_bytes(data: bytes) -> _Storage:
    """A storage inside of an ordinary pickle: a legacy file of its own."""
    value = _read_pickles(io.BytesIO(data), lambda offset: (tensor.in_buffer, data, offset))
    if not isinstance(value, _Storage):
        raise ValueError("a storage in a pickle is not a storage")
    return value


_KNOWN: pickles.Known = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.storage._load_from_bytes": _storage_from_bytes,
    "torch.Size": tuple,
    "torch.device": lambda *name: ":".join(map(str, name)),
    **{f"torch.{name}": None for name in (*STORAGES, *_DTYPES)},
}


# ---- writing ----


def write(path: str | os.PathLike, value: Mapping[str, Any]) -> None:
    """Writes nested dicts of `Tensor` and plain data; ``torch.load(weights_only=True)`` reads it.

    One tensor is in memory at a time. Not atomic: see `files.draft`.

    Raises:
      ValueError: a dtype that torch's storages do not have, or a value that is not plain data.
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
    """An entry whose bytes begin at a multiple of 64, like torch's, so that it can be mapped."""
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
        raise ValueError(f"a torch file is written of tensors and plain data, not {type(x)}")

    def _tensor(self, x: Tensor) -> bytes:
        kind = next((name for name, dtype in STORAGES.items() if dtype == x.dtype), None)
        if kind is None:
            known = ", ".join(str(dtype) for dtype in STORAGES.values())
            raise ValueError(f"a tensor is {x.dtype}, torch files are written of {known}")
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
