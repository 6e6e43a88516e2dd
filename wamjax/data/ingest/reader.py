"""Defines the `Reader` protocol of data formats: episodes as arrays, and pictures on request."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from wamjax.config import did_you_mean
from wamjax.data.film import Film

PAIRINGS = ("before", "after", "late")
KINDS = ("delta", "absolute", "velocity")


class SourceError(ValueError):
    """An episode or file of a source cannot be read; names the file."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Describes one episode of a source, from its index or headers.

    Attributes:
      name: unique in the source and the same on every machine.
      file: file to name if the episode cannot be read.
      length: T, its number of actions.
      instruction, task: text; '' if unknown.
      success: whether the task was achieved; None if unknown.
      error: why it cannot be read; '' if it can.
    """

    name: str
    file: str
    length: int = 0
    instruction: str = ""
    task: str = ""
    success: bool | None = None
    error: str = ""


@dataclasses.dataclass(frozen=True)
class About:
    """Describes a source.

    Attributes:
      hz: control steps per second; 0 if unknown.
      cameras: name -> (height, width).
      arrays: name -> number of dimensions of the array that `Reader.arrays` returns.
      names: array -> names of its dimensions, if known.
      state, action: their default terms (see `wamjax.data.ingest.terms`).
      robot: its name.
      pairing: "before": observation t was recorded before action t; "after": it was stored after
        action t was executed; "late": action t was recorded one step late, so observation t
        belongs to action max(0, t - 1).
      kind: default kind of the actions, "delta", "absolute" or "velocity"; '' = detect it.
      final: whether there are T + 1 observations for T actions.
      notes: remarks for the report.
      videos: cameras stored as compressed video; a reader with any is a `VideoReader`.
    """

    hz: float
    cameras: Mapping[str, tuple[int, int]]
    arrays: Mapping[str, int]
    state: tuple[str, ...]
    action: tuple[str, ...]
    names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    robot: str = ""
    pairing: str = "before"
    kind: str = ""
    final: bool = False
    notes: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()


class Reader(Protocol):
    """Reads a source in one format. Each process opens it once and reads it from one thread.

    A format is a module with ``open(source: pathlib.Path, **options) -> Reader``. Its docstring
    describes the files; its options are keyword arguments with defaults.

    Attributes:
      about: description of the source.
      late: largest time difference so far between a picture and its step, in seconds; 0 if
        pictures have no timestamps.
    """

    about: About
    late: float

    def episodes(self) -> Sequence[Entry]:
        """Returns all episodes, always in the same order, without reading pictures."""
        ...

    def arrays(self, i: int) -> Mapping[str, np.ndarray]:
        """Returns the arrays of episode `i`: f32 or f64 (T, d), or (T + 1, d) for observations if
        `About.final`; "reward" (T,) if there are rewards; "time" (T,) in seconds if observations
        have timestamps.

        Raises:
          SourceError: the file is damaged.
        """
        ...

    def frames(self, i: int, camera: str, steps: Sequence[int]) -> Iterable[bytes | np.ndarray]:
        """Returns a camera's pictures at some observations: uint8 (h, w, 3), RGB and upright, or
        the encoded PNG or JPEG if the source stores that.

        Args:
          steps: ascending, without duplicates.

        Raises:
          SourceError: the file is damaged, or has no such frame.
        """
        ...


class VideoReader(Reader, Protocol):
    """Reads a source with cameras stored as compressed video, see `About.videos`."""

    def film(self, i: int, camera: str, steps: Sequence[int]) -> Film:
        """Returns the video packets that hold a camera's pictures at some observations.

        Args:
          steps: ascending; duplicates are allowed.

        Raises:
          SourceError: the file is damaged, or has no such frame.
        """
        ...


def formats() -> dict[str, str]:
    """Returns name -> first docstring line of every built-in format."""
    folder = pathlib.Path(__file__).parent / "formats"  # not imported: dependencies may be missing
    texts = {file.stem: ast.get_docstring(ast.parse(file.read_text())) or ""
             for file in sorted(folder.glob("[!_]*.py"))}  # fmt: skip
    return {name: text.partition("\n")[0] for name, text in texts.items()}


def open_reader(name: str, source: str | pathlib.Path, options: Mapping[str, Any]) -> Reader:
    """Opens a source.

    Args:
      name: name of a format: a module in `wamjax.data.ingest.formats`, or the full name of yours.
      source: folder or file.
      options: options of the format, as text or typed.

    Raises:
      ValueError: unknown format or option.
      FileNotFoundError: the source does not exist.
    """
    path = pathlib.Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(2, "no such file or directory", str(path))
    function = _module(name).open
    accepted = dict(list(inspect.signature(function).parameters.items())[1:])
    values = {}
    for key, value in options.items():
        if key not in accepted:
            raise ValueError(f"--option={key}: the format {name} has no such option"
                             f"{did_you_mean(key, accepted)}; it has "
                             f"{', '.join(accepted) or 'none'}")  # fmt: skip
        values[key] = _typed(key, value, accepted[key].default)
    return function(path, **values)


def _module(name: str):
    full = name if "." in name else f"wamjax.data.ingest.formats.{name}"
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name == full or full.startswith(f"{error.name}."):
            names = formats()
            raise ValueError(f"--format={name}: there is no such format{did_you_mean(name, names)};"
                             f" there are {', '.join(names)}, or a module of your own by its full "
                             "name") from None  # fmt: skip
        raise ImportError(f"--format={name} needs {error.name}: pip install 'wamjax[ingest]' (or "
                          f"pip install {error.name})") from error  # fmt: skip


def _typed(key: str, value: Any, default: Any) -> Any:
    """Converts an option to the type of its default."""
    if not isinstance(value, str) or isinstance(default, str):
        return value
    if isinstance(default, bool):
        if value.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"--option={key}={value} must be true or false")
        return value.lower() in ("true", "1")
    try:
        return type(default)(value)
    except ValueError:
        raise ValueError(f"--option={key}={value} must be a {type(default).__name__}") from None


def files_of(source: pathlib.Path, *patterns: str) -> list[pathlib.Path]:
    """Returns the source itself if it is a file, otherwise all matching files below it, sorted.

    Raises:
      FileNotFoundError: no file matches.
    """
    if source.is_file():
        return [source]
    out = sorted({f for pattern in patterns for f in source.rglob(pattern) if f.is_file()})
    if not out:
        raise FileNotFoundError(2, f"no file {' or '.join(patterns)} below", str(source))
    return out


def relative(file: pathlib.Path, source: pathlib.Path) -> str:
    """Returns a file's path relative to its source."""
    return file.name if file == source else file.relative_to(source).as_posix()


def first_good(entries: Sequence[Entry], source: pathlib.Path) -> int:
    """Returns the number of the first episode that can be read.

    Raises:
      SourceError: no episode can be read.
    """
    for i, entry in enumerate(entries):
        if not entry.error:
            return i
    raise SourceError(f"no episode of {source} can be read: {entries[0].error}")
