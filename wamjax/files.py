"""Handles the paths of runs, data sets, checkpoints, bundles and caches, local or in a bucket.

Every such path is an `etils.epath.Path`, made by `path`: of a folder, or ``gs://BUCKET/...``. Files
appear complete or not at all: on a disk by a rename; in a bucket an object appears at the end of
its upload, and the file that marks a folder goes last. Files that a library cannot write or read in
a bucket are written locally and sent (`draft`), or fetched once (`fetch`).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import fnmatch
import functools
import hashlib
import io
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import IO

from etils import epath

from wamjax.console import say

Path = epath.Path
BUCKET = "gs://"
FULL = (errno.ENOSPC, errno.EDQUOT)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/")
_AT_ONCE = 2**22  # bytes: gcsfs sends so much in one call, which is seen as a whole or not at all
_THREADS = 16  # transfers at a time


class NotWritable(OSError):
    """A place cannot be written to or reached; the message says what to set instead."""


def path(place: str | os.PathLike, name: str = "the path") -> Path:
    """Returns the path of a file or folder with the home expanded; `name` is the flag or key that
    gave it.

    Raises:
      NotWritable: it is an address of another kind than gs://, which would become a folder named
        "s3:"; or what reads buckets is not installed.
    """
    text = os.fspath(place)
    if text.startswith(BUCKET):
        _prepare_buckets(f"{name}={text}")
    elif _ADDRESS.match(text):
        raise NotWritable(
            f"{name}={text} is an address, and this wamjax reads and writes gs://BUCKET/... and "
            "local or mounted folders alone: mount the bucket and give the folder where it is "
            "mounted, or give a local folder and copy it afterwards"
        )
    out = epath.Path(text)
    return out if is_remote(out) else out.expanduser()


def name(place: str | os.PathLike) -> str:
    """Returns the last part of a path."""
    return pathlib.PurePosixPath(os.fspath(place)).name


def is_remote(place: str | os.PathLike) -> bool:
    """Returns whether a path lies in a bucket."""
    return os.fspath(place).startswith(BUCKET)


def below(root: Path, place: str | os.PathLike, name: str = "the path") -> Path:
    """Resolves a config's path below `root`, unless it is absolute; see `path`."""
    out = path(place, name)
    return out if is_remote(out) or out.is_absolute() else root / out


def absolute(place: str | os.PathLike) -> Path:
    """Returns the absolute path; addresses are unchanged."""
    out = path(place)
    return out if is_remote(out) else epath.Path(os.path.abspath(out))


@functools.cache
def _prepare_buckets(asked: str) -> None:
    os.environ.setdefault("EPATH_USE_TF", "false")  # else epath would import TensorFlow for it
    try:
        import fsspec.config
        import gcsfs  # noqa: F401  what epath reads buckets by
    except ImportError:
        raise NotWritable(
            f"{asked} is in a bucket, which needs gcsfs: pip install 'wamjax[gcs]'"
        ) from None

    # What other processes write is to be seen; a list that is kept would hide it.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def reach(place: Path, fix: str) -> None:
    """Sends a request to a bucket to check access; does nothing for local paths.

    Raises:
      NotWritable: the bucket does not answer, or denies access; ends with `fix`.
    """
    if not is_remote(place):
        return
    try:
        place.exists()
    except Exception as error:  # of the network, of permissions: whatever gcsfs lets through
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise NotWritable(
            f"cannot reach {place} ({text}): log in by `gcloud auth application-default login`, "
            f"or {fix}"
        ) from None


