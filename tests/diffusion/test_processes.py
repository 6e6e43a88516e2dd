"""Tests all processes: conversions, equivalences between them, and their public constants."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax.diffusion import noise
from wamjax.diffusion.ddpm import DDPM, betas
from wamjax.diffusion.edm import EDM
from wamjax.diffusion.flow import RectifiedFlow
from wamjax.diffusion.mixture import Mixture
from wamjax.diffusion.multistep import dpmpp_2m
from wamjax.diffusion.noise import NoiseLaw
from wamjax.diffusion.process import KINDS, Process
from wamjax.diffusion.schedules import churned, karras, space_timesteps

MIXTURE = Mixture(np.array([0.3, 0.7]), np.array([[-1.0, 0.5], [0.8, -0.2]]), np.array([0.35, 0.5]))
LEVELS = {
    RectifiedFlow(): [0.02, 0.35, 0.97],
    EDM(): [0.01, 0.6, 30.0],
    EDM(1.0): [0.01, 0.6, 30.0],
    DDPM(): [3.0, 417.5, 990.0],
    DDPM("cosine"): [3.0, 417.5, 990.0],
}
PROCESSES = list(LEVELS)


def name(process):
    """Names a process by its values other than the defaults."""
    mine, default = vars(process), vars(type(process)())
    changed = "-".join(str(mine[k]) for k in mine if mine[k] != default[k])
    return f"{type(process).__name__}-{changed}"


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def definitions(process, x0, eps, level):
    """Computes every kind of prediction by its definition, the velocity by differences."""
    alpha, sigma = (c[:, None] for c in process.alpha_sigma(level))
    h = 1e-5 * np.minimum(level, 1)
    path = lambda level: np.asarray(process.corrupt(x0, eps, level))  # noqa: E731
    kinds = {
        "x0": x0,
        "eps": eps,
        "v": alpha * eps - sigma * x0,
        "velocity": (path(level + h) - path(level - h)) / (2 * h)[:, None],
        "score": -eps / sigma,
    }
    if isinstance(process, EDM):
        skip = process.c_skip(level)[:, None] * path(level)
        kinds["edm"] = (x0 - skip) / process.c_out(level)[:, None]
    return kinds


@pytest.mark.parametrize("process", PROCESSES, ids=name)
def test_conversions_among_all_kinds(process):
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 3, 5))
    level = np.array(LEVELS[process])
    x = process.corrupt(x0, eps, level)
    kinds = definitions(process, x0, eps, level)
    assert set(kinds) >= set(KINDS)
    for source, target in itertools.permutations(kinds, 2):
        got = process.convert(x, kinds[source], level, source, target)
        size = np.abs(kinds[target]).max(axis=1, keepdims=True)
        # Where x is nearly all noise, x0 from eps loses a factor of 1 / alpha in precision.
        loss = 1e-4 if "velocity" in (source, target) else 1e-9
        np.testing.assert_allclose(got / size, kinds[target] / size, rtol=0, atol=loss)
        back = process.convert(x, got, level, target, source)
        np.testing.assert_allclose(back, kinds[source], rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(process.target(x0, eps, level), kinds[process.predicts], rtol=1e-9)
    output = kinds[process.predicts]
    for read, kind in [("data", "x0"), ("noise", "eps"), ("velocity",) * 2, ("score",) * 2]:
        got = getattr(process, read)(x, output, level)
        np.testing.assert_allclose(got, kinds[kind], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("process", PROCESSES, ids=name)
@pytest.mark.parametrize("kind", KINDS)
def test_converting_an_expectation_to_the_score_and_back(process, kind):
    """On a mixture, expectations of every kind convert to the gradient of the log density and
    back."""
    level = np.array(LEVELS[process])
    alpha, sigma = (c[:, None] for c in process.alpha_sigma(level))
    x = alpha * MIXTURE.means[0] + (alpha * 0.4 + sigma) * np.array([0.3, -1.2])

    @jax.jit
    def run(x):
        want = jax.grad(lambda x: MIXTURE.log_prob(process, x, level).sum())(x)
        field = MIXTURE.predict(dataclasses.replace(process, predicts=kind), x, level)
        score = process.convert(x, field, level, kind, "score")
        return want, field, score, process.convert(x, score, level, "score", kind)

    want, field, score, back = run(x)
    np.testing.assert_allclose(score, want, rtol=1e-7, atol=1e-9 * np.abs(want).max())
    np.testing.assert_allclose(back, field, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("process", [DDPM(), DDPM("cosine"), EDM()], ids=name)
def test_paths_with_equal_ratios_differ_only_in_scale(process):
    """A DDPM path is the flow's Gaussian path with another scale and speed."""
    flow = RectifiedFlow()
    level = np.array(LEVELS[process])
    tau = flow.level_of(process.ratio(level))
    scale = process.alpha_sigma(level)[0] / flow.alpha_sigma(tau)[0]
    np.testing.assert_allclose(scale * tau, process.alpha_sigma(level)[1], rtol=1e-12)
    x = np.random.default_rng(0).standard_normal((3, 2)) + 0.3
    velocity = MIXTURE.predict(flow, x, tau)
    output = MIXTURE.predict(process, scale[:, None] * x, level)
    for read in (Process.data, Process.noise):
        got = read(process, scale[:, None] * x, output, level)
        np.testing.assert_allclose(got, read(flow, x, velocity, tau), rtol=1e-8, atol=1e-9)

    def tau_and_scale(level):
        tau = flow.level_of(process.ratio(level))
        return tau, process.alpha_sigma(level)[0] / flow.alpha_sigma(tau)[0]

    rates = jax.jvp(tau_and_scale, (jnp.asarray(level),), (jnp.ones(3),))[1]
    got = process.velocity(scale[:, None] * x, output, level)
    want = rates[1][:, None] * x + (scale * rates[0])[:, None] * velocity  # the chain rule
    np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9)


