"""Rectified flow in Wan's convention: level 1 is noise, level 0 is data.

    x_tau = (1 - tau) x0 + tau eps,    velocity = eps - x0,    dx/dtau = velocity

Much of the literature runs time the other way (t = 1 - tau, velocity x0 - eps); the map between
the two is exactly that sign and that flip, and this file is the only place that needs to know.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def shifted(u: Array, shift: float) -> Array:
    """Wan's time shift ``s u / (1 + (s - 1) u)``: more of the schedule at high noise for s > 1."""
    return shift * u / (1 + (shift - 1) * u)


@dataclasses.dataclass(frozen=True)
class RectifiedFlow:
    """A process: how data is corrupted, what is regressed, and how levels are weighted.

    Attributes:
      shift: time shift of training levels and of the sampling schedule.
      weighting: "wan" (a bump around the middle of the schedule, spec 5.1) or "uniform".
    """

    shift: float = 1.0
    weighting: str = "wan"

    def sample_level(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Training noise levels in [0, 1): uniform, then shifted."""
        return shifted(jax.random.uniform(key, shape), self.shift)

    def corrupt(self, x0: Array, noise: Array, level: Array) -> Array:
        """``x_tau``; `level` broadcasts from the left: (b,) or (b, t) against (b, t, h, w, c)."""
        level = _align(level, x0)
        return (1 - level) * x0 + level * noise

    def target(self, x0: Array, noise: Array, level: Array) -> Array:
        """What the network regresses; the velocity does not depend on the level."""
        del level
        return noise - x0

    def weight(self, level: Float[Array, "..."]) -> Float[Array, "..."]:
        """Loss weight of a level; its mean over the shifted schedule is 1."""
        if self.weighting == "uniform":
            return jnp.ones_like(level)
        if self.weighting == "wan":
            return _bump(level) / _bump_mean(self.shift)
        raise ValueError(f"weighting {self.weighting!r} is not 'wan' or 'uniform'")

    def schedule(self, steps: int) -> np.ndarray:
        """Sampling levels from 1 to 0, (steps + 1,), through the shift."""
        if steps < 1:
            raise ValueError(f"a sampler needs at least one step, got {steps}")
        return shifted(np.linspace(1.0, 0.0, steps + 1), self.shift)

    def data(self, x: Array, velocity: Array, level: Array) -> Array:
        """The x0 that a velocity implies."""
        return x - _align(level, x) * velocity

    def noise(self, x: Array, velocity: Array, level: Array) -> Array:
        """The eps that a velocity implies."""
        return x + (1 - _align(level, x)) * velocity


def _bump(level):
    xp = np if isinstance(level, np.ndarray) else jnp
    return xp.exp(-2 * (level - 0.5) ** 2) - np.exp(-0.5)


@functools.cache
def _bump_mean(shift: float) -> float:
    """Mean of the bump over the shifted 1000-point grid of the public scheduler."""
    return float(np.mean(_bump(shifted(np.linspace(1.0, 0.0, 1001)[:-1], shift))))


def _align(level: Array, x: Array) -> Array:
    return jnp.reshape(level, level.shape + (1,) * (x.ndim - level.ndim))
