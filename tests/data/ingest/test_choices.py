"""Tests the choices of a conversion: cameras, sizes, rate, state, actions, rotations, gripper,
no-ops."""

import json

import h5py
import numpy as np
import pytest
from data.ingest import layouts
from data.ingest.test_hdf5 import ingest, shown
from scipy.spatial.transform import Rotation

from wamjax.data.ingest import frame, plan, rotations, signals, steps
from wamjax.data.records import Reader


@pytest.fixture
def source(tmp_path):
    return tmp_path / "in_demo.hdf5", layouts.libero(tmp_path / "in_demo.hdf5")


def test_cameras_are_chosen_renamed_resized_and_reported(source, tmp_path):
    report, (first, _) = ingest(source[0], tmp_path / "out", cameras=("front=agentview_rgb",),
                                resize=(8, 12), pictures="jpeg")  # fmt: skip
    assert list(first.images) == ["front"] and first.images["front"][0][:2] == b"\xff\xd8"
    assert shown(first, "front").shape == (13, 8, 12, 3)
    assert report["cameras"] == {"front": "agentview_rgb, (16, 24) to (8, 12)"}
    with pytest.raises(ValueError, match="no camera 'agentview', did you mean 'agentview_rgb'"):
        ingest(source[0], tmp_path / "no", cameras=("agentview",))


def test_state_and_action_are_chosen_and_rotations_rewritten(source, tmp_path):
    state = ("gripper_states[0]", "ee_states[3:6]:axis_angle:rotation_6d", "ee_states[:3]")
    _, (first, _) = ingest(source[0], tmp_path / "out", state=state, action=("actions[0:3]",))
    want = source[1][0][1]
    matrix = Rotation.from_rotvec(want[:, 3:6]).as_matrix()
    assert np.allclose(first.proprio[:-1, 0], want[:, 6])
    assert np.allclose(first.proprio[:-1, 1:4], matrix[:, :, 0], atol=1e-6)
    assert np.allclose(first.proprio[:-1, 4:7], matrix[:, :, 1], atol=1e-6)
    assert np.allclose(first.proprio[:-1, 7:], want[:, :3])
    names = Reader(tmp_path / "out").info.proprio_names
    assert names[0] == "finger_left" and names[1] == "ee_states.rotation_6d[0]" and len(names) == 10


@pytest.mark.parametrize("term, fault", [
    ("ee_state", "no array 'ee_state', did you mean 'ee_states'"),
    ("ee_states[4:9]", "selects no dimension: ee_states has 6"),
    ("ee_states[3:6]:quat_xyzw", "selects 3 dimensions, but quat_xyzw has 4"),
    ("ee_states[3:6]:axisangle", "did you mean 'axis_angle'"),
    ("ee_states[3:6", "must have the form"),
])  # fmt: skip
def test_errors_in_terms_show_valid_ones(source, tmp_path, term, fault):
    with pytest.raises(ValueError, match=fault.replace("[", r"\[")):
        ingest(source[0], tmp_path / "out", state=(term,))


@pytest.mark.parametrize("kind", rotations.SIZES)
def test_every_rotation_round_trips(kind):
    r = Rotation.random(50, random_state=0)
    x = rotations.write(r, kind)
    assert x.shape == (50, rotations.SIZES[kind])
    for other in rotations.SIZES:
        back = rotations.read(rotations.convert(rotations.convert(x, kind, other), other, kind),
                              kind)  # fmt: skip
        assert (back * r.inv()).magnitude().max() < 1e-6


def test_quaternions_have_their_order_and_do_not_jump():
    turns = np.linspace(0, 2 * np.pi, 40)[:, None] * [0, 0, 1]  # once around
    xyzw = rotations.convert(turns, "axis_angle", "quat_xyzw")
    assert np.allclose(xyzw[0], [0, 0, 0, 1]) and np.allclose(xyzw[-1], [0, 0, 0, -1])
    assert abs(np.diff(xyzw, axis=0)).max() < 0.1
    wxyz = rotations.convert(turns, "axis_angle", "quat_wxyz")
    assert np.array_equal(wxyz[:, [1, 2, 3, 0]], xyzw)


