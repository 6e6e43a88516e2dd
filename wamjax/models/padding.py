"""Pads slots to whole tiles of a TPU.

Modulation acts per slot, on (b, m, l / m, d). A TPU stores the last two dimensions of an array in
tiles of 8 by 128. A slot of 98 tokens is not a multiple of 8, and the compiler then makes the batch
the smaller side of the tile, which with two examples per chip uses a quarter of it. With slots
padded once at the input, to 104 tokens, every array of the network is whole tiles, and slots stay a
separate axis through all blocks without a copy. No query sees padded tokens. They are removed
before the heads and before anything is cached, so results and gradients equal those without padding
up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from wamjax.models.layers import on_tpu

TILE = 8  # tokens of a tile
CHOICES = ("auto", "on", "off")
# A slot grows by at most a quarter: padding a slot of one token to eight is not worth it.
LARGEST = 4


class Padding(NamedTuple):
    """Describes how the slots of a stream are padded; static.

    Attributes:
      slot: tokens of a slot.
      size: tokens of a slot with padding.
    """

    slot: int
    size: int

    @property
    def missing(self) -> int:
        """Returns the number of padding tokens per slot; 0 if a slot is whole tiles already."""
        return self.size - self.slot

    def pad(self, x: Array | np.ndarray, axis: int = 1, value: float | bool = 0):
        """Fills every slot along `axis` up to its size; numpy arrays stay numpy arrays."""
        library = np if isinstance(x, np.ndarray) else jnp
        x, axis = self._slots(x, axis, self.slot)
        widths = [(0, 0)] * x.ndim
        widths[axis + 1] = (0, self.missing)
        return self._joined(library.pad(x, widths, constant_values=value), axis)

    def remove(self, x: Array, axis: int = 1) -> Array:
        """Removes the tokens that `pad` added."""
        x, axis = self._slots(x, axis, self.size)
        return self._joined(x[(slice(None),) * (axis + 1) + (slice(self.slot),)], axis)

    def keys(self, length: int) -> Bool[np.ndarray, "1 s"]:
        """Returns which of `length` padded tokens exist."""
        return np.tile(np.arange(self.size) < self.slot, length // self.size)[None]

    def _slots(self, x, axis: int, size: int):
        axis %= x.ndim
        return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis

    def _joined(self, x, axis: int):
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def choose(kind: str, lengths: Sequence[int], slots: int) -> Padding | None:
    """Returns the padding of a stream with `slots` slots; None if they are too short, or if a group
    is not made of whole slots.

    Args:
      kind: "on", "off", or "auto", which is on in programs for a TPU.
      lengths: tokens of each group of the stream.

    Raises:
      ValueError: the kind is unknown.
    """
    if kind not in CHOICES:
        raise ValueError(f"config.model.pad_slots = {kind!r} is not one of {CHOICES}")
    slot, remainder = divmod(sum(lengths), slots)
    padding = -slot % TILE
    if kind == "off" or (kind == "auto" and not on_tpu()):
        return None
    if remainder or LARGEST * padding > slot or any(length % slot for length in lengths):
        return None
    return Padding(slot, slot + padding)