def test_edm_loss_is_the_flow_loss():
    """They agree for one denoiser, with tau = sigma / (1 + sigma), up to an explicit weight."""
    rng = np.random.default_rng(0)
    x0, eps, guess = rng.standard_normal((3, 4, 6))
    sigma = np.array([0.1, 1.0, 4.0, 80.0])
    flow, edm = RectifiedFlow(weighting="uniform"), EDM(1.0)
    tau = flow.level_of(edm.ratio(sigma))
    x_edm, x_flow = edm.corrupt(x0, eps, sigma), flow.corrupt(x0, eps, tau)
    np.testing.assert_allclose(x_flow, x_edm / (1 + sigma)[:, None], rtol=1e-12)
    edm_loss = edm.loss(edm.convert(x_edm, guess, sigma, "x0", "edm"), x0, eps, sigma)
    flow_loss = flow.loss(flow.convert(x_flow, guess, tau, "x0", "velocity"), x0, eps, tau)
    weight = ((sigma**2 + 1) / sigma**2)[:, None]
    np.testing.assert_allclose(edm_loss, weight * (guess - x0) ** 2, rtol=1e-9)
    weight = ((1 + sigma) ** 2 / sigma**2)[:, None]
    np.testing.assert_allclose(flow_loss, weight * (guess - x0) ** 2, rtol=1e-9)


def test_the_edm_form_of_cosmos_is_the_flow():
    """c_in = c_skip = 1 - t, c_out = -t, c_noise = t of spec 5.3 are this flow."""
    rng = np.random.default_rng(0)
    x0, eps, output = rng.standard_normal((3, 3, 6))
    sigma = np.array([0.5, 4.0, 80.0])
    flow = RectifiedFlow(weighting="uniform")
    t = flow.level_of(sigma)
    np.testing.assert_allclose(t[1:], [0.8, 0.987654], atol=5e-7)
    x = x0 + sigma[:, None] * eps
    np.testing.assert_allclose(flow.corrupt(x0, eps, t), (1 - t)[:, None] * x, rtol=1e-12)
    np.testing.assert_array_equal(flow.c_noise(t), t)
    denoised = (1 - t)[:, None] * x - t[:, None] * output
    got = flow.data(flow.corrupt(x0, eps, t), output, t)
    np.testing.assert_allclose(got, denoised, rtol=1e-9, atol=1e-12)
    loss = ((1 + sigma) ** 2 / sigma**2)[:, None] * (x0 - denoised) ** 2
    np.testing.assert_allclose(flow.loss(output, x0, eps, t), loss, rtol=1e-9)
    np.testing.assert_allclose(flow.loss(output, x0, eps, t), (output - (eps - x0)) ** 2, rtol=1e-9)


