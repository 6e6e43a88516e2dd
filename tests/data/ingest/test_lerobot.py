"""Tests LeRobot folders of both layouts, with all their known pitfalls."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.ingest import layouts
from data.ingest.test_hdf5 import ingest, shown

from wamjax.data import images
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
def test_both_layouts_are_converted_exactly(tmp_path, layout):
    truth = getattr(layouts, layout)(tmp_path / "in")
    report, episodes = ingest(tmp_path / "in", tmp_path / "out", "lerobot")
    assert same(episodes, truth)
    info = Reader(tmp_path / "out").info
    assert info.control_hz == 20 and info.cameras == {"front": (32, 48), "wrist": (32, 48)}
    assert info.action_names[-1] == "gripper" and info.proprio_names[0] == "x"
    assert not info.outcomes and len(episodes[0].returns) == 0  # outcomes are unknown
    assert report["warnings"] == [] and report["bad"] == {}


def test_video_files_have_their_own_numbers_and_all_shards_are_read(tmp_path):
    """One data file, two files of the front camera and one of the wrist; metadata in two shards
    with the same base name."""
    truth = layouts.lerobot_v30(tmp_path / "in", data_files=((0,), (1,), (2,)))
    assert same(ingest(tmp_path / "in", tmp_path / "out", "lerobot")[1], truth)


def test_wrong_ranges_in_the_metadata_are_ignored(tmp_path):
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
    with pytest.raises(SourceError, match=r"0.0100 s off; give --option=tolerance=0.015 to use it"):
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


def test_a_rate_that_contradicts_the_timestamps_gives_a_warning(tmp_path):
    layouts.lerobot_v30(tmp_path / "in", fps=30)
    report, _ = ingest(tmp_path / "in", tmp_path / "out", "lerobot")
    assert "the time stamps say 20 Hz, not 30: give --source_fps=20" in report["warnings"][0]
    report, _ = ingest(tmp_path / "in", tmp_path / "right", "lerobot", source_fps=20)
    assert report["warnings"] == []


@pytest.mark.parametrize("gop", [2, 30])
def test_frames_of_a_video_at_any_distance_are_found(tmp_path, gop):
    truth = layouts.lerobot_v30(tmp_path / "in", lengths=(50, 40, 60), gop=gop,
                                video_files={c: ((0, 1, 2),) for c in layouts.CAMERAS})  # fmt: skip
    reader = open_reader("lerobot", tmp_path / "in", {})
    for i in (2, 0, 1):
        for steps in ([0, 1, 2], [5, 39], [3], [0, 25, 26, 39]):
            got = np.stack(list(reader.frames(i, "front", steps))).astype(int)
            assert abs(got - truth[i][2]["observation.images.front"][steps]).max() < 3


def test_pictures_in_rows_tasks_by_index_and_skipped_depth(tmp_path):
    """As in converted data sets; PNG bytes are unchanged."""
    truth = layouts.lerobot_v30(tmp_path / "in")
    rows = tmp_path / "in/data/chunk-000/file-000.parquet"
    table, camera = pq.read_table(rows), layouts.CAMERAS[0]
    cells = [{"bytes": images.encode(x), "path": None}
             for _, _, frames in truth for x in frames[camera]]  # fmt: skip
    pq.write_table(table.append_column(camera, pa.array(cells)), rows)
    info = json.loads((tmp_path / "in/meta/info.json").read_text())
    info["features"][camera]["dtype"] = "image"
    info["features"]["observation.images.depth"] = {
        "dtype": "video", "shape": [32, 48, 1], "info": {"video.is_depth_map": True}
    }  # fmt: skip
    info["features"][layouts.CAMERAS[1]]["shape"] = [3, 32, 48]
    (tmp_path / "in/meta/info.json").write_text(json.dumps(info))
    meta = tmp_path / "in/meta"
    frame = pa.table({"task_index": [1, 0], "task": list(layouts.TASKS[::-1])})
    pq.write_table(frame, meta / "tasks.parquet")
    for shard in meta.glob("episodes/*/*.parquet"):  # only tasks.parquet has the texts
        pq.write_table(pq.read_table(shard).drop_columns(["tasks"]), shard)
    report, episodes = ingest(tmp_path / "in", tmp_path / "out", "lerobot")
    assert same(episodes, truth)
    assert episodes[1].images["front"][2] == cells[12 + 2]["bytes"]
    assert set(episodes[0].images) == {"front", "wrist"}
    assert [n for n in report["notes"] if "depth is left out: observation.images.depth" in n]


def test_a_damaged_parquet_file_loses_only_its_episodes(tmp_path):
    truth = layouts.lerobot_v30(tmp_path / "in", data_files=((0,), (1, 2)))
    (tmp_path / "in/data/chunk-000/file-000.parquet").write_bytes(b"PAR1 no more")
    report, episodes = ingest(tmp_path / "in", tmp_path / "out", "lerobot", skip_bad=1)
    assert "file-000.parquet cannot be read" in report["bad"]["episode_000000"]
    assert [len(e.actions) for e in episodes] == [len(t[0]) for t in truth[1:]]


def test_a_row_that_lengths_do_not_fit_is_bad(tmp_path):
    layouts.lerobot_v21(tmp_path / "in")
    file = tmp_path / "in/meta/episodes.jsonl"
    file.write_text(file.read_text().replace('"length": 9', '"length": 8'))
    with pytest.raises(SourceError, match="episode_000001.parquet has 9 rows, .* says 8"):
        ingest(tmp_path / "in", tmp_path / "out", "lerobot")


def test_another_version_is_an_error_that_lists_the_supported_ones(tmp_path):
    layouts.lerobot_v21(tmp_path / "in")
    file = tmp_path / "in/meta/info.json"
    file.write_text(file.read_text().replace("v2.1", "v1.6"))
    with pytest.raises(ValueError, match="'v1.6'; supported are v2.0, v2.1, v3.0"):
        ingest(tmp_path / "in", tmp_path / "out", "lerobot")


def test_names_as_openpi_writes_them(tmp_path):
    truth = layouts.lerobot_v21(tmp_path / "in")
    text = (tmp_path / "in/meta/info.json").read_text()
    new = {"observation.state": "state", "action": "actions"}
    for old, name in new.items():
        text = text.replace(f'"{old}"', f'"{name}"')
    (tmp_path / "in/meta/info.json").write_text(text)
    for file in (tmp_path / "in").glob("data/*/*.parquet"):
        table = pq.read_table(file)
        names = [new.get(name, name) for name in table.column_names]
        pq.write_table(table.rename_columns(names), file)
    assert same(ingest(tmp_path / "in", tmp_path / "out", "lerobot")[1], truth)
