"""Arrays in safetensors files: written atomically, read as memory maps, bfloat16 included.

    8 bytes     n, little endian
    n bytes     json {name: {"dtype", "shape", "data_offsets"}, "__metadata__": {text: text}}
    the rest    the arrays, little endian, in C order

Format: https://github.com/huggingface/safetensors. Its library knows no bfloat16 in numpy and reads
no rows at random, hence this.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

DTYPES = {
    "BOOL": np.dtype(bool),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    **{
        f"{letter}{8 * size}": np.dtype(f"<{kind}{size}")
        for letter, kind, sizes in (("U", "u", (1, 2, 4, 8)), ("I", "i", (1, 2, 4, 8)),
                                    ("F", "f", (2, 4, 8)))
        for size in sizes
    },
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"


def write(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a file beside `path` and renames it when it is complete.

    Raises:
      ValueError: an array of a dtype that the format does not have.
    """
    header: dict[str, dict] = {_METADATA: dict(metadata)}
    offset = 0
    for name, x in arrays.items():
        if x.dtype not in _NAMES:
            raise ValueError(f"{name!r} is {x.dtype}, safetensors holds {', '.join(DTYPES)}")
        end = offset + x.nbytes
        header[name] = {
            "dtype": _NAMES[x.dtype], "shape": x.shape, "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the arrays
    path = pathlib.Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in arrays.values():
            file.write(np.ascontiguousarray(x).tobytes())
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a file as read-only memory maps, and its metadata.

    Raises:
      ValueError: it is not such a file, or cut off.
    """
    path = pathlib.Path(path)
    try:
        raw = np.memmap(path, np.uint8, "r")  # one map for all: a file may hold thousands
        length = int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8 : 8 + length].tobytes())
        metadata, body = header.pop(_METADATA, {}), raw[8 + length :]
        return {name: _array(body, **entry) for name, entry in header.items()}, metadata
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file, or is cut off: {error!r}") from error


def _array(body: np.ndarray, dtype: str, shape: Sequence[int], data_offsets: Sequence[int]):
    begin, end = data_offsets
    return body[begin:end].view(DTYPES[dtype]).reshape(shape)
