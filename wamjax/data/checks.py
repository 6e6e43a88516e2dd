"""Checks data for likely mistakes and describes batches."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wamjax.data import normalize
from wamjax.data.normalize import CONSTANT, KEYS
from wamjax.data.records import Episode, RecordError
from wamjax.data.sources import Source
from wamjax.data.spec import DataSpec
from wamjax.data.tokens import Vocabulary, words
from wamjax.data.windows import held

SAMPLED = 64  # episodes read per source
PACE = 1.6  # maximum ratio of speeds at one rate; half the rate gives 2 for motion, 1.4 for noise


def checks(
    sources: Sequence[Source],
    statistics: Mapping[str, Any],
    spec: DataSpec | None = None,
    hold: Sequence[str] | None = None,
) -> list[str]:
    """Returns warnings about sources under the statistics that will normalize them.

    Args:
      sources: from `wamjax.data.sources.open_sources`.
      statistics: statistics of the sources, or of a checkpoint.
      spec: shape of a window, to compare with the length of episodes.
      hold: see `wamjax.data.windows.padding`.
    """
    names = _names(sources)
    out = _constant(statistics, names) + _padding(statistics, names["actions"], hold)
    for source in sources:
        out += _ranges(source, statistics, names)
        out += _episodes(source, spec)
    return out


def lost(sources: Sequence[Source], statistics: Mapping[str, Any], mode: str) -> list[str]:
    """Returns warnings about dimensions whose rare, large values do not survive normalization."""
    names = _names(sources)
    return [
        f"{_dim(key, i, names)} reaches {value:.4g}, and comes back as {back:.4g}: values that are "
        f"rare are clipped by config.data.normalization = {mode!r}; 'min_max' keeps them"
        for key, i, value, back in normalize.lost(statistics, mode)
    ]


def rates(sources: Sequence[Source], count: int = 8) -> list[str]:
    """Returns warnings about sources that move at a different speed than the first, as if their
    rate differed.

    Args:
      count: number of episodes to read per source.
    """
    speeds = [_speed(source, count) for source in sources] if len(sources) > 1 else []
    out = []
    for source, speed in zip(sources[1:], speeds[1:], strict=False):
        moving = (speed > CONSTANT) & (speeds[0] > CONSTANT)
        if not moving.any():
            continue
        ratio = float(np.median(speed[moving] / speeds[0][moving]))
        if not 1 / PACE < ratio < PACE:
            out.append(
                f"{source.where} moves {ratio:.2g} times as far in a step as {sources[0].where}, "
                f"and both say {source.reader.info.control_hz:g} Hz: is the rate of one wrong?"
            )
    return out


def _speed(source: Source, count: int) -> np.ndarray:
    """Returns the mean change of each state dimension per step."""
    moves = [np.abs(np.diff(e.proprio, axis=0)) for e in _sample(source, count)]
    dims = source.reader.info.proprio_dim
    return np.concatenate(moves).mean(axis=0) if moves else np.zeros(dims)


def alike(sources: Sequence[Source], length: int, vocabulary: Vocabulary) -> list[str]:
    """Returns warnings about instructions and words that the tokenizer cannot tell apart or
    ignores."""
    same = defaultdict(set)
    for source in sources:
        for text in source.reader.index.get("instructions", ()):
            same[tuple(vocabulary.tokenize(text, length).tolist())].add(text)
    out = _collisions(sources, vocabulary) + [
        f"the instructions {sorted(group)} are the same to the tokeniser (it knows a-z and 0-9, "
        "and no case): the policy cannot tell them apart"
        for group in same.values()
        if len(group) > 1
    ]
    blank = sorted(same.get((0,) * length, ()))
    return out + ([f"the instructions {blank} have no word that the tokeniser knows (a-z, 0-9): "
                   "the policy reads nothing"] if blank else [])  # fmt: skip


def describe(batch: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Returns one line per leaf of a batch: type, shape, and range (or the share of true
    values)."""
    return {key: _line(np.asarray(value)) for key, value in batch.items()}


def _line(x: np.ndarray) -> str:
    head = f"{x.dtype}{list(x.shape)}"
    if x.dtype == bool:
        return f"{head} true {x.mean():.0%}"
    if not np.isfinite(x).all():
        return f"{head} NON-FINITE {1 - np.isfinite(x).mean():.2%}"
    return f"{head} from {x.min():.4g} to {x.max():.4g}, mean {x.mean():.4g}"


def _names(sources: Sequence[Source]) -> dict[str, tuple[str, ...]]:
    info = sources[0].reader.info
    return {"actions": info.action_names, "proprio": info.proprio_names}


