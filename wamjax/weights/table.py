"""Defines the language of a family's key map, read in both directions.

A table is a tuple of rows ``Row(theirs, ours, layout)``:

    Row("blocks.{i}.attn.{x}.weight", "blocks/video/self_attn/{x:q|k|v|o}/kernel", "o i -> i o")

``ours``    a parameter's path, with names in braces. A name stands for one part of the path; with
            alternatives, for one of those: ``{a:self_attn|cross_attn}``, or, where the names
            differ, ``{a:self_attn=attn1|cross_attn=attn2}``.
``theirs``  the published key, which repeats the names of the path. ``{i}`` is the layer: of a
            parameter below ``blocks/`` it tells the slices along its leading axis apart; of any
            other it says that every layer of the file holds a copy. A path below ``final_block/``
            is looked up as one below ``blocks/`` where it has no row of its own, as the last
            layer. ``key[{x}/3]`` is the x-th third of a tensor along its first axis (a fused qkv).
``layout``  how the published tensor becomes ours, for einops, read backwards when exporting.

A row that matches no parameter of the network has no effect: one table serves networks with and
without biases.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange

from wamjax import tree


class Row(NamedTuple):
    """Holds one line of a table; see the module.

    Attributes:
      layout: einops pattern; "" if nothing changes.
      sizes: sizes of axes that the pattern cannot infer backwards.
      order: the published tensor is split into ``len(order)`` parts along its first axis, and ours
        has part ``order[0]`` first.
    """

    theirs: str
    ours: str
    layout: str = ""
    sizes: tuple[tuple[str, int], ...] = ()
    order: tuple[int, ...] = ()


Table = tuple[Row, ...]


def linear(theirs: str, ours: str, order: tuple[int, ...] = ()) -> Table:
    """Maps a Linear: its weight is (out, in), our kernel (in, out)."""
    part = re.search(r"\[.*\]$", theirs)
    theirs, part = (theirs[: part.start()], part[0]) if part else (theirs, "")
    return (
        Row(f"{theirs}.weight{part}", f"{ours}/kernel", "o i -> i o", (), order),
        Row(f"{theirs}.bias{part}", f"{ours}/bias", "", (), order),
    )


def norm(theirs: str, ours: str) -> Table:
    """Maps a norm with a weight, and a bias if ours has one."""
    return Row(f"{theirs}.weight", f"{ours}/scale"), Row(f"{theirs}.bias", f"{ours}/bias")


class Piece(NamedTuple):
    """Holds one correspondence: a published tensor or a part of one, and a parameter or a layer of
    one.

    Attributes:
      theirs: published key; `copies` are further keys with the same values.
      part: (j, n): the j-th of n parts along the first axis.
      ours: path; `layer` is an index of its leading axis, or None.
      shape: shape of our side, without the layer axis.
      published: shape of the published tensor, all parts together.
      row: row that defines the conversion.
    """

    theirs: str
    copies: tuple[str, ...]
    part: tuple[int, int]
    ours: str
    layer: int | None
    shape: tuple[int, ...]
    published: tuple[int, ...]
    row: Row

    def to_ours(self, x: np.ndarray) -> np.ndarray:
        """Converts the published tensor to the parameter; a view if possible."""
        j, n = self.part
        rows = len(x) // n if n > 1 else 0
        return _reorder(x[j * rows : (j + 1) * rows] if n > 1 else x, self.row)

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        """Converts the parameter to the published tensor, or to this piece's part of it."""
        pattern, sizes, order = self.row.layout, dict(self.row.sizes), self.row.order
        if pattern:
            x = rearrange(x, _backwards(pattern), **sizes)
        if order:
            parts = np.split(x, len(order))
            x = np.concatenate([parts[order.index(i)] for i in range(len(order))])
        return x


def _reorder(x: np.ndarray, row: Row) -> np.ndarray:
    if row.order:
        parts = np.split(x, len(row.order))
        x = np.concatenate([parts[i] for i in row.order])
    return rearrange(x, row.layout, **dict(row.sizes)) if row.layout else x


def _backwards(pattern: str) -> str:
    left, right = pattern.split("->")
    return f"{right.strip()} -> {left.strip()}"


