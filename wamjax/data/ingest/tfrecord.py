"""Reads TFRecord files and tf.train.Example without TensorFlow.

A file is a sequence of records: length (u64), checksum of the length, data, checksum of the data;
both checksums are masked CRC32C. An Example is a protobuf message: a map from names to lists of
bytes, float32 or int64. Messages are views into the mapped file, so unused features are not read
from disk.
"""

from __future__ import annotations

import mmap
import pathlib
import struct
from collections.abc import Iterator

import numpy as np

from wamjax.data.ingest.reader import SourceError

_BYTES, _FLOATS, _INTS = 1, 2, 3  # fields of a Feature
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types


class File:
    """Gives access to the records of a file by number.

    Raises:
      SourceError: the file is truncated or damaged; names it.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        try:
            with path.open("rb") as file:
                self._view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise SourceError(f"{path} cannot be read: {error}") from error
        self._places = list(self._index())

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> memoryview:
        start, end = self._places[i]
        return self._view[start:end]

    def _index(self) -> Iterator[tuple[int, int]]:
        at, size = 0, len(self._view)
        while at < size:
            head = self._view[at : at + 12]
            if len(head) < 12:
                raise SourceError(f"{self._path} is cut off after {at} bytes")
            length, checksum = struct.unpack("<QI", head)
            if mask(crc32c(head[:8])) != checksum:
                raise SourceError(
                    f"{self._path} is damaged at byte {at}, where a record should start"
                )
            end = at + 12 + length
            if end + 4 > size:
                raise SourceError(f"{self._path} is cut off: a record of {length} bytes begins at "
                                  f"byte {at} of {size}")  # fmt: skip
            yield at + 12, end
            at = end + 4


def _table() -> list[int]:
    out = []
    for n in range(256):
        for _ in range(8):
            n = (n >> 1) ^ (0x82F63B78 * (n & 1))
        out.append(n)
    return out


_TABLE = _table()


def crc32c(data: bytes | memoryview) -> int:
    """Returns the CRC-32C (Castagnoli) of a few bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def mask(crc: int) -> int:
    """Masks a checksum as TFRecord stores it."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def features(example: memoryview) -> dict[str, memoryview]:
    """Returns name -> Feature of an Example, reading only names and lengths.

    Raises:
      ValueError: the bytes are not an Example.
    """
    out = {}
    for field, inner in _fields(example):
        if field != 1:
            continue
        for entry_field, entry in _fields(inner):
            if entry_field == 1:
                parts = dict(_fields(entry))
                out[bytes(parts[1]).decode()] = parts.get(2, memoryview(b""))
    return out


def strings(feature: memoryview) -> list[memoryview]:
    """Returns the byte strings of a Feature."""
    return [data for _, data in _fields(_list(feature, _BYTES))]


def numbers(feature: memoryview) -> np.ndarray:
    """Returns the numbers of a Feature, f32 or int64 (n,).

    Raises:
      ValueError: it holds byte strings, or is not a Feature.
    """
    parts = dict(_fields(feature))
    if _FLOATS in parts:
        # Numbers may be packed or single, and one list may mix both.
        blocks = [np.frombuffer(x, "<f4") for _, x in _fields(parts[_FLOATS])]
        return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if _INTS in parts:
        blocks = [_varints(x) for _, x in _fields(parts[_INTS])]
        return np.concatenate(blocks) if blocks else np.zeros(0, np.int64)
    if _BYTES in parts:
        raise ValueError("a feature holds bytes, not numbers")
    return np.zeros(0, np.float32)


def _list(feature: memoryview, kind: int) -> memoryview:
    return dict(_fields(feature)).get(kind, memoryview(b""))


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yields (number, content) of each field of a message."""
    at, size = 0, len(message)
    while at < size:
        key, at = _varint(message, at)
        wire = key & 7
        if wire == _LENGTH:
            length, at = _varint(message, at)
            end = at + length
        elif wire == _VARINT:
            _, end = _varint(message, at)
        elif wire in (_FIXED32, _FIXED64):
            end = at + (4 if wire == _FIXED32 else 8)
        else:
            raise ValueError(f"damaged message: unknown wire type {wire} at byte {at}")
        if end > size:
            raise ValueError(f"damaged message: a field of {end - at} bytes at byte {at} of {size}")
        yield key >> 3, message[at:end]
        at = end


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f"damaged message: the number before byte {at} is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _varints(data: memoryview) -> np.ndarray:
    """Decodes consecutive varints: int64 (n,)."""
    x = np.frombuffer(data, np.uint8)
    if len(x) and (x < 2).all():  # flags, the most common case
        return x.astype(np.int64)
    out, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        out.append(value - (1 << 64) * (value >> 63))
    return np.array(out, np.int64)
