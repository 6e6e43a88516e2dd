"""Examines a data set for likely mistakes; `wamjax.doctor` shows them.

Every finding is a sentence that names the camera, the dimension or the episode. The numbers of all
episodes are examined, and the pictures of a sample.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wamjax.data.checks import alike, checks, lost, rates
from wamjax.data.episodes import Episode
from wamjax.data.ingest import signals
from wamjax.data.normalize import CONSTANT, MODES
from wamjax.data.records import Reader, RecordError, read_json
from wamjax.data.skips import Skips
from wamjax.data.sources import Source, compute_statistics
from wamjax.data.tokens import Vocabulary

SAMPLE, SHOWN = 12, 5  # episodes whose pictures are examined, and frames of each
DARK, FLAT, WHITE = 14.0, 3.0, 245.0  # grey levels
PLAIN, ALIKE = 10.0, 0.6  # grey levels of a scene, correlation of two pictures of it
NARROW = 0.02  # of its range, where a dimension spends 98 % of its steps
JUMP = 8.0  # times the 95th percentile of steps
IDLE = 0.2  # share of steps in which nothing moves
TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Examination:
    """Holds the findings about a data set.

    Attributes:
      reader: reader of the data set.
      facts: name -> finding, in words.
      warnings: likely mistakes.
      episodes: all episodes that can be read.
      pictures: camera -> pictures of some episodes, (number, uint8 (`SHOWN`, h, w, 3)).
      statistics: recomputed statistics.
    """

    reader: Reader
    facts: Mapping[str, str]
    warnings: Sequence[str]
    episodes: Sequence[tuple[int, Episode]]
    pictures: Mapping[str, Sequence[tuple[int, np.ndarray]]]
    statistics: Mapping[str, Any]


def examine(path, others: Sequence[str] = ()) -> Examination:
    """Examines the data set in a folder.

    Args:
      path: folder of the data set.
      others: folders of data sets in the same mixture, to compare their rates.

    Raises:
      FileNotFoundError, ValueError: the data set does not exist, or nothing in it can be read.
    """
    reader = Reader(path)
    episodes, bad = _read(reader)
    if not episodes:
        raise ValueError(f"no episode of {path} can be read: {bad[0]}")
    skips = Skips(len(reader))
    statistics = compute_statistics([reader], skips)
    source = Source("data", reader, action_free=reader.info.action_free, skips=skips)
    pictures, faults = _pictures(reader, episodes)
    facts, doubts = _conventions(reader, [e for _, e in episodes])
    warnings = [
        *bad,
        *faults,
        *_cameras(pictures, reader.lengths),
        *doubts,
        *_narrow(reader, statistics),
        *_jumps(reader, episodes),
        *_instructions(source),
        *_lengths(reader),
        *_twins(reader),
        *_statistics(reader, statistics),
        *checks([source], statistics),
        *itertools.chain(*(lost([source], statistics, mode) for mode in MODES)),
        *rates([source, *(Source(pathlib.Path(p).name, Reader(p)) for p in others)]),
        *_origin(reader),
    ]  # fmt: skip
    return Examination(reader, _facts(reader) | facts, warnings, episodes, pictures, statistics)


def _read(reader: Reader) -> tuple[list[tuple[int, Episode]], list[str]]:
    out, bad = [], []
    for i in range(len(reader)):
        try:
            out.append((i, reader[i]))
        except RecordError as error:
            bad.append(str(error))
    return out, bad


def _facts(reader: Reader) -> dict[str, str]:
    info, n = reader.info, reader.lengths
    seconds = n.sum() / info.control_hz
    return {
        "episodes": f"{len(reader)}, {np.mean(reader.index['success'][: len(reader)]):.0%} of them "
        "successful",
        "steps": f"{n.sum()} ({n.min()} to {n.max()} in an episode, median {np.median(n):.0f}; "
        f"{seconds / 60:.1f} minutes)",
        "rate": f"{info.control_hz:g} Hz",
        "cameras": ", ".join(f"{k} {h}x{w}" for k, (h, w) in info.cameras.items()) or "none",
        "instructions": str(len(set(reader.index.get("instructions", ())))),
        "end": "with what was seen after the last action" if info.final_observation else
               "the last observation is stored twice",
        "outcomes": "returns" if info.outcomes else "none: values cannot be learned",
    }  # fmt: skip


def _conventions(reader: Reader, episodes: Sequence[Episode]) -> tuple[dict[str, str], list[str]]:
    """Checks gripper, delta or absolute actions, pairing and idle steps."""
    info = reader.info
    if info.action_free:
        return {"actions": "none"}, []
    states, actions = [e.proprio for e in episodes], [e.actions for e in episodes]
    dims = signals.grippers(info.action_names or [""] * info.action_dim, actions)
    facts, warnings = {}, []
    words = {}
    for i in dims:
        words[_name("actions", i, info)] = signals.convention(states, actions, i,
                                                              info.proprio_names)  # fmt: skip
        warnings += _gripper(reader, states, actions, i)
    facts["gripper"] = ", ".join(f"{k}: {_said(v)}" for k, v in words.items()) or "none found"
    kind = signals.action_kind(states, actions, dims)
    facts["actions"] = {"unclear": "delta or absolute: not clear"}.get(kind, kind)
    lags = [signals.together(states, actions, lag, dims) for lag in (-1, 0, 1)]
    if kind != "absolute" and lags[0] > max(lags[1:]) + 0.1:
        warnings.append("the actions go with the motion before them, not after: observations were "
                        "stored after their action? `wamjax.ingest --pairing=after` pairs them "
                        "anew")  # fmt: skip
    if kind != "absolute":
        motion = np.delete(np.concatenate(actions), dims, axis=1)
        idle = float(np.mean(np.linalg.norm(motion, axis=1) < 1e-4))
        if idle > IDLE:
            warnings.append(f"{idle:.0%} of the steps do nothing; `wamjax.ingest --no_op=1e-4` "
                            "drops them as published")  # fmt: skip
    return facts, warnings


def _said(convention: str) -> str:
    if convention not in signals.CONVENTIONS:
        return convention
    opens, closes = signals.CONVENTIONS[convention]
    return f"{opens:g} opens, {closes:g} closes"


def _gripper(reader: Reader, states, actions, dim: int) -> list[str]:
    """Finds episodes whose gripper works the other way round."""
    names = reader.info.proprio_names
    each = [signals.opens([s], [a], dim, names) for s, a in zip(states, actions, strict=True)]
    most = Counter(x for x in each if x).most_common()
    if len(most) < 2:
        return []
    odd = [i for i, x in enumerate(each) if x == most[1][0]]
    return [f"{_name('actions', dim, reader.info)}: the gripper opens and closes the other way "
            f"round in {len(odd)} episodes ({_few(odd)})"]  # fmt: skip


def _narrow(reader: Reader, statistics) -> list[str]:
    """Finds dimensions that hardly ever leave one value."""
    out = []
    for key, rows in statistics.items():
        if key not in ("proprio", "actions"):
            continue
        for i, (low, high) in enumerate(zip(rows["min"], rows["max"], strict=True)):
            spread = rows["q99"][i] - rows["q01"][i]
            if high - low >= CONSTANT and spread < NARROW * (high - low):
                out.append(f"{_name(key, i, reader.info)} is nearly constant: 98 % of the steps "
                           f"within {spread:.3g} of a range of {high - low:.3g}")  # fmt: skip
    return out


def _jumps(reader: Reader, episodes) -> list[str]:
    """Finds steps of the state that are far larger than all others, except for grippers."""
    moves = [np.abs(np.diff(e.proprio, axis=0)) for _, e in episodes]
    usual = np.quantile(np.concatenate(moves), 0.95, axis=0)
    usual[[i for i, n in enumerate(reader.info.proprio_names) if signals.GRIPPER.search(n)]] = 0
    span = np.ptp(np.concatenate([e.proprio for _, e in episodes]), axis=0)
    examination: dict[int, list[str]] = {}
    for (number, _), move in zip(episodes, moves, strict=True):
        far = (move > JUMP * usual) & (move > 0.2 * span) & (usual > 0)
        for step, dim in np.argwhere(far):
            examination.setdefault(int(dim), []).append(f"episode {number} step {step}")
    return [f"{_name('proprio', dim, reader.info)} jumps {len(places)} times: {_few(places)}"
            for dim, places in sorted(examination.items())]  # fmt: skip


def _pictures(reader: Reader, episodes):
    """Returns (camera -> some frames of some episodes, their faults)."""
    step = max(1, len(episodes) // SAMPLE)
    out: dict[str, list[tuple[int, np.ndarray]]] = {c: [] for c in reader.info.cameras}
    faults = []
    for number, episode in itertools.islice(episodes[::step], SAMPLE):
        at = np.linspace(0, episode.length - 1, SHOWN).round().astype(int)
        for camera, size in reader.info.cameras.items():
            try:
                out[camera].append((number, episode.frames(camera, at, size)))
            except (ValueError, RecordError) as error:
                faults.append(f"episode {number}: {error}")
    return out, faults


def _cameras(pictures, lengths: np.ndarray) -> list[str]:
    out = []
    for camera, rows in pictures.items():
        levels = {n: (x.mean(), x.std(axis=(1, 2)).mean()) for n, x in rows}
        for what, odd in {
            "dark": [n for n, (mean, _) in levels.items() if mean < DARK],
            "white": [n for n, (mean, _) in levels.items() if mean > WHITE],
            "of one colour": [n for n, (mean, std) in levels.items()
                              if std < FLAT and DARK <= mean <= WHITE],
            "frozen": [n for n, x in rows if lengths[n] >= SHOWN and (x == x[0]).all()
                       and levels[n][1] >= FLAT],
        }.items():  # fmt: skip
            if odd:
                out.append(f"camera {camera!r} is {what} in {len(odd)} of {len(rows)} episodes "
                           f"({_few(odd)})")  # fmt: skip
        out += _turned(camera, [(n, x) for n, x in rows if levels[n][1] >= FLAT])
    return out


_TURNS = {
    "upside down": lambda x: x[::-1],
    "mirrored": lambda x: x[:, ::-1],
    "turned by 180 degrees": lambda x: x[::-1, ::-1],
    "in swapped colours (BGR)": lambda x: x[..., ::-1],
}


def _turned(camera: str, rows) -> list[str]:
    """Finds episodes that look like the others once they are rotated."""
    if len(rows) < 3:
        return []
    first = np.stack([x.astype(np.float64).mean(axis=0) for _, x in rows])
    middle = np.median(first, axis=0)
    out: dict[str, list[int]] = {}
    if middle.std() < PLAIN:  # everything in the scene moves
        return []
    for (number, _), x in zip(rows, first, strict=True):
        now = signals.correlation(x.ravel(), middle.ravel())
        for what, turn in _TURNS.items():
            then = signals.correlation(turn(x).ravel(), middle.ravel())
            if then > max(ALIKE, now + 0.2):
                out.setdefault(what, []).append(number)
                break
    return [f"camera {camera!r} is {what}, beside the other episodes, in {_few(odd)}"
            for what, odd in out.items()]  # fmt: skip


def _instructions(source: Source) -> list[str]:
    texts = source.reader.index.get("instructions", ())
    out = ["some episodes have no instruction"] if any(not t.strip() for t in texts) else []
    long = [t for t in texts if len(t.split()) > TOKENS]
    if long:
        return [*out, f"{len(long)} instructions have more than {TOKENS} words: {long[0]!r}"]
    vocabulary = Vocabulary.of(texts)
    try:
        for text in texts:
            vocabulary.tokenize(text, TOKENS)
    except ValueError as error:
        return [*out, str(error)]
    return out + [x for x in alike([source], TOKENS, vocabulary) if "['']" not in x]


def _lengths(reader: Reader) -> list[str]:
    n, out = reader.lengths, []
    if (one := np.flatnonzero(n == 1)).size:
        out.append(f"{len(one)} episodes have one step ({_few(one.tolist())})")
    middle = np.median(n)
    short = np.flatnonzero((n < 0.1 * middle) & (n > 1))
    long = np.flatnonzero(n > 10 * middle)
    for what, odd in {"a tenth of": short, "ten times": long}.items():
        if odd.size:
            than = "less than" if what.startswith("a") else "more than"
            out.append(f"{len(odd)} episodes have {than} {what} the median of {middle:.0f} steps "
                       f"({_few(odd.tolist())})")  # fmt: skip
    return out


def _twins(reader: Reader) -> list[str]:
    """Finds episodes that occur twice."""
    digests = reader.index.get("digests", {})
    key = "proprio" if reader.info.action_free else "actions"
    places: dict[str, list[int]] = {}
    for i, digest in enumerate(digests.get(key, ())[: len(reader)]):
        places.setdefault(digest, []).append(i)
    twins = [p for p in places.values() if len(p) > 1]
    return [f"{len(twins)} times episodes have the same {key}: {_few(twins)}"] if twins else []


def _statistics(reader: Reader, statistics) -> list[str]:
    """Checks whether the stored statistics belong to these episodes."""
    try:
        stored = reader.stored_statistics()
    except ValueError as error:
        return [str(error)]
    wrong = [
        f"{key}.{name}"
        for key, rows in statistics.items()
        for name, value in rows.items()
        if name in ("min", "max", "mean", "std")
        and not _close(stored.get(key, {}).get(name), value)
    ]
    return [f"statistics.json does not fit the episodes ({', '.join(wrong)}): recompute it by "
            f"`python -m wamjax.stats --data={reader.path} --out={reader.path}/statistics.json`"
            ] * bool(wrong)  # fmt: skip


def _close(a: Any, b: Any) -> bool:
    return a is not None and np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-3, atol=1e-5)


def _origin(reader: Reader) -> list[str]:
    """Returns the warnings of `wamjax.ingest`."""
    file = reader.path / "ingest.json"
    if not file.exists():
        return []
    report = read_json(file)
    bad = report.get("bad", {})
    out = [f"{len(bad)} episodes of the source were left out: {_few(list(bad))}"] if bad else []
    return out + list(report.get("warnings", ()))


def _name(key: str, i: int, info) -> str:
    names = info.action_names if key == "actions" else info.proprio_names
    return f"{key}[{i}]" + (f" ({names[i]})" if i < len(names) else "")


def _few(values: Sequence[Any], count: int = 5) -> str:
    text = ", ".join(str(v) for v in values[:count])
    return text + (", ..." if len(values) > count else "")


def as_text(examination: Examination) -> str:
    """Formats the examination for a terminal."""
    lines = [f"{examination.reader.path}"]
    lines += [f"  {key:<14}{value}" for key, value in examination.facts.items()]
    lines += [f"warning: {text}" for text in examination.warnings] or ["no warnings"]
    return "\n".join(lines)


def as_json(examination: Examination) -> str:
    """Formats the examination for a program."""
    facts = {"path": str(examination.reader.path), "facts": dict(examination.facts)}
    return json.dumps(facts | {"warnings": list(examination.warnings)}, indent=2)
