"""The safetensors format, tensor by tensor: one file, or shards with an index.

    8 bytes     n, little endian
    n bytes     json {name: {"dtype", "shape", "data_offsets"}, "__metadata__": {text: text}}
    the rest    the tensors, little endian, in C order, without holes

Format: https://github.com/huggingface/safetensors. The library's numpy side knows neither bfloat16
nor reading without copying everything, hence this.
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

from wamjax.weights import tensor
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
    """The tensors of one file; of their values nothing is read yet.

    Raises:
      ValueError: it is not such a file, is cut off, or its header contradicts itself.
    """
    return {name: tensor.in_file(path, *place) for name, place in layout(path)[0].items()}


def metadata(path: str | os.PathLike) -> dict[str, str]:
    """The free text that a file carries."""
    return layout(path)[1]


def layout(
    path: str | os.PathLike,
) -> tuple[dict[str, tuple[int, np.dtype, tuple[int, ...]]], dict[str, str]]:
    """Where the tensors of a file lie, (first byte, dtype, shape) by name, and its free text.

    Raises:
      ValueError: see `read`.
    """
    path = pathlib.Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is no safetensors file, or is cut off: {size} bytes")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_unique)
            free = header.pop(_METADATA, {})
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} has no safetensors header: {error}") from error
    start, begin = 8 + length, 0
    found: dict[str, tuple[int, np.dtype, tuple[int, ...]]] = {}
    for name, entry in sorted(header.items(), key=lambda item: _offsets(path, *item)):
        dtype, shape = DTYPES.get(entry.get("dtype")), tuple(entry.get("shape", ()))
        if dtype is None:
            raise ValueError(f"{path}: {name!r} has dtype {entry.get('dtype')!r}; known are "
                             f"{', '.join(DTYPES)}")  # fmt: skip
        end = begin + math.prod(shape) * dtype.itemsize
        if _offsets(path, name, entry) != (begin, end):
            raise ValueError(
                f"{path}: {name!r} {shape} of {dtype} should fill bytes {begin} to {end}, the "
                f"header says {entry['data_offsets']}"
            )
        found[name] = start + begin, dtype, shape
        begin = end
    if start + begin != size:
        raise ValueError(f"{path} is cut off or too long: {size} bytes, wants {start + begin}")
    return {name: found[name] for name in header}, free


def _offsets(path, name: str, entry: Any) -> tuple[int, int]:
    try:
        begin, end = entry["data_offsets"]
        return int(begin), int(end)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the entry of {name!r} is broken: {entry}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        twice = sorted({k for k, _ in pairs if sum(k == other for other, _ in pairs) > 1})
        raise ValueError(f"named twice: {twice}")
    return out


def write(
    path: str | os.PathLike, tensors: Tensors, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a file, reading one tensor at a time. Not atomic: see `files.draft`.

    Raises:
      ValueError: a dtype that the format does not have.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    begin = 0
    for name, x in tensors.items():
        if x.dtype not in _NAMES:
            raise ValueError(f"{name!r} is {x.dtype}, safetensors holds {', '.join(DTYPES)}")
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
      the files written.
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