def make_folder(folder: Path, fix: str) -> None:
    """Makes a writable folder; a bucket has no folders and is only checked for access.

    Raises:
      NotWritable: the folder cannot be made, reached, or written to; ends with `fix`.
    """
    if is_remote(folder):
        reach(folder, fix)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in FULL:
            raise
        raise NotWritable(f"cannot make the folder {folder} ({error.strerror}): {fix}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise NotWritable(f"the folder {folder} cannot be written to: {fix}")


def size(place: str | os.PathLike) -> int:
    """Returns the bytes of a file, or of the files in a folder."""
    place = path(place)
    if not is_remote(place):
        folder = os.path.isdir(place)
        return sum(map(os.path.getsize, _inside(place))) if folder else os.path.getsize(place)
    return sum(x.stat().length for x in _inside(place)) if place.is_dir() else place.stat().length


def _inside(folder: Path) -> list[Path]:
    """Returns all files below a folder."""
    start = BUCKET if is_remote(folder) else ""  # fsspec leaves it out
    return sorted(
        epath.Path(start + os.fspath(top).removeprefix(start)) / name
        for top, _, names in folder.walk()
        for name in names
    )


# ---- writing ----


@contextlib.contextmanager
def atomic(place: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Opens a file to write, "w" or "wb"; after a crash it is the old one or the new one, never
    partial.

    Its bytes reach the disk before it replaces the old one; otherwise a machine crash leaves an
    empty file under the name. In a bucket it is sent when the block ends.
    """
    place = path(place)
    if is_remote(place):
        with tempfile.TemporaryFile() as data:
            text = io.TextIOWrapper(data, "utf-8") if mode == "w" else data
            yield text
            text.flush()
            data.seek(0)
            _send(data, place)
            if mode == "w":
                text.detach()
        return
    temporary = _beside(place)
    try:
        with temporary.open(mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(place: str | os.PathLike, text: str) -> None:
    """Writes a text, see `atomic`."""
    with atomic(place) as file:
        file.write(text)


@contextlib.contextmanager
def draft(
    place: str | os.PathLike, last: str = "", replace: bool = False
) -> Iterator[pathlib.Path]:
    """Gives a local place for a file or folder that appears at `place` when it is complete.

    Args:
      last: file that marks a complete folder; in a bucket it goes last.
      replace: whether to replace an existing file.

    Raises:
      FileExistsError: `place` exists and may not be replaced.
    """
    place = absolute(place)
    if not replace and is_there(place, last):
        raise FileExistsError(f"{place} exists; remove it or choose another output")
    if is_remote(place):
        with tempfile.TemporaryDirectory(prefix="wamjax-") as folder:
            yield pathlib.Path(folder) / place.name
            _send_all(epath.Path(folder) / place.name, place, last)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(_beside(place))
    try:
        yield temporary
        os.replace(temporary, place)
    finally:
        remove(temporary)


def move(folder: Path, place: Path, last: str) -> None:
    """Moves a folder of files to its final place; in a bucket `last` goes last.

    Raises:
      FileExistsError: the place exists.
    """
    if is_there(place, last):
        raise FileExistsError(f"{place} exists already: choose another place, or remove it first")
    if not is_remote(place):
        os.rename(folder, place)
        return
    remove(place)  # left by an interrupted move
    mark = place / ".incomplete"  # epath moves files only to where there are some
    mark.write_text(f"is being moved from {folder}\n")
    for file in _inside(folder):
        if file.name != last:
            file.rename(place / file.name)
    (folder / last).rename(place / last)
    mark.unlink()


def remove(place: str | os.PathLike) -> None:
    """Removes a file or folder with its contents, if it exists."""
    if is_remote(place):
        epath.Path(place).rmtree(missing_ok=True)
    elif os.path.isdir(place):
        shutil.rmtree(place, ignore_errors=True)
    else:
        pathlib.Path(place).unlink(missing_ok=True)


class Journal:
    """Appends lines to a text file. A bucket cannot append: there `flush` sends the whole text,
    always if it must, else in at most a twentieth of the time and at most every 30 s."""

    def __init__(self, place: Path):
        self._place, self._due, self._new = place, 0.0, False
        self._remote = is_remote(place)
        self._file = io.StringIO() if self._remote else place.open("a")
        if self._remote and place.exists():
            self._file.write(place.read_text())

    def write(self, text: str) -> None:
        """Appends text."""
        self._file.write(text)
        self._new = True

    def flush(self, must: bool = False) -> None:
        """Makes the text visible to others; with `must` it also survives a crash."""
        if not self._remote:
            self._file.flush()
            if must:
                os.fsync(self._file.fileno())
        elif self._new and (must or time.monotonic() >= self._due):
            self._new, begin = False, time.monotonic()
            write_text(self._place, self._file.getvalue())
            end = time.monotonic()
            self._due = end + max(30.0, 20 * (end - begin))

    def close(self) -> None:
        """Writes the rest."""
        self.flush(must=self._remote)
        self._file.close()


def is_there(place: Path, last: str) -> bool:
    """Returns whether a folder of `draft` or `move` exists; in a bucket only if it was sent
    completely."""
    return (place / last if last and is_remote(place) else place).exists()


def glob(folder: Path, pattern: str) -> list[Path]:
    """Returns the paths in a folder that match a pattern like ``*.json``, in order; none if it does
    not exist."""
    if not folder.is_dir():
        return []
    return sorted(x for x in folder.iterdir() if fnmatch.fnmatchcase(x.name, pattern))


def _beside(place: Path) -> Path:
    """Returns a name of this process in the same folder, with the same ending."""
    return place.with_name(f".{os.getpid()}-{place.name}")


def _send(data: IO[bytes], place: Path) -> None:
    """Sends a file to a bucket; one of several calls under another name first, since gcsfs closes
    what is interrupted, and then it would be seen as it is."""
    if data.seek(0, os.SEEK_END) <= _AT_ONCE:
        data.seek(0)
        place.write_bytes(data.read())
        return
    data.seek(0)
    part = _beside(place)
    with part.open("wb") as file:
        shutil.copyfileobj(data, file, 2**24)
    part.replace(place)


def _send_all(source: Path, place: Path, last: str) -> None:
    if not source.is_dir():
        with source.open("rb") as data:
            _send(data, place)
        return
    remove(place)  # left by an interrupted transfer

    def send(file: Path) -> None:
        with file.open("rb") as data:
            _send(data, place / file.relative_to(source))

    files = [file for file in _inside(source) if file != source / last]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(send, files))
    if last:
        send(source / last)


# ---- reading ----


def cache() -> pathlib.Path:
    """Returns the local folder for files that can be made or fetched again."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "wamjax"


def fetch(place: str | os.PathLike) -> pathlib.Path:
    """Returns a local file with the same bytes, for libraries that cannot read buckets: the file
    itself, or a copy that is cached by the digest of its address, size and time.

    Raises:
      FileNotFoundError: the file does not exist.
      NotWritable: there is no room for it, or the file changed.
    """
    place = path(place)
    if not is_remote(place):
        return pathlib.Path(place)
    about = place.stat()
    digest = hashlib.sha256(f"{place} {about.length} {about.mtime}".encode()).hexdigest()[:20]
    copy = cache() / "fetched" / digest / place.name
    _fetch({place: copy})
    return copy


def fetch_all(place: str | os.PathLike) -> pathlib.Path:
    """Returns a local file or folder with the same content, likewise; after an interruption only
    the missing files are copied.

    Raises:
      FileNotFoundError, NotWritable: see `fetch`.
    """
    place = path(place)
    if not is_remote(place) or not place.is_dir():
        return fetch(place)
    stats = {file: file.stat() for file in _inside(place)}
    if not stats:
        raise FileNotFoundError(2, "no file below", os.fspath(place))
    listing = [f"{file} {about.length} {about.mtime}" for file, about in stats.items()]
    digest = hashlib.sha256("\n".join(listing).encode()).hexdigest()[:20]
    copy = cache() / "fetched" / digest / place.name
    start = len(os.fspath(place).rstrip("/")) + 1
    _fetch({file: copy / os.fspath(file)[start:] for file in stats})
    return copy


def _fetch(copies: dict[Path, pathlib.Path]) -> None:
    """Copies the missing files of a bucket."""
    sizes = {place: place.stat().length for place in copies}
    copies = {place: copy for place, copy in copies.items()
              if not (copy.exists() and copy.stat().st_size == sizes[place])}  # fmt: skip
    if not copies:
        return
    fix = "set XDG_CACHE_HOME to a folder with room"
    for folder in {copy.parent for copy in copies.values()}:
        make_folder(epath.Path(folder), fix)
    folder, total = next(iter(copies.values())).parent, sum(sizes[place] for place in copies)
    first = next(iter(copies)) if len(copies) == 1 else f"{len(copies)} files"
    if shutil.disk_usage(folder).free < total:
        raise NotWritable(f"{folder} has no room for the {total / 1e6:,.1f} MB of {first}: {fix}")
    say(f"fetching {first} ({total / 1e6:,.1f} MB) into {folder}")
    for place, copy in copies.items():
        with atomic(copy, "wb") as file, place.open("rb") as data:
            shutil.copyfileobj(data, file, 2**24)
            if file.tell() != sizes[place]:
                raise NotWritable(f"{place} has {sizes[place]} bytes and {file.tell()} came: it is "
                                  "being written, or the network broke off; try again")  # fmt: skip
