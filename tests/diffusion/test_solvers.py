"""Solvers: exact on straight paths, of the right order on a Gaussian, in lock-step on pytrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax.diffusion.flow import RectifiedFlow
from wamjax.diffusion.solvers import SOLVERS, euler, heun

MEAN, STD = 1.5, 0.4


def gaussian_velocity(x, level):
    """E[eps - x0 | x] for data ~ N(MEAN, STD^2): the exact marginal velocity."""
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


@pytest.mark.parametrize("solver", [euler, heun])
def test_the_model_is_traced_once_and_state_keeps_its_dtype(solver):
    traces = []

    def velocity(x, point):
        traces.append(point)
        return (-x).astype(x.dtype)

    levels = RectifiedFlow().schedule(50)
    out = solver(velocity, jnp.ones(3, jnp.bfloat16), levels, levels)
    assert out.dtype == jnp.bfloat16
    assert len(traces) <= 4  # a scan, not a loop of 50