def _dim(key: str, i: int, names: Mapping[str, tuple[str, ...]]) -> str:
    known = names.get(key, ())
    return f"{key}[{i}]" + (f" ({known[i]})" if i < len(known) else "")


def _constant(statistics, names) -> list[str]:
    return [
        f"{_dim(key, i, names)} is constant ({low:.4g}): the model reads 0, and acts the constant"
        for key in KEYS
        if key in statistics
        for i, (low, high) in enumerate(
            zip(statistics[key]["min"], statistics[key]["max"], strict=True)
        )
        if high - low < CONSTANT
    ]


def _padding(statistics, names, hold: Sequence[str] | None) -> list[str]:
    """Warns about actions that are 0 after the end of an episode and never elsewhere."""
    if hold is None or "actions" not in statistics:
        return []
    low, high = statistics["actions"]["min"], statistics["actions"]["max"]
    free = ~held(hold, names, len(low))
    return [
        f"{_dim('actions', i, {'actions': names})} spans {low[i]:.4g} to {high[i]:.4g}, and is 0 "
        f"behind the end of an episode: if it is an absolute command, add {i} to those that "
        "config.data.padding='hold:...' keeps"
        for i in np.flatnonzero(free)
        if not low[i] <= 0 <= high[i]
    ]


def _ranges(source: Source, statistics, names) -> list[str]:
    """Compares a source with the statistics: far outside of them, or in a small corner."""
    keys = ["proprio"] if source.action_free else ["proprio", "actions"]
    episodes, out = _sample(source), []
    for key in keys if episodes else ():
        x = np.concatenate([getattr(episode, key) for episode in episodes])
        rows = statistics[key]
        if x.shape[1] != len(rows["min"]):
            out.append(
                f"{source.where}: {key} has {x.shape[1]} dimensions, the statistics have "
                f"{len(rows['min'])}: they are of another data set"
            )
            continue
        for i, column in enumerate(x.T):
            low, high = rows["min"][i], rows["max"][i]
            width, extent = max(high - low, CONSTANT), (column.min(), column.max())
            subject = (
                f"{source.where}: {_dim(key, i, names)} spans {extent[0]:.4g} to {extent[1]:.4g}, "
            )
            span = f"the statistics {low:.4g} to {high:.4g}"
            if extent[0] < low - 0.1 * width or extent[1] > high + 0.1 * width:
                out.append(f"{subject}far outside of {span}: statistics of another data set?")
            elif extent[1] - extent[0] < 0.05 * width and high - low >= CONSTANT:
                out.append(f"{subject}a corner of {span}: other units, or another robot?")
    return out


def _sample(source: Source, count: int = SAMPLED) -> list[Episode]:
    """Reads some of the episodes, and skips as many bad ones as training would."""
    step, out = max(1, len(source.reader) // count), []
    for i in range(0, len(source.reader), step):
        try:
            out.append(source.reader[i])
        except RecordError as error:
            source.skips.add(source.reader.path, i, error)
    return out


def _episodes(source: Source, spec: DataSpec | None) -> list[str]:
    index, out = source.reader.index, []
    lengths = source.reader.lengths
    if spec is not None:
        span = max(spec.chunk, spec.frame_stride * (spec.frames - 1))
        short = np.mean(lengths < span)
        if short > 0.1:
            out.append(
                f"{source.where}: {short:.0%} of the episodes are shorter than a window of {span} "
                f"steps (median {np.median(lengths):.0f}): much of it is masked padding"
            )
    failed = 1 - np.mean(index["success"][: len(source.reader)])
    if failed > 0.5 and not source.action_free:
        out.append(f"{source.where}: {failed:.0%} of the episodes are not marked as successful")
    tasks = Counter(index["tasks"][: len(source.reader)])
    most, least = max(tasks.values()), min(tasks.values())
    if most > 5 * least:
        out.append(f"{source.where}: tasks are unbalanced, {dict(tasks)}")
    return out


def _collisions(sources: Sequence[Source], vocabulary: Vocabulary) -> list[str]:
    """Returns warnings about words that the tokenizer cannot tell apart."""
    same = defaultdict(set)
    for source in sources:
        for text in source.reader.index.get("instructions", ()):
            for word in words(text):
                same[vocabulary.token(word)].add(word)
    return [
        f"the words {sorted(group)} of the instructions share token {i}: the policy cannot tell "
        "them apart; config.data.vocabulary = 'words' gives each its own"
        for i, group in same.items()
        if len(group) > 1
    ]
