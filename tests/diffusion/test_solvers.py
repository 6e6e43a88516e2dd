"""Tests solvers: exact on straight paths, with the right order, and in step for pytrees.

Trajectories of public schedulers are in `test_diffusers`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from wamjax.diffusion.ddpm import DDPM
from wamjax.diffusion.edm import EDM
from wamjax.diffusion.flow import RectifiedFlow
from wamjax.diffusion.mixture import Mixture
from wamjax.diffusion.schedules import karras
from wamjax.diffusion.solvers import SOLVERS, heun

MEAN, STD = 1.5, 0.4


def gaussian_velocity(x, level):
    """Returns E[eps - x0 | x] for data ~ N(MEAN, STD^2): the exact marginal velocity."""
    keep = 1 - level
    variance = (keep * STD) ** 2 + level**2
    return -MEAN + (level - keep * STD**2) / variance * (x - keep * MEAN)


def solve(solver, start, steps, shift=1.0):
    levels = RectifiedFlow(shift).schedule(steps)
    with jax.enable_x64(True):
        levels = jnp.asarray(levels)
        return np.asarray(solver(gaussian_velocity, jnp.asarray(start), levels, levels))


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_order_of_convergence(name, order, shift):
    start = np.array([-1.3, 0.2, 2.0])
    exact = MEAN + STD * start  # the flow keeps the quantile
    errors = [np.abs(solve(SOLVERS[name], start, n, shift) - exact).max() for n in (200, 400, 800)]
    assert errors[-1] > 1e-9  # not at round-off
    measured = np.log2(errors[0] / errors[1]), np.log2(errors[1] / errors[2])
    np.testing.assert_allclose(measured, order, atol=0.15)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 4])
def test_exact_on_straight_paths(name, steps):
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 3, 5)).astype(np.float32)
    levels = RectifiedFlow(5.0).schedule(steps)
    got = SOLVERS[name](lambda x, point: noise - x0, noise, levels, levels)
    np.testing.assert_allclose(got, x0, atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_pytrees_move_in_lock_step_on_their_own_schedules(name):
    """Two quantities at once equal two solves, and each step sees both at the same index."""
    grids = {"a": RectifiedFlow(1.0).schedule(6), "b": RectifiedFlow(5.0).schedule(6)}
    x = {"a": jnp.array([0.3, -1.0]), "b": jnp.array([[2.0]])}

    def both(x, point):
        return jax.tree.map(gaussian_velocity, x, point)

    got = SOLVERS[name](both, x, grids, grids)
    for key in x:
        want = SOLVERS[name](gaussian_velocity, x[key], grids[key], grids[key])
        np.testing.assert_allclose(got[key], want, rtol=1e-6)


@pytest.mark.parametrize("name", ["euler", "ddim", "heun"])
def test_each_step_sees_all_quantities_at_the_same_index(name):
    grids = {"a": RectifiedFlow(1.0).schedule(6), "b": RectifiedFlow(5.0).schedule(6)}
    x = {"a": jnp.array([0.3, -1.0]), "b": jnp.array([[2.0]])}

    def coupled(x, point):
        return {"a": x["a"] * 0 + x["b"][0], "b": x["b"] * 0 + point["a"]}

    got = SOLVERS[name](coupled, x, grids, grids)
    a, b = np.asarray(x["a"], np.float64), float(x["b"][0, 0])
    for i in range(6):  # the same by hand
        da, db = (grids[k][i + 1] - grids[k][i] for k in "ab")
        slope_a, slope_b = b, grids["a"][i]
        if name == "heun":
            slope_a = (b + (b + db * slope_b)) / 2
            slope_b = (slope_b + grids["a"][i + 1]) / 2
        a, b = a + da * slope_a, b + db * slope_b
    np.testing.assert_allclose(got["a"], a, rtol=1e-5)
    np.testing.assert_allclose(got["b"], [[b]], rtol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_the_model_is_traced_once_and_state_keeps_its_dtype(solver):
    traces = []

    def velocity(x, point):
        traces.append(point)
        return (-x).astype(x.dtype)

    levels = RectifiedFlow().schedule(50)
    out = solver(velocity, jnp.ones(3, jnp.bfloat16), levels, levels)
    assert out.dtype == jnp.bfloat16
    assert len(traces) <= 4  # a scan, not a loop of 50


MIXTURE = Mixture(np.array([0.3, 0.7]), np.array([[-1.0], [0.8]]), np.array([0.35, 0.5]))
GRIDS = {
    RectifiedFlow(): lambda n: RectifiedFlow().level_of(np.geomspace(20, 0.05, n + 1)),
    EDM(): lambda n: np.geomspace(20, 0.05, n + 1),
    DDPM(): lambda n: np.linspace(900, 40, n + 1),
}
ORDERS = {"euler": 1, "heun": 2, "ddim": 1, "exponential": 2, "dpmpp_2m": 2, "unipc": 3}


def quantile(process, x, start, end):
    """Solves the flow on a line, which keeps the share of the mass to the left of x."""

    def mass(x, level):
        alpha, sigma = process.alpha_sigma(level)
        widths = np.hypot(alpha * MIXTURE.stds, sigma)
        return np.sum(MIXTURE.weights * norm.cdf((x - alpha * MIXTURE.means[:, 0]) / widths))

    want = mass(x, start)
    return brentq(lambda y: mass(y, end) - want, -200, 200, xtol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("process", GRIDS, ids=lambda p: type(p).__name__)
def test_order_on_a_mixture(process, name):
    """Compares all solvers on all paths with a closed form: quantiles of a mixture on a line."""
    assert set(ORDERS) == set(SOLVERS)
    errors = []
    for steps in (150, 300):
        levels = GRIDS[process](steps)
        start = np.array([-1.5, 0.1, 0.6, 2.0]) * np.hypot(*process.alpha_sigma(levels[0]))
        want = [quantile(process, x, levels[0], levels[-1]) for x in start]
        with jax.enable_x64(True):
            model = lambda x, level: MIXTURE.predict(process, x, level)  # noqa: E731
            got = SOLVERS[name](model, jnp.asarray(start)[:, None], levels, levels, process)
        errors.append(np.abs(np.asarray(got)[:, 0] - want).max())
    assert errors[1] > 1e-10  # not at round-off
    assert np.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[name], abs=0.2)


@pytest.mark.parametrize("name", ["ddim", "exponential", "dpmpp_2m", "unipc"])
def test_a_path_of_equal_ratios_gives_equal_data(name):
    """A flow and EDM follow DDPM's own levels, down to the data."""
    ddpm, flow, edm = DDPM(), RectifiedFlow(), EDM()
    grid = ddpm.schedule(8)
    noise = np.random.default_rng(0).standard_normal((6, 1))
    found = []
    with jax.enable_x64(True):
        for process, levels in [
            (ddpm, grid), (flow, flow.level_of(ddpm.ratio(grid))), (edm, ddpm.ratio(grid)),
        ]:  # fmt: skip
            start = process.alpha_sigma(levels)[1][0] * noise
            model = lambda x, level, p=process: MIXTURE.predict(p, x, level)  # noqa: E731
            found.append(SOLVERS[name](model, start, levels, levels, process))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-9, atol=1e-12)


