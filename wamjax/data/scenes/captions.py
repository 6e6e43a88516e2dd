"""Defines captions: their meaning, their wording, and the split that training may see.

A caption is data: groups of equal objects and, for two objects, a relation. All captions are
enumerated, so a split is a subset of them.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from wamjax.data.scenes.draw import COLOURS, SHAPES, Object

KINDS = ("attribute", "binding", "count", "position")
SPLITS = ("train", "combination", "object")
MOST = 4  # maximum objects in a scene
HELD_OUT = {("yellow", "circle"), ("green", "square"), ("blue", "triangle")}
RELATIONS = {  # relation -> (its wordings, whether it holds between two objects)
    "left of": (("left of", "to the left of"), lambda a, b: a.column < b.column),
    "right of": (("right of", "to the right of"), lambda a, b: a.column > b.column),
    "above": (("above", "over"), lambda a, b: a.row < b.row),
    "below": (("below", "under"), lambda a, b: a.row > b.row),
}
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
WORDINGS = 3  # wordings of every caption
VOCABULARY = tuple(  # id 0 is padding
    "<pad> a two three four red green blue yellow circle circles square squares triangle triangles "
    "and with is are there picture of left right above below over under to the".split()
)
_IDS = {word: i for i, word in enumerate(VOCABULARY)}


class Group(NamedTuple):
    """Describes objects of one kind."""

    count: int
    colour: str
    shape: str

    @property
    def kind(self) -> tuple[str, str]:
        """Returns (colour, shape)."""
        return self.colour, self.shape


class Caption(NamedTuple):
    """Describes a scene of these groups only, with the first in `relation` to the second."""

    kind: str  # one of KINDS
    groups: tuple[Group, ...]
    relation: str = ""

    @property
    def counts(self) -> Counter:
        """Returns (colour, shape) -> number of objects."""
        return Counter({group.kind: group.count for group in self.groups})


@functools.cache
def captions(part: str = "train", kinds: tuple[str, ...] = KINDS) -> tuple[Caption, ...]:
    """Returns all captions of a split and of some kinds, in a fixed order.

    Raises:
      KeyError: unknown split or kind.
      ValueError: no caption matches.
    """
    for name, known in ((part, SPLITS), *((kind, KINDS) for kind in kinds)):
        if name not in known:
            raise KeyError(f"{name!r} is not one of {', '.join(known)}")
    out = tuple(c for c in _all_captions() if c.kind in kinds and split(c) == part)
    if not out:
        raise ValueError(f"the split {part!r} has no captions of the kinds {', '.join(kinds)}")
    return out


@functools.cache
def _all_captions() -> tuple[Caption, ...]:
    kinds = list(itertools.product(COLOURS, SHAPES))
    pairs = list(itertools.permutations(kinds, 2))
    numbers = [
        pair
        for pair in itertools.product(range(1, MOST), repeat=2)
        if 2 < sum(pair) <= MOST
    ]  # fmt: skip
    out = [Caption("attribute", (Group(1, *kind),)) for kind in kinds]
    out += [Caption("count", (Group(n, *k),)) for k in kinds for n in range(2, MOST + 1)]
    for a, b in pairs:
        out.append(Caption("binding", (Group(1, *a), Group(1, *b))))
        out += [Caption("count", (Group(n, *a), Group(m, *b))) for n, m in numbers]
        out += [Caption("position", (Group(1, *a), Group(1, *b)), r) for r in RELATIONS]
    return tuple(out)


def split(caption: Caption) -> str:
    """Returns which of SPLITS a caption belongs to.

    * object: one of its objects is held out: training never shows that colour with that shape.
    * combination: training shows all its objects, but never these two together, in any number,
      order or relation, or never this number of one. These are a fifth of the combinations.
    * train: all others, including every single object that is not held out.
    """
    if any(group.kind in HELD_OUT for group in caption.groups):
        return "object"
    if caption.kind == "attribute":
        return "train"
    kinds = sorted(" ".join(group.kind) for group in caption.groups)
    combination = "+".join(kinds) if len(kinds) > 1 else f"{caption.groups[0].count} {kinds[0]}"
    digest = hashlib.blake2b(combination.encode(), digest_size=8).digest()
    return "combination" if int.from_bytes(digest, "big") % 5 == 0 else "train"


def text(caption: Caption, wording: int = 0) -> str:
    """Returns a caption in words, in one of `WORDINGS` wordings."""
    names = [
        f"{NUMBERS[g.count]} {g.colour} {g.shape}{'s' if g.count > 1 else ''}"
        for g in caption.groups
    ]
    be = "is" if caption.groups[0].count == 1 else "are"
    if caption.relation:
        wordings, _ = RELATIONS[caption.relation]
        joined = f" {('', '', 'is ')[wording]}{wordings[wording % 2]} ".join(names)
    else:
        joined = (" and ", " with ", " and ")[wording].join(names)
    there = "" if caption.relation else f"there {be} "
    return ("", "a picture of ", there)[wording] + joined


def encode(words: str, length: int) -> Int[np.ndarray, " n"]:
    """Returns the ids of the words of a caption, padded with 0 to `length`.

    Raises:
      KeyError: a word is not in VOCABULARY.
      ValueError: there are more than `length` words.
    """
    found = re.findall(r"[a-z]+", words.lower())
    for word in found:
        if word not in _IDS:
            near = difflib.get_close_matches(word, VOCABULARY, 1)
            hint = f"did you mean {near[0]!r}?" if near else "see VOCABULARY"
            raise KeyError(f"captions have no word {word!r}; {hint}")
    if len(found) > length:
        raise ValueError(
            f"caption {words!r} has {len(found)} words, more than length = {length}: raise length"
        )
    return np.array([_IDS[word] for word in found] + [0] * (length - len(found)), np.int32)


def satisfies(caption: Caption, scene: Sequence[Object]) -> dict[str, bool]:
    """Returns which parts of a caption hold for a scene, rendered or parsed.

    Returns:
      * colour, shape: whether the scene has exactly these colours (shapes), in any number;
      * binding: whether each colour has the right shape, in any number;
      * count: whether the total number of objects is right;
      * position: whether the relation holds between two of the named objects; True without a
        relation, so average it over captions that have one;
      * all: whether the scene has exactly the objects of the caption, in its relation.
    """
    have = Counter(thing.kind for thing in scene)
    want = caption.counts
    a, b = (caption.groups[i].kind for i in (0, -1))
    holds = RELATIONS[caption.relation][1] if caption.relation else None
    position = holds is None or any(
        holds(x, y) for x in scene for y in scene if x.kind == a and y.kind == b
    )
    return {
        "colour": {c for c, _ in have} == {c for c, _ in want},
        "shape": {s for _, s in have} == {s for _, s in want},
        "binding": set(have) == set(want),
        "count": have.total() == want.total(),
        "position": position,
        "all": have == want and position,
    }
