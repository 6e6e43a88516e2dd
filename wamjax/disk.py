"""Checks whether a disk has room for files to be written; buckets always have."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator

from wamjax import files

# TensorStore says it in words.
_FULL_TEXT = re.compile("No space left on device|Disk quota exceeded")


class NoRoom(OSError):
    """A disk is full, or would become full."""


def check_room(folder: files.Path, size: int, count: int) -> str:
    """Checks whether checkpoints fit on a disk, before anything is computed.

    Args:
      folder: folder of the checkpoints; need not exist yet.
      size: bytes per checkpoint.
      count: number of further checkpoints that exist at once.

    Returns:
      A warning if there is room for one of them but not for all, else "".

    Raises:
      NoRoom: there is no room for one.
    """
    if files.is_remote(folder):
        return ""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise NoRoom(f"{folder} has no room for a checkpoint: it takes {_bytes(size)}, and "
                     f"{_bytes(free)} are free; make room, or use another --workdir")  # fmt: skip
    if free < count * size:
        return (f"{folder} has room for {free // size} more checkpoints of {_bytes(size)} "
                f"({_bytes(free)} are free), and {count} are going to be there at once: make room, "
                "or lower checkpoint.keep")  # fmt: skip
    return ""


@contextlib.contextmanager
def sentence(folder: files.Path, what: str = "what is written", size: int = 0) -> Iterator[None]:
    """Reports a full disk in one sentence, whichever library found out, and how.

    Args:
      folder: folder that is written to.
      what: name of the data, of `size` bytes if known.

    Raises:
      NoRoom: instead of an error caused by a full disk; all others pass.
    """
    logging.getLogger("absl").addFilter(_is_news)  # Orbax tells it in pages, from its threads
    try:
        yield
    except NoRoom:
        raise
    except Exception as error:
        if not _is_full(error):
            raise
        # A coroutine of Orbax is forgotten on the way, which Python mentions at its end.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        if files.is_remote(folder):  # what goes there is put together here
            folder = files.path(tempfile.gettempdir())
        free = shutil.disk_usage(folder).free
        needed = f" of {_bytes(size)}" if size else ""
        raise NoRoom(
            f"the disk of {folder} is full: no room for {what}{needed}, {_bytes(free)} are free. "
            "Nothing that was complete is lost: make room, and the same command continues"
        ) from None


def _is_full(error: BaseException | None) -> bool:
    """Returns whether an error, or one of its causes, is a full disk."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if getattr(error, "errno", None) in files.FULL or _FULL_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_news(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not (_is_full(error) or _FULL_TEXT.search(record.getMessage()))


def _bytes(count: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit / 10:
            return f"{count / unit:,.2f} {name}"
    return f"{count:,} bytes"
