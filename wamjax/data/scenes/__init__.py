"""Rendered scenes with captions: does a text-conditioned model bind, count and place?

    batch = make(1000, seed=0)  # images (1000, 32, 32, 3) uint8, tokens (1000, 12) int32, captions
    found = parse(generated)    # what is really in each picture
    satisfies(caption, found[0])  # {"colour": True, ..., "position": False, "all": False}

One to four coloured shapes stand on a grid of cells. A caption says all there is in its scene:
"a red circle", "three blue squares", "two red circles and a blue square", "a red circle left of a
blue square". The parser is exact on clean pictures and robust to noise, so that a model can be
scored without another model. Captions are split by what is combined in them: what was seen in
training, unseen combinations of seen objects, and objects (a colour with a shape) never seen.

Files, in reading order: draw (objects to pictures), captions (meaning, words, split), make
(random batches), parse.
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
