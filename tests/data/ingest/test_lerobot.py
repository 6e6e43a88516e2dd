"""LeRobot folders of both layouts, and every trap that is known of them."""

import json

import numpy as np
import pytest
from data.ingest import layouts
from data.ingest.test_hdf5 import ingest, shown

from wamjax.data.ingest.reader import SourceError, open_reader
from wamjax.data.records import Reader


def same(episodes, truth):
    for i, (episode, (actions, states, frames)) in enumerate(zip(episodes, truth, strict=True)):
        assert np.array_equal(episode.actions, actions), i
        assert np.array_equal(episode.proprio[:-1], states)
        assert episode.instruction == layouts.TASKS[i % 2]
        for camera in ("front", "wrist"):
            got = shown(episode, camera)[:-1].astype(int)
            want = frames[f"observation.images.{camera}"]
            assert abs(got - want).max() < 3, (i, camera)  # neighbours differ by 3 grey levels
    return True


@pytest.mark.parametrize("layout", ["lerobot_v21", "lerobot_v30"])
def test_both_layouts_come_out_as_they_were_written(tmp_path, layout):
    truth = getattr(layouts, layout)(tmp_path / "in")
    report, episodes = ingest(tmp_path / "in", tmp_path / "out", "lerobot")
    assert same(episodes, truth)
    info = Reader(tmp_path / "out").info
    assert info.control_hz == 20 and info.cameras == {"front": (32, 48), "wrist": (32, 48)}
    assert info.action_names[-1] == "gripper" and info.proprio_names[0] == "x"
    assert not info.outcomes and len(episodes[0].returns) == 0  # nothing says success
    assert report["warnings"] == [] and report["bad"] == {}


def test_video_files_are_numbered_for_themselves_and_all_shards_are_read(tmp_path):
    """One file of data, and of the front camera two, the wrist one; metadata in two shards of one
    base name."""
    truth = layouts.lerobot_v30(tmp_path / "in", data_files=((0,), (1,), (2,)))
    assert same(ingest(tmp_path / "in", tmp_path / "out", "lerobot")[1], truth)


def test_ranges_in_the_metadata_are_not_believed(tmp_path):
    def spoil(i, row):
        row["data/file_index"] = 0  # the second file's first episode points to the first file
        row["dataset_from_index"] = row["dataset_to_index"] = 7 * i

    truth = layouts.lerobot_v30(tmp_path / "in", data_files=((0,), (1, 2)), spoil=spoil)
    report, episodes = ingest(tmp_path / "in", tmp_path / "out", "lerobot")
    assert same(episodes, truth)
    assert [n for n in report["notes"] if "data/file_index of 2 episodes" in n]
    assert [n for n in report["notes"] if "dataset_from_index of 3 episodes" in n]


def test_episodes_that_claim_the_same_frames_are_bad(tmp_path):
    def spoil(i, row):
        if i == 1:  # the first one of a new file, stale
            row["videos/observation.images.front/file_index"] = 0

    layouts.lerobot_v30(tmp_path / "in", spoil=spoil)
    with pytest.raises(SourceError, match=r"file-000.mp4: episodes 0 and 1 claim the same frames"):
        ingest(tmp_path / "in", tmp_path / "out", "lerobot")
    report, episodes = ingest(tmp_path / "in", tmp_path / "out", "lerobot", skip_bad=1)
    assert list(report["bad"]) == ["episode_000001"] and len(episodes) == 2


def test_a_frame_that_is_late_is_an_error_or_is_reported(tmp_path):
    def spoil(i, row):
        if i == 2:
            row["videos/observation.images.wrist/from_timestamp"] += 0.01

    truth = layouts.lerobot_v30(tmp_path / "in", spoil=spoil)
    with pytest.raises(SourceError, match=r"0.0100 s off; --option=tolerance=0.015 takes it"):
        ingest(tmp_path / "in", tmp_path / "out", "lerobot")
    report, episodes = ingest(tmp_path / "in", tmp_path / "out", "lerobot", {"tolerance": "0.02"})
    assert same(episodes, truth) and "10.0 ms off" in report["video"]


def test_quantiles_are_of_the_data_not_of_its_metadata(tmp_path):
    layouts.lerobot_v30(tmp_path / "in")
    (tmp_path / "in/meta/stats.json").write_text(json.dumps({"action": {"q01": [9.0] * 7}}))
    _, episodes = ingest(tmp_path / "in", tmp_path / "out", "lerobot")
    actions = np.concatenate([e.actions for e in episodes]).astype(np.float64)
    found = Reader(tmp_path / "out").stored_statistics()["actions"]
    assert np.allclose(found["q01"], np.quantile(actions, 0.01, axis=0))


def test_a_rate_against_the_time_stamps_is_doubted(tmp_path):
    layouts.lerobot_v30(tmp_path / "in", fps=30)
    report, _ = ingest(tmp_path / "in", tmp_path / "out", "lerobot")
    assert "the time stamps say 20 Hz, not 30: give --source_fps=20" in report["warnings"][0]
    report, _ = ingest(tmp_path / "in", tmp_path / "right", "lerobot", source_fps=20)
    assert report["warnings"] == []


@pytest.mark.parametrize("gop", [2, 30])
def test_any_frames_of_a_video_in_any_distance(tmp_path, gop):
    truth = layouts.lerobot_v30(tmp_path / "in", lengths=(50, 40, 60), gop=gop,
                                video_files={c: ((0, 1, 2),) for c in layouts.CAMERAS})  # fmt: skip
    reader = open_reader("lerobot", tmp_path / "in", {})
    for i in (2, 0, 1):
        for steps in ([0, 1, 2], [5, 39], [3], [0, 25, 26, 39]):
            got = np.stack(list(reader.frames(i, "front", steps))).astype(int)
            assert abs(got - truth[i][2]["observation.images.front"][steps]).max() < 3
