"""Converts a source in several processes; may be killed and resumed without a partial data set.

Every episode becomes a file, written atomically, in a hidden folder beside the data set; when the
same command runs again, it skips the episodes that are there. At the end, all are written to the
data set in the order of the source, whatever the number of processes, and the folder is removed. So
the disk holds the result twice for a while.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import msgpack
import tqdm

from wamjax.console import say
from wamjax.data import records
from wamjax.data.episodes import check, pack, unpack
from wamjax.data.ingest import plan
from wamjax.data.ingest.convert import Settings, convert
from wamjax.data.ingest.plan import Plan, Request
from wamjax.data.ingest.reader import Entry, Reader, SourceError, open_reader
from wamjax.data.spec import Info

VERSION = 1  # version of the files of single episodes
REPORT = "ingest.json"
WRONG_RATE = 0.02


@dataclasses.dataclass(frozen=True)
class Task:
    """Holds what a process needs to convert any episode."""

    format: str
    source: str
    options: Mapping[str, Any]
    settings: Settings
    info: Info
    folder: str


def ingest(
    format: str,
    source: str | os.PathLike,
    out: str | os.PathLike,
    ask: Request = Request(),  # noqa: B008  (frozen)
    options: Mapping[str, Any] | None = None,
    workers: int = 0,
    skip_bad: int = 0,
    limit: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Converts a source to a data set.

    Args:
      format: see `wamjax.data.ingest.reader.open_reader`; `options` belong to the format.
      source: file or folder.
      out: folder of the data set; must not exist.
      ask: choices of the conversion.
      workers: processes; 0 = convert in this one.
      skip_bad: how many bad episodes may be skipped; one more is an error.
      limit: convert only the first `limit` episodes; 0 = all.
      progress: whether to show a progress bar.

    Returns:
      the report, as in ``ingest.json`` of the data set.

    Raises:
      FileExistsError: the data set exists.
      SourceError: more than `skip_bad` episodes are bad; names the file of the last one.
      ValueError: `ask` does not fit the source.
    """
    out = pathlib.Path(out)
    if out.exists():
        raise FileExistsError(
            f"--out={out} exists already: choose another folder, or remove it first"
        )
    reader = open_reader(format, source, options or {})
    entries = list(reader.episodes())[: limit or None]
    choices = plan.resolve(reader, entries, ask)
    folder = out.with_name(f".{out.name}.ingest")
    task = Task(format, str(source), dict(options or {}), choices.settings, choices.info,
                str(folder))  # fmt: skip
    with _begin(folder, task, entries):
        bad = _convert(task, reader, entries, workers, skip_bad, progress)
        good = [i for i in range(len(entries)) if i not in bad]
        if not good:
            raise SourceError(f"no episode of {source} can be read: {next(iter(bad.values()))}")
        report = _write(out, folder, good, entries, choices, bad, progress, format, str(source))
    shutil.rmtree(folder, ignore_errors=True)
    return report


@contextlib.contextmanager
def _begin(folder: pathlib.Path, task: Task, entries: Sequence[Entry]) -> Iterator[None]:
    """Locks and prepares the folder of the parts; keeps those of the same command only."""
    names = "\n".join(f"{e.name} {e.length} {e.instruction}" for e in entries)
    about = json.dumps([VERSION, dataclasses.asdict(task) | {"folder": ""}, names], default=list)
    digest = hashlib.blake2b(about.encode(), digest_size=16).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = records.lock(folder)
    except OSError:
        raise ValueError(f"another process is writing {folder}: wait for it, or stop it") from None
    with held:
        mark = folder / "digest"
        before = mark.read_text() if mark.exists() else ""
        parts = list(folder.glob("*.part"))
        if before == digest and parts:
            say(f"continuing: {len(parts)} episodes are done")
        elif before != digest:
            if parts:
                say(
                    f"starting over: the episodes in {folder} are of other settings or another "
                    "source"
                )
            for part in parts:
                part.unlink()
            mark.write_text(digest)
        yield


def _convert(
    task: Task, reader: Reader, entries: Sequence[Entry], workers: int, skip_bad: int,
    progress: bool,
) -> dict[int, str]:  # fmt: skip
    """Converts the episodes that are missing; returns episode -> why it is bad."""
    bad: dict[int, str] = {}
    folder = pathlib.Path(task.folder)
    todo = []
    for i, entry in enumerate(entries):
        if entry.error:
            _add(bad, i, entry.error, skip_bad)
        elif not _part(folder, i).exists():
            todo.append(i)
    steps = sum(entries[i].length for i in todo)
    bar = tqdm.tqdm(total=steps, unit="step", desc="ingest", disable=not progress)
    with bar, _results(task, reader, entries, todo, workers) as results:
        for i, error in results:
            if error:
                _add(bad, i, error, skip_bad)
            bar.update(entries[i].length)
    return bad


