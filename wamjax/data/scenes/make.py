"""Makes batches of random scenes with captions."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from wamjax.data.scenes.captions import KINDS, RELATIONS, WORDINGS, Caption, captions, encode, text
from wamjax.data.scenes.draw import OFFSETS, Object, render

LENGTH = 16  # tokens; the longest caption has 13 words


class Batch(NamedTuple):
    """Holds scenes with their captions."""

    images: UInt8[np.ndarray, "n h w 3"]
    tokens: Int[np.ndarray, "n length"]  # ids into VOCABULARY, 0 is padding
    captions: list[Caption]
    texts: list[str]
    scenes: list[tuple[Object, ...]]


def make(
    count: int,
    seed: int,
    part: str = "train",
    kinds: tuple[str, ...] = (),
    size: int = 32,
    grid: int = 3,
    length: int = LENGTH,
) -> Batch:
    """Draws random captions, on average equally many of each kind, each with a random scene.

    Args:
      count: n.
      seed: the same seed gives the same batch.
      part: one of `SPLITS`.
      kinds: some of `KINDS`; () = all that the part has.
      size: side of the pictures, in pixels.
      grid: cells along each side, 2 or more.
      length: number of tokens.

    Raises:
      KeyError: unknown part or kind.
      ValueError: there is no such caption, `length` is too short, or the grid has one cell.
    """
    if grid < 2:
        raise ValueError(f"a scene needs a grid of 2x2 cells or more, not {grid}x{grid}")
    kinds = kinds or tuple(k for k in KINDS if any(c.kind == k for c in captions(part)))
    rng = np.random.default_rng(seed)
    by_kind = [captions(part, (kind,)) for kind in kinds]
    chosen = [
        some[int(u * len(some))]
        for some, u in zip(
            (by_kind[i] for i in rng.integers(len(kinds), size=count)),
            rng.random(count),
            strict=True,
        )
    ]
    words = [text(c, w) for c, w in zip(chosen, rng.integers(WORDINGS, size=count), strict=True)]
    scenes = [place(caption, rng, grid) for caption in chosen]
    tokens = np.array([encode(t, length) for t in words], np.int32).reshape(count, length)
    return Batch(render(scenes, size, grid), tokens, chosen, words, scenes)


def place(caption: Caption, rng: np.random.Generator, grid: int = 3) -> tuple[Object, ...]:
    """Draws a scene that a caption describes, uniformly among all of them, sorted by cell."""
    kinds = [group.kind for group in caption.groups for _ in range(group.count)]
    if caption.relation:
        pairs = _related(caption.relation, grid)
        cells = pairs[rng.integers(len(pairs))]
    else:
        cells = rng.permutation(grid * grid)[: len(kinds)].tolist()
    offsets = rng.integers(len(OFFSETS), size=len(kinds)).tolist()
    return tuple(
        Object(shape, colour, cell // grid, cell % grid, offset)
        for cell, offset, (colour, shape) in sorted(zip(cells, offsets, kinds, strict=True))
    )


@functools.cache
def _related(relation: str, grid: int) -> list[tuple[int, int]]:
    """Returns all pairs of cells in a relation."""
    holds = RELATIONS[relation][1]
    at = [Object("", "", cell // grid, cell % grid) for cell in range(grid * grid)]
    return [(i, j) for i, j in itertools.product(range(len(at)), repeat=2) if holds(at[i], at[j])]
