"""Reads and writes the safetensors format, tensor by tensor: one file, or shards with an index.

    8 bytes     n, little endian
    n bytes     json {name: {"dtype", "shape", "data_offsets"}, "__metadata__": {text: text}}
    the rest    the tensors, little endian, in C order, without holes

Format: https://github.com/huggingface/safetensors. The library (0.8.0) is not used: its numpy side
has no float8, and it accepts a header with a repeated name, a shape of a million dimensions, and
gigabytes of entries without tensors. Everything that it refuses is refused here too; the tests
compare.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from wamjax.weights import bounds, tensor
from wamjax.weights.bounds import BadFile
from wamjax.weights.tensor import Tensor, Tensors

DTYPES = {
    "BOOL": np.dtype(bool),
    "BF16": tensor.BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    **{
        f"{letter}{8 * size}": np.dtype(f"<{kind}{size}")
        for letter, kind, sizes in (("U", "u", (1, 2, 4, 8)), ("I", "i", (1, 2, 4, 8)),
                                    ("F", "f", (2, 4, 8)))
        for size in sizes
    },
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"


def read(path: str | os.PathLike) -> dict[str, Tensor]:
    """Returns the tensors of one file without reading their values.

    Raises:
      BadFile: the file has another format or is truncated, or its header contradicts itself.
    """
    return {name: tensor.in_file(path, *place) for name, place in layout(path)[0].items()}


def metadata(path: str | os.PathLike) -> dict[str, str]:
    """Returns the free text of a file."""
    return layout(path)[1]


def layout(
    path: str | os.PathLike,
) -> tuple[dict[str, tuple[int, np.dtype, tuple[int, ...]]], dict[str, str]]:
    """Returns the (first byte, dtype, shape) of a file's tensors by name, and its free text.

    Raises:
      BadFile: see `read`.
    """
    path = pathlib.Path(path)
    with bounds.reading(path, "has no valid safetensors header"):
        size = bounds.size_of(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise BadFile(f"{path} is not a safetensors file, or is cut off: it has {size} "
                              f"bytes, expected at least {8 + length}; download it again"
                              )  # fmt: skip
            if length > bounds.HEADER:
                raise ValueError(f"it has {length} bytes, more than the {bounds.HEADER} allowed")
            header = bounds.read_json(file.read(length))
        if not isinstance(header, dict):
            raise ValueError(f"it must be a JSON object, not {bounds.short(header)}")
        free = header.pop(_METADATA, {})
        if not isinstance(free, dict) or not all(isinstance(v, str) for v in free.values()):
            raise ValueError(f"its {_METADATA} must map names to texts, not {bounds.short(free)}")
    with bounds.reading(path):
        return _places(path, header, 8 + length, size), free


def _places(
    path: pathlib.Path, header: Mapping[str, Any], start: int, size: int
) -> dict[str, tuple[int, np.dtype, tuple[int, ...]]]:
    """Returns the `layout` of a header, followed by tensors that fill bytes `start` to `size`
    without holes."""
    places: dict[str, tuple[int, np.dtype, tuple[int, ...]]] = {}
    begin = 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(path, *item)):
        bounds.check_name(name)
        dtype = DTYPES.get(entry["dtype"]) if isinstance(entry.get("dtype"), str) else None
        if dtype is None:
            raise BadFile(f"{path}: {name!r} has dtype {bounds.short(entry.get('dtype'))}, it must "
                          f"be one of {', '.join(DTYPES)}")  # fmt: skip
        shape = bounds.check_shape(entry.get("shape"))
        end = begin + math.prod(shape) * dtype.itemsize
        if _offsets(path, name, entry) != (begin, end):
            raise BadFile(
                f"{path}: {name!r} of shape {shape} and dtype {dtype} must fill bytes {begin} to "
                f"{end}, but its data_offsets are {entry['data_offsets']}"
            )
        places[name] = start + begin, dtype, shape
        begin = end
    if start + begin != size:
        raise BadFile(f"{path} is cut off or too long: it has {size} bytes, expected "
                      f"{start + begin}; download it again")  # fmt: skip
    return {name: places[name] for name in header}


def _offsets(path, name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    numbers = isinstance(offsets, list) and [type(n) for n in offsets] == [int, int]
    if not numbers or not 0 <= offsets[0] <= offsets[1] < 2**63:
        raise BadFile(f"{path}: the entry of {bounds.short(name)} must have data_offsets [begin, "
                      f"end] in bytes, not be {bounds.short(entry)}")  # fmt: skip
    return offsets[0], offsets[1]


def write(
    path: str | os.PathLike, tensors: Tensors, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a file, reading one tensor at a time. Not atomic: see `wamjax.files.draft`.

    Raises:
      ValueError: the format does not support a dtype.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    begin = 0
    for name, x in tensors.items():
        if x.dtype not in _NAMES:
            raise ValueError(f"{name!r} is {x.dtype}, which safetensors cannot hold: convert it to "
                             f"one of {', '.join(DTYPES)}")  # fmt: skip
        end = begin + x.nbytes
        header[name] = {"dtype": _NAMES[x.dtype], "shape": x.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    with pathlib.Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            file.write(tensor.raw(x))
        file.flush()
        os.fsync(file.fileno())


def write_sharded(
    folder: str | os.PathLike, tensors: Tensors, limit: int, stem: str = "model"
) -> list[pathlib.Path]:
    """Writes ``stem-00001-of-0000N.safetensors`` of at most `limit` bytes, and their index.

    A single shard is ``stem.safetensors`` without an index.

    Returns:
      the paths of the files.
    """
    folder, shards, size = pathlib.Path(folder), [{}], 0
    for name, x in tensors.items():
        if shards[-1] and size + x.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = x
        size += x.nbytes
    if len(shards) == 1:
        path = folder / f"{stem}.safetensors"
        write(path, tensors)
        return [path]
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write(folder / name, shard)
    index = {
        "metadata": {"total_size": sum(x.nbytes for x in tensors.values())},
        "weight_map": {k: n for n, shard in zip(names, shards, strict=True) for k in shard},
    }
    path = folder / f"{stem}.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n")
    return [*(folder / n for n in names), path]
