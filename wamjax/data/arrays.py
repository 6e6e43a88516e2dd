"""Data that is arrays of examples: pictures, latents, clips; with labels or captions, or without.

``config.data.kind = "arrays"`` and ``config.data.arrays = "digits:size=8"`` choose a maker of
`wamjax.data.makers` and its options. Examples are served like windows of episodes are: in an order
that only the seed decides, every process making its rows of every batch, resumable to the bit.
Batches have the keys that are stored.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import grain
import ml_dtypes
import numpy as np

from wamjax import config as configs
from wamjax.data import mixture

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ROUNDED = ("latents", "context")  # objectives take these in bfloat16


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """The sizes that arrays decide for a model.

    Attributes:
      shapes: of an example, by key.
      dtypes: their names, by key.
      sizes: how many values an integer key takes: classes of "label", words of "instruction".
      count: examples (N).
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    sizes: Mapping[str, int]
    count: int

    def to_json(self) -> dict[str, Any]:
        """Plain json, to keep in a checkpoint."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> ArraySpec:
        """The reverse of `to_json`."""
        shapes = {key: tuple(shape) for key, shape in values["shapes"].items()}
        return ArraySpec(**dict(values) | {"shapes": shapes})


class Table(Protocol):
    """Examples by number; safe to read from several threads."""

    spec: ArraySpec

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """A batch of the examples with these numbers."""


class Arrays:
    """A table of arrays that lead with the example; in memory, or mapped from files.

    Args:
      arrays: by key, equally long. Floating "latents" and "context" are served in bfloat16.
      sizes: see `ArraySpec`.

    Raises:
      ValueError: the arrays do not fit each other or their sizes; the key is named.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], sizes: Mapping[str, int] | None = None):
        self._arrays, sizes = dict(arrays), dict(sizes or {})
        counts = {key: len(x) for key, x in self._arrays.items()}
        if not counts or len(set(counts.values())) > 1 or not min(counts.values()):
            raise ValueError(f"arrays must be equally long, and not empty: {counts}")
        for key, x in self._arrays.items():
            if x.dtype in (np.int64, np.uint64) and np.abs(x).max() > np.iinfo(np.int32).max:
                raise ValueError(f"{key!r} holds numbers that do not fit int32")
        for key, size in sizes.items():
            low, high = self._arrays[key].min(), self._arrays[key].max()
            if low < 0 or high >= size:
                raise ValueError(f"{key!r} spans {low} to {high}, there are {size} values from 0")
        self.spec = ArraySpec(
            {key: x.shape[1:] for key, x in self._arrays.items()},
            {key: _served(key, x.dtype).name for key, x in self._arrays.items()},
            sizes,
            min(counts.values()),
        )

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """A batch of the examples with these numbers."""
        rows = {key: np.asarray(x[indices]) for key, x in self._arrays.items()}
        return {key: x.astype(_served(key, x.dtype), copy=False) for key, x in rows.items()}


def _served(key: str, dtype: np.dtype) -> np.dtype:
    """What a stored array is served as: 32 bits at most, and latents in bfloat16."""
    if dtype == BFLOAT16 or (key in ROUNDED and np.issubdtype(dtype, np.floating)):
        return BFLOAT16
    narrow = {"float64": np.float32, "int64": np.int32, "uint64": np.uint32}
    return np.dtype(narrow.get(dtype.name, dtype))


def open_table(data, split: str = "train") -> Table:
    """The table that a config names.

    Args:
      data: ``config.data``; ``arrays`` is NAME or NAME:option=value,...
      split: "train" or "test".

    Raises:
      ValueError: unknown maker, option or split, with a suggestion.
    """
    from wamjax.data.makers import MAKERS

    name, _, options = data.arrays.partition(":")
    if name not in MAKERS:
        raise ValueError(
            f"config.data.arrays = {data.arrays!r}: there is no {name!r}"
            f"{configs.did_you_mean(name, MAKERS)}; there are {sorted(MAKERS)}"
        )
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r} is not 'train' or 'test'")
    known = inspect.signature(MAKERS[name]).parameters
    defaults = {key: p.default for key, p in known.items() if p.kind == p.KEYWORD_ONLY}
    try:
        values = configs.parse_arg(options, **defaults)
    except ValueError as error:
        raise ValueError(f"config.data.arrays = {data.arrays!r}: {error}") from error
    return MAKERS[name](data.root, split, **values)


def batches(config, table: Table, rows: Sequence[int] | None = None) -> grain.MapDataset:
    """`rows` (all by default) of batch i at index i, without end; every epoch is shuffled anew."""
    schedule = mixture.Schedule((config.data.batch_size,), rows)
    numbers = grain.MapDataset.range(table.spec.count)
    numbers = numbers.shuffle(seed=mixture.shuffle_seed(config.seed, config.data.arrays)).repeat()
    chosen = grain.MapDataset.select_from_datasets([numbers], schedule)
    # Numbers are batched and rows taken at once: an example alone would cost more than its copy.
    return chosen.batch(schedule.size, drop_remainder=True).map(table.take)


# dtypes of the keys that a config may declare
DECLARED = {
    "video": "uint8", "label": "int32", "instruction": "int32",
    "latents": "bfloat16", "context": "bfloat16", "pooled": "float32",
}  # fmt: skip


def declared(data) -> ArraySpec | None:
    """The spec that ``data.declared.arrays`` states, or None.

    It is ``KEY=SHAPE[:VALUES],...``: the shape of an example as 1x32x32x4 (nothing for a scalar),
    and how many values an integer key takes: "latents=1x32x32x4,label=:1000".

    Raises:
      ValueError: it cannot be read.
    """
    shapes, sizes = {}, {}
    for part in filter(None, data.declared.arrays.split(",")):
        key, _, text = part.partition("=")
        shape, _, values = text.partition(":")
        try:
            if key not in DECLARED:
                raise ValueError(f"there is no {key!r}, only {sorted(DECLARED)}")
            shapes[key] = tuple(int(n) for n in shape.split("x") if shape)
            if values:
                sizes[key] = int(values)
        except ValueError as error:
            raise ValueError(
                f"config.data.declared.arrays: {part!r} is not KEY=SHAPE[:VALUES]: {error}"
            ) from error
    if not shapes:
        return None
    return ArraySpec(shapes, {key: DECLARED[key] for key in shapes}, sizes, 0)
