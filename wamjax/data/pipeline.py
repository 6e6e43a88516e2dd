"""The training pipeline: endless batches, in an order that only the seed decides.

    windows of each source -> transforms -> shuffled anew every epoch -> exact mixture -> batches

Batches are made by grain threads ahead of their use. The order depends neither on the number of
threads nor on the number of processes, and the iterator's state is the number of the next batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from wamjax.data import mixture
from wamjax.data.checks import checks, describe
from wamjax.data.normalize import normalizers
from wamjax.data.sources import Source, open_sources
from wamjax.data.spec import DataSpec
from wamjax.data.transforms import sample_transforms
from wamjax.data.windows import Windows

__all__ = ["batches", "checks", "describe", "open_sources", "spec_of", "train_iterator"]

_KEYS = (
    "video",
    "proprio",
    "actions",
    "instruction",
    "frame_valid",
    "action_valid",
    "episode",
)


def spec_of(config) -> DataSpec:
    """The spec of a config: declared in ``data.declared``, or of its data, collected if need be.

    A checkpoint's own spec (`DataSpec.from_json`) needs neither.
    """
    return declared(config.data) or open_sources(config.data)[0]


def declared(data) -> DataSpec | None:
    """The spec of a config that states its sizes, so that a model can be built without data."""
    if not data.declared.action_dim:
        return None
    return DataSpec(
        cameras=dict.fromkeys(data.cameras, tuple(data.declared.camera_size)),
        proprio_dim=data.declared.proprio_dim,
        action_dim=data.declared.action_dim,
        chunk=data.chunk,
        frames=data.frames,
        frame_stride=data.frame_stride,
        instruction_length=data.instruction_length,
        control_hz=data.declared.control_hz,
    )


def train_iterator(
    config,
    spec: DataSpec,
    statistics: dict[str, Any],
    sources: Sequence[Source],
    process_index: int = 0,
    process_count: int = 1,
):
    """This process's part of every batch, forever.

    Args:
      config: the whole config; ``seed`` and ``data`` matter.
      spec, statistics, sources: from `open_sources`.
      process_index, process_count: which contiguous part of each batch to make.

    Returns:
      A grain iterator of dicts of numpy arrays (the batch of the objectives), with
      ``get_state`` and ``set_state``, which grain's checkpoint handlers save.
    """
    data = batches(config, spec, statistics, sources, process_index, process_count)
    threads = config.data.prefetch
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    return iter(data.to_iter_dataset(options))


def batches(
    config,
    spec: DataSpec,
    statistics: dict[str, Any],
    sources: Sequence[Source],
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset:
    """The same by random access: batch i at index i."""
    counts = mixture.counts({s.name: s.weight for s in sources}, config.data.batch_size)
    schedule = mixture.Schedule(counts, process_index, process_count)
    chain = sample_transforms(spec, normalizers(statistics, config.data.normalization))

    def example(window: dict[str, Any]) -> dict[str, np.ndarray]:
        sample = chain.forward(window)
        return {key: sample[key] for key in _KEYS}

    streams = [
        grain.MapDataset.source(Windows(s.reader, spec, s.action_free, s.offset))
        .map(example)
        .shuffle(seed=shuffle_seed(config.seed, s.name))
        .repeat()
        for s in sources
    ]
    mixed = grain.MapDataset.select_from_datasets(streams, schedule)
    return mixed.batch(schedule.size, drop_remainder=True)


def shuffle_seed(seed: int, name: str) -> int:
    """32 bits that differ between sources and between neighbouring seeds.

    Grain shuffles epoch e by seed + e: with plain seeds, runs 0 and 1 would share their epochs.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "big")
