"""Tests DiT's learned variance and hybrid loss against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax.diffusion.ddpm import DDPM, betas
from wamjax.diffusion.variational import discretized_log_likelihood, gaussian_kl

STEPS = np.array([0, 1, 17, 500, 999])


def example(seed=0):
    """Returns x0 in [-1, 1] with both ends, noise, and outputs of 2c channels; (b, h, c)."""
    rng = np.random.default_rng(seed)
    x0 = np.clip(rng.standard_normal((5, 4, 3)), -1, 1)
    noise, mean, raw = rng.standard_normal((3, 5, 4, 3))
    return x0, noise, noise + 0.1 * mean, np.tanh(raw)


def cdf(x):
    return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def bound_by_tables(x0, noise, prediction, raw, predicts="eps", name="linear"):
    """Computes the variational term in bits for each t, in the improved-DDPM paper's notation."""
    beta = betas(name, 1000)
    abar = np.cumprod(1 - beta)
    before = np.append(1, abar[:-1])
    tilde = beta * (1 - before) / (1 - abar)
    out = []
    for i, t in enumerate(STEPS):
        log_tilde = np.log(tilde[max(t, 1)])
        x = np.sqrt(abar[t]) * x0[i] + np.sqrt(1 - abar[t]) * noise[i]
        guess = (x - np.sqrt(1 - abar[t]) * prediction[i]) / np.sqrt(abar[t])
        if predicts == "x0":
            guess = prediction[i]

        def mean(x0, x=x, t=t):
            on_x0 = beta[t] * np.sqrt(before[t]) / (1 - abar[t])
            return on_x0 * x0 + (1 - before[t]) * np.sqrt(1 - beta[t]) / (1 - abar[t]) * x

        share = (raw[i] + 1) / 2
        log_variance = share * np.log(beta[t]) + (1 - share) * log_tilde
        if t == 0:
            inverse, off = np.exp(-log_variance / 2), x0[i] - mean(guess)
            above, below = cdf(inverse * (off + 1 / 255)), cdf(inverse * (off - 1 / 255))
            above, below = np.where(x0[i] > 0.999, 1, above), np.where(x0[i] < -0.999, 0, below)
            nats = -np.log(np.maximum(above - below, 1e-12))
        else:
            ratio = np.exp(log_tilde - log_variance)
            squared = (mean(x0[i]) - mean(guess)) ** 2 / np.exp(log_variance)
            nats = 0.5 * (ratio - 1 - np.log(ratio) + squared)
        out.append(nats / np.log(2))
    return np.stack(out)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("predicts", ["eps", "x0"])
def test_bound_and_hybrid_loss(predicts, name):
    x0, noise, prediction, raw = example()
    want = bound_by_tables(x0, noise, prediction, raw, predicts, name)
    process = DDPM(name, variance="learned", predicts=predicts)
    output = np.concatenate([prediction, raw], axis=-1)
    with jax.enable_x64(True):

        @jax.jit
        def both(output, x0, noise):
            x = process.corrupt(x0, noise, STEPS)
            return process.bound(output, x0, x, STEPS), process.loss(output, x0, noise, STEPS)

        got, loss = both(output, x0, noise)
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-8)
    simple = (prediction - {"eps": noise, "x0": x0}[predicts]) ** 2
    np.testing.assert_allclose(loss, simple + want, rtol=1e-8, atol=1e-8)


def test_the_weight_of_the_bound_is_proportional_to_the_timesteps():
    x0, noise, prediction, raw = example()
    output, t = np.concatenate([prediction, raw], axis=-1), STEPS // 2
    process = DDPM(variance="learned", timesteps=500)
    bound = process.bound(output, x0, process.corrupt(x0, noise, t), t)
    got = process.loss(output, x0, noise, t)
    np.testing.assert_allclose(got, (prediction - noise) ** 2 + bound / 2, rtol=1e-5)


