"""Reads a source in a foreign format in place, as `wamjax.ingest` would convert it by default.

Every choice is left to the source; one that the source does not decide is an error. Pictures are
decoded when a window shows them; where that is expensive, as in videos, a data set converted by
`wamjax.ingest` is faster.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from wamjax import named
from wamjax.console import say
from wamjax.data import images
from wamjax.data.episodes import Episode, check
from wamjax.data.ingest import plan, steps
from wamjax.data.ingest.convert import Settings, numbered, numbers
from wamjax.data.ingest.reader import Entry, Reader, open_reader
from wamjax.data.shards import RecordError

HELD = 64  # episodes whose numbers stay in memory, since windows come in any order


@dataclasses.dataclass(frozen=True)
class Format:
    """Opens a source in a format of `wamjax.ingest`."""

    name: str
    place: str

    def __call__(self) -> Reader:
        return open_reader(self.name, self.place, {})

    def __str__(self) -> str:
        return f"{self.name}:{self.place}"


@dataclasses.dataclass(frozen=True)
class Named:
    """Opens a user-defined source by ``package.module:attribute``."""

    name: str

    def __call__(self) -> Reader:
        return named.resolve(self.name, "config.data.sources.*.path")()

    def __str__(self) -> str:
        return self.name


class InPlace:
    """Gives access to the episodes of a foreign source, see `wamjax.data.readers.Reader`.

    Args:
      source: opens the source; is pickled instead of its reader.
      limit: only the first `limit` episodes; 0 = all.
      skip_bad: how many episodes with bad headers may be skipped.

    Raises:
      FileNotFoundError: the source does not exist.
      ValueError: the source leaves a choice open, or has fewer episodes than `limit` or more bad
        ones than `skip_bad`.
    """

    advice = "Correct the source, or pass over the episode by data.skip_bad"

    def __init__(self, source: Format | Named, limit: int = 0, skip_bad: int = 0):
        self._source, self.path = source, str(source)
        self._open()
        entries = list(self._reader.episodes())
        bad = [entry for entry in entries if entry.error]
        if len(bad) > skip_bad:
            raise ValueError(f"{self.path}: {bad[0].error} ({len(bad)} bad episodes, more than "
                             f"config.data.skip_bad = {skip_bad})")  # fmt: skip
        if bad:
            say(f"{self.path}: {len(bad)} bad episodes are left out: {bad[0].error}")
        decided = plan.resolve(self._reader, entries, plan.Request())
        self._settings, self.info = decided.settings, decided.info
        for line in decided.warnings:
            say(f"warning: {self.path}: {line}")
        self._numbers = [i for i, entry in enumerate(entries) if not entry.error]
        self._entries = [entries[i] for i in self._numbers]
        available = len(self._entries)
        if not 0 <= limit <= available or not available:
            raise ValueError(f"{self.path} has {available} episodes, so it cannot give "
                             f"{limit or 'any'}: correct its limit")  # fmt: skip
        self._limit = limit or available
        final = self._reader.about.final
        lengths = [_length(entry, self._settings, final) for entry in self._entries]
        self.lengths = np.asarray(lengths[: self._limit], np.int64)
        self.index: dict[str, Any] = {
            "lengths": lengths,
            "instructions": sorted({entry.instruction for entry in self._entries}),
            "tasks": [entry.task or entry.instruction for entry in self._entries],
            "success": [entry.success is not False for entry in self._entries],
        }

    def _open(self) -> None:
        self._reader, self._lock = self._source(), threading.Lock()
        self._read = functools.lru_cache(HELD)(self._read_anew)

    def __getstate__(self) -> dict[str, Any]:
        here = ("_reader", "_lock", "_read")  # opened again after unpickling
        return {k: v for k, v in self.__dict__.items() if k not in here}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self._limit

    def __repr__(self) -> str:
        return f"InPlace({self.path!r}, {self._limit} of {len(self._entries)} episodes)"

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Episode:
        """See `wamjax.data.readers.Reader`."""
        if not 0 <= i < len(self):
            raise IndexError(f"episode {i} of {len(self)} in {self.path}")
        return self._read(i)

    def where(self, i: int) -> str:
        """See `wamjax.data.readers.Reader`."""
        return f"{self._entries[i].file} ({self._entries[i].name})"

    def digest(self, key: str, good: Sequence[bool] | None = None) -> str:
        """Returns '', since no digest is stored."""
        return ""

    def stored_statistics(self) -> None:
        """Returns None, since no statistics are stored."""

    def _read_anew(self, i: int) -> Episode:
        try:
            with self._lock:
                state, track, _ = numbers(self._reader, self._numbers[i], self._settings)
            episode = numbered(state, track, i, self._entries[i], self._settings)
            shown = {c: Pictures(self, i, c, track.observations) for c in self._settings.cameras}
            episode = dataclasses.replace(episode, images=shown)
            if episode.length != self.lengths[i]:
                raise ValueError(
                    f"it has {episode.length} steps, its header says {self.lengths[i]}"
                )
            check(episode, self.info)
            return _Seen(**{f.name: getattr(episode, f.name)
                            for f in dataclasses.fields(episode)})  # fmt: skip
        except (ValueError, KeyError, IndexError, OSError, RuntimeError) as error:
            raise RecordError(f"{self.where(i)} cannot be read: {error}. {self.advice}") from error

    def pictures(self, i: int, camera: str, observations: Sequence[int]) -> list[np.ndarray]:
        """Reads a camera's pictures of an episode at ascending observations of the source.

        Raises:
          RecordError: the pictures cannot be read.
        """
        try:
            with self._lock:
                asked = self._settings.cameras[camera]
                found = list(self._reader.frames(self._numbers[i], asked, observations))
            if len(found) != len(observations):
                raise ValueError(f"it has {len(found)} of {len(observations)} pictures")
            return [images.decode(x) if isinstance(x, bytes) else np.asarray(x) for x in found]
        except (ValueError, KeyError, IndexError, OSError, RuntimeError) as error:
            at = f"camera {camera!r}, observations {list(observations)}"
            raise RecordError(f"{self.where(i)}: {at}: {error}. {self.advice}") from error


class Pictures(Sequence):
    """Reads the pictures of a camera in an episode on access, and encodes those that it returns.

    Args:
      observations: the source's observation for each of the episode's.
    """

    def __init__(self, reader: InPlace, episode: int, camera: str, observations: np.ndarray):
        self._reader, self._episode, self._camera = reader, episode, camera
        self._observations = observations

    def __len__(self) -> int:
        return len(self._observations)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        return images.encode(self.decoded([i])[0])

    def decoded(self, indices: Sequence[int]) -> np.ndarray:
        """Reads some pictures, each of them once: uint8 (len(indices), h, w, 3)."""
        at, back = np.unique(self._observations[np.asarray(indices)], return_inverse=True)
        found = self._reader.pictures(self._episode, self._camera, at.tolist())
        if len({x.shape for x in found}) > 1:
            raise ValueError(f"camera {self._camera!r}: pictures {at.tolist()} differ in size")
        return np.stack(found)[back]


class _Seen(Episode):
    """Returns pictures without encoding and decoding them."""

    def frames(
        self, camera: str, indices: Sequence[int], size: tuple[int, int] | None = None
    ) -> np.ndarray:
        """See `Episode.frames`."""
        if camera not in self.images:
            raise ValueError(f"there is no camera {camera!r}; the cameras are {list(self.images)}")
        out = self.images[camera].decoded(indices)
        if size is not None and out.shape[1:3] != tuple(size):
            raise ValueError(f"camera {camera!r}: pictures are {out.shape[1]} x {out.shape[2]}, "
                             f"not {size[0]} x {size[1]}")  # fmt: skip
        return out


def _length(entry: Entry, settings: Settings, final: bool) -> int:
    """Returns how many actions of an episode remain, by its header."""
    track = steps.pair(np.zeros((entry.length, 1)), None, settings.pairing, final)
    return len(steps.finish(track, settings.end).actions)
