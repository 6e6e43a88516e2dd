"""Serves arrays of examples: pictures, latents or clips, with or without labels or captions.

``config.data.kind = "arrays"`` and ``config.data.arrays = "digits:size=8"`` choose a maker of
`wamjax.data.makers` and its options. Examples are served like windows of episodes: in an order
that only the seed determines, each process making its rows of every batch, with exact resumption.
Batches have the stored keys.
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
    """Holds the sizes that arrays determine for a model.

    Attributes:
      shapes: shape of an example, by key.
      dtypes: dtype names, by key.
      sizes: number of values of an integer key: classes of "label", words of "instruction".
      count: number of examples (N).
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    sizes: Mapping[str, int]
    count: int

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values to store in a checkpoint."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> ArraySpec:
        """Reverses `to_json`."""
        shapes = {key: tuple(shape) for key, shape in values["shapes"].items()}
        return ArraySpec(**dict(values) | {"shapes": shapes})


class Table(Protocol):
    """Gives examples by number; safe to read from several threads."""

    spec: ArraySpec

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns a batch of the examples with these numbers."""


class Arrays:
    """Holds arrays whose first axis is the example, in memory or mapped from files.

    Args:
      arrays: arrays of equal length, by key. Floating "latents" and "context" are served in
        bfloat16.
      sizes: see `ArraySpec`.

    Raises:
      ValueError: the arrays do not match each other or their sizes; names the key.
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
                raise ValueError(
                    f"{key!r} has values from {low} to {high}, they must lie in 0 to {size - 1}"
                )
        self.spec = ArraySpec(
            {key: x.shape[1:] for key, x in self._arrays.items()},
            {key: _served(key, x.dtype).name for key, x in self._arrays.items()},
            sizes,
            min(counts.values()),
        )

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns a batch of the examples with these numbers."""
        rows = {key: np.asarray(x[indices]) for key, x in self._arrays.items()}
        return {key: x.astype(_served(key, x.dtype), copy=False) for key, x in rows.items()}


def _served(key: str, dtype: np.dtype) -> np.dtype:
    """Returns the dtype that a stored array is served in: at most 32 bits, and bfloat16 for
    latents."""
    if dtype == BFLOAT16 or (key in ROUNDED and np.issubdtype(dtype, np.floating)):
        return BFLOAT16
    narrow = {"float64": np.float32, "int64": np.int32, "uint64": np.uint32}
    return np.dtype(narrow.get(dtype.name, dtype))


def open_table(data, split: str = "train") -> Table:
    """Opens the table that a config names.

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
    parameters = inspect.signature(MAKERS[name]).parameters
    defaults = {key: p.default for key, p in parameters.items() if p.kind == p.KEYWORD_ONLY}
    try:
        values = configs.parse_arg(options, **defaults)
    except ValueError as error:
        raise ValueError(f"config.data.arrays = {data.arrays!r}: {error}") from error
    return MAKERS[name](data.root, split, **values)


def batches(config, table: Table, rows: Sequence[int] | None = None) -> grain.MapDataset:
    """Returns batch i of `rows` (all by default) at index i, endlessly; each epoch is shuffled
    differently."""
    schedule = mixture.Schedule((config.data.batch_size,), rows)
    numbers = grain.MapDataset.range(table.spec.count)
    numbers = numbers.shuffle(seed=mixture.shuffle_seed(config.seed, config.data.arrays)).repeat()
    chosen = grain.MapDataset.select_from_datasets([numbers], schedule)
    # Batch numbers first and take all rows at once: single examples would cost more than their
    # copy.
    return chosen.batch(schedule.size, drop_remainder=True).map(table.take)


# dtypes of the keys that a config may declare
DECLARED = {
    "video": "uint8", "label": "int32", "instruction": "int32",
    "latents": "bfloat16", "context": "bfloat16", "pooled": "float32",
}  # fmt: skip


def declared(data) -> ArraySpec | None:
    """Returns the spec that ``data.declared.arrays`` states, or None.

    The format is ``KEY=SHAPE[:VALUES],...``: the shape of an example as 1x32x32x4 (empty for a
    scalar), and the number of values of an integer key: "latents=1x32x32x4,label=:1000".

    Raises:
      ValueError: the text cannot be parsed.
    """
    shapes, sizes = {}, {}
    for part in filter(None, data.declared.arrays.split(",")):
        key, _, text = part.partition("=")
        shape, _, values = text.partition(":")
        try:
            if key not in DECLARED:
                raise ValueError(f"{key!r} is not one of {sorted(DECLARED)}")
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
