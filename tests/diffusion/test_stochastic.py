"""Tests solvers with noise: moments on a Gaussian, the papers' formulas, pytrees and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import ks_1samp, norm

from wamjax.diffusion.ddpm import DDPM
from wamjax.diffusion.edm import EDM
from wamjax.diffusion.flow import RectifiedFlow
from wamjax.diffusion.mixture import Mixture
from wamjax.diffusion.multistep import ddim
from wamjax.diffusion.schedules import churned
from wamjax.diffusion.solvers import heun
from wamjax.diffusion.stochastic import ancestral, churned_heun

MEAN, STD = 0.7, 0.4
GAUSSIAN = Mixture(np.array([1.0]), np.array([[MEAN]]), np.array([STD]))
MIXTURE = Mixture(np.array([0.3, 0.7]), np.array([[-1.0], [0.8]]), np.array([0.35, 0.5]))
COUNT = 20_000


def perfect(process, data=MIXTURE):
    return lambda x, level: data.predict(process, x, level)


def noise_at(process, level, count=COUNT):
    return process.alpha_sigma(level)[1] * jax.random.normal(jax.random.key(9), (count, 1))


@pytest.mark.parametrize("process, eta", [
    (DDPM(), 1.0), (DDPM(variance="large"), 1.0), (DDPM("cosine"), 0.5), (EDM(), 1.0),
    (RectifiedFlow(3.0), 1.0), (RectifiedFlow(), 0.7),
], ids=str)  # fmt: skip
def test_moments_of_ancestral_sampling(process, eta):
    """With a perfect network on a Gaussian every step is linear, so moments follow a recursion."""
    levels = process.schedule(6)
    got = ancestral(
        perfect(process, GAUSSIAN), noise_at(process, levels[0]), levels, levels, process,
        jax.random.key(0), eta,
    )  # fmt: skip
    mean, variance = 0.0, process.alpha_sigma(levels)[1][0] ** 2
    for now, new in zip(levels[:-1], levels[1:], strict=True):
        (alpha, sigma), (alpha_to, sigma_to) = map(process.alpha_sigma, (now, new))
        _, _, small, large = process.posterior(now, new)
        added = large if getattr(process, "variance", "") == "large" else eta**2 * small
        added = added if sigma_to > 0 else 0.0
        direct = np.sqrt(sigma_to**2 - eta**2 * small)  # of eps = (x - alpha x0) / sigma
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)  # x0 = MEAN + gain (x - alpha MEAN)
        slope = direct / sigma + (alpha_to - direct / sigma * alpha) * gain
        offset = (alpha_to - direct / sigma * alpha) * MEAN * (1 - gain * alpha)
        mean, variance = slope * mean + offset, slope**2 * variance + added
    assert float(got.mean()) == pytest.approx(mean, abs=4 * np.sqrt(variance / COUNT) + 1e-3)
    assert float(got.var()) == pytest.approx(variance, rel=0.04)


@pytest.mark.parametrize(
    "process", [DDPM(), RectifiedFlow(), EDM()], ids=lambda p: type(p).__name__
)
def test_many_steps_reproduce_the_distribution(process):
    """Passes a Kolmogorov-Smirnov test against the mixture, which few steps fail."""

    def statistic(steps):
        levels = process.schedule(steps)
        x = ancestral(
            perfect(process), noise_at(process, levels[0]), levels, levels, process,
            jax.random.key(1),
        )  # fmt: skip
        mass = lambda x: sum(  # noqa: E731
            w * norm.cdf(x, m[0], s)
            for w, m, s in zip(MIXTURE.weights, MIXTURE.means, MIXTURE.stds, strict=True)
        )
        return ks_1samp(np.asarray(x)[:, 0], mass).statistic

    assert statistic(250) < 0.015 < statistic(4)


def test_eta_zero_is_ddim():
    process = DDPM()
    levels = process.schedule("ddim10")
    x = noise_at(process, levels[0], 100)
    got = ancestral(perfect(process), x, levels, levels, process, jax.random.key(0), eta=0.0)
    want = ddim(perfect(process), x, levels, levels, process)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    network = lambda x, level: jnp.tile(perfect(process)(x, level), 2)  # noqa: E731
    learned = DDPM(variance="learned")  # ignored by other solvers
    np.testing.assert_allclose(ddim(network, x, levels, levels, learned), want, rtol=1e-6)


@pytest.mark.parametrize("share, fixed", [(-1.0, "small"), (1.0, "large")])
def test_learned_variance_reaches_both_bounds(share, fixed):
    plain, learned = DDPM(variance=fixed), DDPM(variance="learned")
    levels = plain.schedule("12")
    x = noise_at(plain, levels[0], 50)

    def network(x, level):
        eps = MIXTURE.predict(plain, x, level)
        return jnp.concatenate([eps, jnp.full_like(eps, share)], axis=-1)

    got = ancestral(network, x, levels, levels, learned, jax.random.key(3))
    want = ancestral(perfect(plain), x, levels, levels, plain, jax.random.key(3))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_churned_heun_is_algorithm_2_of_edm():
    edm, key = EDM(predicts="x0"), jax.random.key(2)
    sigmas = edm.schedule(8)
    x = noise_at(edm, sigmas[0], 5)
    grid = churned(sigmas, 6.0, low=0.01, high=50.0)
    got = churned_heun(perfect(edm), x, grid, grid, edm, key, noise_scale=1.003)
    predict = jax.jit(perfect(edm))
    x, slope = np.asarray(x), lambda x, s: (x - np.asarray(predict(x, s))) / s
    raised = 0
    for i, k in enumerate(jax.random.split(key, 8)):
        now, new = sigmas[i], sigmas[i + 1]
        gamma = min(6.0 / 8, np.sqrt(2) - 1) if 0.01 <= now <= 50 else 0.0
        hat, raised = now * (1 + gamma), raised + (gamma > 0)
        noise = np.asarray(jax.random.normal(jax.random.split(k, 1)[0], x.shape))
        x = x + np.sqrt(hat**2 - now**2) * 1.003 * noise
        d = slope(x, hat)
        to = x + (new - hat) * d
        x = to if new == 0 else x + (new - hat) * (d + slope(to, new)) / 2
    assert 0 < raised < 8
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("process", [EDM(), RectifiedFlow()], ids=["edm", "flow"])
def test_churn_keeps_the_distribution(process):
    """Without churn it is Heun."""
    ratios = EDM(sigma_max=20.0, sigma_min=0.02).schedule(60)
    x = noise_at(process, process.level_of(ratios)[0])
    still, stirred = (process.level_of(churned(ratios, c)) for c in (0.0, 10.0))
    got = churned_heun(perfect(process), x, still, still, process, jax.random.key(0))
    plain = heun(perfect(process), x, still[::2], still[::2], process)
    np.testing.assert_allclose(got, plain, rtol=1e-4, atol=1e-5)
    got = churned_heun(perfect(process), x, stirred, stirred, process, jax.random.key(0))
    assert np.abs(got - plain).mean() > 0.3
    data = MIXTURE.sample(jax.random.key(5), COUNT)
    assert float(got.mean()) == pytest.approx(float(data.mean()), abs=0.03)
    assert float(got.std()) == pytest.approx(float(data.std()), rel=0.02)


@pytest.mark.parametrize("solver", [ancestral, churned_heun])
def test_keys_and_pytrees(solver):
    """Leaves and steps draw independently, and the key determines the draws."""
    flow = RectifiedFlow()
    ratios = np.array([4.0, 1.0, 0.3, 0.1])
    levels = flow.level_of(churned(ratios, 1.0) if solver is churned_heun else ratios)
    grid = {"a": levels, "b": levels}
    x = {"a": jnp.zeros((3, 1)), "b": jnp.zeros((3, 1), jnp.bfloat16)}
    model = lambda x, point: jax.tree.map(jnp.zeros_like, x)  # noqa: E731
    run = lambda seed: solver(model, x, grid, grid, flow, jax.random.key(seed))  # noqa: E731
    one, again, other = run(0), run(0), run(1)
    np.testing.assert_array_equal(one["a"], again["a"])
    assert np.abs(one["a"] - other["a"]).min() > 1e-3
    assert np.abs(one["a"] - one["b"]).min() > 1e-3
    assert one["b"].dtype == jnp.bfloat16
