"""Parses terms: which numbers of a source become the state or the action, in which order.

    KEY                       all dimensions of an array
    KEY[3:6]                  some dimensions; [6] is a single one
    KEY[3:6]:axis_angle       ... that are a rotation, and are treated as one
    KEY:quat_xyzw:rotation_6d ... converted to another representation
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from wamjax.config import did_you_mean
from wamjax.data.ingest import rotations
from wamjax.data.ingest.reader import About

_TERM = re.compile(r"(?P<key>[^\[\]:]+)(\[(?P<cut>[-\d:]*)\])?(:(?P<old>\w+)(:(?P<new>\w+))?)?")


@dataclasses.dataclass(frozen=True)
class Term:
    """Describes a block of dimensions.

    Attributes:
      key: array of the source.
      start, end: first dimension of it, and the one after the last.
      old, new: representation of a rotation in the source and in the data set; '' = no rotation.
    """

    key: str
    start: int
    end: int
    old: str = ""
    new: str = ""

    @property
    def size(self) -> int:
        """Returns the number of dimensions in the data set."""
        return rotations.SIZES[self.new] if self.new else self.end - self.start

    def read(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Reads the block, f64 (n, size)."""
        x = np.asarray(arrays[self.key], np.float64)
        x = x.reshape(len(x), -1)[:, self.start : self.end]
        return rotations.convert(x, self.old, self.new) if self.old != self.new else x


def parse(text: str, about: About, flag: str) -> Term:
    """Parses a term and checks it against the arrays of a source.

    Raises:
      ValueError: the syntax is wrong, or the array or some of its dimensions do not exist.
    """
    match = _TERM.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{flag}: {text!r} must have the form KEY, KEY[0:3] or "
                         "KEY[3:6]:axis_angle:rotation_6d")  # fmt: skip
    key = match["key"]
    if key not in about.arrays:
        raise ValueError(f"{flag}: the source has no array {key!r}"
                         f"{did_you_mean(key, about.arrays)}; it has "
                         f"{', '.join(f'{k} ({n})' for k, n in about.arrays.items())}")  # fmt: skip
    total = about.arrays[key]
    dims = _dims(match["cut"], total)
    if not len(dims):
        raise ValueError(f"{flag}: {text!r} selects no dimension: {key} has {total}")
    old = rotations.check(match["old"]) if match["old"] else ""
    if old and len(dims) != rotations.SIZES[old]:
        raise ValueError(f"{flag}: {text!r} selects {len(dims)} dimensions, but {old} has "
                         f"{rotations.SIZES[old]}")  # fmt: skip
    new = rotations.check(match["new"]) if match["new"] else old
    return Term(key, dims[0], dims[-1] + 1, old, new)


def _dims(cut: str | None, total: int) -> range:
    if cut is None:
        return range(total)
    if cut.lstrip("-").isdigit():
        i = int(cut) + total * (int(cut) < 0)
        return range(i, i + 1) if 0 <= i < total else range(0)
    ends = cut.split(":")
    if len(ends) != 2 or not all(re.fullmatch(r"-?\d*", x) for x in ends):
        return range(0)
    first, last = (int(x) if x else None for x in ends)
    out = range(total)[slice(first, last)]
    return out if last is None or last <= total else range(0)


def assemble(terms: Sequence[Term], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Concatenates the blocks: f64 (n, sum of sizes)."""
    return np.concatenate([term.read(arrays) for term in terms], axis=1)


def names(terms: Sequence[Term], about: About) -> tuple[str, ...]:
    """Returns names of the dimensions: the source's, or else the array's name with an index."""
    out: list[str] = []
    for term in terms:
        labels = about.names.get(term.key, ())[term.start : term.end]
        if term.old == term.new and len(labels) == term.size:
            out += labels
        elif term.size == 1 and about.arrays[term.key] == 1:
            out.append(term.key)
        else:
            label = f"{term.key}.{term.new}" if term.new else term.key
            first = 0 if term.new else term.start
            out += [f"{label}[{first + i}]" for i in range(term.size)]
    return tuple(out)


def rotation_blocks(terms: Sequence[Term]) -> dict[tuple[int, int], str]:
    """Returns the rotations: (start, end) among the assembled dimensions -> representation."""
    out, at = {}, 0
    for term in terms:
        if term.new:
            out[at, at + term.size] = term.new
        at += term.size
    return out
