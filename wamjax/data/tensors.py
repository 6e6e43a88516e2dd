"""Stores arrays in safetensors files: written atomically, read as views of one memory map per
file."""

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
    """Writes a file next to `path` and renames it when it is complete.

    Raises:
      ValueError: the format does not support an array's dtype.
    """
    with files.draft(path, replace=True) as draft:
        safetensors.write(draft, {name: tensor.of(x) for name, x in arrays.items()}, metadata)


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the read-only arrays of a file and its metadata.

    One map serves all arrays: a file may hold thousands, and a process has a limited number of
    maps.

    Raises:
      ValueError: the file has another format or is truncated.
    """
    local = files.fetch(path)
    try:
        places, metadata = safetensors.layout(local)
    except ValueError as error:
        raise ValueError(f"{path} is not a safetensors file, or is cut off: {error}") from error
    raw = np.memmap(local, np.uint8, "r")
    return {name: _array(raw, *place) for name, place in places.items()}, metadata


def _array(raw: np.ndarray, begin: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return raw[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