def test_float32_is_enough():
    x0, noise, prediction, raw = (a.astype(np.float32) for a in example(1))
    process = DDPM(variance="learned")
    output = jnp.concatenate([prediction, raw], axis=-1)
    x = process.corrupt(jnp.asarray(x0), noise, jnp.asarray(STEPS))
    got = process.bound(output, x0, x, jnp.asarray(STEPS))
    want = bound_by_tables(x0, noise, prediction, raw)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


def test_the_bound_trains_the_variance_only():
    x0, noise, prediction, raw = example()
    process, simple = DDPM(variance="learned"), DDPM()

    def hybrid(prediction, raw):
        output = jnp.concatenate([prediction, raw], axis=-1)
        return process.loss(output, x0, noise, STEPS).mean()

    on_mean, on_raw = jax.jit(jax.grad(hybrid, argnums=(0, 1)))(prediction, raw)
    want = jax.jit(jax.grad(lambda p: simple.loss(p, x0, noise, STEPS).mean()))(prediction)
    np.testing.assert_allclose(on_mean, want, rtol=1e-6)
    assert (np.abs(on_raw) > 0).all()


def test_the_bound_is_least_at_the_error_of_the_mean():
    """For a given error, the best variance is the posterior's plus the squared error."""
    process, t = DDPM(variance="learned"), np.full(41, 500)
    share = np.linspace(0, 1, 41)
    x0, noise = np.full((41, 1), 0.3), np.full((41, 1), -0.8)
    output = np.stack([np.full(41, -0.7), 2 * share - 1], axis=-1)
    with jax.enable_x64(True):
        x = process.corrupt(x0, noise, t)
        bounds = np.asarray(process.bound(output, x0, x, t))[:, 0]
        error = float((process.data(x, output, t) - x0)[0, 0])
    _, on_x0, small, large = process.posterior(np.array(500), np.array(499))
    best = np.log1p((on_x0 * error) ** 2 / small) / np.log(large / small)
    assert 0.1 < best < 0.9 and abs(share[bounds.argmin()] - best) <= 1 / 40


def test_variance_of_the_reverse_step():
    small, large = np.log(0.01), np.log(0.02)
    output = jnp.array([[5.0, 5.0, -1.0, 1.0], [5.0, 5.0, 0.0, 3.0]])  # two channels, two samples
    learned = DDPM(variance="learned")
    got = learned.log_variance(output, small, large)
    want = [[small, large], [(small + large) / 2, 2 * large - small]]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_array_equal(learned.prediction(output), output[:, :2])
    assert DDPM(variance="small").log_variance(output, small, large) == small
    assert DDPM(variance="large").log_variance(output, small, large) == large
    with pytest.raises(ValueError, match="'learnt' is not 'small', 'large' or 'learned'"):
        DDPM(variance="learnt")


def test_gaussian_kl_against_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    m, lv, m2, lv2 = rng.standard_normal((4, 7))
    normal = lambda m, lv: torch.distributions.Normal(torch.tensor(m), torch.tensor(np.exp(lv / 2)))  # noqa: E731
    want = torch.distributions.kl_divergence(normal(m, lv), normal(m2, lv2))
    with jax.enable_x64(True):
        np.testing.assert_allclose(gaussian_kl(m, lv, m2, lv2), want, rtol=1e-10)


@pytest.mark.parametrize("scale", [0.003, 0.1, 0.7])
def test_bins_share_all_probability(scale):
    values = np.arange(256) / 127.5 - 1
    with jax.enable_x64(True):
        logs = discretized_log_likelihood(values, np.full(256, 0.13), np.full(256, np.log(scale)))
    assert np.exp(logs).sum() == pytest.approx(1, abs=1e-6)
    inside = np.abs(values - 0.13) < min(2 * scale, 0.8)
    density = np.exp(-(((values - 0.13) / scale) ** 2) / 2) / scale / np.sqrt(2 * np.pi) * 2 / 255
    if scale > 0.01:  # else a bin is wider than the density is straight
        np.testing.assert_allclose(np.exp(logs)[inside], density[inside], rtol=0.03)
