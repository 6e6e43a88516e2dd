"""The training pipeline: endless batches, in an order that only the seed decides.

    windows of each source -> transforms -> shuffled anew every epoch -> exact mixture -> batches
    arrays                                -> shuffled anew every epoch               -> batches

Batches are made by grain threads ahead of their use. The order depends neither on the number of
threads nor on the number of processes, and the iterator's state is the number of the next batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from wamjax import files
from wamjax.console import say
from wamjax.data import arrays, branches, mixture, stand_in
from wamjax.data import checks as checks_of
from wamjax.data.arrays import ArraySpec
from wamjax.data.checks import checks, describe
from wamjax.data.embeddings import EmbeddingCache
from wamjax.data.normalize import bounds, normalizers
from wamjax.data.sources import Source, cells_of, data_root, open_sources
from wamjax.data.spec import DataSpec
from wamjax.data.transforms import sample_transforms
from wamjax.data.windows import Windows, padding

__all__ = [
    "batches",
    "checks",
    "describe",
    "open_data",
    "open_sources",
    "spec_of",
    "train_iterator",
]

KINDS = ("episodes", "arrays", "branches")
_KEYS = ("proprio", "actions", "frame_valid", "action_valid", "episode")
_OUTCOME = ("future_proprio", "score", "to_go", "rollout")


def open_data(config, rows: Sequence[int] | None = None, known: Sequence[str] = ()):
    """What a training run needs of its data, of either kind.

    Args:
      config: the whole config.
      rows: those of each batch that are to be made, see `training.sharding.batch_rows`; all of them
        by default.
      known: words that have the first ids, of a run that is gone on from.

    Returns:
      (spec, statistics, iterator): `DataSpec` and statistics of episodes, or `ArraySpec` and {};
      see `train_iterator` for the iterator.

    Raises:
      ValueError, FileNotFoundError: data that is missing or does not fit; says what to do.
    """
    if kind_of(config) == "arrays":
        table = arrays.open_table(config.data)
        data = arrays.batches(config, table, rows)
        return table.spec, {}, _iterate(config, data)
    if kind_of(config) == "branches":
        spec, statistics, table = branches.open_branches(config)
        return spec, statistics, _iterate(config, arrays.batches(config, table, rows))
    spec, statistics, sources = open_episodes(config, known)
    for line in doubts(config, spec, statistics, sources):
        say(f"warning: {line}")
    # What a policy was told in training, so that it can say when it is told something else.
    told = sorted({text for s in sources for text in s.reader.index["instructions"]})
    statistics = {**statistics, "instructions": told[:INSTRUCTIONS]}
    return spec, statistics, train_iterator(config, spec, statistics, sources, rows)


INSTRUCTIONS = 10_000  # kept in a checkpoint, at most


def doubts(
    config, spec: DataSpec, statistics: dict[str, Any], sources: Sequence[Source]
) -> list[str]:
    """Warnings of what a run of `config` would lose or confuse of its data; reads few records."""
    out = checks_of.lost(sources, statistics, config.data.normalization) + checks_of.rates(sources)
    if config.model.text.kind == "context":
        cache = embeddings_of(config, sources)
        return out + cache.doubts(t for s in sources for t in s.reader.index["instructions"])
    return out + checks_of.alike(sources, spec.instruction_length, spec.vocabulary)


def kind_of(config) -> str:
    """``config.data.kind``, if there is such a kind."""
    if config.data.kind not in KINDS:
        raise ValueError(f"config.data.kind = {config.data.kind!r} is not one of {KINDS}")
    return config.data.kind


def open_episodes(
    config, known: Sequence[str] = ()
) -> tuple[DataSpec, dict[str, Any], list[Source]]:
    """The sources as the model of `config` reads them, see `open_sources`; makes stand-ins first.

    Raises:
      ValueError: the data is not what ``config.data.declared`` says.
    """
    stand_in.ensure(config)
    words = config.model.text.kind == "tokens"
    opened = open_sources(config.data, config.model.codec.kind == "cached", words, known)
    said = declared(config.data)
    if said:
        for key, value in said.to_json().items():
            if opened[0].to_json()[key] != value:
                raise ValueError(
                    f"config.data.declared makes {key} {value}, the data has "
                    f"{opened[0].to_json()[key]}; correct it, or name other data"
                )
    return opened


def spec_of(config) -> DataSpec | ArraySpec:
    """The spec of a config: declared in ``data.declared``, or of its data, collected if need be.

    A checkpoint's own spec (`DataSpec.from_json`) needs neither.
    """
    if kind_of(config) == "arrays":
        return arrays.declared(config.data) or arrays.open_table(config.data).spec
    if kind_of(config) == "branches":
        return declared(config.data) or branches.open_branches(config)[0]
    return declared(config.data) or open_episodes(config)[0]


def declared(data) -> DataSpec | None:
    """The spec of a config that states its sizes, so that a model can be built without data."""
    if not data.declared.action_dim:
        return None
    cells, resized = cells_of(data), any(data.image_size)
    size = data.image_size if resized else data.declared.camera_size
    return DataSpec(
        cameras=cells or dict.fromkeys(data.cameras, tuple(size)),
        proprio_dim=data.declared.proprio_dim,
        action_dim=data.declared.action_dim,
        chunk=data.chunk,
        frames=data.frames,
        frame_stride=data.frame_stride,
        instruction_length=data.instruction_length,
        control_hz=data.declared.control_hz,
        resize=data.resize if cells or resized else "",
        layout=data.layout,
    )


def train_iterator(
    config,
    spec: DataSpec,
    statistics: dict[str, Any],
    sources: Sequence[Source],
    rows: Sequence[int] | None = None,
):
    """This process's rows of every batch, forever.

    Args:
      config: the whole config; ``seed`` and ``data`` matter.
      spec, statistics, sources: from `open_sources`.
      rows: see `open_data`.

    Returns:
      A grain iterator of dicts of numpy arrays (the batch of the objectives), with
      ``get_state`` and ``set_state``, which grain's checkpoint handlers save.
    """
    return _iterate(config, batches(config, spec, statistics, sources, rows))


def _iterate(config, data: grain.MapDataset):
    threads = config.data.prefetch
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    return iter(data.to_iter_dataset(options))


def _check_outcomes(sources: Sequence[Source]) -> None:
    for source in sources:
        if not (source.reader.info.outcomes or source.successes):
            raise ValueError(f"{source.where} holds neither rewards nor success, and values are to "
                             "be learned from it: set config.data.outcome to False, write it with "
                             f"them, or set config.data.sources.{source.name}.successes where all "
                             "of its episodes are demonstrations that succeed")  # fmt: skip


def batches(
    config,
    spec: DataSpec,
    statistics: dict[str, Any],
    sources: Sequence[Source],
    rows: Sequence[int] | None = None,
) -> grain.MapDataset:
    """The same by random access: batch i at index i."""
    if config.data.outcome:
        _check_outcomes(sources)
    counts = mixture.counts({s.name: s.weight for s in sources}, config.data.batch_size)
    schedule = mixture.Schedule(counts, rows)
    cache = embeddings_of(config, sources) if config.model.text.kind == "context" else None
    hold = padding(config.data.padding)
    scales = normalizers(statistics, config.data.normalization)
    chain = sample_transforms(spec, scales, cache, padded=hold is not None)
    seen = "latents" if config.model.codec.kind == "cached" else "video"
    keys = (seen, "instruction" if cache is None else "context", *_KEYS)
    keys += _OUTCOME if config.data.outcome else ()

    limits = bounds(statistics)

    def example(window: dict[str, Any]) -> dict[str, np.ndarray]:
        sample = chain.forward(window)
        return {key: sample[key] for key in keys}

    streams = [
        grain.MapDataset.source(
            Windows(
                s.reader, spec, s.action_free, s.offset, s.latents, s.rollout, s.ended,
                hold=hold or (), bounds=limits, skips=s.skips,
                successes=s.successes,
            )  # fmt: skip
        )
        .map(example)
        .shuffle(seed=mixture.shuffle_seed(config.seed, s.name))
        .repeat()
        for s in sources
    ]
    mixed = grain.MapDataset.select_from_datasets(streams, schedule)
    return mixed.batch(schedule.size, drop_remainder=True)


def embeddings_of(config, sources: Sequence[Source]) -> EmbeddingCache:
    """The text embeddings that ``config.data.embeddings`` names.

    Raises:
      FileNotFoundError: there is no such cache.
      ValueError: it does not fit the config, or lacks instructions of a source; says what to do.
    """
    if not config.data.embeddings:
        raise ValueError(
            "config.model.text.kind = 'context' wants text embeddings: set config.data.embeddings "
            "to the folder of a cache (see wamjax.data.embeddings)"
        )
    path = files.below(data_root(config.data.root), config.data.embeddings)
    cache = EmbeddingCache(path)
    for source in sources:
        cache.require(source.reader.index["instructions"], source.reader.path)
    have = {"data.instruction_length": cache.settings.length, "model.context_width": cache.width}
    want = {"data.instruction_length": config.data.instruction_length,
            "model.context_width": config.model.context_width}  # fmt: skip
    for key, value in want.items():
        if have[key] != value:
            raise ValueError(
                f"config.{key} is {value}, the text embeddings in {cache.path} have {have[key]}: "
                "correct it, or name another cache by config.data.embeddings"
            )
    return cache
