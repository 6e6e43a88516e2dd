"""LeRobot v2.0, v2.1 and v3.0: parquet and mp4, read by pyarrow and PyAV.

The episode of a row is read from its ``episode_index``, never from the ranges in the metadata,
which are wrong in converted data sets; differences are reported. Video files have their own
numbering, separate for each camera and from the data. Depth videos are skipped.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wamjax.data.film import Film
from wamjax.data.ingest.reader import About, Entry, SourceError
from wamjax.data.ingest.video import TOLERANCE, Videos

VERSIONS = ("v2.0", "v2.1", "v3.0")
PREFIX, DEPTH = "observation.images.", "video.is_depth_map"
STATE = ("observation.state", "state")  # the second as written by openpi
ACTION = ("action", "actions")
COUNTERS = ("timestamp", "frame_index", "episode_index", "index", "task_index")


class Place(NamedTuple):
    """Locates the rows of an episode in a parquet file."""

    file: pathlib.Path
    start: int
    end: int


class Clip(NamedTuple):
    """Locates an episode of a camera in a video file, by the time at which it starts."""

    file: pathlib.Path
    start: float


def open(source: pathlib.Path, tolerance: float = TOLERANCE) -> LeRobot:
    """Opens a data set.

    Args:
      tolerance: maximum seconds between the time of a row and that of its frame; beyond it, the
        episode is bad.
    """
    return LeRobot(source, tolerance)


class LeRobot:
    """See `wamjax.data.ingest.reader.Reader`."""

    def __init__(self, source: pathlib.Path, tolerance: float):
        self._source = source
        self._info = _json(source / "meta" / "info.json")
        version = self._info.get("codebase_version")
        if version not in VERSIONS:
            raise ValueError(f"{source}/meta/info.json has codebase_version {version!r}; "
                             f"supported are {', '.join(VERSIONS)}")  # fmt: skip
        self._one_file_each = version.startswith("v2")
        self._features = self._info["features"]
        self._videos = Videos(tolerance)
        self._notes: list[str] = []
        self._keys = self._find_cameras()
        self._tasks = self._read_tasks()
        self._rows = self._read_rows()
        self._places: dict[int, Place] = {}
        self._bad: dict[int, str] = {}
        self._locate()
        self._numbers = sorted({*self._rows, *self._places, *self._bad})
        self._entries = [self._entry(number) for number in self._numbers]
        self._last: tuple[int, pa.Table] | None = None
        self.about = self._describe()

    @property
    def late(self) -> float:
        """See `Reader`."""
        return self._videos.off

    def episodes(self) -> Sequence[Entry]:
        """See `Reader.episodes`."""
        return self._entries

    def arrays(self, i: int) -> Mapping[str, np.ndarray]:
        """See `Reader.arrays`."""
        table = self._table(i)
        out = {key: _matrix(table[key]) for key in self.about.arrays}
        if "next.reward" in out:
            out["reward"] = out["next.reward"][:, 0]
        return out | {"time": np.asarray(table["timestamp"], np.float64)}

    def frames(
        self, i: int, camera: str, steps: Sequence[int]
    ) -> Iterator[bytes | np.ndarray]:
        """See `Reader.frames`."""
        key, number = self._keys[camera], self._numbers[i]
        if self._features[key]["dtype"] == "image":
            column = _parquet(*self._places[number], [key])[key]
            yield from (self._picture(column[t].as_py()) for t in steps)
            return
        clip = self._clip(number, key)
        times = np.asarray(self._table(i)["timestamp"], np.float64)
        yield from self._videos.frames(clip.file, (clip.start + times[list(steps)]).tolist())

    def film(self, i: int, camera: str, steps: Sequence[int]) -> Film:
        """See `VideoReader.film`."""
        clip = self._clip(self._numbers[i], self._keys[camera])
        times = np.asarray(self._table(i)["timestamp"], np.float64)
        return self._videos.film(clip.file, (clip.start + times[list(steps)]).tolist())

    def _picture(self, cell: Mapping[str, Any]) -> bytes:
        if cell.get("bytes"):
            return cell["bytes"]
        try:
            return (self._source / cell["path"]).read_bytes()
        except (OSError, TypeError) as error:
            raise SourceError(f"a picture has no bytes, and {cell.get('path')}: {error}") from error

    def _table(self, i: int) -> pa.Table:
        """Returns the rows of an episode, and caches the last one."""
        number = self._numbers[i]
        if self._last is None or self._last[0] != number:
            place = self._places[number]
            if self._one_file_each:
                _check(place, number)
            self._last = number, _parquet(*place, [*self.about.arrays, "timestamp"])
        return self._last[1]

    def _clip(self, number: int, key: str) -> Clip:
        """Returns where a camera's frames of an episode are, by the numbering of video files."""
        if self._one_file_each:
            chunk = number // self._info.get("chunks_size", 1000)
            name = self._info["video_path"].format(
                episode_chunk=chunk, video_key=key, episode_index=number
            )
            return Clip(self._source / name, 0.0)
        row = self._rows[number]
        name = self._info["video_path"].format(
            video_key=key,
            chunk_index=row[f"videos/{key}/chunk_index"],
            file_index=row[f"videos/{key}/file_index"],
        )
        return Clip(self._source / name, row[f"videos/{key}/from_timestamp"])

    def _find_cameras(self) -> dict[str, str]:
        """Returns name -> feature of the cameras, without depth."""
        keys = [k for k, value in self._features.items() if value["dtype"] in ("video", "image")]
        depth = [k for k in keys if (self._features[k].get("info") or {}).get(DEPTH)]
        if depth:
            self._notes.append(f"depth is left out: {', '.join(depth)}")
        return {key.removeprefix(PREFIX): key for key in keys if key not in depth}

    def _read_tasks(self) -> dict[int, str]:
        meta = self._source / "meta"
        if (meta / "tasks.jsonl").exists():
            return {row["task_index"]: row["task"] for row in _lines(meta / "tasks.jsonl")}
        if not (meta / "tasks.parquet").exists():
            return {}
        table = _parquet(meta / "tasks.parquet")
        # The texts are the index of a pandas table, whose column may have any name.
        words = next((k for k in table.column_names if k != "task_index"), None)
        return dict(zip(table["task_index"].to_pylist(), table[words].to_pylist(), strict=True))

    def _read_rows(self) -> dict[int, dict[str, Any]]:
        """Reads the metadata of all episodes from all shards."""
        meta = self._source / "meta"
        if self._one_file_each:
            return {row["episode_index"]: row for row in _lines(meta / "episodes.jsonl")}
        out = {}
        files = sorted((meta / "episodes").glob("*/*.parquet"))
        if not files:
            raise FileNotFoundError(2, "no file */*.parquet below", str(meta / "episodes"))
        for file in files:
            names = [k for k in pq.read_schema(file).names if not k.startswith("stats/")]
            out |= {row["episode_index"]: row for row in _parquet(file, columns=names).to_pylist()}
        return out

    def _locate(self) -> None:
        """Finds the actual rows of each episode, and notes where the metadata differs."""
        if self._one_file_each:
            for number, row in self._rows.items():
                chunk = number // self._info.get("chunks_size", 1000)
                name = self._info["data_path"].format(episode_chunk=chunk, episode_index=number)
                self._places[number] = Place(self._source / name, 0, row["length"])
            return
        for file in sorted((self._source / "data").glob("*/*.parquet")):
            try:
                self._locate_in(file)
            except SourceError as error:
                numbers = [n for n, row in self._rows.items() if self._data_file(row) == file]
                self._bad |= dict.fromkeys(numbers, str(error))
        for number in self._rows:
            if number not in self._places and number not in self._bad:
                self._bad[number] = f"{self._data_file(self._rows[number])} has no row of it"
        self._compare()

    def _locate_in(self, file: pathlib.Path) -> None:
        numbers = np.asarray(_parquet(file, columns=["episode_index"])["episode_index"])
        edges = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1))
        for start, end in zip(edges[:-1], edges[1:], strict=True):
            number = int(numbers[start])
            if number in self._places:
                self._bad[number] = (f"{file}: rows of episode {number} are in several places, "
                                     f"also in {self._places[number].file}")  # fmt: skip
            self._places[number] = Place(file, int(start), int(end))

    def _data_file(self, row: Mapping[str, Any]) -> pathlib.Path:
        return self._source / self._info["data_path"].format(
            chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
        )

    def _compare(self) -> None:
        wrong = {"data/file_index": 0, "dataset_from_index": 0, "length": 0}
        total = 0
        for number in sorted(self._rows):
            row, place = self._rows[number], self._places.get(number)
            if place is None:
                continue
            count = place.end - place.start
            wrong["data/file_index"] += self._data_file(row) != place.file
            claim = row.get("dataset_from_index", total), row.get("dataset_to_index", total + count)
            wrong["dataset_from_index"] += claim != (total, total + count)
            wrong["length"] += row.get("length", count) != count
            total += count
        self._notes += [f"{key} of {n} episodes is wrong in the metadata; the rows were counted"
                        for key, n in wrong.items() if n]  # fmt: skip
        for number in set(self._places) - set(self._rows):
            self._bad[number] = (f"{self._places[number].file}: meta/episodes says nothing of "
                                 f"episode {number}")  # fmt: skip
        self._check_videos()

    def _check_videos(self) -> None:
        """Marks episodes as bad whose parts of a video file are missing or overlap.

        If two parts overlap, one of the episodes would show the other's frames.
        """
        places = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
        for key in (k for k in self._keys.values() if self._features[k]["dtype"] == "video"):
            names, parts = [f"videos/{key}/{place}" for place in places], []
            for number, row in self._rows.items():
                if lacks := [name for name in names if row.get(name) is None]:
                    self._bad[number] = (f"{self._source}/meta/episodes: episode {number} has no "
                                         f"{lacks[0]}")  # fmt: skip
                else:
                    parts.append((*(row[name] for name in names), number))
            parts.sort()
            for before, after in zip(parts[:-1], parts[1:], strict=True):
                if before[:2] == after[:2] and after[2] < before[3] - TOLERANCE:
                    pair = sorted((before[4], after[4]))
                    self._bad[pair[1]] = (f"{self._clip(pair[1], key).file}: episodes {pair[0]} and"
                                          f" {pair[1]} claim the same frames of it")  # fmt: skip

    def _entry(self, number: int) -> Entry:
        name, row = f"episode_{number:06d}", self._rows.get(number, {})
        place = self._places.get(number)
        file = str(place.file if place else self._source)
        if error := self._bad.get(number, ""):
            return Entry(name=name, file=file, error=error)
        claim = row.get("tasks")
        claim = [claim] if isinstance(claim, str) else claim or []
        text = str(claim[0]) if len(claim) else self._task_of(place)
        return Entry(name=name, file=file, length=place.end - place.start, instruction=text)

    def _task_of(self, place: Place) -> str:
        if not self._tasks:
            return ""
        first = _parquet(place.file, place.start, place.start + 1, ["task_index"])
        return self._tasks.get(first["task_index"][0].as_py(), "")

    def _describe(self) -> About:
        arrays = {
            key: int(np.prod(value["shape"])) for key, value in self._features.items()
            if value["dtype"].startswith(("float", "int", "bool")) and key not in COUNTERS
        }  # fmt: skip
        return About(
            hz=float(self._info["fps"]),
            cameras={name: _size(self._features[key]) for name, key in self._keys.items()},
            arrays=arrays,
            state=tuple(key for key in STATE if key in arrays)[:1],
            action=tuple(key for key in ACTION if key in arrays)[:1],
            names={key: _names(self._features[key].get("names")) for key in arrays},
            robot=self._info.get("robot_type") or "",
            videos=tuple(name for name, key in self._keys.items()
                         if self._features[key]["dtype"] == "video"),
            notes=(f"LeRobot {self._info['codebase_version']}", *self._notes),
        )


