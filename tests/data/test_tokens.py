import subprocess
import sys

import numpy as np
import pytest

from wamjax.data.tokens import VOCAB, token, tokenize, words

KNOWN = [24, 289, 374, 770, 326, 289, 727, 646, 0, 0]


def test_ids_are_stable_for_ever():
    # Trained policies depend on these numbers: do not adjust them to a changed hash.
    assert tokenize("Put the RED block, on the left zone!", 10).tolist() == KNOWN


def test_ids_do_not_depend_on_the_process():
    code = "from wamjax.data.tokens import tokenize; print(tokenize('push the blue block', 6))"
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
    assert runs == {f"{tokenize('push the blue block', 6)}\n"}


def test_padding_case_and_punctuation():
    ids = tokenize("pick up the red block", 8)
    assert ids.dtype == np.int32 and ids.shape == (8,)
    assert (ids[:5] > 0).all() and (ids < VOCAB).all() and (ids[5:] == 0).all()
    assert (tokenize("Pick up -- the RED block.", 8) == ids).all()
    ids[:] = 0  # the caller owns the array
    assert tokenize("pick up the red block", 8)[0] > 0


def test_too_long_an_instruction_names_the_key():
    with pytest.raises(ValueError, match="5 words, room is for 4; raise config.data.instruction_"):
        tokenize("pick up the red block", 4)


def test_no_two_words_of_the_tabletop_share_an_id():
    from wamjax.envs.tabletop import TASKS, instruction

    vocabulary = {word for task in TASKS for word in words(instruction(task))}
    vocabulary |= set("green magenta cyan yellow purple right left zone block pick place".split())
    assert len({token(word) for word in vocabulary}) == len(vocabulary) > 15
