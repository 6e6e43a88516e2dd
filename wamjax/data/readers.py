"""What a source of episodes is to training, wherever its files are and whatever they look like.

The path of a source names it: a folder that `wamjax.data.records` wrote; ``FORMAT:PATH`` of what
others recorded, in a format of `wamjax.ingest`, read in place; or ``MODULE:ATTRIBUTE`` of one's
own.
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
    """Episodes by random access; read from several threads, pickled for other processes.

    Attributes:
      path: where they are, for messages.
      info: what they hold.
      index: of all that there are: "lengths"; "instructions", each once; of each episode "tasks"
        and "success".
      lengths: int64 (n,): the actions of those that are read.
      advice: what to do about a bad one.
    """

    path: Any
    info: Info
    index: Mapping[str, Any]
    lengths: np.ndarray

    @property
    def advice(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Episode:
        """Reads an episode: its numbers and its instruction. Its pictures are read when
        `Episode.frames` asks for those of a camera at some steps.

        Raises:
          IndexError: beyond the end.
          RecordError: it cannot be read.
        """
        ...

    def where(self, i: int) -> str:
        """Says where an episode is, for messages."""
        ...

    def digest(self, key: str, good: Sequence[bool] | None = None) -> str:
        """Gives the digest of the states or actions of episodes; '' where nothing says it."""
        ...

    def stored_statistics(self) -> dict[str, Any] | None:
        """Reads the statistics that are stored with all episodes; None where none are."""
        ...


def is_elsewhere(path: str) -> bool:
    """Whether the path of a source names a format or a reader of one's own, and no folder."""
    return _format(path) or bool(_NAME.fullmatch(path))


def open_elsewhere(path: str, root: files.Path, limit: int, skip_bad: int) -> Reader:
    """Opens a source whose path names a format or a reader of one's own.

    Args:
      path: ``FORMAT:PATH``, the path below `root`; or ``MODULE:ATTRIBUTE``: a function without
        arguments that gives a `wamjax.data.ingest.reader.Reader`.
      limit: the first so many episodes; 0 = all.
      skip_bad: so many may be bad by their headers and are left out.

    Raises:
      FileNotFoundError, ValueError: there is no such source, or it leaves something undecided.
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
