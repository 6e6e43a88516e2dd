"""Renders scenes with captions, to test whether a text-conditioned model binds, counts and places.

    batch = make(1000, seed=0)  # images (1000, 32, 32, 3) uint8, tokens (1000, 12) int32, captions
    found = parse(generated)    # what each picture shows
    satisfies(caption, found[0])  # {"colour": True, ..., "position": False, "all": False}

One to four coloured shapes stand on a grid of cells. A caption describes its scene completely:
"a red circle", "three blue squares", "two red circles and a blue square", "a red circle left of a
blue square". The parser is exact on clean pictures and robust to noise, so a model can be scored
without another model. Captions are split by the objects (a colour with a shape) that they combine:
those of training, unseen combinations of seen objects, and unseen objects.

Files, in reading order: draw (renders objects), captions (meaning, words, split), make (random
batches), parse.
"""

from wamjax.data.scenes.captions import (
    KINDS,
    SPLITS,
    VOCABULARY,
    Caption,
    Group,
    captions,
    encode,
    satisfies,
    split,
    text,
)
from wamjax.data.scenes.draw import BACKGROUND, COLOURS, SHAPES, Object, render
from wamjax.data.scenes.make import Batch, make, place
from wamjax.data.scenes.parse import Found, Parsed, parse

__all__ = [
    "BACKGROUND",
    "COLOURS",
    "KINDS",
    "SHAPES",
    "SPLITS",
    "VOCABULARY",
    "Batch",
    "Caption",
    "Found",
    "Group",
    "Object",
    "Parsed",
    "captions",
    "encode",
    "make",
    "parse",
    "place",
    "render",
    "satisfies",
    "split",
    "text",
]
