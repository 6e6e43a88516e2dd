"""HDF5 files as others write them, and every trap that is known of them."""

import numpy as np
import pytest

pytest.importorskip("h5py")
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


def test_libero_comes_out_as_it_was_written_and_upright(tmp_path):
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
    assert first.returns[-1] == 1.0  # what the dropped action earned is not lost
    assert Reader(tmp_path / "out").info.final_observation and "left out" in report["end"]


def test_observations_that_libero_stored_after_their_action_are_moved(tmp_path):
    file = tmp_path / "a_demo.hdf5"
    (actions, states, frames), _ = layouts.libero(file, attributes={"bddl_file_name": "x.bddl"})
    report, (first, _) = ingest(file, tmp_path / "out")
    assert np.array_equal(first.actions, actions[1:].astype(np.float32))
    assert np.array_equal(shown(first, "agentview_rgb"), frames)
    assert "after action t" in report["pairing"] and first.length == 11
    assert Reader(tmp_path / "out").info.final_observation
