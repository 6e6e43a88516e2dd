"""Tests error curves against arithmetic, and that the clip network and its distance see motion."""

import jax
import numpy as np
import pytest

from wamjax.scores import video as v
from wamjax.scores.frechet import frechet


def moving_squares(count, seed, frames=4):
    """Returns clips of a bright square that moves right (class 0) or down (class 1) over noise."""
    rng = np.random.default_rng(seed)
    out = rng.integers(0, 20, (count, frames, 16, 16, 3), np.uint8)
    classes = rng.integers(0, 2, count)
    for i in range(count):
        y, x = rng.integers(0, 16 - 2 * frames, 2)
        for t in range(frames):
            a, b = (y, x + 2 * t) if classes[i] == 0 else (y + 2 * t, x)
            out[i, t, a : a + 3, b : b + 3] = 220
    return out, classes.astype(np.int32)


def test_error_curve_beside_copying():
    truth = np.zeros((2, 4, 4, 4, 3), np.uint8)
    truth[0, 2:] = 51  # the first clip changes after two frames, the second does not
    video = truth.copy()
    video[:, 3] += 102
    video[:, :2] = 200  # given frames are not scored
    curve = v.error_curve(video, truth, given=2)
    np.testing.assert_allclose(curve.mse, [0, 0.16], rtol=1e-6)
    np.testing.assert_allclose(curve.copy_mse, [0.02, 0.02], rtol=1e-6)
    assert curve.psnr[0] == np.inf
    np.testing.assert_allclose(curve.psnr[1], 20 * np.log10(255 / 102), rtol=1e-6)
    np.testing.assert_allclose(curve.copy_psnr, 10 * np.log10(50), rtol=1e-6)


def test_differences_of_bytes_do_not_wrap():
    low, high = np.zeros((1, 1, 2, 2, 3), np.uint8), np.full((1, 1, 2, 2, 3), 255, np.uint8)
    assert v.squared_error(low, high) == v.squared_error(high, low) == 1


def test_copy_last_repeats_the_last_given_frame():
    video = np.arange(5, dtype=np.uint8).reshape(1, 5, 1, 1, 1) * np.ones((1, 1, 2, 2, 3), np.uint8)
    np.testing.assert_array_equal(v.copy_last(video, 3)[0, :, 0, 0, 0], [0, 1, 2, 2, 2])


def test_reordered_batches_are_what_their_labels_say():
    video = np.arange(6, dtype=np.uint8).reshape(1, 6, 1, 1, 1) + np.zeros(
        (3, 1, 1, 1, 1), np.uint8
    )
    video = video + np.array([0, 10, 20], np.uint8).reshape(3, 1, 1, 1, 1)
    images, labels = v._reordered((video, np.array([7, 8, 9])), jax.random.key(0), 400)
    frames = np.asarray(images)[:, 0, 0].astype(int)
    np.testing.assert_array_equal(labels[:, 0] - 7, frames[:, 0] // 10)
    orders, ahead, last = np.asarray(labels[:, 1]), np.arange(6), set()
    for row, order in zip(frames % 10, orders, strict=True):
        if order == 0:
            np.testing.assert_array_equal(row, ahead)
        elif order == 1:
            np.testing.assert_array_equal(row, ahead[::-1])
        elif order == 2:
            np.testing.assert_array_equal(np.sort(row), ahead)
        else:
            last.add(row[-1])
            np.testing.assert_array_equal(row, np.minimum(ahead, row[-1]))
    assert last == {0, 1, 2, 3, 4}
    assert np.bincount(orders, minlength=4).min() > 70
    assert len({tuple(row) for row in frames[orders == 2] % 10}) > 50


@pytest.fixture(scope="module")
def trained():
    network = v.clip_network(classes=2, size=16)
    params = v.fit_clips(network, *moving_squares(400, 0), 120, jax.random.key(0), batch_size=32)
    return network, params


def test_the_clip_network_learns_class_and_order(trained):
    video, classes = moving_squares(200, 1)
    for clips, order in ((video, 0), (video[:, ::-1], 1)):
        logits = v.clip_outputs(*trained, clips).logits
        assert (logits[0].argmax(-1) == classes).mean() > 0.9
        assert np.isin(logits[1].argmax(-1), (order, 2)).mean() > 0.8
        assert (logits[1].argmax(-1) == 1 - order).mean() < 0.1


def test_the_video_distance_grows_with_corruption(trained):
    truth, video = moving_squares(150, 2)[0], moving_squares(150, 3)[0]

    def distance(x):
        return frechet(*(v.clip_outputs(*trained, y).features for y in (x, truth)))

    floor = distance(video)
    noise = np.random.default_rng(0).normal(0, 60, video.shape)
    assert 2 * floor < distance(np.clip(video + noise, 0, 255).astype(np.uint8))
    still = [distance(v.copy_last(video, given)) for given in (1, 3)]
    assert still[0] > still[1] > 2 * floor
    assert distance(video[:, ::-1]) > 5 * floor
    found = v.frechet_video(*trained, video, truth)
    assert found.low < found.mean == pytest.approx(floor) and found.mean < found.high


def test_mistakes_are_named(trained):
    with pytest.raises(ValueError, match="takes clips of 4 frames: cut windows"):
        v.clip_outputs(*trained, np.zeros((2, 5, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="24x24 pixels: the size must be a multiple of 16"):
        v.clip_network(2, 24)
    video = np.zeros((2, 4, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=r"given must be in 1..3, not 4"):
        v.error_curve(video, video, 4)
    with pytest.raises(ValueError, match=r"expected equal \(b, f, h, w, 3\)"):
        v.squared_error(video, video[:, :3])
    with pytest.raises(ValueError, match="not float32 and uint8"):
        v.squared_error(video.astype(np.float32), video)
