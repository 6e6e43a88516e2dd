"""Tests rectified flow against the Fast-WAM spec (5.1, 6.1) and its own identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax.diffusion.flow import OneStep, RectifiedFlow, shifted


@pytest.mark.parametrize("shift, mean", [(5.0, 0.189496), (3.0, 0.218857), (1.0, 0.249094)])
def test_normalisation_of_the_weights(shift, mean):
    """Z, recovered from the weight at the top of the bump, to the six digits of the spec."""
    flow = RectifiedFlow(shift)
    top = 1 - np.exp(-0.5)
    assert abs(top / flow.weight(np.float64(0.5)[None])[0] - mean) < 5e-7
    grid = shifted(np.linspace(1.0, 0.0, 1001)[:-1], shift)
    # As published: the mean, and 1e-10 more.
    z = np.mean(np.exp(-2 * (grid - 0.5) ** 2) - np.exp(-0.5))
    assert abs(flow.weight(grid).mean() - z / (z + 1e-10)) < 1e-14
    published = (np.exp(-2 * ((1000 * grid - 500) / 1000) ** 2) - np.exp(-0.5)) / (z + 1e-10)
    np.testing.assert_allclose(flow.weight(grid), published, rtol=0, atol=1e-12)


def test_weights_of_the_spec():
    levels = np.array([0.0, 1.0, 0.25, 0.75, 0.5, 5 / 6])  # the spec rounds 833
    want = [0, 0, 1.456, 1.456, 2.076, 1.025]
    np.testing.assert_allclose(RectifiedFlow(5.0).weight(levels), want, atol=5.1e-4)
    got = RectifiedFlow(5.0).weight(jnp.asarray(levels, jnp.float32))
    np.testing.assert_allclose(got, want, atol=5.1e-4)
    np.testing.assert_array_equal(RectifiedFlow(5.0, "uniform").weight(levels), np.ones(6))
    with pytest.raises(ValueError, match="'wam' is not 'wan' or 'uniform'"):
        RectifiedFlow(weighting="wam").weight(levels)


def test_schedules_of_the_spec():
    five = [1, 0.9783, 0.9524, 0.9211, 0.8824, 0.8333, 0.7692, 0.6818, 0.5556, 0.3571, 0]
    np.testing.assert_allclose(RectifiedFlow(5.0).schedule(10), five, atol=5e-5)
    np.testing.assert_allclose(RectifiedFlow(1.0).schedule(10), np.arange(10, -1, -1) / 10)
    for shift, steps in [(5.0, 1), (1.0, 7), (0.3, 4)]:
        grid = RectifiedFlow(shift).schedule(steps)
        assert abs(grid[0] - 1) < 1e-15 and grid[-1] == 0 and len(grid) == steps + 1
        assert np.all(np.diff(grid) < 0)
    with pytest.raises(ValueError, match="at least one step, got 0"):
        RectifiedFlow().schedule(0)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_sampled_levels(shift):
    """Checks quantiles of the shifted law, and that weights average to 1 under it."""
    flow = RectifiedFlow(shift)
    levels = flow.sample_level(jax.random.key(0), (200_000,))
    assert levels.min() >= 0 and levels.max() < 1
    for u in (0.1, 0.5, 0.9):
        assert abs(np.quantile(levels, u) - shifted(u, shift)) < 5e-3
    weights = np.asarray(flow.weight(levels))
    assert abs(weights.mean() - 1) < 5 * weights.std() / len(weights) ** 0.5 + 1e-3
    if shift == 5.0:  # median and mean of the spec
        assert abs(np.median(levels) - 0.833) < 5e-3 and abs(np.mean(levels) - 0.748) < 5e-3


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_round_trips(shape):
    """(b,) and (b, t) levels align with the left of (b, t, h, c)."""
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 4, 3, 2, 5))
    level = rng.uniform(0.05, 0.95, shape)
    flow = RectifiedFlow(3.0)
    with jax.enable_x64(True):
        x = np.asarray(flow.corrupt(*map(jnp.asarray, (x0, noise, level))))
        velocity = flow.target(x0, noise, level)
        data, eps = flow.data(x, velocity, level), flow.noise(x, velocity, level)
    for index in np.ndindex(shape):
        tau = level[index]
        np.testing.assert_allclose(x[index], (1 - tau) * x0[index] + tau * noise[index], atol=1e-14)
    np.testing.assert_allclose(data, x0, atol=1e-12)
    np.testing.assert_allclose(eps, noise, atol=1e-12)


def test_velocity_is_the_derivative_of_the_path():
    x0, noise = jnp.array([[0.3, -2.0]]), jnp.array([[1.5, 0.7]])
    flow = RectifiedFlow()
    path = lambda level: flow.corrupt(x0, noise, level[None])  # noqa: E731
    _, derivative = jax.jvp(path, (jnp.float32(0.4),), (jnp.float32(1.0),))
    np.testing.assert_allclose(derivative, flow.target(x0, noise, 0.4), rtol=1e-6)
    np.testing.assert_array_equal(path(jnp.float32(0.0)), x0)
    np.testing.assert_array_equal(path(jnp.float32(1.0)), noise)


def test_one_step_starts_at_pure_noise_and_predicts_the_data():
    """For any ratio and draw, the input is the noise, the output noise - x0 is exact, and all draws
    have equal weight."""
    flow, rng = OneStep(), np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, 5, 3)).astype(np.float32)
    level = flow.sample_level(jax.random.key(0), (5, 1))
    np.testing.assert_array_equal(level, flow.level_of(jnp.array([[0.1], [1], [9], [0], [2.0]])))
    np.testing.assert_array_equal(flow.corrupt(clean, noise, level), noise)
    np.testing.assert_allclose(flow.data(noise, noise - clean, level), clean, atol=1e-6)
    np.testing.assert_allclose(flow.loss(noise - clean, clean, noise, level), 0, atol=1e-12)
    wrong = flow.loss(noise - clean + 1, clean, noise, level)
    np.testing.assert_allclose(wrong, 1, atol=1e-5)
