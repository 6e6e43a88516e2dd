"""Implements solvers with a random key; model, levels and points are as in `solvers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from wamjax.diffusion.multistep import walk
from wamjax.diffusion.process import Process, concrete, namespace
from wamjax.diffusion.solvers import heun_step

Tree = Any
Model = Callable[[Tree, Tree], Tree]


def ancestral(
    model: Model,
    x: Tree,
    levels: Tree,
    points: Tree,
    process: Process,
    key: Array,
    eta: float = 1.0,
    states: bool = False,
    noise: Tree | None = None,
) -> Tree:
    """Samples as DDPM, or as DDIM with noise, from the posterior at the predicted x0.

    Steps may skip timesteps: the variances are those of the respaced chain. A step that ends at
    data adds no noise.

    Args:
      eta: 1 is DDPM, with the variance of the process; 0 is DDIM; in between, the noise is eta
        times that of the posterior (arXiv 2010.02502, equation 16).
      states: whether to return all states, see `solvers`.
      noise: standard normals of every step, (n, ...) like `x`, instead of draws from `key`.
    """

    def step(x, inputs):
        point, level, factors, draw = inputs
        output = model(x, point)
        data = jax.tree.map(process.data, x, output, level)
        normals = _normals(draw, x) if noise is None else draw
        return jax.tree.map(move, x, output, data, factors, normals)

    def move(x, output, data, factors, noise):
        on_x, on_x0, small, large, share = factors
        log_variance = process.log_variance(output, small, large) if eta == 1 else small
        moved = on_x * x + on_x0 * data + share * jnp.exp(log_variance / 2) * noise
        return moved.astype(x.dtype)

    grids = jax.tree.map(lambda grid: concrete(process, grid), levels)
    starts = jax.tree.map(lambda g: jnp.asarray(g)[:-1], (points, grids))
    factors = jax.tree.map(lambda grid: _factors(process, grid, eta), grids)
    steps = jax.tree.leaves(starts)[0].shape[0]
    draws = jax.random.split(key, steps) if noise is None else noise
    return walk(step, x, (*starts, factors, draws), states)


def churned_heun(
    model: Model,
    x: Tree,
    levels: Tree,
    points: Tree,
    process: Process,
    key: Array,
    noise_scale: float = 1.0,
    states: bool = False,
) -> Tree:
    """Samples as EDM (arXiv 2206.00364, Algorithm 2): adds noise before each step of Heun.

    Args:
      levels: (2 n + 1,) grids in which every second level is the one that noise is added up to, see
        `schedules.churned`; leaves of `points` have as many rows.
      noise_scale: S_noise of the paper.
    """

    def step(x, inputs):
        factors, high, low, key = inputs
        x = jax.tree.map(up, x, factors, _normals(key, x))
        return heun_step(process, model, x, high, low)

    def up(x, factors, noise):
        on_x, on_noise = factors
        return (on_x * x + noise_scale * on_noise * noise).astype(x.dtype)

    factors = jax.tree.map(lambda grid: _raising(process, grid), levels)
    both = jax.tree.map(jnp.asarray, (points, levels))
    high, low = (jax.tree.map(lambda g, i=i: g[i::2], both) for i in (1, 2))
    keys = jax.random.split(key, jax.tree.leaves(high)[0].shape[0])
    return walk(step, x, (factors, high, low, keys), states)


@np.errstate(divide="ignore")
def _factors(process: Process, levels: Array, eta: float) -> tuple[Array, ...]:
    """Returns the factors of x and x0, the logarithms of the two variances, and the factor of the
    noise; (n,) each."""
    xp = namespace(levels)
    start, end = levels[:-1], levels[1:]
    alpha, sigma = process.alpha_sigma(start)
    alpha_to, sigma_to = process.alpha_sigma(end)
    *_, small, large = process.posterior(start, end)
    on_x = xp.sqrt(xp.maximum(sigma_to**2 - eta**2 * small, 0.0)) / sigma
    noisy = sigma_to > 0
    log_small = xp.log(xp.where(noisy, small, 1.0))
    return on_x, alpha_to - alpha * on_x, log_small, xp.log(large), xp.where(noisy, eta, 0.0)


def _raising(process: Process, levels: Array) -> tuple[Array, Array]:
    """Returns the factors of x and noise, (n,) each, from every second level to the noisier next
    one."""
    xp = namespace(levels)
    alpha, sigma = process.alpha_sigma(levels)
    on_x = alpha[1::2] / alpha[:-1:2]
    added = sigma[1::2] ** 2 - (on_x * sigma[:-1:2]) ** 2
    return on_x, xp.sqrt(xp.maximum(added, 0.0))  # rounding may go below 0


def _normals(key: Array, x: Tree) -> Tree:
    """Draws independent standard normals shaped like x."""
    leaves, structure = jax.tree.flatten(x)
    keys = jax.random.split(key, len(leaves))
    normals = [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, normals)
