"""Stores episodes on disk: a folder of ArrayRecord shards, one msgpack record per episode.

    spec.json         contents of the episodes (`wamjax.data.spec.Info`)
    index.json        lengths, tasks and digests of the episodes, records in each shard: windows are
                      planned from it without reading a record
    statistics.json   statistics of actions and proprio, with the digest of their episodes
    episodes-00000-of-0000N.arrayrecord   everything but the pictures
    frames-00000-of-0000N.arrayrecord     the pictures, see `wamjax.data.frames`

Pictures are read only when a frame of them is needed. Arrays are stored as (dtype, shape, bytes);
nothing is pickled. Format 1, with the pictures in the episodes' records, can still be read.
"""

from __future__ import annotations

import _thread
import contextlib
import dataclasses
import functools
import glob
import itertools
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from wamjax import files, locks
from wamjax.console import say
from wamjax.data import frames, normalize
from wamjax.data.episodes import Episode, check, pack, unpack
from wamjax.data.film import Film
from wamjax.data.ingest.guess import advice
from wamjax.data.shards import OPTIONS, RecordError, Shards, shard_name
from wamjax.data.spec import Info

SPEC = "spec.json"

__all__ = [
    "Episode",
    "Reader",
    "RecordError",
    "Writer",
    "lock",
    "pack",
    "read_json",
    "shard_name",
    "unpack",
    "write_json",
]


