"""Tests guidance: the score of a sharpened conditional, its channels and its interval."""

import jax
import numpy as np
import pytest

from wamjax.diffusion.flow import RectifiedFlow
from wamjax.diffusion.guidance import guide, interval
from wamjax.diffusion.mixture import Mixture
from wamjax.diffusion.solvers import euler

BOTH = Mixture(np.array([0.5, 0.5]), np.array([[-1.0], [1.0]]), np.array([0.4, 0.4]))
RIGHT = Mixture(np.array([1.0]), np.array([[1.0]]), np.array([0.4]))


@pytest.mark.parametrize("predicts", ["velocity", "x0", "eps", "score"])
def test_guidance_is_the_same_for_any_prediction(predicts):
    """It is the gradient of (1 - s) log p(x) + s log p(x | c)."""
    flow, level = RectifiedFlow(predicts=predicts), np.array(0.4)
    with jax.enable_x64(True):

        @jax.jit
        def both(x):
            given, free = (m.predict(flow, x, level) for m in (RIGHT, BOTH))
            score = flow.score(x, guide(given, free, 3.0), level)
            log = lambda x: -2 * BOTH.log_prob(flow, x, level) + 3 * RIGHT.log_prob(flow, x, level)  # noqa: E731
            return score, jax.grad(lambda x: log(x).sum())(x)

        score, want = both(np.array([[-0.7], [0.2], [1.5]]))
    np.testing.assert_allclose(score, want, rtol=1e-9)


def test_channels():
    """DiT guides 3 of 4 channels; the fourth and the variances come from the conditional output."""
    rng = np.random.default_rng(0)
    given, free = rng.standard_normal((2, 2, 5, 8))
    got = guide(given, free, 4.0, channels=3)
    np.testing.assert_allclose(got[..., :3], (free + 4 * (given - free))[..., :3], rtol=1e-6)
    np.testing.assert_allclose(got[..., 3:], given[..., 3:], rtol=1e-6)
    np.testing.assert_allclose(guide(given, free, 1.0), given, rtol=1e-6)
    np.testing.assert_allclose(guide(given, free, 0.0), free, rtol=1e-6)


def test_interval():
    levels = RectifiedFlow().schedule(4)
    np.testing.assert_array_equal(interval(levels, 5.0, 0.25, 0.75), [1, 5, 5, 1, 1])


def test_guidance_as_a_point_of_the_solver():
    """Scales are prepared outside the loop; guiding part of the path has part of the effect."""
    flow = RectifiedFlow()
    levels = flow.schedule(30)
    x = jax.random.normal(jax.random.key(0), (500, 1))

    def right(low, high, scale=6.0):
        points = {"level": levels, "scale": interval(levels, scale, low, high)}

        def model(x, point):
            given, free = (m.predict(flow, x, point["level"]) for m in (RIGHT, BOTH))
            return guide(given, free, point["scale"])

        return float(euler(model, x, levels, points).mean())

    plain, part, whole = right(2, 3), right(0.3, 0.8), right(0, 1)
    assert abs(plain - 1) < 0.1  # scale 1: the condition alone
    assert plain < part < whole