def test_edm_keeps_unit_variance():
    """The network's input and target have unit variance for data of deviation sigma_data."""
    rng = np.random.default_rng(0)
    x0, eps = 0.5 * rng.standard_normal((3, 100_000)), rng.standard_normal((3, 100_000))
    edm, sigma = EDM(), np.array([0.02, 0.5, 10.0])
    seen = edm.c_in(sigma)[:, None] * edm.corrupt(x0, eps, sigma)
    np.testing.assert_allclose(np.std(seen, axis=1), 1, atol=0.01)
    np.testing.assert_allclose(np.std(edm.target(x0, eps, sigma), axis=1), 1, atol=0.01)
    np.testing.assert_allclose(edm.c_noise(sigma), np.log(sigma) / 4)


def test_ddpm_is_the_public_chain():
    for name, last in [("linear", 4.035830e-5), ("cosine", 2.428767e-9)]:
        beta, process = betas(name, 1000), DDPM(name)
        assert beta.shape == (1000,)
        abar = np.cumprod(1 - beta)
        alpha, sigma = process.alpha_sigma(np.arange(1000))
        np.testing.assert_allclose(alpha**2, abar, rtol=1e-12)
        np.testing.assert_allclose(sigma**2, 1 - abar, rtol=1e-10)
        assert abar[-1] == pytest.approx(last, rel=1e-6)
        assert process.alpha_sigma(np.array(-1.0)) == (1, 0)
        between = process.ratio(np.linspace(-1, 999, 7001))
        assert (np.diff(between) > 0).all()
    assert betas("linear", 1000)[[0, -1]].tolist() == [1e-4, 0.02]
    assert betas("cosine", 1000)[-1] == 0.999
    assert betas("cosine", 1000)[0] == pytest.approx(4.128422e-5, rel=1e-6)
    np.testing.assert_allclose(betas("linear", 50)[[0, -1]], [2e-3, 0.4])  # rescaled
    with pytest.raises(ValueError, match="'sigmoid' are not 'linear' or 'cosine'"):
        betas("sigmoid", 10)


def test_posterior_of_ddpm():
    """Checks equations 6 and 7 of the paper, for steps over one timestep and over many."""
    beta = betas("linear", 1000)
    abar = np.append(np.cumprod(1 - beta), 1.0)  # index -1 is the data
    for t, to in [(700, 699), (1, 0), (700, 300), (0, -1)]:
        step = 1 - abar[t] / abar[to]
        want = (
            np.sqrt(abar[t] / abar[to]) * (1 - abar[to]) / (1 - abar[t]),
            np.sqrt(abar[to]) * step / (1 - abar[t]),
            (1 - abar[to]) / (1 - abar[t]) * step,
            step,
        )
        got = DDPM().posterior(np.array(t), np.array(to))
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("process", PROCESSES, ids=name)
def test_posterior_follows_from_bayes_rule(process):
    """Conditions the joint Gaussian of x at two levels, given x0."""
    high, low = np.array(LEVELS[process][1]), np.array(LEVELS[process][0])
    (alpha, sigma), (alpha_to, sigma_to) = map(process.alpha_sigma, (high, low))
    on_x, on_x0, variance, _ = process.posterior(high, low)
    cross = alpha / alpha_to * sigma_to**2  # x is a scaled x_to with independent noise
    np.testing.assert_allclose(on_x, cross / sigma**2, rtol=1e-9)
    np.testing.assert_allclose(on_x0, alpha_to - on_x * alpha, rtol=1e-9)
    np.testing.assert_allclose(variance, sigma_to**2 - on_x * cross, rtol=1e-7)


