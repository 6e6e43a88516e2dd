"""Tests scenes: parsing recovers what was drawn; captions, meanings and splits are consistent."""

import re
from collections import Counter

import numpy as np
import pytest

from wamjax.data import scenes as s
from wamjax.data.scenes.captions import NUMBERS, RELATIONS, WORDINGS
from wamjax.data.scenes.draw import OFFSETS, coverages

EVERY = [c for part in s.SPLITS for c in s.captions(part)]


def random_scenes(count, grid, seed, most=4):
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        cells = np.sort(rng.permutation(grid**2)[: rng.integers(0, most + 1)])
        out.append(
            tuple(
                s.Object(
                    s.SHAPES[rng.integers(3)],
                    list(s.COLOURS)[rng.integers(4)],
                    int(cell) // grid,
                    int(cell) % grid,
                    int(rng.integers(9)),
                )
                for cell in cells
            )
        )
    return out


def what(things):
    return [(o.shape, o.colour, o.row, o.column) for o in things]


def noisy(images, std, seed=0):
    noise = np.random.default_rng(seed).normal(0, std, images.shape)
    return np.clip(np.round(images + noise), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size, grid, most", [(32, 3, 9), (32, 2, 4), (64, 3, 4), (24, 3, 4)])
def test_parsing_recovers_what_was_drawn(size, grid, most):
    scenes = random_scenes(400, grid, size + grid, most)
    images = s.render(scenes, size, grid)
    assert images.shape == (400, size, size, 3) and images.dtype == np.uint8
    cell = size / grid
    for scene, parsed in zip(scenes, s.parse(images, grid), strict=True):
        assert what(parsed.objects) == what(scene)
        assert parsed.confidence > 0.6
        for thing, found in zip(scene, parsed.objects, strict=True):
            dy, dx = OFFSETS[thing.offset]
            centre = (thing.row + 0.5 + 0.09 * dy) * cell, (thing.column + 0.5 + 0.09 * dx) * cell
            np.testing.assert_allclose(found.centre, centre, atol=1e-6)


@pytest.mark.parametrize("std", [10, 20, 30, 40])
def test_parsing_tolerates_noise_and_reports_confidence(std):
    scenes = random_scenes(300, 3, std)
    parsed = s.parse(noisy(s.render(scenes), std))
    right = np.mean([what(p.objects) == what(q) for p, q in zip(parsed, scenes, strict=True)])
    assert right >= 0.995
    sure = np.mean([p.confidence for p in parsed])
    assert abs(sure - (1 - 0.008 * std)) < 0.08, "falls by about 0.08 for each 10 grey levels"


def test_parsing_tolerates_a_shift_and_low_contrast():
    scenes = random_scenes(200, 3, 1)
    images = s.render(scenes)
    for other in (np.roll(images, (1, -1), (1, 2)), (24 + 0.7 * (images - 24.0)).astype(np.uint8)):
        assert [what(p.objects) for p in s.parse(other)] == [what(q) for q in scenes]


def test_confidence_is_zero_between_two_readings():
    red, blue = (s.Object("circle", colour, 1, 1) for colour in ("red", "blue"))
    square = s.Object("square", "red", 1, 1)
    a, *others = s.render([(red,), (blue,), (square,), ()]).astype(float)
    for b in others:
        sure = [
            p.confidence
            for p in s.parse(np.stack([a + w * (b - a) for w in (0, 0.25, 0.5)]).astype(np.uint8))
        ]
        np.testing.assert_allclose(sure, [1, 0.5, 0], atol=0.12)
    empty = s.parse(np.broadcast_to(np.array(s.BACKGROUND, np.uint8), (1, 32, 32, 3)))[0]
    assert empty.objects == () and empty.confidence == 1


def test_objects_stay_in_their_cells_and_are_about_equally_large():
    cover = coverages(48, 3)  # cells of 16 pixels: no pixel belongs to two
    for cell in range(9):
        rows = cover[cell * 27 : (cell + 1) * 27].reshape(27, 48, 48).copy()
        y, x = divmod(cell, 3)
        area = rows.sum((1, 2)).reshape(3, 9)
        rows[:, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = 0
        assert not rows.any()
        assert np.ptp(area, axis=1).max() < 3
        circle, square, triangle = area[:, 4] / 16**2
        assert circle == pytest.approx(np.pi * 0.4**2, rel=0.03)
        assert square == pytest.approx((2 * 0.88 * 0.4) ** 2, rel=0.03)
        assert triangle == pytest.approx(1.85 * 0.4**2, rel=0.03)
    assert not cover[-1].any()


@pytest.mark.parametrize("part", s.SPLITS)
@pytest.mark.parametrize("grid", [2, 3])
def test_random_scenes_match_their_captions(part, grid):
    kinds = s.KINDS[1:] if part == "combination" else s.KINDS
    batch = s.make(300, 7, part, grid=grid)
    assert batch.images.shape == (300, 32, 32, 3) and batch.tokens.shape == (300, 16)
    assert batch.tokens.dtype == np.int32
    parsed = s.parse(batch.images, grid)
    for caption, words, tokens, scene, found in zip(
        batch.captions, batch.texts, batch.tokens, batch.scenes, parsed, strict=True
    ):
        assert s.split(caption) == part
        assert words in {s.text(caption, w) for w in range(WORDINGS)}
        np.testing.assert_array_equal(tokens, s.encode(words, 16))
        assert what(found.objects) == what(scene)
        assert set(s.satisfies(caption, found.objects).values()) == {True}
    share = Counter(c.kind for c in batch.captions)
    assert all(share[kind] > 0.6 * 300 / len(kinds) for kind in kinds)


def test_a_captions_scenes_are_all_equally_likely():
    rng = np.random.default_rng(3)
    groups = (s.Group(1, "red", "circle"), s.Group(1, "blue", "square"))
    seen = Counter()
    for _ in range(2700):
        scene = s.place(s.Caption("position", groups, "left of"), rng)
        at = {o.colour: (o.row, o.column) for o in scene}
        assert at["red"][1] < at["blue"][1]
        seen[at["red"], at["blue"]] += 1
    assert len(seen) == 27  # 3 pairs of columns, 9 pairs of rows
    assert 60 < min(seen.values()) and max(seen.values()) < 145


def test_kinds_can_be_chosen():
    assert {c.kind for c in s.make(40, 0, kinds=("count", "position")).captions} == {
        "count",
        "position",
    }


def test_the_same_seed_makes_the_same_batch():
    a, b, c = s.make(20, 1), s.make(20, 1), s.make(20, 2)
    np.testing.assert_array_equal(a.images, b.images)
    assert a.texts == b.texts and a.scenes == b.scenes
    assert a.texts != c.texts


def read(words):
    """Reads captions independently of the package."""
    words = re.sub(r"^(a picture of|there is|there are) ", "", words)
    words = words.replace(" is ", " ").replace(" to the ", " ")
    one = r"(a|two|three|four) (\w+) (\w+?)s?"
    match = re.fullmatch(
        rf"{one}(?: (and|with|left of|right of|above|over|below|under) {one})?", words
    )
    n, colour, shape, join, *second = match.groups()
    count = {word: number for number, word in NUMBERS.items()}
    groups = [s.Group(count[n], colour, shape)]
    if join:
        groups.append(s.Group(count[second[0]], *second[1:]))
    relation = {"over": "above", "under": "below", "and": "", "with": "", None: ""}.get(join, join)
    return tuple(groups), relation


def test_wordings_state_their_caption_and_are_unique():
    said = [s.text(caption, w) for caption in EVERY for w in range(WORDINGS)]
    assert len(set(said)) == len(said) == 3 * len(set(EVERY))
    for words, caption in zip(said, np.repeat(np.arange(len(EVERY)), WORDINGS), strict=True):
        assert read(words) == (EVERY[caption].groups, EVERY[caption].relation)
    examples = ("a red circle", "three red squares", "a green circle left of a red square")
    assert set(examples) < set(said)


def test_words_and_ids_are_a_fixed_list_and_go_both_ways():
    assert s.VOCABULARY[0] == "<pad>" and len(set(s.VOCABULARY)) == len(s.VOCABULARY)
    assert s.VOCABULARY.index("circle") == 9  # stored models depend on it
    used = set()
    for caption in s.captions("train"):
        for w in range(WORDINGS):
            words = s.text(caption, w)
            ids = s.encode(words, 16)
            assert " ".join(s.VOCABULARY[i] for i in ids if i) == words
            used |= set(ids.tolist())
    assert used == set(range(len(s.VOCABULARY))), "every word is seen in training"


def test_splits_hold_out_what_they_promise():
    parts = {part: s.captions(part) for part in s.SPLITS}
    seen = {g.kind for c in parts["train"] for g in c.groups}
    beside = {frozenset(c.counts) for c in parts["train"] if len(c.groups) > 1}
    number = {(g.count, g.kind) for c in parts["train"] if len(c.groups) == 1 for g in c.groups}
    for caption in parts["combination"]:
        assert set(caption.counts) <= seen
        if len(caption.groups) > 1:
            assert frozenset(caption.counts) not in beside
        else:
            assert (caption.groups[0].count, caption.groups[0].kind) not in number
    for caption in parts["object"]:
        assert not set(caption.counts) <= seen
    assert len(seen) == 9
    assert {c for c, _ in seen} == set(s.COLOURS) and {k for _, k in seen} == set(s.SHAPES)
    share = len(parts["combination"]) / (len(parts["combination"]) + len(parts["train"]))
    assert 0.1 < share < 0.3
    assert len(EVERY) == 12 + 36 + 132 * (1 + 5 + 4)


def scene(*things):
    return [s.Object(shape, colour, row, column) for colour, shape, row, column in things]


def test_satisfies_tells_which_part_is_wrong():
    groups = (s.Group(1, "red", "circle"), s.Group(1, "blue", "square"))
    caption = s.Caption("position", groups, "left of")
    right = scene(("blue", "square", 0, 2), ("red", "circle", 1, 0))

    def wrong(things):
        return {key for key, ok in s.satisfies(caption, things).items() if not ok} - {"all"}

    assert s.satisfies(caption, right)["all"] and not wrong(right)
    cases = {
        "mirrored": ([o._replace(column=2 - o.column) for o in right], {"position"}),
        "one above the other": ([o._replace(column=1) for o in right], {"position"}),
        "colours swapped": (
            scene(("red", "square", 0, 2), ("blue", "circle", 1, 0)),
            {"binding", "position"},
        ),
        "one missing": (right[:1], {"colour", "shape", "binding", "count", "position"}),
        "one too many": ([*right, right[0]._replace(row=2)], {"count"}),
        "another colour": (
            [right[0]._replace(colour="green"), right[1]],
            {"colour", "binding", "position"},
        ),
        "another shape": (
            [right[0], right[1]._replace(shape="square")],
            {"shape", "binding", "position"},
        ),
        "nothing": ([], {"colour", "shape", "binding", "count", "position"}),
    }
    for name, (things, expected) in cases.items():
        assert wrong(things) == expected, name
        assert not s.satisfies(caption, things)["all"], name


def test_numbers_within_the_groups_count_for_all_but_not_for_the_total():
    caption = s.Caption("count", (s.Group(2, "red", "circle"), s.Group(1, "blue", "square")))
    other = scene(("red", "circle", 0, 0), ("blue", "square", 1, 1), ("blue", "square", 2, 2))
    got = s.satisfies(caption, other)
    assert got["count"] and got["binding"] and got["position"] and not got["all"]


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_have_opposites(relation):
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    a, b = s.Group(1, "red", "circle"), s.Group(1, "green", "triangle")
    rng = np.random.default_rng(0)
    one, other = (
        s.Caption("position", (a, b), relation),
        s.Caption("position", (b, a), opposite[relation]),
    )
    assert s.split(one) == s.split(other)
    against = s.Caption("position", (a, b), opposite[relation])
    for _ in range(20):
        things = s.place(one, rng)
        assert s.satisfies(other, things)["all"] and not s.satisfies(against, things)["position"]


def test_mistakes_are_named():
    with pytest.raises(KeyError, match="did you mean 'circle'"):
        s.encode("a red circl", 16)
    with pytest.raises(ValueError, match="3 words, more than length = 2"):
        s.encode("a red circle", 2)
    with pytest.raises(KeyError, match="'test' is not one of train, combination, object"):
        s.make(1, 0, "test")
    with pytest.raises(ValueError, match="'combination' has no captions of the kinds attribute"):
        s.captions("combination", ("attribute",))
    thing = s.Object("circle", "red", 0, 0)
    with pytest.raises(ValueError, match="two objects in one cell"):
        s.render([(thing, thing)])
    with pytest.raises(ValueError, match="outside of a grid of 2x2"):
        s.render([(thing._replace(row=2),)], grid=2)
    with pytest.raises(ValueError, match="not float64"):
        s.parse(np.zeros((1, 32, 32, 3)))
    with pytest.raises(ValueError, match="grid of 2x2 cells or more"):
        s.make(1, 0, grid=1)
