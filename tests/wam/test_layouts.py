"""Tests layouts: the published indices follow from the words; every mistake is named."""

import numpy as np
import pytest

from wamjax.data.spec import DataSpec
from wamjax.wam.cosmos_policy.layouts import GROUPS, LAYOUTS, named, parse

# The specification's table (section 3), index by index.
PUBLISHED = {
    "libero": {
        "blank": 0, "proprio": 1, "wrist": 2, "agentview": 3, "action": 4, "future_proprio": 5,
        "future_wrist": 6, "future_agentview": 7, "value": 8,
    },
    "robocasa": {
        "blank": 0, "proprio": 1, "wrist": 2, "left": 3, "right": 4, "action": 5,
        "future_proprio": 6, "future_wrist": 7, "future_left": 8, "future_right": 9, "value": 10,
    },
    "aloha": {
        "blank": 0, "proprio": 1, "left_wrist": 2, "right_wrist": 3, "high": 4, "action": 5,
        "future_proprio": 6, "future_left_wrist": 7, "future_right_wrist": 8, "future_high": 9,
        "value": 10,
    },
}  # fmt: skip
SIZES = {"libero": (4, 16, 7, 9), "robocasa": (5, 32, 7, 9), "aloha": (5, 50, 14, 14),
         "tabletop": (4, 8, 4, 5)}  # conditional, chunk, action and state dimensions  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_indices_sizes_and_words_of_every_layout(name):
    layout = parse(LAYOUTS[name])
    assert layout.words == LAYOUTS[name] and parse(layout.words) == layout
    if name in PUBLISHED:
        assert {n: layout.index(n) for n in layout.names} == PUBLISHED[name]
    conditional, chunk, actions, proprio = SIZES[name]
    assert (layout.conditional, layout.chunk) == (conditional, chunk)
    assert layout.statistics == {"actions": actions, "proprio": proprio}
    assert tuple(layout.groups) == GROUPS
    # Groups are contiguous and cover the clip once; decode lists name the future pictures.
    assert sum(layout.groups.values(), ()) == tuple(range(len(layout)))
    assert layout.sizes == {g: len(p) for g, p in layout.groups.items()}
    for camera, i in layout.decoded.items():
        assert layout.slots[i].kind == "future_camera" and layout.names[i] == f"future_{camera}"
    assert tuple(layout.decoded) == layout.cameras
    assert all(word in str(layout) for word in layout.words)


def test_layouts_are_named_or_given():
    assert named("libero") == named(LAYOUTS["libero"]) == parse(LAYOUTS["libero"])
    with pytest.raises(ValueError, match="no layout 'libro', did you mean 'libero'"):
        named("libro")


def test_a_new_robot_is_words_alone():
    layout = parse(("blank", "camera:eye", "action:3x2", "future_camera:eye", "value"))
    assert layout.statistics == {"actions": 2} and layout.conditional == 2
    assert set(layout.numbers) == {"action", "value"}
    assert layout.sizes == dict(blank=1, current=1, action=1, future=1, value=1)


GOOD = list(LAYOUTS["tabletop"])
MISTAKES = {
    "no kind 'camra', did you mean 'camera'": [(2, "camra:overhead")],
    "names no camera; write camera:NAME": [(2, "camera")],
    "must have the form action:NxN": [(4, "action:8")],
    "must have the form proprio:N$": [(1, "proprio:05")],
    "'proprio:0' must have": [(1, "proprio:0")],
    "must have the form value$": [(8, "value:1")],
    r"contains \['overhead'\] more than once": [(3, "camera:overhead")],
    r"needs slots of the groups \['action'\]": [(4, "future_camera:overhead"), (6, None)],
    "must be in the order": [(0, "proprio:5"), (1, "blank")],
    "with one blank": [(0, "blank"), (1, "value"), (8, "proprio:5")],
    "'future_camera:gripper' needs a slot 'camera:gripper'": [(3, "camera:wrist")],
    "'future_proprio:6' needs a slot 'proprio' of the same size": [(5, "future_proprio:6")],
    "'future_proprio:5' needs a slot 'proprio' of the same size": [(1, None)],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    words = list(GOOD)
    for i, word in MISTAKES[message]:
        words[i] = word
    with pytest.raises(ValueError, match=message):
        parse([w for w in words if w is not None])


def test_the_data_must_fit():
    layout = parse(GOOD)
    cameras = {"overhead": (64, 64), "gripper": (64, 64)}

    def spec(**changes):
        values = dict(cameras=cameras, proprio_dim=5, action_dim=4, chunk=8, frames=2,
                      frame_stride=8, instruction_length=12, control_hz=10.0)  # fmt: skip
        return DataSpec(**values | changes)

    layout.check_data(spec())
    for message, changes in {
        "need actions of size 4, the data has 7": dict(action_dim=7),
        "need proprio of size 5, the data has 6": dict(proprio_dim=6),
        "need chunk of size 8, the data has 16": dict(chunk=16),
        "needs camera 'gripper', did you mean 'griper'": dict(
            cameras={"overhead": (64, 64), "griper": (64, 64)}
        ),
        "must have equal sizes": dict(cameras=cameras | {"gripper": (64, 32)}),
    }.items():
        with pytest.raises(ValueError, match=message):
            layout.check_data(spec(**changes))
    with pytest.raises(KeyError, match="'gripperr', did you mean 'gripper'"):
        layout.index("gripperr")
    assert np.all([layout.index(n) == i for i, n in enumerate(layout.names)])
