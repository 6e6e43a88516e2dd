"""Stores pictures of episodes in records of their own, so that a window reads only its own frames.

A record holds neighbouring frames of one camera in one episode: as many as fit into `RECORD_BYTES`,
but at least one; for pictures that stayed video, whole groups of them (`film`). So the cost of a
window does not grow with the length of its episode. The record of the episode stores, for each
camera, the number of its first record and the first frame of each record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

from wamjax.data import film, images
from wamjax.data.film import Film
from wamjax.data.shards import RecordError, Shards

STEM = "frames"  # of the file names
RECORD_BYTES = 2**16


def split(pictures: Sequence[bytes], limit: int = RECORD_BYTES) -> list[int]:
    """Returns the first frame of each record."""
    starts, size = [], 0
    for i, picture in enumerate(pictures):
        if not starts or size + len(picture) > limit:
            starts.append(i)
            size = 0
        size += len(picture)
    return starts


def pack(episode: int, camera: str, start: int, pictures: Sequence[bytes]) -> bytes:
    """Packs a record."""
    values = {"episode": episode, "camera": camera, "start": start, "frames": list(pictures)}
    return msgpack.packb(values)


def pack_video(episode: int, camera: str, start: int, part: Film) -> bytes:
    """Packs a record of video."""
    values = {"episode": episode, "camera": camera, "start": start, "video": part.to_record()}
    return msgpack.packb(values)


class Frames(Sequence):
    """Holds the encoded pictures of a camera in an episode, read on access.

    It caches only the last record. Safe to use from several threads.

    Args:
      shards: shards of the records.
      episode, camera: the pictures' episode and camera.
      place: {"first": number of the first record, "starts": first frame of each record, "count":
        number of frames, "video": whether they are groups of video}.

    Raises:
      ValueError: `place` has another format.
    """

    def __init__(self, shards: Shards, episode: int, camera: str, place: Mapping[str, Any]):
        try:
            self._first, self._count = int(place["first"]), int(place["count"])
            self._starts = np.asarray(place["starts"], np.int64)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"camera {camera!r}: the place of its pictures is missing or damaged: {error!r}"
            ) from error
        edges = np.array([*self._starts, self._count])
        last = self._first + len(self._starts)
        if self._starts.ndim != 1 or edges[0] or (np.diff(edges) < 1).any():
            raise ValueError(
                f"camera {camera!r}: its records start at frames {edges[:-1].tolist()}, which must "
                f"ascend from 0 to below {self._count}"
            )
        if self._first < 0 or last > len(shards):
            raise ValueError(
                f"camera {camera!r}: it names records {self._first} to {last - 1}, but there are "
                f"{len(shards)}"
            )
        self._shards, self._episode, self._camera = shards, episode, camera
        self.is_video = bool(place.get("video", False))
        self._last: tuple[int, list[bytes] | Film] = (-1, [])

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"Frames({self._count} of {self._camera!r}, episode {self._episode})"

    def __eq__(self, other) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]  # supports negative indices; raises IndexError
        if self.is_video:
            return images.encode(self.decoded([i])[0])
        record = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._held(record)[i - self._starts[record]]

    def decoded(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Decodes some frames of video, ascending: uint8 (h, w, 3) each."""
        at = np.searchsorted(self._starts, np.asarray(indices), side="right") - 1
        groups = []
        for record in np.unique(at).tolist():
            start = int(self._starts[record])
            inside = [int(i) - start for i, k in zip(indices, at, strict=True) if k == record]
            groups += self._held(record).wanted(inside)
        return film.decode(groups)

    def _held(self, record: int) -> list[bytes] | Film:
        """Returns a record; the last one is cached."""
        number, pictures = self._last
        if number != record:
            pictures = self._read(record)
            self._last = record, pictures
        return pictures

    def _read(self, record: int) -> list[bytes] | Film:
        start = int(self._starts[record])
        end = [*self._starts[1:], self._count][record]
        number = self._first + record
        try:
            values = msgpack.unpackb(self._shards.read(number))
            at = values["episode"], values["camera"], values["start"]
            if at != (self._episode, self._camera, start):
                raise ValueError(f"it belongs to episode {at[0]}, camera {at[1]!r}, frame {at[2]}")
            if self.is_video:
                part = Film.of_record(values["video"])
                if len(part) != end - start:
                    raise ValueError(f"it shows {len(part)} frames, {end - start} were written")
                return part
            pictures = values["frames"]
            if len(pictures) != end - start or not all(isinstance(x, bytes) for x in pictures):
                raise ValueError(f"it holds {len(pictures)} frames, {end - start} were written")
            return pictures
        except (RuntimeError, ValueError, KeyError, TypeError, IndexError,
                msgpack.UnpackException) as error:  # fmt: skip
            file, position = self._shards.locate(number)
            raise RecordError(
                f"{file}: record {position} (episode {self._episode}, camera {self._camera!r}, "
                f"frame {start}) cannot be read: {error}. Copy the file again from where it came"
            ) from error
