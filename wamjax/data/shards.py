"""Reads records by random access from several ArrayRecord files."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from wamjax import files

# For writers. Pictures are compressed already, latents do not compress. Groups of one record:
# random access reads no other.
OPTIONS = "group_size:1,uncompressed"


class RecordError(ValueError):
    """A record cannot be read; the message names file, record, episode and key, and what to do."""


class Shards:
    """Reads records in several ArrayRecord files by random access; safe to use from several
    threads.

    Args:
      folder: folder of the files.
      counts: number of records in each.
      stem: prefix of their names.
    """

    def __init__(self, folder: files.Path, counts: Sequence[int], stem: str = "episodes"):
        self._files = [folder / shard_name(i, len(counts), stem) for i in range(len(counts))]
        self._counts = counts
        self._ends = list(itertools.accumulate(counts))
        self._readers: list[ArrayRecordReader | None] = [None] * len(counts)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": [None] * len(self._counts), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()  # files are opened again

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, i: int) -> tuple[files.Path, int]:
        """Returns the file of record `i` and its position there."""
        shard, position = self._find(i)
        return self._files[shard], position

    def read(self, i: int) -> bytes:
        """Returns record `i`.

        Raises:
          RuntimeError, ValueError, IndexError: the file is missing, truncated or damaged.
        """
        shard, position = self._find(i)
        return self._reader(shard).read([position])[0]

    def _find(self, i: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, i, side="right"))
        return shard, i - (self._ends[shard - 1] if shard else 0)

    def _reader(self, shard: int) -> ArrayRecordReader:
        """Opens a file on first use and checks it, because ArrayRecord treats a missing or
        truncated file as empty."""
        with self._lock:
            reader = self._readers[shard]
            if reader is None:
                if not self._files[shard].exists():
                    raise ValueError("the file does not exist")
                options = "readahead_buffer_size:0"
                place = self._files[shard]
                if sys.platform != "linux":  # only there ArrayRecord itself reads buckets
                    place = files.fetch(place)
                reader = ArrayRecordReader(str(place), options, file_reader_buffer_size=2**15)
                actual, expected = reader.num_records(), self._counts[shard]
                if actual != expected:
                    raise ValueError(f"{actual} records found in the file, {expected} were written")
                self._readers[shard] = reader
            return reader


def shard_name(i: int, count: int, stem: str = "episodes") -> str:
    """Returns the file name of shard `i`."""
    return f"{stem}-{i:05d}-of-{count:05d}.arrayrecord"
