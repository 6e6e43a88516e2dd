"""Tests HDF5 files of other projects, with all their known pitfalls."""

import json

import h5py
import numpy as np
import pytest
from data.ingest import layouts

from wamjax.data import images
from wamjax.data.ingest import run
from wamjax.data.ingest.plan import Request
from wamjax.data.records import Reader


def ingest(source, out, format="libero", options=None, workers=0, skip_bad=0, **ask):
    report = run.ingest(format, source, out, Request(**ask), options, workers, skip_bad,
                        progress=False)  # fmt: skip
    return report, list(Reader(out))


def shown(episode, camera):
    return np.stack([images.decode(x) for x in episode.images[camera]])


def test_libero_is_converted_exactly_and_upright(tmp_path):
    truth = layouts.libero(tmp_path / "a_demo.hdf5")
    report, episodes = ingest(tmp_path / "a_demo.hdf5", tmp_path / "out")
    assert (report["episodes"], report["steps"]) == (2, 21)
    for episode, (actions, states, frames) in zip(episodes, truth, strict=True):
        assert np.array_equal(episode.actions, actions.astype(np.float32))
        assert np.array_equal(episode.proprio[:-1], states.astype(np.float32))
        assert np.array_equal(episode.proprio[-1], episode.proprio[-2])
        assert np.array_equal(shown(episode, "agentview_rgb")[:-1], frames)
        assert episode.instruction == "open the drawer" and episode.success
        want = 0.99 ** np.arange(len(actions) - 1, -1, -1.0)
        assert np.allclose(episode.returns, want)
    info = Reader(tmp_path / "out").info
    assert not info.final_observation and info.outcomes and info.control_hz == 20
    assert "last observation is stored twice" in report["end"]
    assert "before" in report["pairing"] and report["gripper"] == "gripper minus_opens"
    assert report["actions are"] == "delta (from the data)"


def test_the_last_action_may_be_dropped_instead(tmp_path):
    (actions, states, frames), _ = layouts.libero(tmp_path / "a_demo.hdf5")
    report, (first, _) = ingest(tmp_path / "a_demo.hdf5", tmp_path / "out", end="drop")
    assert np.array_equal(first.actions, actions[:-1].astype(np.float32))
    assert np.array_equal(shown(first, "agentview_rgb"), frames)
    assert first.returns[-1] == 1.0  # the reward of the dropped action is not lost
    assert Reader(tmp_path / "out").info.final_observation and "left out" in report["end"]


def test_observations_stored_after_their_action_are_shifted(tmp_path):
    file = tmp_path / "a_demo.hdf5"
    (actions, states, frames), _ = layouts.libero(file, attributes={"bddl_file_name": "x.bddl"})
    report, (first, _) = ingest(file, tmp_path / "out")
    assert np.array_equal(first.actions, actions[1:].astype(np.float32))
    assert np.array_equal(shown(first, "agentview_rgb"), frames)
    assert "after action t" in report["pairing"] and first.length == 11
    assert Reader(tmp_path / "out").info.final_observation


@pytest.mark.parametrize("name, said", [
    ("KITCHEN_SCENE10_put_the_bowl_in_the_drawer_demo", "put the bowl in the drawer"),
    ("LIVING_ROOM_SCENE2_pick_up_the_soup_demo", "pick up the soup"),
    ("open_the_middle_drawer_demo", "open the middle drawer"),
])  # fmt: skip
def test_regenerated_libero_is_upright_and_named_by_its_file(tmp_path, name, said):
    file = tmp_path / f"{name}.hdf5"
    truth = layouts.libero(file, flip=False)
    with h5py.File(file, "a") as f:
        del f["data"].attrs["problem_info"]
        for demo in f["data"].values():  # ... and JPEG, in ragged rows
            frames = demo["obs"].pop("agentview_rgb")[:]
            kind = h5py.vlen_dtype(np.uint8)
            rows = demo["obs"].create_dataset("agentview_rgb_jpeg", (len(frames),), kind)
            for i, x in enumerate(frames):
                rows[i] = np.frombuffer(images.encode(x, "jpeg"), np.uint8)
    report, episodes = ingest(file, tmp_path / "out")
    want = images.encode(truth[0][2][3], "jpeg")
    assert episodes[0].images["agentview_rgb"][3] == want  # not decoded and encoded again
    assert {e.instruction for e in episodes} == {said} and "upright" in report["notes"][0]


def test_robomimic_has_final_observations_and_splits(tmp_path):
    truth = layouts.robomimic(tmp_path / "lift.hdf5")
    report, episodes = ingest(tmp_path / "lift.hdf5", tmp_path / "out", "robomimic",
                              {"split": "train"}, instruction="lift it")  # fmt: skip
    assert len(episodes) == 2  # demo_0 and demo_10, in the order of their numbers
    for episode, (actions, states, frames) in zip(episodes, truth[::2], strict=True):
        assert np.array_equal(episode.actions, actions.astype(np.float32))
        assert np.allclose(episode.proprio[:, :3], states[:, :3])
        assert np.array_equal(shown(episode, "agentview_image"), frames)
        assert episode.instruction == "lift it" and not episode.success
    assert Reader(tmp_path / "out").info.final_observation and report["robot"] == "Lift"
    layouts.robomimic(tmp_path / "low.hdf5", after=False)
    report, episodes = ingest(tmp_path / "low.hdf5", tmp_path / "out2", "robomimic")
    assert len(episodes) == 3 and "stored twice" in report["end"]
    assert "no instruction" in report["warnings"][0]