def _check(place: Place, number: int) -> None:
    """Checks that a file of one episode holds that episode completely."""
    rows = _parquet(place.file, columns=["episode_index"])["episode_index"]
    if len(rows) != place.end:
        raise SourceError(f"{place.file} has {len(rows)} rows, meta/episodes.jsonl says "
                          f"{place.end}")  # fmt: skip
    if rows[0].as_py() != number:
        raise SourceError(f"{place.file} holds episode {rows[0].as_py()}, not {number}")


def _size(feature: Mapping[str, Any]) -> tuple[int, int]:
    """Returns (height, width) of a shape with channels first or last."""
    shape = feature["shape"]
    height, width = shape[1:] if shape[0] in (1, 3) and shape[-1] not in (1, 3) else shape[:2]
    return int(height), int(width)


def _names(claim: Any) -> tuple[str, ...]:
    """Returns the names of dimensions, given as a list or as a list under some key."""
    if isinstance(claim, Mapping):
        claim = next(iter(claim.values()), None)
    return tuple(map(str, claim)) if isinstance(claim, Sequence) and claim else ()


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Returns a column of lists or scalars as numbers, (T, d)."""
    column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    count = len(column)
    while pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type) or (
        pa.types.is_large_list(column.type)
    ):
        column = column.flatten()
    return np.asarray(column.to_numpy(zero_copy_only=False)).reshape(count, -1)


def _parquet(
    file: pathlib.Path, start: int = 0, end: int | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """Reads rows of a file, and only the row groups that hold them.

    Raises:
      SourceError: the file cannot be read, or lacks a column; names it.
    """
    try:
        with pq.ParquetFile(file) as parquet:
            meta, groups, at, first = parquet.metadata, [], 0, 0
            end = meta.num_rows if end is None else end
            if lacks := set(columns or ()) - set(parquet.schema_arrow.names):
                raise SourceError(f"{file} lacks the columns {sorted(lacks)}")
            for group in range(meta.num_row_groups):
                rows = meta.row_group(group).num_rows
                if at < end and start < at + rows:
                    first = at if not groups else first
                    groups.append(group)
                at += rows
            if end > at:
                raise SourceError(
                    f"{file} has {at} rows, fewer than the {end} that its index names"
                )
            table = parquet.read_row_groups(groups, columns=columns)
            return table.slice(start - first, end - start)
    except (OSError, pa.ArrowException) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(f"{file} cannot be read: {text}") from error


def _json(file: pathlib.Path) -> dict[str, Any]:
    if not file.exists():
        raise FileNotFoundError(2, "no such file; is it a LeRobot folder?", str(file))
    return json.loads(file.read_text())


def _lines(file: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
