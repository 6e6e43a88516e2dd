"""RLDS data sets of TFDS, as TFRecord or ArrayRecord, read without TensorFlow.

``<name>/<version>/{features.json, <name>-<split>.tfrecord-00000-of-000NN}``; an episode is one
tf.train.Example, whose steps/<path> are lists over time. Arrays are named by their path below
steps, without observation/. Pictures stay encoded. Rewards determine success. The files contain no
rate: it is known for LIBERO (20 Hz) and DROID (15); otherwise give ``--source_fps``.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from wamjax.data import images
from wamjax.data.ingest import tfrecord
from wamjax.data.ingest.reader import About, Entry, SourceError

STEPS = "steps/"
LANGUAGE = ("language_instruction", "language_instruction_2", "language_instruction_3",
            "natural_language_instruction", "instruction", "task/language_instruction")  # fmt: skip
RATES = {"libero": 20.0, "droid": 15.0}
LIBERO = {
    "state": ("x", "y", "z", "rx", "ry", "rz", "finger_left", "finger_right"),
    "action": ("dx", "dy", "dz", "drx", "dry", "drz", "gripper"),
}  # as OpenVLA converted it
FLAGS = ("is_first", "is_last", "is_terminal", "discount")


class Leaf(NamedTuple):
    """Describes a feature of the steps: "numbers", "image" or "text", and its shape."""

    kind: str
    shape: tuple[int, ...]


class Part(NamedTuple):
    """Selects the steps of a record that form an episode; `end` 0 = all."""

    file: int
    record: int
    start: int = 0
    end: int = 0


def open(source: pathlib.Path, split: str = "train", language: str = "") -> Rlds:
    """Opens a data set.

    Args:
      split: name of the split.
      language: path of the instruction below steps; '' = the first usual one that is not blank.
    """
    return Rlds(source, split, language)


class Rlds:
    """See `wamjax.data.ingest.reader.Reader`."""

    late = 0.0

    def __init__(self, source: pathlib.Path, split: str, language: str):
        self._folder = _version(source)
        self._leaves = _leaves(self._folder / "features.json")
        if language and language not in self._leaves:
            raise ValueError(f"--option=language={language}: there is no such feature; texts are "
                             f"{[k for k, leaf in self._leaves.items() if leaf.kind == 'text']}")
        self._language = [language] if language else [k for k in LANGUAGE if k in self._leaves]
        self._paths = _files(self._folder, split)
        self._files: list[Any] = [None] * len(self._paths)
        self._entries: list[Entry] | None = None
        self._parts: list[Part] = []
        self._bad: dict[int, str] = {}
        for i in range(len(self._paths)):
            try:
                self._parts += [Part(i, record) for record in range(len(self._file(i)))]
            except SourceError as error:
                self._bad[len(self._parts)] = str(error)
                self._parts.append(Part(i, -1))
        self._last: tuple[int, dict[str, memoryview]] = (-1, {})
        self.about = self.describe()

    def episodes(self) -> Sequence[Entry]:
        """See `Reader.episodes`; of TFRecord files, it reads only the features that it needs."""
        if self._entries is None:
            self._entries = [self._entry(i) for i in range(len(self._parts))]
        return self._entries

    def arrays(self, i: int) -> Mapping[str, np.ndarray]:
        """See `Reader.arrays`."""
        with self._where(i):
            values, out = self._features(i), {}
            for key, width in self.about.arrays.items():
                out[key] = self._cut(i, tfrecord.numbers(values[_path(key, values)]), width)
            if "reward" in out:
                out["reward"] = out["reward"][:, 0]
            return out

    def frames(self, i: int, camera: str, steps: Sequence[int]) -> Iterator[bytes]:
        """See `Reader.frames`."""
        with self._where(i):
            values, start = self._features(i), self._parts[i].start
            rows = tfrecord.strings(values[_path(camera, values)])
            if len(rows) <= start + max(steps):
                raise SourceError(
                    f"camera {camera} has {len(rows)} pictures, too few for step {max(steps)}"
                )
            yield from (bytes(rows[start + t]) for t in steps)

    def describe(self) -> About:
        """See `Reader.about`."""
        kinds = {k: leaf for k, leaf in self._leaves.items() if k not in FLAGS}
        arrays = {k: int(np.prod(leaf.shape)) for k, leaf in kinds.items()
                  if leaf.kind == "numbers"}  # fmt: skip
        cameras = {k: leaf.shape[:2] for k, leaf in kinds.items() if leaf.kind == "image"}
        if any(None in size for size in cameras.values()):  # the data set allows any size
            cameras = {k: self._size(k) for k in cameras}
        name = self._folder.parent.name
        return About(
            hz=next((hz for word, hz in RATES.items() if word in name), 0.0),
            cameras=cameras,
            arrays=arrays,
            state=("state",) if "state" in arrays else (),
            action=("action",) if "action" in arrays else (),
            names={k: x for k, x in LIBERO.items() if "libero" in name and arrays.get(k) == len(x)},
            robot=name,
            notes=("RLDS lets the action of the last step mean nothing: --end=drop leaves it out",),
        )

    def _size(self, camera: str) -> tuple[int, int]:
        values = self._features(next(i for i in range(len(self._parts)) if i not in self._bad))
        return images.size(bytes(tfrecord.strings(values[_path(camera, values)])[0]))

    def _entry(self, i: int) -> Entry:
        part = self._parts[i]
        path = self._paths[part.file]
        name = f"{path.name}:{part.record}"
        if i in self._bad:
            return Entry(name=path.name, file=str(path), error=self._bad[i])
        try:
            with self._where(i):
                values = self._features(i)
                count = self._count(values)
                if not count:
                    raise SourceError("no step")
                return self.entry(i, values, Entry(
                    name=name, file=str(path), length=count, instruction=self._text(values),
                    task=self._folder.parent.name, success=_success(values),
                ))  # fmt: skip
        except SourceError as error:
            return Entry(name=name, file=str(path), error=str(error))

    def entry(self, i: int, values: Mapping[str, memoryview], entry: Entry) -> Entry:
        """Completes the entry of an episode; formats built on this one override it."""
        part = self._parts[i]
        if not part.end:
            return entry
        name = f"{entry.name}[{part.start}:{part.end}]"
        return dataclasses.replace(entry, name=name, length=part.end - part.start)

    def text(self, values: Mapping[str, memoryview], key: str) -> str:
        """Returns a text of the episode's metadata; '' if it is absent."""
        feature = values.get(f"episode_metadata/{key}")
        rows = tfrecord.strings(feature) if feature is not None else []
        return bytes(rows[0]).decode() if rows else ""

    def _text(self, values: Mapping[str, memoryview]) -> str:
        for key in self._language:
            rows = tfrecord.strings(values[_path(key, values)])
            if rows and (text := bytes(rows[0]).decode().strip()):
                return text
        return ""

    def _count(self, values: Mapping[str, memoryview]) -> int:
        """Returns the number of steps of a record."""
        key = next((k for k in FLAGS if STEPS + k in values), None)
        if key:
            return len(tfrecord.numbers(values[STEPS + key]))
        key = next(k for k, leaf in self._leaves.items() if leaf.kind == "numbers")
        return len(tfrecord.numbers(values[_path(key, values)])) // int(
            np.prod(self._leaves[key].shape)
        )

    def _cut(self, i: int, x: np.ndarray, width: int) -> np.ndarray:
        part = self._parts[i]
        if len(x) % width:
            raise SourceError(f"{len(x)} numbers do not divide into steps of {width}")
        return x.reshape(-1, width)[part.start : part.end or None]

    def _features(self, i: int) -> dict[str, memoryview]:
        """Returns the features of an episode's record, and caches the last ones."""
        part = self._parts[i]
        if self._last[0] != i:
            self._last = i, tfrecord.features(self._file(part.file)[part.record])
        return self._last[1]

    def _file(self, i: int):
        if self._files[i] is None:
            array = ".array_record" in self._paths[i].name
            self._files[i] = (_ArrayRecords if array else tfrecord.File)(self._paths[i])
        return self._files[i]

    def _where(self, i: int) -> _Where:
        part = self._parts[i]
        return _Where(f"{self._paths[part.file]}: record {part.record}")


