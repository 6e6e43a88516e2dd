"""Tests the distance against scipy's matrix root and closed forms; merging; interval coverage."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from wamjax.scores import frechet as f


def gaussian(rng, n, d, spread=1.0):
    return rng.normal(size=(n, d)) @ (spread * rng.normal(size=(d, d))) + rng.normal(size=d)


def by_scipy(x, y):
    s, r = np.cov(x.T), np.cov(y.T)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + r - 2 * sqrtm(s @ r)).real


@pytest.mark.parametrize("d", [2, 7, 40])
def test_equals_the_formula_with_the_general_matrix_root(d):
    rng = np.random.default_rng(d)
    x, y = gaussian(rng, 300, d), gaussian(rng, 200, d, 0.5)
    assert f.frechet(x, y) == pytest.approx(by_scipy(x, y), rel=1e-9)
    assert f.frechet(x, y) == pytest.approx(f.frechet(y, x), rel=1e-12)


def test_diagonal_gaussians_have_a_closed_form():
    rng = np.random.default_rng(0)
    mean, other = rng.normal(size=(2, 9))
    scale, wider = rng.uniform(0.1, 3, size=(2, 9))
    a = f.Moments(5, mean, 4 * np.diag(scale**2))
    b = f.Moments(11, other, 10 * np.diag(wider**2))
    wanted = ((mean - other) ** 2).sum() + ((scale - wider) ** 2).sum()
    assert f.distance(a, b) == pytest.approx(wanted, rel=1e-12)


def test_singular_covariances_need_no_regularisation():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(20, 64))  # 19 of 64 eigenvalues are not zero
    assert f.frechet(x, x) < 1e-10
    far = x + 3.0
    assert f.frechet(x, far) == pytest.approx(64 * 9, rel=1e-12)
    assert f.frechet(x, 2 * x) == pytest.approx(
        (x.mean(0) ** 2).sum() + np.trace(np.cov(x.T)), rel=1e-10
    )
    still = np.ones((4, 64))  # a generator that has collapsed to one picture
    spread = ((x.mean(0) - 1) ** 2).sum() + np.trace(np.cov(x.T))
    assert f.frechet(x, still) == pytest.approx(spread, rel=1e-12)


def test_a_rotation_changes_nothing():
    rng = np.random.default_rng(2)
    x, y = gaussian(rng, 100, 12), gaussian(rng, 100, 12)
    turn = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    assert f.frechet(x @ turn, y @ turn) == pytest.approx(f.frechet(x, y), rel=1e-10)


def test_the_square_root_squares_to_the_matrix():
    a = np.random.default_rng(3).normal(size=(30, 8))
    matrix = a @ a.T  # rank 8 of 30
    root = f.square_root(matrix)
    np.testing.assert_allclose(root @ root, matrix, atol=1e-11)
    np.testing.assert_allclose(root, root.T, atol=1e-14)
    assert np.linalg.eigvalsh(root).min() > -1e-13


@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_merged_batches_are_the_two_pass_result_even_far_from_zero(offset):
    rng = np.random.default_rng(4)
    x = gaussian(rng, 501, 6) + offset
    order = [f.moments(part) for part in np.split(x, [1, 7, 300])]
    for parts in (order, order[::-1]):
        total = parts[0]
        for part in parts[1:]:
            total = f.merge(total, part)
        assert total.count == 501
        np.testing.assert_allclose(total.mean, x.mean(0), rtol=1e-14)
        # Rounding of the samples themselves is 1e-8 at an offset of 1e8; sum of squares
        # minus square of sums would be off by 1e0.
        np.testing.assert_allclose(total.covariance, np.cov(x.T), atol=1e-10 + 1e-15 * offset)


def test_half_precision_features_are_promoted_first():
    x = gaussian(np.random.default_rng(5), 200, 4).astype(np.float16)
    assert f.moments(x).mean.dtype == np.float64
    assert f.frechet(x, x.astype(np.float64)) < 1e-12


def test_the_interval_covers_the_expected_distance_about_as_often_as_it_says():
    rng = np.random.default_rng(6)
    draws = [(rng.normal(size=(150, 3)), rng.normal(size=(150, 3)) * 1.3 + 0.5) for _ in range(150)]
    expected = np.mean([f.frechet(x, y) for x, y in draws])
    found = [f.interval(x, y, resamples=60, seed=i) for i, (x, y) in enumerate(draws)]
    hits = np.mean([i.low <= expected <= i.high for i in found])
    assert 0.88 < hits < 0.99
    assert all(i.low <= i.mean <= i.high for i in found)
    narrow = f.interval(*draws[0], confidence=0.5, resamples=60)
    assert narrow.high - narrow.low < 0.5 * (found[0].high - found[0].low)


def test_resampled_moments_are_those_of_the_drawn_rows():
    x = gaussian(np.random.default_rng(7), 50, 3)
    got = f._resampled(x, np.random.default_rng(8))
    rows = np.random.default_rng(8).integers(50, size=50)
    np.testing.assert_allclose(got.mean, x[rows].mean(0))
    np.testing.assert_allclose(got.covariance, np.cov(x[rows].T))


def test_bad_features_are_named():
    good = np.ones((3, 2))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        f.moments(np.ones(3))
    with pytest.raises(ValueError, match="1 of 3 feature rows are not finite"):
        f.moments(np.array([[1.0, 2], [np.nan, 1], [0, 0]]))
    with pytest.raises(ValueError, match="width 2 against width 4"):
        f.frechet(good, np.ones((3, 4)))
    with pytest.raises(ValueError, match="width 2 and of width 4"):
        f.merge(f.moments(good), f.moments(np.ones((3, 4))))
    with pytest.raises(ValueError, match="2 samples or more"):
        f.frechet(good, good[:1])
