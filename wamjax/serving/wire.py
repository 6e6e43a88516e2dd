"""Encodes messages as bytes in openpi's format; needs only Python 3.9, NumPy and msgpack.

A message is msgpack. An array is a map with bytes keys,

    {b"__ndarray__": True, b"data": C-order bytes, b"dtype": "<f4", b"shape": [2, 3]}

and a NumPy scalar is ``{b"__npgeneric__": True, b"data": item, b"dtype": "<f4"}``. Both sides
refuse structured, object and complex values, so nothing is ever unpickled. The contents of a
message are bounded, so reading one takes milliseconds, whoever wrote it.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import re
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

REFUSED = "VOc"  # kinds of dtype without plain bytes
DTYPE = re.compile(r"[<>|=]?[biufSUmM][0-9]{1,6}(\[[0-9A-Za-z]{1,8}\])?")
MAX_CONTAINERS, MAX_ITEMS = 512, 1024  # maps and lists per message; items in each
MAX_DIMENSIONS = 8
MAX_NUMBERS = 500_000  # numbers in JSON text: half a million take 50 ms


class BadMessage(ValueError):
    """Bytes are not a message of this protocol; the text says why, in one line."""

    def __init__(self, text: str):
        super().__init__(sentence(text))


def sentence(text: object) -> str:
    """Returns a text for a client: one line of bounded length with printable characters."""
    line = " ".join(str(text).split())[:600]
    return "".join(c if c.isprintable() else "?" for c in line)


def pack(value: Any) -> bytes:
    """Encodes a message as bytes.

    Raises:
      ValueError: an array is structured, complex or holds objects.
    """
    return msgpack.packb(value, default=_plain)


def unpack(data: bytes) -> Any:
    """Decodes a message; its arrays are read-only views of the bytes.

    Raises:
      BadMessage: the bytes are not a message, or one larger than any observation.
    """
    count = _counter()

    def of_list(items: list) -> list:
        count()
        return items

    def of_map(values: dict) -> Any:
        count()
        return _value(values)

    try:
        return msgpack.unpackb(
            data, object_hook=of_map, list_hook=of_list, max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS, max_ext_len=0,
        )  # fmt: skip
    except BadMessage:
        raise
    except Exception as error:  # msgpack raises a dozen kinds
        text = str(error) or type(error).__name__
        raise BadMessage(f"this is not a msgpack message: {text[:200]}") from None


def array(data: bytes, dtype: str, shape: Any, order: str = "C") -> np.ndarray:
    """Returns a read-only array over bytes, checked before anything is allocated.

    Raises:
      BadMessage: bytes, dtype and shape do not match, or the dtype is refused.
    """
    if not isinstance(dtype, str) or not DTYPE.fullmatch(dtype):
        raise BadMessage(f"dtype {str(dtype)[:40]!r} is refused: it must be of numbers or texts")
    try:
        kind = np.dtype(dtype)
    except TypeError:
        raise BadMessage(f"there is no dtype {dtype!r}") from None
    sizes = isinstance(shape, (list, tuple)) and len(shape) <= MAX_DIMENSIONS
    if not sizes or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise BadMessage(
            f"shape {str(shape)[:80]} must be a list of at most {MAX_DIMENSIONS} sizes"
        )
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * kind.itemsize:
        size = len(data) if isinstance(data, bytes) else type(data).__name__
        raise BadMessage(f"an array of {dtype} and shape {list(shape)} has {size} bytes, it must "
                         f"have {math.prod(shape) * kind.itemsize}")  # fmt: skip
    if not data:
        return np.zeros(shape, kind) if math.prod(shape) == 0 else np.empty(shape, kind)
    return np.frombuffer(data, kind).reshape(shape, order=order)


def from_json(text: bytes) -> tuple[Any, bool]:
    """Decodes an HTTP body; returns the message and whether its arrays are in json-numpy's format.

    Arrays are nested lists, ``{"__numpy__": base64, "dtype": .., "shape": ..}`` as in json-numpy,
    or ``{"npy": base64 of a .npy file}``. ``{"encoded": text}`` holds the message as a text, which
    some clients of OpenVLA send.

    Raises:
      BadMessage: the body is not JSON, or larger than any observation.
    """
    if text.count(b",") > MAX_NUMBERS:
        raise BadMessage(f"more than {MAX_NUMBERS} values: send pictures in base64, see docs/robot")
    count, packed = _counter(limit=MAX_NUMBERS), []

    def of_map(values: dict) -> Any:
        count()
        if "__numpy__" in values:
            packed.append(True)
            return array(_base64(values["__numpy__"]), values.get("dtype"), values.get("shape"))
        return _npy(_base64(values["npy"])) if set(values) == {"npy"} else values

    try:
        value = json.loads(text, object_hook=of_map)
        if isinstance(value, dict) and set(value) == {"encoded"}:
            value = json.loads(value["encoded"], object_hook=of_map)
    except BadMessage:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise BadMessage(f"this is not a JSON message: {str(error)[:200]}") from None
    return value, bool(packed)


def to_json(actions: np.ndarray, packed: bool) -> Any:
    """Converts actions for JSON: to json-numpy's format if the request used it, else nested
    lists."""
    if not packed:
        return actions.tolist()
    data = base64.b64encode(np.ascontiguousarray(actions).tobytes()).decode()
    return {"__numpy__": data, "dtype": actions.dtype.str, "shape": list(actions.shape)}


def _plain(value: Any) -> Any:
    """Converts a value that msgpack does not support to one that it does."""
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in REFUSED:
        raise ValueError(f"arrays of {value.dtype} cannot be sent: send numbers or texts")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str,
                b"shape": value.shape}  # fmt: skip
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise ValueError(f"a {type(value).__name__} cannot be sent: send numbers, texts or arrays")


def _value(values: dict) -> Any:
    """Returns the array or scalar that a map encodes, or the map itself."""
    if b"__ndarray__" in values:
        return array(values.get(b"data"), values.get(b"dtype"), values.get(b"shape"))
    if b"__npgeneric__" in values:
        dtype, data = values.get(b"dtype"), values.get(b"data")
        if not isinstance(dtype, str) or not DTYPE.fullmatch(dtype):
            raise BadMessage(
                f"dtype {str(dtype)[:40]!r} is refused: it must be of numbers or texts"
            )
        if not isinstance(data, (bool, int, float, str, bytes)):
            raise BadMessage(f"a scalar of {dtype} is a {type(data).__name__}, it must be a "
                             "number, a text or bytes")  # fmt: skip
        return np.dtype(dtype).type(data)
    return values


def _counter(limit: int = MAX_CONTAINERS) -> Callable[[], None]:
    """Returns a function that counts maps and lists of a message and raises beyond a limit."""
    remaining = limit

    def count() -> None:
        nonlocal remaining
        remaining -= 1
        if remaining < 0:
            raise BadMessage(f"more than {limit} maps and lists: send numbers as arrays")

    return count


def _base64(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise BadMessage(f"an array is not base64: {str(error)[:80]}") from None


def _npy(data: bytes) -> np.ndarray:
    """Returns the array of a .npy file after checking its header."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0}[version]  # fmt: skip
        shape, fortran, dtype = read(file)
    except Exception as error:  # NumPy does not document what a bad header raises
        raise BadMessage(f"an array is not a .npy file: {str(error)[:80]}") from None
    return array(data[file.tell() :], dtype.str, shape, "F" if fortran else "C")
