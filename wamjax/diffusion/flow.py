"""Implements rectified flow in Wan's convention: level 1 is noise, level 0 is data.

    x_tau = (1 - tau) x0 + tau eps,    velocity = eps - x0,    dx/dtau = velocity

Much of the literature runs time in the other direction: t = 1 - tau, with the velocity x0 - eps.
Only the direction and the sign differ, and no other file needs to know.

EDM's sigma is tau / (1 - tau). Cosmos-Predict2 writes this process in EDM's form, with c_in =
c_skip = 1 - tau, c_out = -tau and c_noise = tau: same network input, same loss.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wamjax.diffusion.noise import NoiseLaw
from wamjax.diffusion.process import Process, namespace

WEIGHT_EPS = 1e-10  # added to the mean weight by which the public scheduler divides
TRAIN_TIMESTEPS = 1000  # of the public schedulers, whose grids end at 1 / 1000 and then jump to 0


def shifted(u: Array, shift: float) -> Array:
    """Applies Wan's time shift ``s u / (1 + (s - 1) u)``, with more high noise for s > 1.

    It multiplies tau / (1 - tau) by s.
    """
    return shift * u / (1 + (shift - 1) * u)


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(Process):
    """Implements rectified flow.

    Attributes:
      shift: time shift of training levels and of the sampling schedule.
      weighting: "wan" (the public scheduler's bump around its middle), or as in `Process`.
      law: law of training levels before the shift; None = uniform in tau.
      spacing: grid of the sampling schedule before the shift. "uniform" goes from 1 to 0; "euler"
        and "unipc" are the grids in diffusers of FlowMatchEulerDiscreteScheduler and of
        UniPCMultistepScheduler with flow sigmas.
      predicts: see `Process`.
    """

    shift: float = 1.0
    weighting: str = "wan"
    law: NoiseLaw | None = None
    spacing: str = "uniform"
    predicts: str = "velocity"

    def alpha_sigma(self, level: Array) -> tuple[Array, Array]:
        """Returns (1 - tau, tau)."""
        return 1 - level, level

    def level_of(self, ratio: Array) -> Array:
        """Returns the tau of a noise-to-signal ratio."""
        return ratio / (1 + ratio)

    def sample_level(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Draws training levels in [0, 1), uniform or from the law, then shifted."""
        if self.law is None:
            return shifted(jax.random.uniform(key, shape), self.shift)
        return self.level_of(self.shift * self.law.sample(key, shape))

    def weight(self, level: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the loss weight of a level.

        The mean of "wan" over the shifted schedule is 1 - 5e-10.
        """
        if self.weighting == "wan":
            return _bump(level) / (_bump_mean(self.shift) + WEIGHT_EPS)
        if self.weighting in ("uniform", "min_snr"):
            return super().weight(level)
        raise ValueError(f"weighting {self.weighting!r} is not 'wan' or 'uniform' or 'min_snr'")

    def schedule(self, steps: int) -> np.ndarray:
        """Returns the shifted sampling levels from 1 to 0, (steps + 1,)."""
        if steps < 1:
            raise ValueError(f"a sampler needs at least one step, got {steps}")
        least = 1 / TRAIN_TIMESTEPS
        if self.spacing == "uniform":
            return shifted(np.linspace(1.0, 0.0, steps + 1), self.shift)
        if self.spacing == "euler":
            grid = np.linspace(1.0, shifted(least, self.shift), steps)  # shifted twice, as there
        elif self.spacing == "unipc":
            grid = np.linspace(1.0, least, steps + 1)[:-1]
        else:
            raise ValueError(f"spacing {self.spacing!r} is not 'uniform', 'euler' or 'unipc'")
        grid = shifted(grid, self.shift)
        if self.spacing == "unipc":
            grid[0] -= 1e-6  # as in diffusers, so that log alpha is finite
        return np.append(grid, 0.0)


@dataclasses.dataclass(frozen=True)
class OneStep(RectifiedFlow):
    """Implements the flow of one-step prediction: its only level is 1, where no data is left."""

    weighting: str = "uniform"

    def level_of(self, ratio: Array) -> Array:
        """Returns 1 for any ratio."""
        return jnp.ones_like(ratio)

    def sample_level(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Returns ones."""
        del key
        return jnp.ones(shape)


STRAIGHT = RectifiedFlow()  # for uses of the path alone, which no attribute changes


def _bump(level):
    xp = namespace(level)
    return xp.exp(-2 * (level - 0.5) ** 2) - np.exp(-0.5)


@functools.cache
def _bump_mean(shift: float) -> float:
    """Returns the mean of the bump over the shifted 1000-point grid of the public scheduler."""
    return float(np.mean(_bump(shifted(np.linspace(1.0, 0.0, 1001)[:-1], shift))))