@pytest.mark.parametrize("process, closed", [
    (DDPM(weighting="min_snr"), lambda snr: np.minimum(snr, 5) / snr),
    (DDPM(weighting="min_snr", predicts="v"), lambda snr: np.minimum(snr, 5) / (snr + 1)),
    (DDPM(weighting="min_snr", predicts="x0"), lambda snr: np.minimum(snr, 5)),
    (RectifiedFlow(weighting="min_snr"), lambda s: np.minimum(s, 5) / (1 + np.sqrt(s)) ** 2),
])  # fmt: skip
def test_min_snr(process, closed):
    level = np.array([5.0, 200.0, 800.0]) / (1 if isinstance(process, DDPM) else 1000)
    snr = process.ratio(level) ** -2
    assert snr[0] > 5 > snr[-1]
    np.testing.assert_allclose(process.weight(level), closed(snr), rtol=1e-9)


@pytest.mark.parametrize("process", PROCESSES, ids=name)
def test_loss_is_the_weighted_error_of_each_element(process):
    rng = np.random.default_rng(0)
    x0, eps, off = rng.standard_normal((3, 3, 2, 4))
    level = np.array(LEVELS[process])
    level = np.stack([level, level[::-1]], axis=1)  # (b, t)
    for weighting in ("uniform", "min_snr"):
        weighted = dataclasses.replace(process, weighting=weighting)
        loss = weighted.loss(process.target(x0, eps, level) + off, x0, eps, level)
        np.testing.assert_allclose(loss, weighted.weight(level)[..., None] * off**2, rtol=1e-6)
    with pytest.raises(ValueError, match="'snr' is not"):
        dataclasses.replace(process, weighting="snr").weight(level)
    with pytest.raises(ValueError, match=f"{type(process).__name__} has no prediction 'epsilon'"):
        process.row("epsilon", level)


@pytest.mark.parametrize("process", [
    RectifiedFlow(3.0), RectifiedFlow(3.0, spacing="euler"), RectifiedFlow(spacing="unipc"),
    EDM(), DDPM(), DDPM("cosine", spacing="trailing"), DDPM(spacing="multistep"),
    RectifiedFlow(predicts="v"), EDM(predicts="x0"), DDPM(predicts="v"),
], ids=name)  # fmt: skip
def test_the_same_code_samples_from_every_process(process):
    """A perfect network on 40 steps reproduces the moments of the data, by one interface."""
    levels = process.schedule(40)
    assert levels.shape == (41,) and (np.diff(process.ratio(levels)) < 0).all()
    assert process.alpha_sigma(levels)[1][-1] == 0
    key = jax.random.key(0)

    @jax.jit
    def run(key):
        start = process.corrupt(jnp.zeros(()), jax.random.normal(key, (4000, 2)), levels[0])
        predict = lambda x, level: MIXTURE.predict(process, x, level)  # noqa: E731
        x = dpmpp_2m(predict, start, levels, levels, process)
        return x, process.sample_level(key, (500,))

    x, drawn = map(np.asarray, run(key))
    data = MIXTURE.sample(jax.random.key(1), 4000)
    np.testing.assert_allclose(x.mean(0), data.mean(0), atol=0.1)
    np.testing.assert_allclose(np.cov(x.T), np.cov(data.T), atol=0.1)
    assert drawn.shape == (500,) and np.isfinite(process.c_noise(drawn)).all()
    assert np.unique(process.ratio(drawn) < 1).size == 2  # both sides of signal = noise
    with pytest.raises(ValueError, match=r"\b0\b"):
        process.schedule(0)


