"""Tests that the classifier learns digits in seconds, and its parts against oracles."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax.scores import classifier as c
from wamjax.scores.frechet import frechet

TRAIN = 1300


@pytest.fixture(scope="module")
def digits():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = (data.images / 8 - 1).astype(np.float32)[..., None]
    return images[order], data.target[order]


@pytest.fixture(scope="module")
def trained(digits):
    images, labels = digits
    network = c.Classifier(heads=(10,))
    begin = time.perf_counter()
    params = c.fit(network, images[:TRAIN], labels[:TRAIN], 300, jax.random.key(0))
    jax.block_until_ready(params)
    return network, params, time.perf_counter() - begin


def test_digits_in_seconds(digits, trained):
    (images, labels), (network, params, seconds) = digits, trained
    out = c.outputs(network, params, images[TRAIN:])
    assert c.accuracy(out.logits[0], labels[TRAIN:]) > 0.96
    assert c.accuracy(out.logits[0], (labels[TRAIN:] + 1) % 10) < 0.05
    assert seconds < 20


def test_features_tell_real_digits_from_noisy_blurred_and_one_sided_ones(digits, trained):
    (images, labels), (network, params, _) = digits, trained

    def distance(some):
        return frechet(*(c.outputs(network, params, x).features for x in (images[TRAIN:], some)))

    rng = np.random.default_rng(0)
    floor = distance(images[:497])
    noisy = [distance(images[:497] + rng.normal(0, s, images[:497].shape)) for s in (0.4, 0.8)]
    blurred = (images[:497] + np.roll(images[:497], 1, 1) + np.roll(images[:497], 1, 2)) / 3
    assert 1.5 * floor < noisy[0] < noisy[1] / 2
    assert 4 * floor < distance(blurred)
    assert 20 * floor < distance(images[labels == 3])


def test_neighbours_times_a_matrix_is_a_convolution():
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(2, 8, 6, 3)), rng.normal(size=(3, 3, 3, 5))
    with jax.enable_x64(True):
        wanted = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        got = c.neighbours(jnp.asarray(x)) @ kernel.reshape(27, 5)
        np.testing.assert_allclose(got, wanted, atol=1e-12)


@pytest.fixture(scope="module")
def tiny():
    network = c.Classifier(heads=(3, 2), patch=2, widths=(4, 6), features=5)
    params = jax.jit(network.init)(jax.random.key(2), jnp.zeros((1, 8, 8, 3)))["params"]
    images = np.random.default_rng(3).integers(0, 256, (11, 8, 8, 3), np.uint8)
    return network, params, images


def test_outputs_are_the_same_in_any_batches_and_in_order(tiny):
    network, params, images = tiny
    whole, parts = (c.outputs(network, params, images, batch) for batch in (11, 4))
    assert whole.features.shape == (11, 5) and [x.shape for x in whole.logits] == [(11, 3), (11, 2)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, parts)
    assert np.ptp(whole.features, axis=0).min() > 1e-3


def test_bytes_are_pictures_between_minus_one_and_one(tiny):
    network, params, images = tiny
    as_float = images.astype(np.float32) / 127.5 - 1
    got, wanted = c.outputs(network, params, images), c.outputs(network, params, as_float)
    np.testing.assert_allclose(got.features, wanted.features, atol=1e-5)


def test_training_is_repeatable_uses_the_labels_and_lowers_the_loss(tiny):
    network = c.Classifier(heads=(2,), patch=2, widths=(8, 8), features=16)
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 2, 64)
    images = rng.normal(size=(64, 8, 8, 1)).astype(np.float32)
    images += 2 * labels[:, None, None, None]
    first, same, other = (
        c.fit(network, images, labels, 100, jax.random.key(k), batch_size=32) for k in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, same)
    assert not np.array_equal(first["features"]["kernel"], other["features"]["kernel"])
    assert c.accuracy(c.outputs(network, first, images).logits[0], labels) > 0.95
    flipped = c.fit(network, images, 1 - labels, 100, jax.random.key(0), batch_size=32)
    assert c.accuracy(c.outputs(network, flipped, images).logits[0], labels) < 0.05


def test_mistakes_are_named(tiny):
    network, params, images = tiny
    with pytest.raises(ValueError, match="10x8 do not divide by patch 2 times 2"):
        c.outputs(network, params, np.zeros((1, 10, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(11,\)"):
        c.fit(network, images, np.zeros(3, int), 1, jax.random.key(0))
    with pytest.raises(ValueError, match=r"0..5, the heads have \(4,\) classes"):
        c.fit(c.Classifier((4,)), images, np.arange(11) % 6, 1, jax.random.key(0))
    with pytest.raises(ValueError, match="the heads have"):
        c.fit(network, images, np.zeros(11, int), 1, jax.random.key(0))
    with pytest.raises(ValueError, match="no pictures"):
        c.outputs(network, params, images[:0])
    with pytest.raises(ValueError, match="2 rows of logits and 3 labels"):
        c.accuracy(np.zeros((2, 5)), np.zeros(3))
