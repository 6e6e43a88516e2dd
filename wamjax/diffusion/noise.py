"""Defines noise laws, which draw training levels as noise-to-signal ratios (EDM's sigma).

As ratios, the logit-normal law of flow levels is log-normal, and a time shift is a factor.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class NoiseLaw:
    """Mixes a log-normal law with a uniform one.

    Attributes:
      mean, std: of the logarithm. EDM trains with (-1.2, 1.2); (0, 1) is the logit-normal law of
        SD3 (arXiv 2403.03206).
      uniform: share of levels drawn uniformly from `low` to `high` instead.
      scale: factor of all levels.
    """

    mean: float = -1.2
    std: float = 1.2
    uniform: float = 0.0
    low: float = 1.0
    high: float = 85.0
    scale: float = 1.0

    def sample(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Draws positive ratios, float32."""
        coin, normal, flat = jax.random.split(key, 3)
        normal = jnp.exp(self.mean + self.std * jax.random.normal(normal, shape))
        flat = jax.random.uniform(flat, shape, minval=self.low, maxval=self.high)
        return self.scale * jnp.where(jax.random.bernoulli(coin, self.uniform, shape), flat, normal)


def cosmos_policy(slots: int, uniform: float = 0.3) -> NoiseLaw:
    """Returns the hybrid law of Cosmos Policy (arXiv 2601.16163) for samples of `slots` latent
    frames.

    It is 70 % log-normal with median 4 and 30 % uniform from 1 to 85, times the square root of the
    number of slots. `uniform` = 0 is the law of the video model that it starts from.
    """
    return NoiseLaw(math.log(4.0), 1.2, uniform, 1.0, 85.0, math.sqrt(slots))
