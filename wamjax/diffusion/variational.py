"""Computes terms of the variational bound, elementwise, in nats (Ho et al., arXiv 2006.11239)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BIN = 1 / 255  # half the distance between values of a uint8 picture scaled to [-1, 1]
EDGE = 0.999  # beyond it are only the first and the last value, whose bins are open
FLOOR = 1e-12  # least probability


def gaussian_kl(
    mean: Array, log_variance: Array, other_mean: Array, other_log_variance: Array
) -> Array:
    """Returns the KL divergence of the first Gaussian from the second; arguments broadcast."""
    difference = log_variance - other_log_variance
    squared = jnp.square(mean - other_mean) * jnp.exp(-other_log_variance)
    return 0.5 * (jnp.exp(difference) - difference - 1 + squared)


def discretized_log_likelihood(
    x: Float[Array, "..."], mean: Float[Array, "..."], log_scale: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Returns the log probability of the bin of `x` under a Gaussian.

    Args:
      x: data in [-1, 1] on 256 values. (DiT applies it to latents as well.)
      mean, log_scale: mean and log standard deviation of the Gaussian.
    """
    above = _normal_cdf((x - mean + BIN) * jnp.exp(-log_scale))
    below = _normal_cdf((x - mean - BIN) * jnp.exp(-log_scale))
    inside = jnp.where(x < -EDGE, above, jnp.where(x > EDGE, 1 - below, above - below))
    return jnp.log(jnp.maximum(inside, FLOOR))


def _normal_cdf(x):
    """Approximates the normal CDF by tanh to 3e-4, as the public code does, for equal numbers."""
    return 0.5 * (1 + jax.lax.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
