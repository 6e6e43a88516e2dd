"""Tests that clips show the world and its motion, and are made only once."""

import numpy as np
import pytest

from wamjax import files
from wamjax.envs import tabletop
from wamjax.envs.tabletop import clips as module
from wamjax.envs.tabletop.clips import Settings, chunks, ensure_clips, shrink

SMALL = Settings(count=20, frames=4, stride=3, seed=5)


@pytest.fixture(scope="module", autouse=True)
def small_calls():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", 16)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    return root, ensure_clips(SMALL, root, progress=False)


def test_shapes_tasks_in_turn_and_plain_files(made):
    root, clips = made
    assert clips["video"].shape == (20, 4, 64, 64, 3) and clips["video"].dtype == np.uint8
    np.testing.assert_array_equal(clips["task"], np.arange(20) % len(tabletop.TASKS))
    assert clips["task"].dtype == np.int32
    (folder,) = root.iterdir()
    assert {f.name for f in folder.iterdir()} == {"video.npy", "task.npy", "settings.json"}
    for name in ("video", "task"):
        np.load(folder / f"{name}.npy", allow_pickle=False)


def test_frames_are_the_worlds_at_the_stride(made, monkeypatch):
    seen = []
    render = tabletop.render_episode
    monkeypatch.setattr(
        tabletop, "render_episode", lambda s, shift: (seen.append(s), render(s, shift))[1]
    )
    chunk = next(chunks(SMALL._replace(count=16)))
    np.testing.assert_array_equal(chunk["video"], made[1]["video"][:16])
    assert len(seen) == 4
    # Physics: three steps move the gripper by at most three times its speed limit.
    xy = np.stack([s.gripper[:, :2] for s in seen], axis=1)
    moved = np.linalg.norm(np.diff(xy, axis=1), axis=-1)
    assert moved.max() <= 3 * 0.12 + 1e-5 and moved.max() > 2 * 0.12


def test_a_smaller_set_is_a_prefix_and_another_seed_differs(made):
    parts = list(chunks(SMALL))
    assert [len(p["task"]) for p in parts] == [16, 4]
    few = np.concatenate([p["video"] for p in chunks(SMALL._replace(count=3))])
    np.testing.assert_array_equal(few, made[1]["video"][:3])
    other = next(chunks(SMALL._replace(count=3, seed=6)))["video"]
    assert np.all(np.abs(other.astype(int) - few).mean((1, 2, 3, 4)) > 1)


def test_every_clip_moves(made):
    video = made[1]["video"].astype(int)
    assert (np.abs(np.diff(video, axis=1)).max((2, 3, 4)) > 30).mean() > 0.8
    assert np.abs(video[:, -1] - video[:, 0]).mean((1, 2, 3)).min() > 0.5


def test_starts_are_uniform_over_the_windows_that_travel_far_enough(monkeypatch):
    monkeypatch.setattr(module, "MOVING", 0.5)
    x = np.zeros((1, 9, 3))
    x[0, :, 0] = [0, 0, 0, 1, 2, 3, 3, 3, 3]  # moves in steps 2, 3, 4
    # Windows of 2 steps travel 0 1 2 2 1 0 0: starts 1 to 4 are good.
    dice = (np.arange(400) + 0.5) / 400
    starts = module._starts(np.repeat(x, 400, axis=0), dice, 2)
    np.testing.assert_array_equal(np.unique(starts, return_counts=True), [[1, 2, 3, 4], [100] * 4])
    assert set(module._starts(np.zeros((50, 9, 3)), dice[::8], 8)) == {0}


def test_small_pictures_are_means(made):
    chunk = next(chunks(SMALL._replace(count=4, size=32)))["video"]
    full = made[1]["video"][:4].astype(float)
    mean = full.reshape(4, 4, 32, 2, 32, 2, 3).mean((3, 5))
    assert np.abs(chunk - mean).max() <= 0.5
    assert shrink(np.full((2, 8, 8, 1), 7, np.uint8), 8).shape == (2, 8, 8, 1)


def test_clips_are_made_once(made, monkeypatch):
    root, clips = made
    monkeypatch.setattr(module, "chunks", lambda *_: pytest.fail("made again"))
    np.testing.assert_array_equal(ensure_clips(SMALL, root)["video"], clips["video"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_nothing(tmp_path, monkeypatch, error):
    def broken(settings):
        yield next(chunks(settings))
        raise error

    monkeypatch.setattr(module, "chunks", broken)
    with pytest.raises(error):
        ensure_clips(SMALL, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_slower_process_uses_the_clips_of_the_faster_one(made, tmp_path, monkeypatch):
    replace = files.os.replace

    def late(source, target):
        replace(made[0] / target.name, tmp_path / target.name)  # the other process, just before
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", late)
    got = ensure_clips(SMALL, tmp_path, progress=False)
    replace(next(tmp_path.iterdir()), made[0] / next(tmp_path.iterdir()).name)
    assert got["video"].shape == (20, 4, 64, 64, 3)


def test_bad_settings_are_named():
    with pytest.raises(KeyError, match="did you mean 'pick_red'"):
        ensure_clips(SMALL._replace(tasks=("pick_rd",)))
    with pytest.raises(KeyError, match="there are overhead, gripper"):
        ensure_clips(SMALL._replace(camera="front"))
    with pytest.raises(ValueError, match="size 48 does not divide"):
        ensure_clips(SMALL._replace(size=48))
    with pytest.raises(ValueError, match="span 45 steps, an episode has 40"):
        ensure_clips(SMALL._replace(frames=16))
    with pytest.raises(ValueError, match="must be positive"):
        ensure_clips(SMALL._replace(count=0))
