"""What a file from elsewhere may ask of its reader, and the one error of those that ask for more.

A file of weights may be broken, cut off, or made by somebody who wants readers to hang or to fill
the memory. So nothing that a file says is believed before it is compared with the size of the file
or with a limit here, all of which are far beyond any published model.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import reprlib
from collections.abc import Iterator
from typing import Any

HEADER = 16 * 2**20  # bytes of a text that says what a file holds: a header, an index, a pickle
ENTRIES = 200_000  # tensors of a file
DIMENSIONS = 64  # of a tensor: numpy has no more
DEPTH = 64  # of nested dicts and lists
OPCODES = 2_000_000  # of all pickles of a file
NAME = 4096  # characters of a key, all levels together


class BadFile(ValueError):
    """A file cannot be read: it is broken, or asks for more than a reader gives; says which."""


@contextlib.contextmanager
def reading(path: str | os.PathLike, what: str = "cannot be read") -> Iterator[None]:
    """Turns whatever a broken file makes its reader raise into one line that begins with its path.

    What the system says of the path itself (it does not exist, is a folder, is not allowed) stays.
    """
    try:
        yield
    except (BadFile, FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # of any kind: none is known not to be
        raise BadFile(f"{path} {what}: {line(error)}") from error


def line(error: BaseException, limit: int = 400) -> str:
    """An error as one line of bounded length."""
    text = str(error)[: 10 * limit] or type(error).__name__
    if isinstance(error, KeyError):
        text = f"{text} is not there"
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[:limit]} ..."


def short(value: Any) -> str:
    """A value of a file as text of bounded length, however deeply it is nested."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxstring, brief.maxother = 2, 100, 100
    return brief.repr(value)


def few(lines: list[str], limit: int = 4) -> str:
    """The first of many things, in a line."""
    more = f"; and {len(lines) - limit} more" if len(lines) > limit else ""
    return "; ".join(lines[:limit]) + more


def read_json(text: bytes) -> Any:
    """The value of a json text, of bounded length, depth and number of values.

    Raises:
      ValueError: it is none, is out of bounds, or has an object with a key twice.
    """
    if len(text) > HEADER:
        raise ValueError(f"{len(text)} bytes of json are more than {HEADER}")
    # Before anything is built: of every value there is one of these.
    objects, lists, values = (text.count(c) for c in (b"{", b"[", b","))
    most = ENTRIES, 4 * ENTRIES, 16 * ENTRIES
    if any(n > limit for n, limit in zip((objects, lists, values), most, strict=True)):
        raise ValueError(f"json of {objects} objects, {lists} lists and {values} values")
    if deepest(text) > DEPTH:
        raise ValueError(f"json deeper than {DEPTH} levels")
    return json.loads(text.decode(), object_pairs_hook=_unique)


def deepest(text: bytes) -> int:
    """Brackets of a json text that are open at once, at most; those in strings count, too."""
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
        raise ValueError(f"named twice: {short(twice)}")
    return out


def check_shape(shape: Any) -> tuple[int, ...]:
    """A shape that a file says, as numpy can have it; ValueError if it cannot."""
    if not isinstance(shape, list | tuple) or len(shape) > DIMENSIONS:
        raise ValueError(f"a shape is {short(shape)}")
    size = 1
    for n in shape:
        if type(n) is not int or n < 0 or n >= 2**48:
            raise ValueError(f"a shape is {short(shape)}")
        size *= max(n, 1)
    if size >= 2**56:
        raise ValueError(f"a shape is {short(shape)}")
    return tuple(shape)


def check_name(name: str) -> None:
    """ValueError if the name of a tensor would be harmful as a path, or as text."""
    parts = name.split("/")
    if len(name) > NAME or not name.isprintable() or "\\" in name or {"", ".", ".."} & set(parts):
        raise ValueError(f"a tensor is named {short(name)}")


def size_of(path: str | os.PathLike) -> int:
    """Bytes of a file; ValueError if it is none, such as a pipe, which may never end."""
    path = pathlib.Path(path)
    size = path.stat().st_size
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file")
    if not path.is_file():
        raise ValueError("it is no regular file")
    return size
