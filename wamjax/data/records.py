"""Episodes on disk: a folder of ArrayRecord shards, one msgpack record for each episode.

    spec.json         what the episodes hold (`wamjax.data.spec.Info`)
    index.json        lengths and tasks of the episodes, records in each shard: windows are planned
                      from it without reading a record
    statistics.json   of actions and proprio
    episodes-00000-of-0000N.arrayrecord

Pictures stay encoded until a frame of them is wanted. Arrays are stored as (dtype, shape, bytes);
nothing is pickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from wamjax import disk
from wamjax.data import images, normalize
from wamjax.data.shards import OPTIONS, Shards, shard_name
from wamjax.data.spec import Info


class RecordError(ValueError):
    """A record that cannot be read; says which file and record, and what to do."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode of T actions and T + 1 observations.

    Attributes:
      images: camera -> T + 1 encoded pictures.
      proprio: f32 (T + 1, p), robot units.
      actions: f32 (T, a), robot units; (T, 0) where they are not recorded.
      instruction: in words.
      success: whether the task was achieved.
      returns: f32 (T,), discounted sum of the rewards to come.
      task: its name.
      seed: what the episode was made from.
    """

    images: Mapping[str, Sequence[bytes]]
    proprio: np.ndarray
    actions: np.ndarray
    instruction: str
    success: bool
    returns: np.ndarray
    task: str = ""
    seed: int = 0

    @property
    def length(self) -> int:
        """T."""
        return len(self.actions)

    def frames(self, camera: str, indices: Sequence[int]) -> np.ndarray:
        """Decodes some frames of a camera, each one once: uint8 (len(indices), h, w, 3).

        Raises:
          ValueError: no such camera, or a picture that cannot be decoded.
        """
        if camera not in self.images:
            raise ValueError(f"there is no camera {camera!r}; the cameras are {list(self.images)}")
        unique, back = np.unique(indices, return_inverse=True)
        try:
            return np.stack([images.decode(self.images[camera][i]) for i in unique])[back]
        except ValueError as error:
            raise ValueError(f"camera {camera!r}, frames {unique.tolist()}: {error}") from error


_ARRAYS = ("proprio", "actions", "returns")


def pack(episode: Episode) -> bytes:
    """An episode as a msgpack record."""
    record = {f.name: getattr(episode, f.name) for f in dataclasses.fields(episode)}
    record["images"] = {k: list(v) for k, v in episode.images.items()}
    for key in _ARRAYS:
        x = np.ascontiguousarray(record[key], "<f4")
        record[key] = {"dtype": x.dtype.str, "shape": x.shape, "data": x.tobytes()}
    return msgpack.packb(record)


def unpack(data: bytes) -> Episode:
    """The reverse of `pack`.

    Raises:
      ValueError: the bytes are not such a record.
    """
    try:
        record = msgpack.unpackb(data)
        for key in _ARRAYS:
            stored = record[key]
            x = np.frombuffer(stored["data"], np.dtype(stored["dtype"]))
            record[key] = x.reshape(stored["shape"])
        return Episode(**record)
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise ValueError(f"not an episode: {error!r}") from error


class Writer:
    """Writes a data set into a hidden folder beside `path`, and renames it when it is complete.

    A context manager: leaving it by an exception removes what was written.

    Args:
      path: folder of the data set; must not exist.
      info: what the episodes hold; every episode is checked against it.
      shard_bytes: a new shard is begun beyond this size.
    """

    def __init__(self, path: str | os.PathLike, info: Info, shard_bytes: int = 2**28):
        self.path = pathlib.Path(path)
        self.info = info
        self._shard_bytes = shard_bytes
        name = f"{_partial(self.path)}{socket.gethostname()}-{os.getpid()}"
        self._folder = self.path.with_name(name)
        self._index: dict[str, list] = {"lengths": [], "tasks": [], "success": [], "shards": []}
        self._instructions: set[str] = set()
        self._arrays: dict[str, list[np.ndarray]] = {"proprio": []}
        if not info.action_free:
            self._arrays["actions"] = []
        self._shard: ArrayRecordWriter | None = None
        self._size = 0

    def __enter__(self) -> Writer:
        if self.path.exists():
            raise FileExistsError(f"{self.path} exists; remove it or write somewhere else")
        _remove_orphans(self.path)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._held = lock(self._folder)
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._complete()
            else:
                self._close_shard()
        finally:
            self._held.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def write(self, episode: Episode) -> None:
        """Appends an episode.

        Raises:
          ValueError: it does not fit `info`, or holds non-finite numbers.
        """
        _check(episode, self.info, len(self._index["lengths"]))
        if self._shard is None or self._size > self._shard_bytes:
            self._close_shard()
            name = self._folder / f"{len(self._index['shards']):05d}"
            self._shard = ArrayRecordWriter(str(name), OPTIONS)
            self._index["shards"].append(0)
            self._size = 0
        data = pack(episode)
        self._shard.write(data)
        self._size += len(data)
        self._index["shards"][-1] += 1
        self._index["lengths"].append(episode.length)
        self._index["tasks"].append(episode.task)
        self._index["success"].append(bool(episode.success))
        self._instructions.add(episode.instruction)
        for key, kept in self._arrays.items():
            kept.append(np.asarray(getattr(episode, key), np.float32))

    def _complete(self) -> None:
        self._close_shard()
        if not self._index["lengths"]:
            raise ValueError(f"no episode was written to {self.path}")
        for i in range(len(self._index["shards"])):
            (self._folder / f"{i:05d}").rename(self._folder / self._name(i))
        index = self._index | {"instructions": sorted(self._instructions)}
        write_json(self._folder / "index.json", index)
        write_json(self._folder / "statistics.json", normalize.statistics(self._arrays))
        write_json(self._folder / "spec.json", self.info.to_json())
        (self._folder / "lock").unlink()
        self._folder.rename(self.path)

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def _name(self, i: int) -> str:
        return shard_name(i, len(self._index["shards"]))


class Reader:
    """The episodes of a data set, by random access; safe to read from several threads.

    Args:
      path: folder of the data set.
      limit: only the first so many episodes; 0 = all.

    Raises:
      FileNotFoundError: there is no data set.
      ValueError: of another format, or fewer episodes than `limit`.
    """

    def __init__(self, path: str | os.PathLike, limit: int = 0):
        self.path = pathlib.Path(path)
        if not (self.path / "spec.json").exists():
            raise FileNotFoundError(
                f"there is no data set in {self.path} (no spec.json); collect one by "
                f"`python -m wamjax.collect --out={self.path}`, or correct config.data"
            )
        self.info = Info.from_json(read_json(self.path / "spec.json"), f"{self.path}/spec.json")
        self.index = read_json(self.path / "index.json")
        if lacks := [k for k in ("lengths", "shards") if k not in self.index]:
            raise ValueError(f"{self.path}/index.json lacks {lacks}: copy it again from where it "
                             f"came, or remove {self.path} and collect it again")  # fmt: skip
        available = len(self.index["lengths"])
        if not 0 <= limit <= available:
            raise ValueError(f"{limit} episodes are asked of {self.path}, which has {available}")
        self.limit = limit or available
        self.lengths = np.asarray(self.index["lengths"][: self.limit], np.int64)
        self._shards = Shards(self.path, self.index["shards"])

    def __len__(self) -> int:
        return self.limit

    def __repr__(self) -> str:
        return f"Reader({str(self.path)!r}, {self.limit} of {len(self.index['lengths'])} episodes)"

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Episode:
        """Episode `i`.

        Raises:
          IndexError: beyond the end.
          RecordError: it cannot be read.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"episode {i} of {len(self)} in {self.path}")
        try:
            episode = unpack(self._shards.read(i))
            if episode.length != self.lengths[i]:
                raise ValueError(f"{episode.length} steps, index.json says {self.lengths[i]}")
            return episode
        except (RuntimeError, IndexError, ValueError) as error:
            file, position = self._shards.locate(i)
            raise RecordError(
                f"{file}: record {position} (episode {i}) cannot be read: {error}. Copy the file "
                f"again from where it came, or remove {self.path} and collect it again"
            ) from error

    def stored_statistics(self) -> dict[str, Any]:
        """What the writer computed over all episodes."""
        return read_json(self.path / "statistics.json")


