"""Arrays in safetensors files: written atomically, read as views of one memory map per file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import numpy as np

from wamjax import files
from wamjax.weights import safetensors, tensor


def write(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a file beside `path` and renames it when it is complete.

    Raises:
      ValueError: an array of a dtype that the format does not have.
    """
    with files.draft(path, replace=True) as draft:
        safetensors.write(draft, {name: tensor.of(x) for name, x in arrays.items()}, metadata)


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a file, read-only, and its metadata.

    One map serves all arrays: a file may hold thousands, and a process has only so many maps.

    Raises:
      ValueError: it is not such a file, or cut off.
    """
    local = files.fetch(path)
    try:
        places, metadata = safetensors.layout(local)
    except ValueError as error:
        raise ValueError(f"{path} is no safetensors file, or is cut off: {error}") from error
    raw = np.memmap(local, np.uint8, "r")
    return {name: _array(raw, *place) for name, place in places.items()}, metadata


def _array(raw: np.ndarray, begin: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return raw[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