def test_half_the_rate_sums_deltas_and_keeps_the_last_command_of_the_gripper(source, tmp_path):
    report, (first, second) = ingest(source[0], tmp_path / "out", fps=10)
    (actions, states, frames), (odd, _, _) = source[1]
    assert np.allclose(first.actions[:, :6], actions[:, :6].reshape(6, 2, 6).sum(1), atol=1e-6)
    assert np.array_equal(first.actions[:, 6], actions[1::2, 6])
    assert np.array_equal(first.proprio[:-1], states[::2].astype(np.float32))
    assert np.array_equal(shown(first, "agentview_rgb")[:-1], frames[::2])
    assert second.length == 5 and np.allclose(second.actions[-1], odd[-1])  # of 9 steps
    info = Reader(tmp_path / "out").info
    assert info.control_hz == 10 and report["rate"] == "20 Hz to 10 Hz"
    with pytest.raises(ValueError, match="--fps=40 is above the source's 20"):
        ingest(source[0], tmp_path / "no", fps=40)


def test_a_rate_that_does_not_divide_uses_nearest_steps_and_reports_the_distance(tmp_path):
    truth = layouts.aloha(tmp_path / "in", count=1, steps=50)
    report, (episode,) = ingest(tmp_path / "in", tmp_path / "out", "aloha", fps=15)
    picked = np.floor(np.arange(15) * 50 / 15 + 0.5).astype(int)
    assert np.array_equal(episode.proprio[:-1], truth[0][1][picked])
    # Absolute actions are the target at the time of the next observation.
    assert np.array_equal(episode.actions, truth[0][0][np.append(picked[1:], 50) - 1])
    assert report["resampled"] == "observations are at most 6.7 ms off the new times"


def test_no_ops_are_dropped_as_published(source, tmp_path):
    actions = np.array([[0, 0, -1], [1, 0, -1], [0, 0, -1], [0, 0, 1], [1e-5, 0, 1], [0, 1, 1]])
    mask = steps.no_ops(np.float64(actions), 1e-4)
    # Dropped: the first one, and those that neither move nor switch the gripper.
    assert mask.tolist() == [False, True, False, True, False, True]
    with h5py.File(source[0], "a") as file:
        moves = file["data/demo_0/actions"][:]
        moves[[3, 4], :6] = 0
        file["data/demo_0/actions"][:] = moves
    report, (first, _) = ingest(source[0], tmp_path / "out", no_op=1e-4)
    assert report["no-ops dropped"] == 2 and first.length == 10
    keep = np.delete(np.arange(12), [3, 4])
    assert np.array_equal(first.proprio[:-1], source[1][0][1][keep].astype(np.float32))


def test_a_gripper_in_the_middle_decides_no_ops_too():
    """RoboCasa's published filter tests all but the last of 12 numbers, so it never drops any."""
    actions = np.zeros((3, 12))
    actions[:, 6] = -1
    assert steps.no_ops(actions, 1e-4).all()
    assert not steps.no_ops(actions, 1e-4, gripper=6).any()


@pytest.mark.parametrize("name", signals.CONVENTIONS)
def test_a_gripper_is_recognised_and_rewritten(tmp_path, name):
    (actions, states, _), *_ = layouts.libero(tmp_path / "a_demo.hdf5")
    opens, closes = signals.CONVENTIONS[name]
    with h5py.File(tmp_path / "a_demo.hdf5", "a") as file:
        for demo in file["data"].values():
            x = demo["actions"][:]
            x[:, 6] = np.where(x[:, 6] > 0, closes, opens)  # the file: 1 closes
            demo["actions"][:] = x
    report, (first, _) = ingest(tmp_path / "a_demo.hdf5", tmp_path / "out", gripper="one_opens")
    assert report["gripper"] == f"gripper {name}; written as one_opens"
    assert np.array_equal(first.actions[:, 6], np.where(actions[:, 6] > 0, 0, 1))


def test_a_state_that_says_how_far_a_gripper_is_closed_is_read_so():
    commands = np.repeat([0.0, 1.0, 0.0, 1.0], 5)[:, None]
    closed = 0.5 + np.cumsum(np.append(0.0, (2 * commands - 1) * 0.1))[:, None]
    assert signals.convention([closed], [commands], 0, ["gripper_closed"]) == "zero_opens"
    assert signals.convention([1 - closed], [commands], 0, ["gripper"]) == "zero_opens"
    assert signals.convention([closed], [commands], 0, ["gripper"]) == "one_opens"
    assert signals.convention([closed], [commands], 0, ["x"]) == "unclear"


def test_the_instruction_may_be_the_name_of_a_file_or_a_folder(tmp_path):
    layouts.aloha(tmp_path / "fold_the_towel", count=1)
    _, (episode,) = ingest(tmp_path, tmp_path / "out", "aloha", instruction="{folder}, please")
    assert episode.instruction == "fold the towel, please"
    layouts.libero(tmp_path / "open_it_demo.hdf5")
    file = tmp_path / "open_it_demo.hdf5"
    _, (episode, _) = ingest(file, tmp_path / "out2", instruction="{file}")
    assert episode.instruction == "open it"


