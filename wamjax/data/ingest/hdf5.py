"""Provides what the HDF5 formats share: cached open files, and raw or encoded pictures."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import h5py
import numpy as np

from wamjax.data import images
from wamjax.data.ingest.reader import SourceError


class Files:
    """Opens files and keeps the last one open."""

    def __init__(self):
        self._path: pathlib.Path | None = None
        self._file: h5py.File | None = None

    @contextlib.contextmanager
    def open(self, path: pathlib.Path) -> Iterator[h5py.File]:
        """Yields the open file; turns errors of h5py into a `SourceError` that names the file."""
        try:
            if self._path != path:
                if self._file is not None:
                    self._file.close()
                self._path, self._file = None, h5py.File(path, "r")
                self._path = path
            yield self._file
        except SourceError as error:
            raise SourceError(f"{path}: {error}") from error
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            text = error.args[0] if error.args else type(error).__name__
            raise SourceError(f"{path} cannot be read: {text}") from error


def in_order(group: h5py.Group) -> list[str]:
    """Returns names such as demo_10, sorted by number."""
    return sorted(group, key=lambda name: (number(name), name))


def number(name: str) -> int:
    """Returns the last number in a name; 0 if there is none."""
    digits = re.findall(r"\d+", name)
    return int(digits[-1]) if digits else 0


def json_of(attributes: Any, name: str) -> dict[str, Any]:
    """Returns an attribute that holds a JSON object; {} if it is absent.

    Raises:
      SourceError: the attribute is not JSON.
    """
    text = text_of(attributes, name)
    try:
        value = json.loads(text) if text else {}
    except ValueError:
        raise SourceError(f"its attribute {name} is not JSON") from None
    return value if isinstance(value, dict) else {}


def text_of(attributes: Any, name: str) -> str:
    """Returns an attribute that holds text; '' if it is absent."""
    value = attributes.get(name, "")
    return value.decode() if isinstance(value, bytes) else str(value)


def vectors(group: h5py.Group, count: int) -> dict[str, np.ndarray]:
    """Returns the numeric datasets of a group that have `count` rows, by name: (count, d)."""
    return {
        name: _flat(x[:]) for name, x in group.items()
        if isinstance(x, h5py.Dataset) and x.ndim in (1, 2) and x.dtype.kind in "fiub"
        and len(x) == count and h5py.check_vlen_dtype(x.dtype) is None
    }  # fmt: skip


def widths(group: h5py.Group, count: int) -> dict[str, int]:
    """Returns the dimensions of the arrays of `vectors`, without reading them."""
    return {
        name: int(np.prod(x.shape[1:])) for name, x in group.items()
        if isinstance(x, h5py.Dataset) and x.ndim in (1, 2) and x.dtype.kind in "fiub"
        and len(x) == count and h5py.check_vlen_dtype(x.dtype) is None
    }  # fmt: skip


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)


def is_camera(x: Any) -> bool:
    """Returns whether a dataset holds pictures: uint8 (T, h, w, 3), or encoded ones in padded rows
    (T, n) or rows of variable length."""
    if not isinstance(x, h5py.Dataset):
        return False
    return (x.ndim == 4 and x.shape[-1] == 3 and x.dtype == np.uint8) or is_encoded(x)


def is_encoded(x: h5py.Dataset) -> bool:
    """Returns whether pictures are stored as PNG or JPEG."""
    return h5py.check_vlen_dtype(x.dtype) is not None or (x.ndim == 2 and x.dtype == np.uint8)


def size(x: h5py.Dataset) -> tuple[int, int]:
    """Returns (height, width) of the pictures."""
    if not is_encoded(x):
        return x.shape[1], x.shape[2]
    return images.size(strip(x[0]))


def strip(row: np.ndarray) -> bytes:
    """Returns an encoded picture without the zeros that pad its row."""
    return np.asarray(row, np.uint8).tobytes().rstrip(b"\0")


def pictures(
    x: h5py.Dataset, steps: Sequence[int], flip: bool = False, bgr: bool = False
) -> Iterator[bytes | np.ndarray]:
    """Yields the pictures of a camera at some steps, upright and in RGB.

    Args:
      flip: whether they are stored upside down.
      bgr: whether encoded ones were encoded from BGR.

    Raises:
      SourceError: there is no such step.
    """
    for step in steps:
        if step >= len(x):
            raise SourceError(f"{x.name} has {len(x)} pictures, so there is none for step {step}")
        row = x[step]
        if not is_encoded(x):
            yield np.ascontiguousarray(row[::-1]) if flip else row
            continue
        data = strip(row)
        if not (flip or bgr):
            yield data
            continue
        picture = images.decode(data)
        picture = picture[..., ::-1] if bgr else picture
        yield np.ascontiguousarray(picture[::-1] if flip else picture)