class _Where:
    """Adds the place to errors raised inside the context."""

    def __init__(self, where: str):
        self._where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, KeyError | ValueError | RuntimeError | IndexError):
            text = f"no feature {error}" if isinstance(error, KeyError) else str(error)
            raise SourceError(f"{self._where}: {text}") from error


class _ArrayRecords:
    """Reads ArrayRecord like `tfrecord.File`; its library reports a damaged file as empty."""

    def __init__(self, path: pathlib.Path):
        self._reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
        if not self._reader.ok() or not self._reader.num_records():
            raise SourceError(f"{path} cannot be read: no record")

    def __len__(self) -> int:
        return self._reader.num_records()

    def __getitem__(self, i: int) -> memoryview:
        return memoryview(self._reader.read([i])[0])


def _version(source: pathlib.Path) -> pathlib.Path:
    """Returns the only folder with features.json, at the source or below."""
    files = sorted(source.rglob("features.json"))
    if len(files) != 1:
        what = f"{len(files)} data sets" if files else "no features.json"
        raise ValueError(f"{source} holds {what}: give --source=<name>/<version> of one")
    return files[0].parent


def _files(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
    files = [f for kind in ("tfrecord", "array_record") for f in folder.glob(f"*.{kind}*")]
    out = sorted(f for f in files if f.name.partition(".")[0].endswith(f"-{split}"))
    if not out:
        splits = sorted({f.name.partition(".")[0].rpartition("-")[2] for f in files})
        raise ValueError(f"--option=split={split}: {folder} has the splits {splits}")
    return out


def _leaves(file: pathlib.Path) -> dict[str, Leaf]:
    """Returns path below steps, without observation/ -> feature."""
    tree = json.loads(file.read_text())
    steps = tree.get("featuresDict", {}).get("features", {}).get("steps")
    if steps is None:
        raise ValueError(f"{file} has no steps, so it is not an RLDS data set: correct --source or "
                         "--format")  # fmt: skip
    out: dict[str, Leaf] = {}
    _walk(steps["sequence"]["feature"], "", out)
    return {path.removeprefix("observation/"): leaf for path, leaf in out.items()}


def _walk(node: Mapping[str, Any], path: str, out: dict[str, Leaf]) -> None:
    if "featuresDict" in node:
        for key, inner in node["featuresDict"]["features"].items():
            _walk(inner, f"{path}/{key}" if path else key, out)
    elif "image" in node:
        shape = tuple(int(n) for n in node["image"].get("shape", {}).get("dimensions", ()))
        depth = node["image"].get("dtype", "uint8") != "uint8" or shape[-1:] != (3,)
        if not depth:
            out[path] = Leaf("image", tuple(n if n > 0 else None for n in shape))
    elif "text" in node:
        out[path] = Leaf("text", ())
    elif "tensor" in node:
        tensor = node["tensor"]
        shape = tuple(int(n) for n in tensor.get("shape", {}).get("dimensions", ()))
        if tensor["dtype"] in ("string", "object"):
            out[path] = Leaf("text", shape)
        elif tensor.get("encoding", "none") == "none":
            out[path] = Leaf("numbers", shape)


def _path(key: str, values: Mapping[str, memoryview]) -> str:
    """Returns the path of a feature in the Example."""
    inner = f"{STEPS}observation/{key}"
    return inner if inner in values else STEPS + key


def _success(values: Mapping[str, memoryview]) -> bool | None:
    if f"{STEPS}reward" not in values:
        return None
    return bool(tfrecord.numbers(values[f"{STEPS}reward"]).max(initial=0.0) > 0)
