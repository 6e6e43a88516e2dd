"""Skips bad records: counts them up to a limit and chooses replacements."""

from __future__ import annotations

import hashlib
import sys
import threading
from typing import Any

from tqdm import tqdm

from wamjax import files
from wamjax.data.shards import RecordError

TRIES = 64  # replacements to try for a bad window


class Skips:
    """Counts the bad episodes that this process met; safe to use from several threads.

    Args:
      limit: maximum number of bad episodes, ``config.data.skip_bad``; 0 = none.
    """

    def __init__(self, limit: int = 0):
        self.limit = limit
        self._bad: dict[tuple[files.Path, int], str] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Number of bad episodes so far."""
        return len(self._bad)

    def add(self, path: files.Path, episode: int, error: RecordError) -> None:
        """Counts a bad episode of the data set in `path`, and logs it the first time.

        Raises:
          RecordError: `error` itself, if no more episodes may be skipped.
        """
        with self._lock:
            if (path, episode) in self._bad:
                return
            if len(self._bad) >= self.limit:
                if not self.limit:
                    raise error
                raise RecordError(f"{error} ({self.limit} bad episodes were skipped before, "
                                  "config.data.skip_bad allows no more)") from error  # fmt: skip
            self._bad[path, episode] = str(error)
            count = len(self._bad)
        tqdm.write(f"skipped a bad episode, {count} of config.data.skip_bad = {self.limit}: "
                   f"{error}", file=sys.stderr)  # fmt: skip


def instead(window: int, tries: int, windows: int) -> int:
    """Returns the window that replaces a bad one after this many tries.

    It depends on nothing else, so every run and every process reads the same one.
    """
    if not tries:
        return window
    digest = hashlib.blake2b(f"{window}/{tries}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % windows