def two_ab(denoise, x, sigmas):
    """Implements Cosmos Policy's sampler as in its spec (6.1), and counts its calls."""
    calls, before = [], None
    for i, (now, new) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        x0 = denoise(x, now)
        calls.append(now)
        if before is None:
            x = (1 - new / now) * x0 + new / now * x
        else:
            h = np.log(now) - np.log(new)
            r = (np.log(now) - np.log(sigmas[i - 1])) / h
            phi_1 = (np.exp(-h) - 1) / -h
            phi_2 = (phi_1 - 1) / -h
            x = np.exp(-h) * x + h * ((phi_1 - phi_2 / r) * x0 + phi_2 / r * before)
        before = x0
    calls.append(sigmas[-1])
    return denoise(x, sigmas[-1]), calls


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_sampler_of_cosmos_policy(steps):
    """Ours runs on a flow with velocities, the spec's on sigma with x0; n points are n calls."""
    flow, edm = RectifiedFlow(), EDM(predicts="x0")
    sigmas = karras(steps, 80.0, 4.0)
    noise = np.random.default_rng(0).standard_normal((5, 1))
    seen = []
    with jax.enable_x64(True):
        denoise = lambda x, sigma: np.asarray(MIXTURE.predict(edm, x, np.array(sigma)))  # noqa: E731
        want, calls = two_ab(denoise, 80 * noise, sigmas[:-1])

        def model(x, level):
            jax.debug.callback(lambda level: seen.append(float(level)), level)
            return MIXTURE.predict(flow, x, level)

        levels = flow.level_of(sigmas)
        start = flow.corrupt(np.zeros(()), noise, levels[0])
        got = jax.block_until_ready(SOLVERS["exponential"](model, start, levels, levels))
        jax.effects_barrier()
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    assert len(calls) == steps
    np.testing.assert_allclose(sorted(seen, reverse=True), flow.level_of(np.array(calls)))


