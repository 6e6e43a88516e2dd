"""Defines the reader that training expects of a source, independent of location and format.

The path of a source names it: a folder of `wamjax.data.records`; ``FORMAT:PATH``, recordings in a
format of `wamjax.ingest`, read in place; or ``MODULE:ATTRIBUTE``, a reader of your own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from wamjax import files
from wamjax.data.episodes import Episode
from wamjax.data.spec import Info

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Reader(Protocol):
    """Gives episodes by random access, to several threads; can be pickled for other processes.

    Attributes:
      path: location of the episodes, for messages.
      info: contents of the episodes.
      index: covers all episodes: "lengths"; "instructions", each once; and "tasks" and "success"
        per episode.
      lengths: int64 (n,): number of actions of each episode that is read.
      advice: what to do about a bad episode.
    """

    path: Any
    info: Info
    index: Mapping[str, Any]
    lengths: np.ndarray

    @property
    def advice(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Episode:
        """Reads the numbers and the instruction of an episode; `Episode.frames` reads pictures on
        demand.

        Raises:
          IndexError: the index is out of range.
          RecordError: the episode cannot be read.
        """
        ...

    def where(self, i: int) -> str:
        """Returns the location of an episode, for messages."""
        ...

    def digest(self, key: str, good: Sequence[bool] | None = None) -> str:
        """Returns the digest of the states or actions of episodes; '' if unknown."""
        ...

    def stored_statistics(self) -> dict[str, Any] | None:
        """Returns the statistics that are stored with the episodes, or None."""
        ...


def is_elsewhere(path: str) -> bool:
    """Returns whether a source's path names a format or a custom reader instead of a folder."""
    return _format(path) or bool(_NAME.fullmatch(path))


def open_elsewhere(path: str, root: files.Path, limit: int, skip_bad: int) -> Reader:
    """Opens a source whose path names a format or a custom reader.

    Args:
      path: ``FORMAT:PATH``, the path below `root`; or ``MODULE:ATTRIBUTE``: a function without
        arguments that gives a `wamjax.data.ingest.reader.Reader`.
      limit: number of episodes from the start; 0 = all.
      skip_bad: number of episodes that may have bad headers and are left out.

    Raises:
      FileNotFoundError, ValueError: the source does not exist, or leaves something undecided.
    """
    from wamjax.data.ingest import in_place  # here: what formats need is not always installed

    if _format(path):
        name, _, place = path.partition(":")
        place = str(files.below(root, place, path))
        return in_place.InPlace(in_place.Format(name, place), limit, skip_bad)
    return in_place.InPlace(in_place.Named(path), limit, skip_bad)


def _format(path: str) -> bool:
    from wamjax.data.ingest.reader import formats

    name, colon, place = path.partition(":")
    return bool(colon and place and not place.startswith("//")) and name in formats()
