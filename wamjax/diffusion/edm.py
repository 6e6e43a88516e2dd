"""Implements EDM (Karras et al., arXiv 2206.00364), whose level is sigma: ``x = x0 + sigma eps``.

The network F receives ``c_in x`` and ``c_noise``, and the denoiser is ``D = c_skip x + c_out F``.
The paper's loss weight on D, (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, is a weight of 1 on
F. So F is one more kind of prediction, "edm", and the rest follows from `Process`.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from wamjax.diffusion.noise import NoiseLaw
from wamjax.diffusion.process import Process, namespace
from wamjax.diffusion.schedules import karras


@dataclasses.dataclass(frozen=True)
class EDM(Process):
    """Implements the process of EDM.

    Attributes:
      sigma_data: standard deviation of the data.
      sigma_max, sigma_min, rho: parameters of the sampling schedule.
      law: law of training levels.
      predicts: "edm" (F), or a kind of `Process`.
      weighting: see `Process`.
    """

    sigma_data: float = 0.5
    sigma_max: float = 80.0
    sigma_min: float = 0.002
    rho: float = 7.0
    law: NoiseLaw = NoiseLaw()
    predicts: str = "edm"
    weighting: str = "uniform"

    def alpha_sigma(self, level: Array) -> tuple[Array, Array]:
        """Returns (1, sigma)."""
        return namespace(level).ones_like(level), level

    def level_of(self, ratio: Array) -> Array:
        """Returns `ratio`, since levels are noise-to-signal ratios."""
        return ratio

    def sample_level(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Draws training levels from the law."""
        return self.law.sample(key, shape)

    def schedule(self, steps: int) -> np.ndarray:
        """Returns `steps` levels from sigma_max to sigma_min, then 0: (steps + 1,)."""
        return karras(steps, self.sigma_max, self.sigma_min, self.rho)

    def c_in(self, level: Array) -> Array:
        """Returns the factor that scales x to unit variance."""
        return (level**2 + self.sigma_data**2) ** -0.5

    def c_noise(self, level: Array) -> Array:
        """Returns log(sigma) / 4."""
        return jnp.log(level) / 4

    def c_skip(self, level: Array) -> Array:
        """Returns the factor of x in the denoiser."""
        return self.sigma_data**2 / (level**2 + self.sigma_data**2)

    def c_out(self, level: Array) -> Array:
        """Returns the factor of F in the denoiser."""
        return level * self.sigma_data * self.c_in(level)

    def row(self, kind: str, level: Array) -> tuple[Array, Array]:
        """Returns (p, q) as in `Process`; F = (x0 - c_skip x) / c_out without dividing by sigma."""
        if kind == "edm":
            scale = self.c_in(level)
            return level / self.sigma_data * scale, -self.sigma_data * scale
        return super().row(kind, level)
