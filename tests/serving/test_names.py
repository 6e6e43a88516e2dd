"""Tests how the keys of different clients are mapped to those of a policy."""

import json

import numpy as np
import pytest

from wamjax.bundle.observation import BadObservation
from wamjax.serving.names import CLIENTS, Names, tables

TWO, FOUR = ("front", "hand"), ("high", "left", "right", "low")


def picture(height=4, width=5, value=0):
    return np.full((height, width, 3), value, np.uint8)


def read(message, chosen=(), cameras=TWO, instruction=""):
    return Names(tables(chosen, cameras), instruction)(message)


def test_a_client_of_droid_has_its_state_in_two_parts():
    message = {
        "observation/exterior_image_1_left": picture(value=1),
        "observation/wrist_image_left": picture(value=2),
        "observation/joint_position": np.arange(7.0), "observation/gripper_position": np.array(9.0),
        "prompt": "lift",
    }  # fmt: skip
    seen, extras = read(message, ["libero", "droid"])
    assert seen["proprio"].tolist() == [0, 1, 2, 3, 4, 5, 6, 9] and extras == {}
    assert [seen["images"][name][0, 0, 0] for name in TWO] == [1, 2]
    assert seen["instruction"] == "lift"


def test_a_client_of_aloha_nests_its_pictures_channels_first_and_says_nothing():
    names = ("cam_high", "cam_left_wrist", "cam_right_wrist", "cam_low")
    images = {name: np.moveaxis(picture(value=i), -1, 0) for i, name in enumerate(names)}
    message = {"state": np.zeros(14), "images": images}
    seen, _ = read(message, ["aloha"], FOUR, "transfer the cube")
    assert seen["instruction"] == "transfer the cube" and seen["images"]["low"].shape == (4, 5, 3)
    assert [seen["images"][name][0, 0, 0] for name in FOUR] == [0, 1, 2, 3]
    seen, _ = read(message, ["aloha"], FOUR[:3], "x")  # cam_low is not used
    assert list(seen["images"]) == list(FOUR[:3])
    with pytest.raises(BadObservation, match="'prompt'. are missing"):
        read(message, ["aloha"], FOUR)


def test_other_names_are_given_as_pairs(tmp_path):
    pairs = ["a/b=hand", "c=front", "q1=proprio", "q2=proprio", "text=instruction", "spare="]
    message = {"a": {"b": picture(value=1)}, "c": picture(), "q1": [1, 2], "q2": 3, "text": "go",
               "spare": 1, "timestamp": np.float32(0.5)}  # fmt: skip
    seen, extras = read(message, pairs)
    assert seen["proprio"].tolist() == [1, 2, 3] and seen["images"]["hand"][0, 0, 0] == 1
    assert extras == {"timestamp": 0.5} and type(extras["timestamp"]) is float
    (tmp_path / "names.json").write_text(json.dumps(dict(p.split("=") for p in pairs)))
    assert tables((), TWO, bundle=str(tmp_path))[0] == tables(pairs, TWO)[0]
    seen, _ = Names(tables((), TWO, bundle=str(tmp_path)))(message)
    assert seen["proprio"].tolist() == [1, 2, 3]
    table = tables(pairs, TWO)[0]
    assert table.to_json() == dict(p.split("=") for p in pairs)


@pytest.mark.parametrize(
    "chosen, cameras, text",
    [
        (["libera"], TWO, "did you mean 'libero'"), (["droid"], FOUR, "such clients have cameras"),
        (["a=fronk", "q=proprio", "t=instruction"], TWO, "names .'fronk'.*no key for .'front', "),
        (["a=front", "b=hand", "t=instruction"], TWO, "has no key for .'proprio'."),
        (["a=front", "b=front", "c=hand", "q=proprio", "t=instruction"], TWO, "can be fr"),
    ],
)  # fmt: skip
def test_impossible_name_tables_are_refused_at_startup(chosen, cameras, text):
    with pytest.raises(ValueError, match=text):
        tables(chosen, cameras)


def native(**changes):
    images = {name: picture() for name in TWO}
    return {"images": images, "proprio": np.zeros(3), "instruction": "lift"} | changes


@pytest.mark.parametrize(
    "message, text",
    [
        (native(images={"front": picture()}), r"keys \['images/hand'\] are missing and \[\]"),
        (native(image=1), r"\['image'\] are unknown"), (native(proprio="x"), "row of numbers"),
        (native(proprio=np.zeros((2, 3))), "row of numbers"), (native(instruction=3), "be a text"),
        (native(instruction="x" * 5000), "must be a text of at most"),
        (native(mode=[1]), "mode is a list"),
        (native(request_id="x" * 300), "longer than 200"), ({1: 2}, "key '1' must be a text"),
        (native(images={"front": picture(), "hand": [[1], [1, 2]]}), "hand is not an array"),
        (native(images={"front": picture(), "hand": picture()[0]}), "one picture .H, W, 3."),
        (native(images={"front": picture(), "hand": picture(2100, 2100)}), "at most 4194304 pix"),
        (native(images={"front": picture(), "hand": [[[0, 1, 256]]]}), "lie in .0, 255."),
        ("text", "a map of keys, not a str"),
    ],
)  # fmt: skip
def test_errors_about_missing_keys_list_both_sides(message, text):
    with pytest.raises(BadObservation, match=text):
        read(message)


def test_every_client_has_a_name_for_everything():
    for keys, proprio, instruction, _ in CLIENTS.values():
        assert keys and proprio and instruction