@pytest.mark.parametrize("slots, median, below_4, above_80", [
    (9, 12.0, 0.127, 0.248), (11, 13.27, 0.112, 0.264)
])  # fmt: skip
def test_noise_law_of_cosmos_policy(slots, median, below_4, above_80):
    """Checks the shares of spec 5.2; the factor of the slots is a shift of the flow."""
    law, key = noise.cosmos_policy(slots), jax.random.key(0)
    sigma = np.asarray(law.sample(key, (200_000,)))
    assert abs((sigma < 4).mean() - below_4) < 4e-3 and abs((sigma > 80).mean() - above_80) < 4e-3
    plain = np.asarray(noise.cosmos_policy(slots, uniform=0.0).sample(key, (200_000,)))
    assert np.median(plain) == pytest.approx(median, rel=0.02)
    assert np.std(np.log(plain)) == pytest.approx(1.2, rel=0.01)
    uniform = np.asarray(noise.cosmos_policy(slots, uniform=1.0).sample(key, (10_000,)))
    ends = uniform.min() / math.sqrt(slots), uniform.max() / math.sqrt(slots)
    np.testing.assert_allclose(ends, [1, 85], rtol=0.03)
    flow = RectifiedFlow(law=law)
    shifted = RectifiedFlow(math.sqrt(slots), law=noise.cosmos_policy(1))
    levels = flow.sample_level(key, (1000,))
    np.testing.assert_allclose(levels, sigma_to_tau(law.sample(key, (1000,))), rtol=1e-6)
    np.testing.assert_allclose(levels, shifted.sample_level(key, (1000,)), rtol=1e-6)


def sigma_to_tau(sigma):
    return sigma / (1 + sigma)


def test_log_normal_ratios_are_logit_normal_levels():
    levels = RectifiedFlow(law=NoiseLaw(0.3, 0.8)).sample_level(jax.random.key(0), (100_000,))
    logits = np.log(levels / (1 - levels))
    assert logits.mean() == pytest.approx(0.3, abs=0.02)
    assert logits.std() == pytest.approx(0.8, abs=0.02)


def test_karras_grids_of_cosmos():
    """Spec 6.1: n points are n network calls, also for n = 2."""
    five = [80, 42.2911, 20.9724, 9.6183, 4, 0]
    ten = [80, 60.6947, 45.5286, 33.7340, 24.6618, 17.7667, 12.5947, 8.7709, 5.9887, 4, 0]
    np.testing.assert_allclose(karras(5, 80.0, 4.0), five, atol=5.1e-5)
    np.testing.assert_allclose(karras(10, 80.0, 4.0), ten, atol=5.1e-5)
    np.testing.assert_allclose(karras(2, 80.0, 4.0), [80, 4, 0])
    np.testing.assert_allclose(karras(1, 80.0, 4.0), [80, 0])
    for bad in [(0, 80.0, 4.0), (3, 4.0, 80.0), (3, 80.0, 0.0)]:
        with pytest.raises(ValueError, match="needs steps and a positive descent"):
            karras(*bad)


def test_churned_grid():
    got = churned(np.array([10.0, 2.0, 0.5, 0.0]), 0.6, low=1.0, high=5.0)
    np.testing.assert_allclose(got, [10, 10, 2, 2.4, 0.5, 0.5, 0])
    most = churned(np.array([10.0, 0.0]), 40.0)
    np.testing.assert_allclose(most, [10, 10 * math.sqrt(2), 0])


def test_space_timesteps():
    """Checks the example of the public docstring, DiT's 250, and DDIM's striding."""
    kept = space_timesteps(300, [10, 15, 20])
    assert len(kept) == 45 and kept[0] == 0 and kept[-1] == 299
    assert [((kept >= 100 * i) & (kept < 100 * (i + 1))).sum() for i in range(3)] == [10, 15, 20]
    kept = space_timesteps(1000, "250")
    np.testing.assert_array_equal(kept, np.round(np.arange(250) * 333 / 83))
    np.testing.assert_array_equal(space_timesteps(1000, "ddim50"), np.arange(0, 1000, 20))
    np.testing.assert_array_equal(DDPM().schedule("250"), np.append(kept[::-1], -1))
    np.testing.assert_array_equal(DDPM().schedule(1), [999, -1])
    with pytest.raises(ValueError, match="no stride takes 600 of 1000"):
        space_timesteps(1000, "ddim600")
    with pytest.raises(ValueError, match="cannot keep 60"):
        space_timesteps(100, "60,10")
    with pytest.raises(ValueError, match="'even' is not 'linspace'"):
        DDPM(spacing="even").schedule(3)
    with pytest.raises(ValueError, match="'even' is not 'uniform'"):
        RectifiedFlow(spacing="even").schedule(3)