def _check(episode: Episode, info: Info, number: int) -> None:
    """An episode against what its data set holds; the error says what differs."""
    steps = len(episode.actions)
    action_dim = 0 if info.action_free else info.action_dim
    wanted = {
        "actions": (steps, action_dim),
        "proprio": (steps + 1, info.proprio_dim),
        "returns": (steps,),
    }
    where = f"episode {number} (task {episode.task!r})"
    if not steps:
        raise ValueError(f"{where} has no steps")
    for key, shape in wanted.items():
        value = np.asarray(getattr(episode, key))
        if value.shape != shape:
            raise ValueError(f"{where}: {key} is {value.shape}, the data set wants {shape}")
        if not np.isfinite(value).all():
            raise ValueError(f"{where}: {key} holds non-finite numbers")
    if set(episode.images) != set(info.cameras):
        raise ValueError(
            f"{where} has cameras {sorted(episode.images)}, the data set {sorted(info.cameras)}"
        )
    for camera, pictures in episode.images.items():
        if len(pictures) != steps + 1:
            raise ValueError(
                f"{where}: {len(pictures)} pictures of camera {camera!r}, {steps} actions need "
                f"{steps + 1}"
            )


def _partial(path: pathlib.Path) -> str:
    """Prefix of the folders that a data set is written into."""
    return f".{path.name}.partial-"


def lock(folder: pathlib.Path):
    """Marks a folder as being written, until what it returns is closed or the process dies.

    Raises:
      OSError: another process writes it.
    """
    file = (folder / "lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


@contextlib.contextmanager
def turn(path: pathlib.Path) -> Iterator[None]:
    """Waits while another process makes `path`, which is then there; others wait for this one.

    By a file beside it, which the system lets go when a process ends, however it ends. Where the
    file system knows no locks nobody waits: what is made twice is complete at one rename, too.
    """
    place = path.with_name(f".{path.name}.lock")
    disk.make_folder(place.parent, "set config.data.root to a folder that can be written to, or "
                     "XDG_CACHE_HOME, below which data is kept if data.root is empty")  # fmt: skip
    while True:
        with place.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                yield
                return
            if not _is_at(file, place):
                continue  # who held it has removed it
            try:
                yield
            finally:
                place.unlink(missing_ok=True)
            return


def _is_at(file, place: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), place.stat())
    except FileNotFoundError:
        return False


def _remove_orphans(path: pathlib.Path) -> None:
    """Folders left by processes that were killed."""
    for folder in path.parent.glob(f"{_partial(path)}*"):
        if not (folder / "lock").exists():
            continue
        try:
            lock(folder).close()
        except OSError:
            continue  # its process is alive
        shutil.rmtree(folder, ignore_errors=True)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a line of json."""
    path.write_text(json.dumps(value) + "\n")


def read_json(path: pathlib.Path) -> Any:
    """Reads json; a ValueError names the file."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); collect the data set again") from error
