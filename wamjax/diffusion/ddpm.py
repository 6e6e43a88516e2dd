"""Implements DDPM (Ho et al., arXiv 2006.11239), a variance-preserving path over timesteps.

    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps,    abar_t = (1 - beta_0) ... (1 - beta_t)

Levels are timesteps. They count from 0 (least noise), as in all public code; data is level -1.
Between integers log abar is interpolated, so the path is smooth and has a velocity.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from wamjax.diffusion.process import Process, align, namespace
from wamjax.diffusion.schedules import space_timesteps
from wamjax.diffusion.variational import discretized_log_likelihood, gaussian_kl


def betas(name: str, timesteps: int) -> np.ndarray:
    """Returns the betas of a public noise schedule, (timesteps,) float64.

    "linear" is Ho et al.'s, from 1e-4 to 0.02 at 1000 timesteps; "cosine" is Nichol and Dhariwal's
    (arXiv 2102.09672), capped at 0.999.
    """
    if name == "linear":
        return np.linspace(0.1 / timesteps, 20 / timesteps, timesteps)
    if name == "cosine":
        at = np.arange(timesteps + 1) / timesteps
        kept = np.cos((at + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - kept[1:] / kept[:-1], 0.999)
    raise ValueError(f"betas {name!r} are not 'linear' or 'cosine'")


@dataclasses.dataclass(frozen=True)
class DDPM(Process):
    """Implements the process of DDPM and DiT.

    Attributes:
      noising: name of the betas, "linear" or "cosine".
      timesteps: length of the full chain.
      variance: variance of the reverse steps, "small" (beta-tilde), "large" (beta) or "learned".
        With "learned", outputs have 2c channels, whose second half interpolates between the
        logarithms of the two (arXiv 2102.09672, equation 15), and the loss is the hybrid one.
      spacing: timesteps of a schedule, as in diffusers: "linspace" includes both ends, "leading"
        the least noise, "trailing" the most; "multistep" is "linspace" of its UniPC and DPM-Solver,
        without timestep 0.
      predicts, weighting: see `Process`.
    """

    noising: str = "linear"
    timesteps: int = 1000
    variance: str = "small"
    spacing: str = "linspace"
    predicts: str = "eps"
    weighting: str = "uniform"

    def __post_init__(self):
        if self.variance not in ("small", "large", "learned"):
            raise ValueError(f"variance {self.variance!r} is not 'small', 'large' or 'learned'")

    @property
    def outputs(self) -> int:
        """Returns 2 if the variance is learned, else 1."""
        return 2 if self.variance == "learned" else 1

    # ---- the path ----

    def alpha_sigma(self, level: Array) -> tuple[Array, Array]:
        """Returns (sqrt(abar), sqrt(1 - abar)) at or between timesteps."""
        xp = namespace(level)
        level = xp.asarray(level, dtype=float)
        start = xp.clip(xp.floor(level), -1, self.timesteps - 2)
        cubic = xp.asarray(_log_abar(self.noising, self.timesteps), dtype=float)
        a, b, c, d = cubic[:, start.astype(int) + 1]
        past = level - start
        log_abar = ((a * past + b) * past + c) * past + d
        return xp.exp(log_abar / 2), xp.sqrt(-xp.expm1(log_abar))

    def sample_level(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Draws uniform timesteps, int32."""
        return jax.random.randint(key, shape, 0, self.timesteps)

    def schedule(self, steps: int | str) -> np.ndarray:
        """Returns descending timesteps and then -1, (steps + 1,) float64.

        Args:
          steps: number of network calls, spaced by `spacing`; or a respacing for
            `space_timesteps`, such as DiT's "250", "ddim50" or "10,15,20".
        """
        if isinstance(steps, str):
            kept = space_timesteps(self.timesteps, steps)[::-1]
        elif not 1 <= steps <= self.timesteps:
            raise ValueError(f"cannot take {steps} of {self.timesteps} timesteps")
        elif self.spacing == "linspace":
            least = 0 if steps > 1 else self.timesteps - 1
            kept = np.linspace(least, self.timesteps - 1, steps).round()[::-1]
        elif self.spacing == "multistep":
            kept = np.linspace(0, self.timesteps - 1, steps + 1).round()[:0:-1]
        elif self.spacing == "leading":
            kept = np.arange(steps)[::-1] * (self.timesteps // steps)
        elif self.spacing == "trailing":
            kept = np.arange(self.timesteps, 0, -self.timesteps / steps).round() - 1
        else:
            known = "'linspace', 'leading', 'trailing' or 'multistep'"
            raise ValueError(f"spacing {self.spacing!r} is not {known}")
        return np.append(kept, -1).astype(np.float64)

    # ---- learned variance ----

    def prediction(self, output: Array) -> Array:
        """Returns the output without the channels of the variance."""
        return jnp.split(output, 2, axis=-1)[0] if self.variance == "learned" else output

    def log_variance(self, output: Array, small: Array, large: Array) -> Array:
        """Returns the log variance of a reverse step: `small`, `large`, or learned between them."""
        if self.variance != "learned":
            return small if self.variance == "small" else large
        share = (jnp.split(output, 2, axis=-1)[1] + 1) / 2
        return share * large + (1 - share) * small

    def loss(self, output: Array, x0: Array, noise: Array, level: Array) -> Array:
        """Returns the loss as in `Process`; with a learned variance plus the bound, as for DiT.

        The bound (in bits) trains the variance only, since no gradient passes through the mean. Its
        factor timesteps / 1000 is that of the public RESCALED_MSE, and 1 for DiT.
        """
        simple = super().loss(self.prediction(output), x0, noise, level)
        if self.variance != "learned":
            return simple
        prediction, raw = jnp.split(output, 2, axis=-1)
        held = jnp.concatenate([jax.lax.stop_gradient(prediction), raw], axis=-1)
        bound = self.bound(held, x0, self.corrupt(x0, noise, level), level)
        return simple + self.timesteps / 1000 * bound

    def bound(self, output: Array, x0: Array, x: Array, level: Array) -> Array:
        """Returns the term of the variational bound at timesteps `level`, elementwise, in bits.

        It is the KL divergence between the posterior and the learned reverse step; at timestep 0 it
        is the negative log-likelihood of the data on 256 values.
        """
        on_x, on_x0, small, large = (
            align(jnp.asarray(row, float)[level], x) for row in _steps(self)
        )
        log_variance = self.log_variance(output, small, large)
        mean = on_x * x + on_x0 * self.data(x, output, level)
        divergence = gaussian_kl(on_x * x + on_x0 * x0, small, mean, log_variance)
        likelihood = discretized_log_likelihood(x0, mean, log_variance / 2)
        return jnp.where(align(level, x) == 0, -likelihood, divergence) / np.log(2)


@functools.cache
def _log_abar(name: str, timesteps: int) -> np.ndarray:
    """Returns log abar from level -1 on as a monotone cubic spline: coefficients (4, timesteps),
    highest power first."""
    from scipy.interpolate import PchipInterpolator

    values = np.concatenate([[0.0], np.log1p(-betas(name, timesteps)).cumsum()])
    return PchipInterpolator(np.arange(-1.0, timesteps), values).c


@functools.cache
def _steps(process: DDPM) -> tuple[np.ndarray, ...]:
    """Returns the posterior of each step: factors of x and x0, log small and log large variance.

    Timestep 0 leads to the data and has no posterior variance, so it takes that of timestep 1.
    """
    timesteps = np.arange(process.timesteps)
    on_x, on_x0, small, large = process.posterior(timesteps, timesteps - 1)
    small[0] = small[1]
    return on_x, on_x0, np.log(small), np.log(large)
