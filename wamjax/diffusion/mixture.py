"""Defines mixtures of isotropic Gaussians, whose perfect network has a closed form.

It holds for any level of any process, and serves to measure solvers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wamjax.diffusion.process import Process, align


class Mixture(NamedTuple):
    """Describes the mixture ``sum_k weights_k N(means_k, stds_k^2 I)``.

    Attributes:
      weights: (k,), positive, with sum 1.
      means: (k, d).
      stds: (k,).
    """

    weights: Array
    means: Float[Array, "k d"]
    stds: Array

    def sample(self, key: Array, count: int) -> Float[Array, "count d"]:
        """Draws independent samples of the data."""
        which, normal = jax.random.split(key)
        k = jax.random.categorical(which, jnp.log(self.weights), shape=(count,))
        normal = jax.random.normal(normal, (count, self.means.shape[1]))
        return self.means[k] + self.stds[k, None] * normal

    def log_prob(self, process: Process, x: Float[Array, "... d"], level: Array) -> Array:
        """Returns the log density of x at a level that broadcasts from the left against (...)."""
        return jax.nn.logsumexp(self._parts(process, x, level)[0], axis=-1)

    def predict(self, process: Process, x: Float[Array, "... d"], level: Array) -> Array:
        """Returns the expectation given x of what `process` regresses: the perfect network."""
        logits, away, variance, alpha, sigma = self._parts(process, x, level)
        share = jax.nn.softmax(logits, axis=-1)[..., None]
        x0 = jnp.sum(share * (self.means + (alpha * self.stds**2 / variance)[..., None] * away), -2)
        eps = jnp.sum(share * (sigma / variance)[..., None] * away, axis=-2)
        p, q = process.row(process.predicts, level)
        return align(p, x) * x0 + align(q, x) * eps

    def _parts(self, process: Process, x: Array, level: Array):
        """Returns for each component the log of its density at x, x minus its mean, and its
        variance; then alpha and sigma."""
        alpha, sigma = (align(c, x) for c in process.alpha_sigma(level))
        variance = (alpha * self.stds) ** 2 + sigma**2
        away = x[..., None, :] - alpha[..., None] * self.means
        spread = jnp.sum(away**2, axis=-1) / variance
        normaliser = x.shape[-1] * jnp.log(2 * jnp.pi * variance)
        return jnp.log(self.weights) - (spread + normaliser) / 2, away, variance, alpha, sigma