class Writer:
    """Writes a data set into a hidden folder beside `path`, and renames it when it is complete.

    It is a context manager: leaving it with an exception removes the written files.

    Args:
      path: folder of the data set; must not exist.
      info: what the episodes hold; every episode is checked against it.
      shard_bytes: size beyond which a new shard starts.
    """

    def __init__(self, path: str | os.PathLike, info: Info, shard_bytes: int = 2**28):
        self.path = files.path(path)
        self.info = info
        self._shard_bytes = shard_bytes
        name = f"{_partial(self.path)}{socket.gethostname()}-{os.getpid()}"
        self._folder = self.path.with_name(name)
        self._index: dict[str, list] = {"lengths": [], "tasks": [], "success": [], "shards": []}
        if info.cameras:
            self._index["frames"] = []
        self._instructions: set[str] = set()
        self._arrays: dict[str, list[np.ndarray]] = {"proprio": []}
        if not info.action_free:
            self._arrays["actions"] = []
        self._digests: dict[str, list[str]] = {key: [] for key in self._arrays}
        self._held = contextlib.ExitStack()
        self._drafts = contextlib.ExitStack()  # of the shards that are being written
        self._shard: ArrayRecordWriter | None = None
        self._frames: ArrayRecordWriter | None = None
        self._size = self._records = 0  # bytes of this shard, records of frames of all

    def __enter__(self) -> Writer:
        if files.is_there(self.path, SPEC):
            raise FileExistsError(
                f"{self.path} exists already: write to another folder, or remove it first"
            )
        _remove_orphans(self.path)
        files.remove(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        if not files.is_remote(self._folder):  # in a bucket the name belongs to this process alone
            self._held.enter_context(lock(self._folder))
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._complete()
            else:
                self._close_shard()
        finally:
            self._held.close()
            self._drafts.close()
            files.remove(self._folder)

    def write(self, episode: Episode) -> None:
        """Appends an episode.

        Raises:
          ValueError: the episode does not match `info`, or holds non-finite numbers.
        """
        number = len(self._index["lengths"])
        try:
            check(episode, self.info)
        except ValueError as error:
            raise ValueError(f"episode {number} (task {episode.task!r}): {error}") from error
        if self._shard is None or self._size > self._shard_bytes:
            self._close_shard()
            self._open_shard()
        data = pack(episode, self._write_frames(number, episode))
        self._shard.write(data)
        self._size += len(data)
        self._index["shards"][-1] += 1
        self._index["lengths"].append(episode.length)
        self._index["tasks"].append(episode.task)
        self._index["success"].append(bool(episode.success))
        self._instructions.add(episode.instruction)
        for key, kept in self._arrays.items():
            kept.append(np.asarray(getattr(episode, key), np.float32))
            self._digests[key].append(normalize.digest(kept[-1]))

    def note(self, name: str, value: Any) -> None:
        """Writes JSON next to the episodes, such as a note on their origin."""
        write_json(self._folder / name, value)

    def _write_frames(self, number: int, episode: Episode) -> dict[str, Any]:
        """Appends the pictures of an episode and returns their location."""
        places = {}
        for camera, pictures in episode.images.items():
            is_video = isinstance(pictures, Film)
            if is_video:
                parts = pictures.parts(frames.RECORD_BYTES)
                starts = list(itertools.accumulate([0, *map(len, parts[:-1])]))
            else:
                starts = frames.split(pictures)
            places[camera] = {"first": self._records, "starts": starts, "count": len(pictures)}
            places[camera] |= {"video": True} if is_video else {}
            ends = [*starts[1:], len(pictures)]
            for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
                if is_video:
                    data = frames.pack_video(number, camera, start, parts[i])
                else:
                    data = frames.pack(number, camera, start, pictures[start:end])
                self._frames.write(data)
                self._size += len(data)
            self._records += len(starts)
            self._index["frames"][-1] += len(starts)
        return places

    def _complete(self) -> None:
        self._close_shard()
        if not self._index["lengths"]:
            raise ValueError(f"no episode was written to {self.path}")
        count = len(self._index["shards"])
        for draft in files.glob(self._folder, "*.draft"):
            stem, i = draft.stem.split("-")
            draft.rename(self._folder / shard_name(int(i), count, stem))
        index = self._index | {"instructions": sorted(self._instructions)}
        write_json(self._folder / "index.json", index | {"digests": self._digests})
        write_json(self._folder / "statistics.json", normalize.statistics(self._arrays))
        write_json(self._folder / SPEC, self.info.to_json())
        (self._folder / "lock").unlink(missing_ok=True)
        files.move(self._folder, self.path, last=SPEC)

    def _open_shard(self) -> None:
        i = len(self._index["shards"])
        self._shard = self._writer(f"episodes-{i:05d}.draft")
        self._index["shards"].append(0)
        if self.info.cameras:
            self._frames = self._writer(f"{frames.STEM}-{i:05d}.draft")
            self._index["frames"].append(0)
        self._size = 0

    def _writer(self, name: str) -> ArrayRecordWriter:
        place = self._drafts.enter_context(files.draft(self._folder / name))
        return ArrayRecordWriter(str(place), OPTIONS)

    def _close_shard(self) -> None:
        for shard in (self._shard, self._frames):
            if shard is not None:
                shard.close()
        self._shard = self._frames = None
        self._drafts.close()  # into their folder


class Reader:
    """Reads the episodes of a data set by random access; safe to read from several threads.

    Args:
      path: folder of the data set.
      limit: number of episodes from the start; 0 = all.

    Raises:
      FileNotFoundError: the data set does not exist.
      ValueError: it has another format, or fewer episodes than `limit`.
    """

    def __init__(self, path: str | os.PathLike, limit: int = 0):
        self.path = files.path(path)
        if not (self.path / SPEC).exists():
            what = advice(self.path) or (
                f"collect one by `python -m wamjax.collect --out={self.path}`, make one of what "
                "others recorded by wamjax.ingest, or correct config.data"
            )
            raise FileNotFoundError(f"there is no data set in {self.path} (no spec.json); {what}")
        self.info = Info.from_json(read_json(self.path / SPEC), f"{self.path}/{SPEC}")
        self.index = read_json(self.path / "index.json")
        if lacks := [k for k in ("lengths", "shards") if k not in self.index]:
            raise ValueError(f"{self.path}/index.json lacks {lacks}: copy it again from where it "
                             "came, or write the data set again")  # fmt: skip
        available = len(self.index["lengths"])
        if not 0 <= limit <= available:
            raise ValueError(
                f"{self.path} has {available} episodes, so it cannot give {limit}: correct its "
                "limit"
            )
        self.limit = limit or available
        self.lengths = np.asarray(self.index["lengths"][: self.limit], np.int64)
        self._shards = Shards(self.path, self.index["shards"])
        self._frames = Shards(self.path, self.index.get("frames", ()), frames.STEM)
        self._instructions = frozenset(self.index.get("instructions", ()))
        self._good = np.zeros(self.limit, bool)  # checked once

    def __len__(self) -> int:
        return self.limit

    def __repr__(self) -> str:
        return f"Reader({str(self.path)!r}, {self.limit} of {len(self.index['lengths'])} episodes)"

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Episode:
        """Returns episode `i`.

        Raises:
          IndexError: the index is out of range.
          RecordError: the episode cannot be read.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"episode {i} of {len(self)} in {self.path}")
        try:
            episode = unpack(self._shards.read(i))
            if episode.length != self.lengths[i]:
                raise ValueError(
                    f"it has {episode.length} steps, index.json says {self.lengths[i]}"
                )
            episode = dataclasses.replace(episode, images=self._images(i, episode.images))
            if not self._good[i]:
                self._check(i, episode)
                self._good[i] = True
            return episode
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise RecordError(f"{self.where(i)} cannot be read: {error}. {self.advice}") from error

    def where(self, i: int) -> str:
        """Returns file and record of an episode, for messages."""
        file, position = self._shards.locate(i)
        return f"{file}: record {position} (episode {i})"

    @property
    def advice(self) -> str:
        """Returns what to do about a bad record."""
        again = (f"remove {self.path} and collect it again" if self.info.collection
                 else "write the data set again from its recordings")  # fmt: skip
        return f"Copy the file again from where it came, {again}, or pass over it by data.skip_bad"

    def digest(self, key: str, good: Sequence[bool] | None = None) -> str:
        """Returns the digest of the states or actions of the episodes; '' if they were written
        without.

        Args:
          good: mask of episodes to include; None = all.
        """
        digests = self._digests(key)[: self.limit]
        if good is not None:
            digests = [x for x, take in zip(digests, good, strict=False) if take]
        return normalize.digest_of(digests) if digests else ""

    def _digests(self, key: str) -> Sequence[str]:
        return self.index.get("digests", {}).get(key, ())

    def _images(self, i: int, stored: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the pictures of an episode, or where they can be read."""
        return {
            camera: frames.Frames(self._frames, i, camera, x) if isinstance(x, Mapping) else x
            for camera, x in stored.items()
        }

    def _check(self, i: int, episode: Episode) -> None:
        check(episode, self.info)
        if self._instructions and episode.instruction not in self._instructions:
            raise ValueError(f"instruction {episode.instruction!r} is not one of index.json")
        for key in normalize.KEYS:
            digests = self._digests(key)
            if digests and normalize.digest(getattr(episode, key)) != digests[i]:
                raise ValueError(f"{key} is not what was written there")

    def stored_statistics(self) -> dict[str, Any]:
        """Returns the statistics that the writer computed over all episodes."""
        return read_json(self.path / "statistics.json")


def _partial(path: files.Path) -> str:
    """Returns the name prefix of the folders that a data set is written into."""
    return f".{path.name}.partial-"


def lock(folder: files.Path):
    """Marks a folder as being written until the context ends or the process dies.

    Raises:
      OSError: another process is writing it.
    """
    if files.is_remote(folder):
        return locks.hold(folder.with_name(f"{folder.name}.lock"), functools.partial(_stop, folder))
    file = (folder / "lock").open("w")
    locks.lock(file)
    return file


def _stop(folder: files.Path, other: str) -> None:
    say(f"{folder} was taken by {other}, which writes it now: stopping")
    _thread.interrupt_main()


@contextlib.contextmanager
def turn(path: files.Path) -> Iterator[None]:
    """Waits while another process makes `path`, then holds the lock so that others wait for this
    one.

    The lock is a file next to it, which the system releases when a process ends for any reason. On
    a file system without locks nobody waits; data made twice is still complete, since it appears by
    one rename.
    """
    place = path.with_name(f".{path.name}.lock")
    files.make_folder(place.parent, "set config.data.root to a folder that can be written to, or "
                     "XDG_CACHE_HOME, below which data is kept if data.root is empty")  # fmt: skip
    if files.is_remote(path):
        say(f"{path} is in a bucket, which has no locks: another process that makes it now does "
            "the same work, and the first one counts")  # fmt: skip
        yield
        return
    while True:
        with place.open("a") as file:
            if not locks.lock(file, wait=True):
                yield
                return
            if not _is_at(file, place):
                continue  # its owner has removed it
            try:
                yield
            finally:
                place.unlink(missing_ok=True)
            return


def _is_at(file, place: files.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(place))
    except FileNotFoundError:
        return False


def _remove_orphans(path: files.Path) -> None:
    """Removes folders left by killed processes."""
    for folder in files.glob(path.parent, f"{glob.escape(_partial(path))}*"):
        if files.is_remote(folder):
            say(f"{folder} is of a process that was killed, or is still writing: remove it if "
                f"nothing writes {path}")  # fmt: skip
        if not (folder / "lock").exists():
            continue
        try:
            with lock(folder):
                pass
        except OSError:
            continue  # its process is alive
        files.remove(folder)


def write_json(path: files.Path, value: Any) -> None:
    """Writes a line of JSON."""
    files.write_text(path, json.dumps(value) + "\n")


def read_json(path: files.Path) -> Any:
    """Reads JSON; a ValueError names the file."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy it again from where it came, or "
                         "write the data set again") from error  # fmt: skip
