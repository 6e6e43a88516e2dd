"""Limits what a file may demand of its reader, and defines the error for files that exceed it.

A file of weights may be broken, truncated, or crafted to make readers hang or fill the memory. So
every claim of a file is compared with the size of the file or with a limit here before it is used;
all limits are far beyond any published model.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import reprlib
from collections.abc import Iterator
from typing import Any

HEADER = 16 * 2**20  # maximum bytes of a header, an index or a pickle
ENTRIES = 200_000  # tensors of a file
DIMENSIONS = 64  # numpy's maximum
DEPTH = 64  # of nested dicts and lists
OPCODES = 2_000_000  # of all pickles of a file
NAME = 4096  # characters of a key, all levels together


class BadFile(ValueError):
    """A file cannot be read: it is broken, or exceeds a limit; the message says which."""


@contextlib.contextmanager
def reading(path: str | os.PathLike, what: str = "cannot be read") -> Iterator[None]:
    """Turns any error of reading a broken file into one line that begins with its path.

    Errors of the system about the path itself (missing, a folder, not allowed) pass through.
    """
    try:
        yield
    except (BadFile, FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # a reader can raise anything on a broken file
        raise BadFile(f"{path} {what}: {line(error)}") from error


def line(error: BaseException, limit: int = 400) -> str:
    """Formats an error as one line of bounded length."""
    text = str(error)[: 10 * limit] or type(error).__name__
    if isinstance(error, KeyError):
        text = f"{text} is missing"
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[:limit]} ..."


def short(value: Any) -> str:
    """Formats a value of a file as text of bounded length, however deeply it is nested."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxstring, brief.maxother = 2, 100, 100
    return brief.repr(value)


def few(lines: list[str], limit: int = 4) -> str:
    """Formats the first of many things in a line."""
    more = f"; and {len(lines) - limit} more" if len(lines) > limit else ""
    return "; ".join(lines[:limit]) + more


def read_json(text: bytes) -> Any:
    """Parses a JSON text of bounded length, depth and number of values.

    Raises:
      ValueError: the text is not JSON, exceeds a limit, or has an object with a repeated key.
    """
    if len(text) > HEADER:
        raise ValueError(f"its JSON has {len(text)} bytes, more than the {HEADER} allowed")
    # Count before parsing: every value comes with one of these characters.
    objects, lists, values = (text.count(c) for c in (b"{", b"[", b","))
    most = ENTRIES, 4 * ENTRIES, 16 * ENTRIES
    if any(n > limit for n, limit in zip((objects, lists, values), most, strict=True)):
        raise ValueError(f"its JSON has {objects} objects, {lists} lists and {values} values, the "
                         f"limits are {most[0]}, {most[1]} and {most[2]}")  # fmt: skip
    if deepest(text) > DEPTH:
        raise ValueError(f"its JSON is nested deeper than the {DEPTH} levels allowed")
    return json.loads(text.decode(), object_pairs_hook=_unique)


def deepest(text: bytes) -> int:
    """Returns the maximum number of open brackets in a JSON text, including those in strings."""
    depth = most = 0
    for c in text.translate(None, _NO_BRACKETS):
        depth += 1 if c in b"[{" else -1
        most = max(most, depth)
    return most


_NO_BRACKETS = bytes(c for c in range(256) if c not in b"[]{}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        twice = sorted({k for k, _ in pairs if k in seen or seen.add(k)})
        raise ValueError(f"its JSON has repeated keys {short(twice)}")
    return out


def check_shape(shape: Any) -> tuple[int, ...]:
    """Returns a file's shape in numpy's form; raises ValueError if numpy cannot have it."""
    if not isinstance(shape, list | tuple) or len(shape) > DIMENSIONS:
        raise ValueError(f"shape {short(shape)} must be a list of at most {DIMENSIONS} sizes")
    size = 1
    for n in shape:
        if type(n) is not int or n < 0 or n >= 2**48:
            raise ValueError(f"shape {short(shape)} must be of whole numbers from 0 to 2^48 - 1")
        size *= max(n, 1)
    if size >= 2**56:
        raise ValueError(f"shape {short(shape)} must have fewer than 2^56 elements")
    return tuple(shape)


def check_name(name: str) -> None:
    """Raises ValueError if the name of a tensor would be harmful as a path or as text."""
    parts = name.split("/")
    if len(name) > NAME or not name.isprintable() or "\\" in name or {"", ".", ".."} & set(parts):
        raise ValueError(
            f"the name {short(name)} of a tensor must be printable, of at most {NAME} characters, "
            "without backslashes, and must not have parts that are empty, '.' or '..'"
        )


def size_of(path: str | os.PathLike) -> int:
    """Returns the size of a file in bytes; raises ValueError if it is not a file, such as a pipe,
    which may never end."""
    path = pathlib.Path(path)
    size = path.stat().st_size
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give a file in it")
    if not path.is_file():
        raise ValueError("it is not a regular file")
    return size
