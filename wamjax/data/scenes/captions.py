"""What captions mean, how they are worded, and which of them training may see.

A caption is data: groups of equal objects and, for two objects, a relation. All captions are
listed, so a split is a choice among them.
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
MOST = 4  # objects in a scene
HELD_OUT = {("yellow", "circle"), ("green", "square"), ("blue", "triangle")}
RELATIONS = {  # relation -> (its wordings, whether it holds between two objects)
    "left of": (("left of", "to the left of"), lambda a, b: a.column < b.column),
    "right of": (("right of", "to the right of"), lambda a, b: a.column > b.column),
    "above": (("above", "over"), lambda a, b: a.row < b.row),
    "below": (("below", "under"), lambda a, b: a.row > b.row),
}
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
WORDINGS = 3  # of every caption
VOCABULARY = tuple(  # id 0 is padding
    "<pad> a two three four red green blue yellow circle circles square squares triangle triangles "
    "and with is are there picture of left right above below over under to the".split()
)
_IDS = {word: i for i, word in enumerate(VOCABULARY)}


class Group(NamedTuple):
    """Equal objects."""

    count: int
    colour: str
    shape: str

    @property
    def kind(self) -> tuple[str, str]:
        """(colour, shape)."""
        return self.colour, self.shape


class Caption(NamedTuple):
    """What a scene is: these groups and nothing else; the first one in `relation` to the second."""

    kind: str  # of KINDS
    groups: tuple[Group, ...]
    relation: str = ""

    @property
    def counts(self) -> Counter:
        """(colour, shape) -> number of objects."""
        return Counter({group.kind: group.count for group in self.groups})


@functools.cache
def captions(part: str = "train", kinds: tuple[str, ...] = KINDS) -> tuple[Caption, ...]:
    """All captions of a split and of some kinds, in a fixed order.

    Raises:
      KeyError: an unknown split or kind.
      ValueError: there is none.
    """
    for name, known in ((part, SPLITS), *((kind, KINDS) for kind in kinds)):
        if name not in known:
            raise KeyError(f"{name!r} is none of {', '.join(known)}")
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
    """Which of SPLITS a caption belongs to.

    * object: some object of it is held out: that colour is never seen with that shape in training.
    * combination: all its objects are seen, but not these two beside each other, in whatever
      number, order or relation; or not this number of them. A fifth of the combinations.
    * train: the rest; single objects that are not held out always.
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
    """A caption in words, in one of `WORDINGS` ways."""
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
    """The ids of the words of a caption, padded with 0 to `length`.

    Raises:
      KeyError: a word that is not in VOCABULARY.
      ValueError: more than `length` words.
    """
    found = re.findall(r"[a-z]+", words.lower())
    for word in found:
        if word not in _IDS:
            near = difflib.get_close_matches(word, VOCABULARY, 1)
            hint = f"did you mean {near[0]!r}?" if near else "see VOCABULARY"
            raise KeyError(f"captions have no word {word!r}; {hint}")
    if len(found) > length:
        raise ValueError(
            f"{words!r} has {len(found)} words, room is for {length}; raise the length"
        )
    return np.array([_IDS[word] for word in found] + [0] * (length - len(found)), np.int32)


def satisfies(caption: Caption, scene: Sequence[Object]) -> dict[str, bool]:
    """What of a caption is true of a scene, or of what was parsed.

    Returns:
      * colour, shape: the scene has these colours (shapes) and no other, in any number;
      * binding: each colour with the right shape, in any number;
      * count: as many objects in total;
      * position: the relation holds between two of the named objects; True without a relation,
        so average it over captions that have one;
      * all: exactly the objects that the caption names, in its relation.
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
