"""What a format gives: episodes of arrays, and their pictures when they are asked for."""

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
    """An episode or a file of a source that cannot be read; names the file."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One episode of a source, as its index or headers say it.

    Attributes:
      name: unique in the source and the same on every machine.
      file: that is to blame if the episode cannot be read.
      length: T, its actions.
      instruction, task: in words; '' where nothing says it.
      success: whether the task was achieved; None where nothing says it.
      error: why it cannot be read; '' where it can.
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
    """What a source says of itself.

    Attributes:
      hz: control steps per second; 0 where nothing says it.
      cameras: name -> (height, width).
      arrays: name -> number of dimensions of what `Reader.arrays` gives.
      names: array -> names of its dimensions, where they are known.
      state, action: terms (see `wamjax.data.ingest.terms`) that they are made of by default.
      robot: its name.
      pairing: "before": observation t was seen before action t; "after": it was stored once action
        t had been carried out; "late": action t was recorded a step late, so that observation t
        goes with action max(0, t - 1).
      kind: of the actions by default, "delta", "absolute" or "velocity"; '' = as the numbers say.
      final: whether there are T + 1 observations for T actions.
      notes: what a person should know, for the report.
      videos: the cameras that are compressed video; a reader with any is a `VideoReader`.
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
    """A source in one format. It is opened once in every process, and read there by one thread.

    A format is a module that has ``open(source: pathlib.Path, **options) -> Reader``; its docstring
    says what the files hold, its options are keyword arguments with defaults.

    Attributes:
      about: the source.
      late: largest distance so far between a picture and the time it is wanted at, in seconds; 0
        where pictures have no times.
    """

    about: About
    late: float

    def episodes(self) -> Sequence[Entry]:
        """All episodes in an order that is always the same; pictures are not touched."""
        ...

    def arrays(self, i: int) -> Mapping[str, np.ndarray]:
        """The numbers of episode `i`: f32 or f64 (T, d), of observations (T + 1, d) if
        `About.final`; "reward" (T,) where there are rewards; "time" (T,) in seconds where
        observations have time stamps.

        Raises:
          SourceError: the file is damaged.
        """
        ...

    def frames(self, i: int, camera: str, steps: Sequence[int]) -> Iterable[bytes | np.ndarray]:
        """The pictures of a camera at some observations: uint8 (h, w, 3), RGB and upright, or
        encoded as PNG or JPEG, where the source has them so.

        Args:
          steps: ascending, without repetitions.

        Raises:
          SourceError: the file is damaged, or has no such frame.
        """
        ...


class VideoReader(Reader, Protocol):
    """A source with cameras whose pictures are compressed video, see `About.videos`."""

    def film(self, i: int, camera: str, steps: Sequence[int]) -> Film:
        """The packets that hold the pictures of a camera at some observations.

        Args:
          steps: ascending; one may come again.

        Raises:
          SourceError: the file is damaged, or has no such frame.
        """
        ...


def formats() -> dict[str, str]:
    """Name -> first line of the docstring of every format that comes with wamjax."""
    folder = pathlib.Path(__file__).parent / "formats"  # not imported: what they need may lack
    texts = {file.stem: ast.get_docstring(ast.parse(file.read_text())) or ""
             for file in sorted(folder.glob("[!_]*.py"))}  # fmt: skip
    return {name: text.partition("\n")[0] for name, text in texts.items()}


def open_reader(name: str, source: str | pathlib.Path, options: Mapping[str, Any]) -> Reader:
    """Opens a source.

    Args:
      name: of a format: a module in `wamjax.data.ingest.formats`, or one's own by its full name.
      source: its folder or file.
      options: of the format, as text or typed.

    Raises:
      ValueError: no such format or option.
      FileNotFoundError: there is no such source.
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
    """An option as its default is typed."""
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
    """The source itself if it is a file, else all files below it that match, sorted.

    Raises:
      FileNotFoundError: there is none.
    """
    if source.is_file():
        return [source]
    out = sorted({f for pattern in patterns for f in source.rglob(pattern) if f.is_file()})
    if not out:
        raise FileNotFoundError(2, f"no file {' or '.join(patterns)} below", str(source))
    return out


def relative(file: pathlib.Path, source: pathlib.Path) -> str:
    """A file's name within its source."""
    return file.name if file == source else file.relative_to(source).as_posix()


def first_good(entries: Sequence[Entry], source: pathlib.Path) -> int:
    """The number of the first episode that can be read.

    Raises:
      SourceError: there is none.
    """
    for i, entry in enumerate(entries):
        if not entry.error:
            return i
    raise SourceError(f"no episode of {source} can be read: {entries[0].error}")