@contextlib.contextmanager
def _results(
    task: Task, reader: Reader, entries: Sequence[Entry], todo: Sequence[int], workers: int
) -> Iterator[Iterator[tuple[int, str]]]:
    """Yields (episode, why it is bad or '') as episodes are done."""
    if not workers or len(todo) < 2:
        yield ((i, _one(task, reader, entries[i], i)) for i in todo)
        return
    context = multiprocessing.get_context("spawn")
    count = min(workers, len(todo))
    pool = ProcessPoolExecutor(count, context, initializer=_open, initargs=(task,))
    try:
        futures: dict[Future, int] = {pool.submit(_in_worker, i, entries[i]): i for i in todo}
        yield ((futures[f], f.result()) for f in as_completed(futures))
    except BrokenProcessPool:
        raise OSError(f"one of {count} processes died, perhaps for lack of memory: run the same "
                      "command again with fewer --workers to continue") from None  # fmt: skip
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_HERE: dict[str, Any] = {}  # state of a worker process


def _open(task: Task) -> None:
    reader = open_reader(task.format, task.source, task.options)
    _HERE.update(task=task, reader=reader)


def _in_worker(i: int, entry: Entry) -> str:
    return _one(_HERE["task"], _HERE["reader"], entry, i)


def _one(task: Task, reader: Reader, entry: Entry, i: int) -> str:
    """Converts one episode to a part; returns why it is bad, or ''."""
    try:
        episode, about = convert(reader, i, entry, task.settings)
        try:
            check(episode, task.info)
        except ValueError as error:
            raise SourceError(f"{entry.file} ({entry.name}): {error}") from error
    except SourceError as error:
        return str(error)
    path = _part(pathlib.Path(task.folder), i)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_bytes(msgpack.packb({"episode": pack(episode), "about": about}))
    draft.replace(path)
    return ""


def _part(folder: pathlib.Path, i: int) -> pathlib.Path:
    return folder / f"{i:07d}.part"


def _add(bad: dict[int, str], i: int, error: str, skip_bad: int) -> None:
    """Counts a bad episode.

    Raises:
      SourceError: more than `skip_bad` are bad.
    """
    if len(bad) >= skip_bad:
        more = f" ({skip_bad} were left out before)" if skip_bad else ""
        raise SourceError(f"{error}{more}; give --skip_bad={len(bad) + 1} to leave it out")
    bad[i] = error
    say(f"left out, {len(bad)} of --skip_bad={skip_bad}: {error}")


def _write(
    out: pathlib.Path, folder: pathlib.Path, good: Sequence[int], entries: Sequence[Entry],
    choices: Plan, bad: Mapping[int, str], progress: bool, format: str, source: str,
) -> dict[str, Any]:  # fmt: skip
    """Writes the parts to the data set, in order."""
    counts = {"read": 0, "no_ops": 0, "gaps": 0, "off": 0.0, "largest": 0.0, "late": 0.0}
    written, rates = 0, []
    with records.Writer(out, choices.info) as writer:
        for i in tqdm.tqdm(good, unit="episode", desc="write", disable=not progress):
            part = msgpack.unpackb(_part(folder, i).read_bytes())
            episode, about = unpack(part["episode"]), part["about"]
            writer.write(episode)
            written += episode.length
            counts["read"] += about["steps"]
            counts["no_ops"] += about["no_ops"]
            counts["gaps"] += about["gaps"]
            rates += [about["rate"]] if about["rate"] else []
            for key in ("off", "largest", "late"):
                counts[key] = max(counts[key], about[key])
        report = {
            "format": format, "source": source, "episodes": len(good), "steps": written,
            "steps of the source": counts["read"], **choices.facts, "no-ops dropped":
            counts["no_ops"], "bad": {entries[i].name: text for i, text in bad.items()},
            "warnings": choices.warnings + _doubts(counts, rates, choices),
        }  # fmt: skip
        if choices.settings.fps != choices.settings.hz:
            report["resampled"] = (f"observations are at most {1e3 * counts['off']:.1f} ms off the "
                                   "new times")  # fmt: skip
        if counts["late"] > 1e-4:
            report["video"] = (f"frames are up to {1e3 * counts['late']:.1f} ms off the times of "
                               "their rows")  # fmt: skip
        writer.note(REPORT, report)
    return report


def _doubts(
    counts: Mapping[str, float], rates: Sequence[float], choices: Plan
) -> list[str]:
    hz, out = choices.settings.hz, []
    if choices.settings.fps != hz and counts["largest"] > 1.0:
        out.append(f"summed deltas reach {counts['largest']:.3g}: a controller that takes [-1, 1] "
                   "clips them")  # fmt: skip
    rate = statistics.median(rates) if rates else hz
    if abs(rate / hz - 1) > WRONG_RATE:
        out.append(f"the time stamps say {rate:.4g} Hz, not {hz:g}: give --source_fps={rate:.3g}, "
                   "or correct the source")  # fmt: skip
    if counts["gaps"]:
        out.append(f"{counts['gaps']} of {counts['read']} steps took half as long again as usual, "
                   "by their time stamps: frames were lost")  # fmt: skip
    return out
