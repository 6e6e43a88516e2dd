"""Represents a tensor in a file, read on demand.

Readers return them, writers take them, and a conversion maps one set of them to another, so a model
of any size can be converted with little memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Holds shape and dtype of a tensor, and a function that reads it.

    Attributes:
      shape, dtype: shape and dtype of the values that `read` returns.
      read: returns the values, often as a read-only memory map that is unmapped with its last
        reference. Call it again rather than keeping the result.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the values, each counted once regardless of strides."""
        return math.prod(self.shape) * self.dtype.itemsize


Tensors = Mapping[str, Tensor]


def of(x: np.ndarray) -> Tensor:
    """Returns a tensor that is in memory already."""
    return Tensor(x.shape, x.dtype, lambda: x)


def in_file(
    path: str | os.PathLike,
    offset: int,
    dtype: np.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
) -> Tensor:
    """Returns a tensor whose first element is byte `offset` of a file.

    Args:
      strides: in elements; C order if None.
    """
    read = functools.partial(_map, pathlib.Path(path), offset, dtype, shape, strides)
    return Tensor(shape, dtype, read)


def in_buffer(
    buffer: bytes,
    offset: int,
    dtype: np.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
) -> Tensor:
    """Returns a tensor whose first element is byte `offset` of a byte string."""

    def read() -> np.ndarray:
        count = extent(shape, strides)
        return _shaped(np.frombuffer(buffer, dtype, count, offset), shape, strides)

    return Tensor(shape, dtype, read)


def extent(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> int:
    """Returns the number of elements from the first to the last one that a tensor touches."""
    if strides is None or 0 in shape:
        return math.prod(shape)
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def _map(path, offset, dtype, shape, strides) -> np.ndarray:
    count = extent(shape, strides)
    if not count:  # an empty range cannot be mapped
        return np.zeros(shape, dtype)
    return _shaped(np.memmap(path, dtype, "r", offset, (count,)), shape, strides)


def _shaped(flat: np.ndarray, shape, strides) -> np.ndarray:
    if strides is None or not flat.size:
        return flat.reshape(shape)
    steps = [s * flat.itemsize for s in strides]
    return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)


def raw(x: Tensor) -> memoryview:
    """Returns the values of a tensor as little-endian bytes in C order, without copying if
    possible.

    Raises:
      ValueError: `read` returns something other than the tensor promised.
    """
    values = np.ascontiguousarray(x.read()).reshape(x.shape)  # which makes (1,) of ()
    if values.dtype != x.dtype:
        raise ValueError(f"a tensor declared as {x.dtype} {x.shape} was read as {values.dtype}")
    return memoryview(values.reshape(-1).view(np.uint8))
