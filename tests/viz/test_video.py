import os
import sys
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

from wamjax.viz import video


def noise(t, h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (t, h, w, 3), np.uint8)


def read(path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    w, h = meta["size"]
    return np.stack([np.frombuffer(f, np.uint8).reshape(h, w, 3) for f in reader]), meta


def test_mp4_round_trip_keeps_frames_order_and_colour(tmp_path):
    frames = np.zeros((5, 33, 47, 3), np.uint8)  # odd sizes
    frames[:] = np.linspace(40, 200, 5, dtype=np.uint8)[:, None, None, None]
    frames[..., 0] = 220
    path = video.save_mp4(frames, tmp_path / "new" / "a.mp4", fps=10, scale=2)
    got, meta = read(path)
    assert path.suffix == ".mp4" and meta["fps"] == 10
    assert got.shape == (5, 66, 94, 3)
    np.testing.assert_allclose(got, video.upscale(frames, 2), atol=8)


def test_small_pictures_are_enlarged_by_default(tmp_path):
    got, _ = read(video.save_mp4(noise(2, 64, 128), tmp_path / "a.mp4", fps=4))
    assert got.shape[1:3] == (192, 384)


def test_a_video_is_written_without_a_fork_of_the_threads_of_jax(tmp_path, monkeypatch):
    """JAX warns about every fork that runs Python in the child, since it may deadlock."""
    forks = []
    os.register_at_fork(before=lambda: forks.append(1))
    jax.block_until_ready(jax.numpy.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = video.save_mp4(noise(3, 8, 8), tmp_path / "a.mp4", fps=5)
    assert not forks and read(path)[1]["fps"] == 5
    before = path.read_bytes()
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: "false")
    with pytest.raises(OSError, match="a.mp4: ffmpeg ended with 1: no message"):
        video.save_mp4(noise(3, 8, 8), path, fps=5)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_without_ffmpeg_a_gif_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    path = video.save_mp4(noise(3, 8, 8), tmp_path / "a.mp4", fps=5, scale=1)
    assert path == tmp_path / "a.gif"
    with Image.open(path) as image:
        assert image.n_frames == 3 and image.info["duration"] == 200


def test_upscale_repeats_pixels():
    frames = noise(2, 3, 4)
    big = video.upscale(frames, 3)
    assert big.shape == (2, 9, 12, 3)
    for i in range(3):
        np.testing.assert_array_equal(big[:, i::3, 2 - i :: 3], frames)


def test_border_tells_the_outcome_and_keeps_the_inside():
    frames = noise(2, 6, 7)
    good, bad = video.border(frames, True), video.border(frames, False)
    for framed in (good, bad):
        np.testing.assert_array_equal(framed[:, 2:-2, 2:-2], frames)
    assert good[0, 0, 0, 1] > good[0, 0, 0, 0] and bad[0, 0, 0, 0] > bad[0, 0, 0, 1]


def test_grid_places_every_video_and_holds_the_last_frame():
    videos = [noise(t, 4, 5, seed=t) for t in (1, 3, 2)]
    tiled = video.grid(videos, columns=2, gap=1)
    assert tiled.shape == (3, 9, 11, 3)
    np.testing.assert_array_equal(tiled[2, :4, :5], videos[0][0])
    np.testing.assert_array_equal(tiled[:, :4, 6:], videos[1])
    np.testing.assert_array_equal(tiled[1:, 5:, :5], np.stack([videos[2][1]] * 2))
    assert (tiled[:, 5:, 6:] == 255).all()


def test_side_by_side_shows_both_completely():
    predicted, real = noise(2, 64, 64, 1), noise(3, 64, 64, 2)
    pair = video.side_by_side(predicted, real)
    np.testing.assert_array_equal(pair[1, -192:, :192], video.upscale(predicted[1], 3))
    np.testing.assert_array_equal(pair[2, -192:, -192:], video.upscale(real[2], 3))


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_arrays_that_are_not_videos_are_errors(bad):
    with pytest.raises(ValueError, match=r"uint8 \(t, h, w, 3\)"):
        video.grid([bad])


def test_unequal_pictures_are_refused():
    with pytest.raises(ValueError, match="one picture size"):
        video.grid([noise(1, 4, 4), noise(1, 4, 5)])
    with pytest.raises(ValueError, match="must have equal picture sizes"):
        video.side_by_side(noise(1, 4, 4), noise(1, 5, 4))