def test_an_unclear_gripper_must_be_stated(source, tmp_path):
    state = ("ee_states",)  # no fingers
    with pytest.raises(ValueError, match="give --gripper_is"):
        ingest(source[0], tmp_path / "out", state=state, gripper="one_opens")
    _, (first, _) = ingest(source[0], tmp_path / "out", state=state, gripper="one_opens",
                           gripper_is="minus_opens")  # fmt: skip
    assert set(first.actions[:, 6]) == {0, 1}


def test_absolute_actions_become_relative_and_back(tmp_path):
    truth = layouts.aloha(tmp_path / "in")
    moves = ("0:6", "7:13")
    report, episodes = ingest(tmp_path / "in", tmp_path / "out", "aloha", relative=moves)
    assert report["relative"] == list(moves)
    for episode, (action, qpos, _) in zip(episodes, truth, strict=True):
        want = action - qpos
        want[:, [6, 13]] = action[:, [6, 13]]
        assert np.allclose(episode.actions, want, atol=1e-6)
    parsed = [frame.parse(m, "--relative", (14, 14), {}, {}) for m in moves]
    action, qpos, _ = truth[0]
    back = frame.absolute(frame.relative(action, qpos, parsed), qpos, parsed)
    assert np.allclose(back, action)


def test_deltas_become_absolute_in_their_units_and_rotations_are_composed(source, tmp_path):
    state = ("ee_states[0:3]", "ee_states[3:6]:axis_angle", "gripper_states")
    action = ("actions[0:3]", "actions[3:6]:axis_angle", "actions[6]")
    _, (first, _) = ingest(source[0], tmp_path / "out", state=state, action=action,
                           absolute=("0:3*0.05", "3:6*0.05"))  # fmt: skip
    actions, states, _ = source[1][0]
    assert np.allclose(first.actions[:-1, :3], states[1:, :3], atol=1e-6)
    turned = Rotation.from_rotvec(0.05 * actions[:, 3:6]) * Rotation.from_rotvec(states[:, 3:6])
    off = Rotation.from_rotvec(first.actions[:, 3:6]) * turned.inv()
    assert off.magnitude().max() < 1e-6
    blocks = {(3, 6): "axis_angle"}
    move = frame.parse("3:6*0.05", "--relative", (7, 8), blocks, blocks)
    back = frame.relative(first.actions, states, [move])
    assert np.allclose(back[:, 3:6], actions[:, 3:6], atol=1e-5)
    with pytest.raises(ValueError, match="cuts through a rotation"):
        frame.parse("2:5", "--relative", (7, 8), blocks, blocks)


def test_a_map_holds_the_same_choices(tmp_path):
    values = {"cameras": {"front": "agentview_rgb"}, "resize": [8, 8], "fps": 10, "end": "drop"}
    ask = plan.request(values, "m")
    want = plan.Request(("front=agentview_rgb",), resize=(8, 8), fps=10.0, end="drop")
    assert ask == want
    with pytest.raises(ValueError, match="m: there is no key 'camera', did you mean 'cameras'"):
        plan.request({"camera": []}, "m")
    with pytest.raises(ValueError, match="fps = 'ten' must be float"):
        plan.request({"fps": "ten"}, "m")


def test_the_command_takes_map_and_flags(source, tmp_path, capsys):
    from data import synthetic

    from wamjax import ingest as command

    (tmp_path / "map.json").write_text(json.dumps({"fps": 5, "end": "drop"}))
    arguments = ["--format=libero", f"--source={source[0]}", f"--out={tmp_path / 'out'}",
                 f"--map={tmp_path / 'map.json'}", "--fps=10", "--resize=8,12"]  # fmt: skip
    with synthetic.command(command, *arguments):
        command.main([])
    info = Reader(tmp_path / "out").info
    assert info.control_hz == 10 and info.final_observation  # the flag wins; the map's end
    text = capsys.readouterr().out
    assert "20 Hz to 10 Hz" in text and "the last action is left out" in text
    assert json.loads((tmp_path / "out" / "ingest.json").read_text())["episodes"] == 2
    with synthetic.command(command, "--list"):
        command.main([])
    listing = capsys.readouterr().out
    for name in ("libero", "robomimic", "robocasa", "aloha", "cosmos_policy", "lerobot", "rlds",
                 "droid"):  # fmt: skip
        assert f"  {name} " in listing
