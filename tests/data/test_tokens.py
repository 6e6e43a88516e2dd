import subprocess
import sys

import numpy as np
import pytest

from wamjax.data.tokens import SIZE, Vocabulary, check_same, words

HASH = Vocabulary()
tokenize = HASH.tokenize
KNOWN = [24, 289, 374, 770, 326, 289, 727, 646, 0, 0]


def test_ids_never_change():
    # Trained policies depend on these numbers; do not adapt them to a changed hash.
    assert tokenize("Put the RED block, on the left zone!", 10).tolist() == KNOWN


def test_ids_do_not_depend_on_the_process():
    code = (
        "from wamjax.data.tokens import Vocabulary as V; "
        "print(V().tokenize('push the blue block', 6), V(('a',)).tokenize('push a block', 6))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    behind = Vocabulary(("a",)).tokenize("push a block", 6)
    assert runs == {f"{tokenize('push the blue block', 6)} {behind}\n"}


def test_padding_case_and_punctuation():
    ids = tokenize("pick up the red block", 8)
    assert ids.dtype == np.int32 and ids.shape == (8,)
    assert (ids[:5] > 0).all() and (ids < SIZE).all() and (ids[5:] == 0).all()
    assert (tokenize("Pick up -- the RED block.", 8) == ids).all()
    ids[:] = 0  # the caller owns the array
    assert tokenize("pick up the red block", 8)[0] > 0


def test_too_long_an_instruction_names_the_key():
    with pytest.raises(ValueError, match="5 words, more than config.data.instruction_"):
        tokenize("pick up the red block", 4)


def test_no_two_words_of_the_tabletop_share_an_id():
    from wamjax.envs.tabletop import TASKS, instruction

    vocabulary = {word for task in TASKS for word in words(instruction(task))}
    vocabulary |= set("green magenta cyan yellow purple right left zone block pick place".split())
    assert len({HASH.token(word) for word in vocabulary}) == len(vocabulary) > 15


# The varying parts of the instructions in LIBERO's four suites.
_BOWLS = (
    "between the plate and the ramekin", "next to the ramekin", "from table center",
    "on the cookie box", "in the top drawer of the wooden cabinet", "on the ramekin",
    "next to the cookie box", "on the stove", "next to the plate", "on the wooden cabinet",
)  # fmt: skip
_FOOD = (
    "alphabet soup", "cream cheese", "salad dressing", "bbq sauce", "ketchup", "tomato sauce",
    "butter", "milk", "chocolate pudding", "orange juice",
)  # fmt: skip
LIBERO = (
    *(f"pick up the black bowl {where} and place it on the plate" for where in _BOWLS),
    *(f"pick up the {what} and place it in the basket" for what in _FOOD),
    "open the middle drawer of the cabinet",
    "put the bowl on the stove",
    "put the wine bottle on top of the cabinet",
    "open the top drawer and put the bowl inside",
    "put the bowl on top of the cabinet",
    "push the plate to the front of the stove",
    "put the cream cheese in the bowl",
    "turn on the stove",
    "put the bowl on the plate",
    "put the wine bottle on the rack",
    "put both the alphabet soup and the tomato sauce in the basket",
    "put both the cream cheese box and the butter in the basket",
    "turn on the stove and put the moka pot on it",
    "put the black bowl in the bottom drawer of the cabinet and close it",
    "put the white mug on the left plate and put the yellow and white mug on the right plate",
    "pick up the book and place it in the back compartment of the caddy",
    "put the white mug on the plate and put the chocolate pudding to the right of the plate",
    "put both the alphabet soup and the cream cheese box in the basket",
    "put both moka pots on the stove",
    "put the yellow and white mug in the microwave and close it",
)


def test_no_two_words_of_libero_share_an_id():
    vocabulary = Vocabulary.of(LIBERO)
    ids = [vocabulary.token(word) for text in LIBERO for word in words(text)]
    assert sorted(set(ids)) == list(range(1, len(vocabulary.words) + 1))
    assert HASH.token("bowl") == HASH.token("microwave")  # unchanged for older runs
    assert vocabulary.token("bowl") != vocabulary.token("microwave")


def test_an_unknown_word_is_never_a_known_one():
    vocabulary = Vocabulary.of(LIBERO)
    n, size = len(vocabulary.words), vocabulary.size
    others = {vocabulary.token(f"w{i}") for i in range(20_000)} | {vocabulary.token("bowll")}
    assert size == SIZE and others == set(range(n + 1, size))
    many = Vocabulary.of(f"w{i} x{i}" for i in range(1000))
    assert many.size == 2000 + 64 and {many.token(f"y{i}") for i in range(5000)} == set(
        range(2001, 2064)
    )


def test_words_keep_their_ids_when_a_run_is_continued():
    first = Vocabulary.of(["lift the block"])
    more = Vocabulary.of(["Drop the ball", "a block"], first.words)
    assert more.words == ("block", "lift", "the", "a", "ball", "drop")
    check_same(first.words, list(first.words), "the planner")
    with pytest.raises(ValueError, match=r"the planner .* other ids \(only .* \['a', 'ball'"):
        check_same(first.words, more.words, "the planner")
