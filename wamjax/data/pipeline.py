"""Builds the training pipeline: endless batches, in an order that only the seed determines.

    windows of each source -> transforms -> shuffled per epoch -> exact mixture -> batches
    arrays                                -> shuffled per epoch                  -> batches

Grain threads make batches ahead of their use. The order depends neither on the number of
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
    """Opens the data of a training run, of any kind.

    Args:
      config: the whole config.
      rows: rows of each batch to make, see `training.sharding.batch_rows`; all by default.
      known: words with the first ids, from the run to continue.

    Returns:
      (spec, statistics, iterator): `DataSpec` and statistics of episodes, or `ArraySpec` and {};
      see `train_iterator` for the iterator.

    Raises:
      ValueError, FileNotFoundError: data is missing or does not match; says what to do.
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
    # The instructions of training, so that the policy can warn about others.
    told = sorted({text for s in sources for text in s.reader.index["instructions"]})
    statistics = {**statistics, "instructions": told[:INSTRUCTIONS]}
    return spec, statistics, train_iterator(config, spec, statistics, sources, rows)


INSTRUCTIONS = 10_000  # maximum number stored in a checkpoint


def doubts(
    config, spec: DataSpec, statistics: dict[str, Any], sources: Sequence[Source]
) -> list[str]:
    """Returns warnings about data that a run of `config` would lose or confuse; reads few
    records."""
    out = checks_of.lost(sources, statistics, config.data.normalization) + checks_of.rates(sources)
    if config.model.text.kind == "context":
        cache = embeddings_of(config, sources)
        return out + cache.doubts(t for s in sources for t in s.reader.index["instructions"])
    return out + checks_of.alike(sources, spec.instruction_length, spec.vocabulary)


def kind_of(config) -> str:
    """Returns ``config.data.kind`` after checking it."""
    if config.data.kind not in KINDS:
        raise ValueError(f"config.data.kind = {config.data.kind!r} is not one of {KINDS}")
    return config.data.kind


def open_episodes(
    config, known: Sequence[str] = ()
) -> tuple[DataSpec, dict[str, Any], list[Source]]:
    """Opens the sources for the model of `config`, see `open_sources`; writes stand-ins first.

    Raises:
      ValueError: the data differs from ``config.data.declared``.
    """
    stand_in.ensure(config)
    words = config.model.text.kind == "tokens"
    opened = open_sources(config.data, config.model.codec.kind == "cached", words, known)
    said = declared(config.data)
    if said:
        for key, value in said.to_json().items():
            if opened[0].to_json()[key] != value:
                raise ValueError(
                    f"config.data.declared gives {key} = {value}, the data has "
                    f"{opened[0].to_json()[key]}: correct config.data.declared, or use other data"
                )
    return opened


def spec_of(config) -> DataSpec | ArraySpec:
    """Returns the spec of a config: declared in ``data.declared``, or from its data, which is
    collected if necessary.

    A checkpoint's own spec (`DataSpec.from_json`) needs neither.
    """
    if kind_of(config) == "arrays":
        return arrays.declared(config.data) or arrays.open_table(config.data).spec
    if kind_of(config) == "branches":
        return declared(config.data) or branches.open_branches(config)[0]
    return declared(config.data) or open_episodes(config)[0]


def declared(data) -> DataSpec | None:
    """Returns the spec of a config that states its sizes, so that a model can be built without
    data."""
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
    """Returns an iterator over this process's rows of every batch, without end.

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
            raise ValueError(f"{source.where} has neither rewards nor success, which values are "
                             "learned from: write it with them, set config.data.outcome to False, "
                             f"or, if all of its episodes succeed, set config.data.sources."
                             f"{source.name}.successes")  # fmt: skip


def batches(
    config,
    spec: DataSpec,
    statistics: dict[str, Any],
    sources: Sequence[Source],
    rows: Sequence[int] | None = None,
) -> grain.MapDataset:
    """Returns the same batches by random access: batch i at index i."""
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
    """Opens the text embeddings that ``config.data.embeddings`` names.

    Raises:
      FileNotFoundError: the cache does not exist.
      ValueError: it does not match the config, or lacks instructions of a source; says what to do.
    """
    if not config.data.embeddings:
        raise ValueError(
            "config.model.text.kind = 'context' needs text embeddings: set config.data.embeddings "
            "to the folder of a cache (see wamjax.data.embeddings)"
        )
    path = files.below(data_root(config.data.root), config.data.embeddings)
    cache = EmbeddingCache(path)
    for source in sources:
        cache.require(source.reader.index["instructions"], source.reader.path)
    actual = {"data.instruction_length": cache.settings.length, "model.context_width": cache.width}
    expected = {"data.instruction_length": config.data.instruction_length,
                "model.context_width": config.model.context_width}  # fmt: skip
    for key, value in expected.items():
        if actual[key] != value:
            raise ValueError(
                f"config.{key} is {value}, the text embeddings in {cache.path} have {actual[key]}: "
                f"set it to {actual[key]}, or use another cache by config.data.embeddings"
            )
    return cache
