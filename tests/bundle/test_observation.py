"""Tests which observations a bundle accepts, and its errors about others."""

import numpy as np
import pytest
from bundle import runs

from wamjax.bundle.observation import BadObservation, Observer, instructions
from wamjax.data.embeddings import EmbeddingCache, Settings
from wamjax.data.tokens import Vocabulary

OBSERVER = Observer(runs.SPEC)
tokenize = Vocabulary().tokenize


def test_observations_of_one_robot_and_of_several():
    seen = runs.observation()
    got, batched = OBSERVER(seen)
    assert not batched and got["video"].shape == (1, 1, 16, 40, 3)
    np.testing.assert_array_equal(got["video"][0, 0, :, :24], seen["images"]["overhead"])
    np.testing.assert_array_equal(got["video"][0, 0, :, 24:], seen["images"]["gripper"])
    np.testing.assert_array_equal(got["instruction"], tokenize("lift the block", 4)[None])
    assert got["proprio"].shape == (1, 5) and got["proprio"].dtype == np.float32
    several = runs.observation(batch=2)
    got, batched = OBSERVER(several)
    assert batched and got["video"].shape == (2, 1, 16, 40, 3) and got["video"].dtype == np.uint8
    np.testing.assert_array_equal(got["instruction"][1], tokenize("lift the", 4))
    again = OBSERVER(several | {"instruction": "lift the block"})[0]
    np.testing.assert_array_equal(again["instruction"], 2 * [tokenize("lift the block", 4)])
    for count in (0, 3):
        assert OBSERVER(OBSERVER.example(count))[0]["video"].shape[0] == max(count, 1)


def test_a_state_that_overflows_float32_is_refused():
    seen = runs.observation()
    state = seen["proprio"].astype(np.float64) * 0 + 1e300
    with pytest.raises(BadObservation, match=r"proprio\[0\] is 1e\+300: every number must be"):
        OBSERVER(seen | {"proprio": state})


def images(**changes):
    return {"images": runs.observation()["images"] | changes}


BLANK = np.zeros((16, 16, 3), np.uint8)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"proprio": None}, r"proprio is object \(\), .* takes numbers \(5,\), or \(b, 5\)"),
        ({"proprio": np.zeros(7)}, r"proprio is float64 \(7,\), the policy takes numbers \(5,\)"),
        ({"proprio": np.zeros((1, 1, 5))}, r"proprio is float64 \(1, 1, 5\)"),
        ({"proprio": np.array([0, 1, np.nan, 0, 0])}, r"proprio\[2\] is nan: every number must be"),
        ({"proprio": np.array(list("abcde"))}, "proprio is <U1"),
        (images(gripper=BLANK / 255), r"images\['gripper'\] is float64, not uint8: .*255 \* x"),
        (images(gripper=BLANK[:8]), r"\(8, 16, 3\), .* takes \(16, 16, 3\): resize .*16x16"),
        (images(gripper=BLANK[None]), r"\(1, 16, 16, 3\), the policy takes \(16, 16, 3\)"),
        (images(grip=BLANK), r"cameras \[\] are missing and \['grip'\] are unknown"),
        ({"images": {"gripper": BLANK, "overhed": BLANK}},
         r"\['overhead'\] are missing and \['overhed'\] are unknown, did you mean 'overhead'"),
        ({"images": BLANK}, r"must be a dict with cameras \['overhead', 'gripper'\].* ndarray"),
        ({"instruction": "one two three four five"}, "has 5 words, .* reads at most 4: say"),
        ({"instruction": ["lift"]}, r"instruction is \['lift'\], the policy takes a text$"),
        ({"instruction": 3}, "instruction is 3, the policy takes a text$"),
        ({"state": 0}, r"keys \[\] are missing and \['state'\] are unknown"),
    ],
)  # fmt: skip
def test_mismatches_are_errors_that_name_the_fix(changes, message):
    with pytest.raises(BadObservation, match=message):
        OBSERVER(runs.observation() | changes)


def test_keys_and_batches_must_agree():
    seen = runs.observation(batch=2)
    with pytest.raises(BadObservation, match="a list of 2 of them"):
        OBSERVER(seen | {"instruction": ["lift"]})
    with pytest.raises(BadObservation, match=r"\(2, 16, 24, 3\), .* \(3, 16, 24, 3\) beside"):
        OBSERVER(seen | {"proprio": np.zeros((3, 5))})
    with pytest.raises(BadObservation, match=r"keys \['instruction'\] are missing"):
        OBSERVER({k: v for k, v in seen.items() if k != "instruction"})
    with pytest.raises(BadObservation, match="observation must be a dict with keys .* not a list"):
        OBSERVER([seen])


def test_instructions_of_a_cache_are_named(tmp_path):
    cache = EmbeddingCache.create(tmp_path, Settings("toy", 4, template="do {instruction} now"))
    cache.add({"open it": np.ones((2, 6)), "close it": np.zeros((3, 6))})
    assert instructions(cache) == ["close it", "open it"]
    observer = Observer(runs.SPEC, cache)
    got, _ = observer(runs.observation(text="open it"))
    np.testing.assert_array_equal(got["context"], cache.lookup("open it")[None])
    assert "instruction" not in got and observer.example()["instruction"] == "close it"
    with pytest.raises(BadObservation, match="(?s)'open' is not among the 2 .*such as 'open it'.*"
                       "wamjax.data.embeddings --cache=.* --instructions=FILE"):  # fmt: skip
        observer(runs.observation(text="open"))