def expand(table: Table, abstract: Any) -> list[Piece]:
    """Returns every correspondence between a published file and a parameter tree.

    Args:
      abstract: the parameters or their shapes; those below ``blocks`` have a leading layer axis.

    Raises:
      ValueError: no row, or more than one row, matches a parameter; names all such parameters.
    """
    flat = tree.flatten(abstract)
    index = _Index(table)
    stacked = next((x.shape[0] for p, x in flat.items() if p.startswith("blocks/")), 0)
    final = any(p.startswith("final_block/") for p in flat)
    pieces, problems = [], []
    for path, leaf in flat.items():
        matches = index.rows(path)
        if len(matches) != 1:
            what = (
                "no row"
                if not matches
                else "several rows: " + ", ".join(r.ours for r, _ in matches)
            )
            problems.append(f"{path} {tuple(leaf.shape)}: {what}")
            continue
        pieces += _pieces(*matches[0], path, tuple(leaf.shape), stacked, stacked + final)
    if problems:
        raise ValueError("the key map must have one row for each parameter; correct it for:\n  "
                         + "\n  ".join(problems))  # fmt: skip
    return pieces


class _Index:
    """Finds rows: those without names by their path, the others one by one."""

    def __init__(self, table: Table):
        self.plain: dict[str, list[Row]] = {}
        self.patterns = [row for row in table if "{" in row.ours]
        for row in table:
            if "{" not in row.ours:
                self.plain.setdefault(row.ours, []).append(row)

    def rows(self, path: str) -> list[tuple[Row, dict[str, str]]]:
        """Returns the rows that match a path, with the values of their names."""
        matches = [(row, {}) for row in self.plain.get(path, ())]
        matches += [
            (r, names) for r in self.patterns if (names := _match(r.ours, path)) is not None
        ]
        if not matches and path.startswith("final_block/"):
            return self.rows(path.replace("final_block/", "blocks/", 1))
        return matches


def _match(ours: str, path: str) -> dict[str, str] | None:
    pattern, words = _compile(ours)
    match = pattern.fullmatch(path)
    if match is None:
        return None
    return {k: words.get(k, {}).get(v, v) for k, v in match.groupdict().items()}


@functools.cache
def _compile(ours: str) -> tuple[re.Pattern, Mapping[str, Mapping[str, str]]]:
    words: dict[str, dict[str, str]] = {}

    def group(match: re.Match) -> str:
        name, _, choices = match[1].partition(":")
        if not choices:
            return f"(?P<{name}>[^/]+)"
        pairs = (c.partition("=") for c in choices.split("|"))
        words[name] = {our: their if equals else our for our, equals, their in pairs}
        return f"(?P<{name}>{'|'.join(map(re.escape, words[name]))})"

    return re.compile(re.sub(r"\{([^{}]+)\}", group, ours)), words


def _pieces(row: Row, names, path: str, shape, stacked: int, layers: int) -> Iterator[Piece]:
    def piece(layer: int | None, indices: range) -> Piece:
        keys = [row.theirs.format(**names, i=i) for i in indices]
        (key, part), *_ = parts = [_part(k) for k in dict.fromkeys(keys)]
        own = shape if layer is None else shape[1:]
        published = _published(row, own)
        if part[1] > 1:
            published = (published[0] * part[1], *published[1:])
        copies = tuple(k for k, _ in parts[1:])
        return Piece(key, copies, part, path, layer, own, published, row)

    if path.startswith("blocks/"):
        yield from (piece(i, range(i, i + 1)) for i in range(stacked))
    elif path.startswith("final_block/"):
        yield piece(None, range(stacked, stacked + 1))
    else:
        yield piece(None, range(max(layers, 1)))


def _part(key: str) -> tuple[str, tuple[int, int]]:
    match = re.fullmatch(r"(.*)\[(\d+)/(\d+)\]", key)
    return (match[1], (int(match[2]), int(match[3]))) if match else (key, (0, 1))


@functools.cache
def _published(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the published tensor, or of its part, from the layout."""
    if not row.layout:
        return shape
    turn = functools.partial(rearrange, pattern=_backwards(row.layout), **dict(row.sizes))
    return jax.eval_shape(turn, jax.ShapeDtypeStruct(shape, np.float32)).shape