def test_robocasa_says_the_task_in_a_demonstration_and_moves_its_base(tmp_path):
    layouts.robomimic(tmp_path / "open.hdf5", after=False)
    with h5py.File(tmp_path / "open.hdf5", "a") as f:
        for demo in f["data"].values():
            demo.attrs["ep_meta"] = json.dumps({"lang": "open the door"})
            actions = demo.pop("actions")[:]
            demo["actions"] = np.concatenate([actions, np.zeros((len(actions), 5))], 1)
    report, episodes = ingest(tmp_path / "open.hdf5", tmp_path / "out", "robocasa")
    assert episodes[0].actions.shape == (10, 7) and episodes[0].instruction == "open the door"
    assert "first 7" in report["notes"][1]
    _, episodes = ingest(tmp_path / "open.hdf5", tmp_path / "all", "robocasa", action=["actions"])
    assert episodes[0].actions.shape == (10, 12)


@pytest.mark.parametrize("compress", [False, True])
def test_aloha_raw_and_encoded(tmp_path, compress):
    truth = layouts.aloha(tmp_path / "fold", count=11, compress=compress)
    report, episodes = ingest(tmp_path / "fold", tmp_path / "out", "aloha", instruction="fold")
    for episode, (action, qpos, frames) in zip(episodes, truth, strict=True):  # 2 before 10
        assert np.array_equal(episode.actions, action)
        assert np.array_equal(episode.proprio[:-1], qpos)
        off = abs(shown(episode, "cam_high")[:-1].astype(int) - frames)
        assert off.max() <= (4 if compress else 0)
    info = Reader(tmp_path / "out").info
    assert info.control_hz == 50 and info.action_names[6] == "left_gripper"
    assert report["actions are"] == "absolute (from the data)" and report["robot"] == "aloha"


def test_real_aloha_is_paired_late_on_request(tmp_path):
    (action, qpos, _), *_ = layouts.aloha(tmp_path / "fold", count=1, sim=False)
    report, _ = ingest(tmp_path / "fold", tmp_path / "out", "aloha")
    assert "--pairing=late" in report["notes"][0]
    _, (episode,) = ingest(tmp_path / "fold", tmp_path / "late", "aloha", pairing="late")
    assert np.array_equal(episode.actions, action[[0, 0, 1, 2, 3, 4, 5, 6]])
    assert np.array_equal(episode.proprio[:-1], qpos)


def roll_out(file, steps, success, score=None):
    actions, states = layouts.motion(1, steps)
    with h5py.File(file, "w") as f:
        f.attrs.update({"success": success, "task_description": "put it there"})
        f["actions"], f["proprio"] = actions, np.zeros((steps, 9))
        f["primary_images"] = layouts.pictures(0, steps)
        rows = f.create_dataset("wrist_images_jpeg", (steps,), h5py.vlen_dtype(np.uint8))
        for i, x in enumerate(layouts.smooth(1, steps)):
            rows[i] = np.frombuffer(images.encode(x, "jpeg"), np.uint8)


def test_cosmos_policy_rollouts_include_failures_and_short_ones_are_bad(tmp_path):
    for ep, (steps, success) in enumerate([(9, True), (7, False), (4, False)]):
        name = f"episode_data--suite=libero_10--task={ep}--ep={ep}--success={success}.hdf5"
        roll_out(tmp_path / name, steps, success)
    report, (won, lost) = ingest(tmp_path, tmp_path / "out", "cosmos_policy", skip_bad=1)
    assert (won.success, lost.success) == (True, False) and won.task == "0"
    assert won.returns[-1] == 1 and not lost.returns.any() and lost.instruction == "put it there"
    assert np.array_equal(shown(won, "primary")[:-1], layouts.pictures(0, 9))
    assert set(won.images) == {"primary", "wrist"}
    (text,) = report["bad"].values()
    assert "ep=2" in text and "4 steps" in text


def test_aloha_rollouts_have_separate_videos(tmp_path):
    frames = layouts.smooth(1, 10)
    layouts.encode_video(tmp_path / "ep0.mp4", frames, fps=25)
    with h5py.File(tmp_path / "episode_0.hdf5", "w") as f:
        f.attrs.update({"sim": False, "success_score": 0.75, "task_description": "bag"})
        f["action"] = f["observations/qpos"] = np.random.default_rng(0).normal(size=(10, 14))
        f["observations/video_paths/cam_high"] = "/somewhere/else/ep0.mp4"
    _, (episode,) = ingest(tmp_path, tmp_path / "out", "cosmos_policy")
    assert abs(shown(episode, "cam_high")[:-1].astype(int) - frames).max() < 3
    assert episode.returns[-1] == 0.75 and episode.success  # a partial score is unchanged
    assert Reader(tmp_path / "out").info.control_hz == 25
    with h5py.File(tmp_path / "episode_0.hdf5", "a") as f:  # a demonstration without an outcome
        del f.attrs["success_score"]
    _, (episode,) = ingest(tmp_path, tmp_path / "demo", "cosmos_policy")
    assert episode.success and not Reader(tmp_path / "demo").info.outcomes