def test_heun_is_the_deterministic_sampler_of_edm():
    """Checks Algorithm 1 of the paper, with sigma(t) = t: 2 n - 1 calls, none at sigma 0."""
    edm, seen = EDM(), []
    sigmas = edm.schedule(7)
    x = 80 * np.random.default_rng(0).standard_normal((5, 1))
    with jax.enable_x64(True):

        def model(x, sigma):
            jax.debug.callback(lambda sigma: seen.append(float(sigma)), sigma)
            return MIXTURE.predict(edm, x, sigma)

        got = jax.block_until_ready(heun(model, x, sigmas, sigmas, edm))
        jax.effects_barrier()
        plain = EDM(predicts="x0")
        slope = lambda x, s: (x - np.asarray(MIXTURE.predict(plain, x, s))) / s  # noqa: E731
        for now, new in zip(sigmas[:-1], sigmas[1:], strict=True):
            d = slope(x, now)
            euler_step = x + (new - now) * d
            x = euler_step if new == 0 else x + (new - now) * (d + slope(euler_step, new)) / 2
    np.testing.assert_allclose(got, x, rtol=1e-8, atol=1e-10)
    assert len(seen) == 13 and min(seen) == pytest.approx(0.002)


@pytest.mark.parametrize("name", ["exponential", "unipc"])
@pytest.mark.parametrize("process", [RectifiedFlow(3.0), DDPM()], ids=["flow", "ddpm"])
def test_traced_and_concrete_grids_give_the_same_result(process, name):
    """Levels may be arguments of a jitted function, or numpy arrays outside it."""
    levels = process.schedule(6).astype(np.float32)
    x = np.random.default_rng(0).standard_normal((5, 1)).astype(np.float32)
    x = x * process.alpha_sigma(levels)[1][0]

    def solve(x, levels):
        model = lambda x, level: MIXTURE.predict(process, x, level)  # noqa: E731
        return SOLVERS[name](model, x, levels, levels, process)

    want = solve(x, levels)
    assert np.isfinite(want).all()
    np.testing.assert_allclose(jax.jit(solve)(x, levels), want, rtol=1e-5, atol=1e-5)


def test_a_grid_that_is_not_monotone_is_an_error():
    levels = np.array([1.0, 0.5, 0.5, 0.0])
    with pytest.raises(ValueError, match="levels .*0.5, 0.5.* of a RectifiedFlow do not go"):
        SOLVERS["unipc"](lambda x, level: x, jnp.ones(2), levels, levels)


@pytest.mark.parametrize("name", SOLVERS)
def test_states_start_with_the_noise_and_end_with_the_result(name):
    """Every state is the result of a grid that stops there, unless a later call corrects it."""
    levels = np.linspace(1.0, 0.2, 5)
    x = jnp.asarray([1.5, -0.5])
    end = SOLVERS[name](gaussian_velocity, x, levels, levels)
    way = SOLVERS[name](gaussian_velocity, x, levels, levels, states=True)
    assert way.shape == (5, 2)
    np.testing.assert_array_equal(way[0], x)
    np.testing.assert_allclose(way[-1], end, rtol=1e-6)
    for n in (1, 3):
        short = SOLVERS[name](gaussian_velocity, x, levels[: n + 1], levels[: n + 1])
        np.testing.assert_allclose(way[n], short, rtol=1e-5)
