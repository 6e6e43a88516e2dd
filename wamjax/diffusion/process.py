"""What all processes share: Gaussian paths, and what a network may predict on them.

    x = alpha(level) x0 + sigma(level) eps,    eps ~ N(0, 1)

Everything a network can be asked for is, at a given level, ``p x0 + q eps`` with known p and q.
Together with x that is a system of two equations for x0 and eps, so one formula converts between
all of them, and expectations given x (what a network learns) convert as the quantities do.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

KINDS = ("x0", "eps", "v", "velocity", "score")
SNR_CEILING = 5.0  # gamma of min-SNR weighting, arXiv 2303.09556


class Process:
    """A Gaussian path and what is regressed on it. Sub-classes say the path.

    Levels broadcast from the left: (b,) or (b, t) against data (b, t, h, w, c).

    Attributes:
      predicts: what an output of the network stands for, one of `KINDS`:
        x0        the data
        eps       the noise
        v         alpha eps - sigma x0 (Salimans and Ho, arXiv 2202.00512)
        velocity  dx/dlevel along the path, what flow matching regresses
        score     the gradient of log p(x) at this level, -eps / sigma
      weighting: "uniform" weighs squared errors of the output alike; "min_snr" weighs squared
        errors of x0 by min(SNR, 5).
    """

    predicts: str
    weighting: str

    @property
    def outputs(self) -> int:
        """Values that a network puts out for each one of the data."""
        return 1

    # ---- the path ----

    def alpha_sigma(self, level: Array) -> tuple[Array, Array]:
        """The two coefficients; numpy float64 for a numpy level, so that grids lose nothing."""
        raise NotImplementedError

    def ratio(self, level: Array) -> Array:
        """Noise to signal, sigma / alpha: EDM's level, whatever the process."""
        alpha, sigma = self.alpha_sigma(level)
        with np.errstate(divide="ignore"):
            return sigma / alpha

    def sample_level(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Training levels."""
        raise NotImplementedError

    def schedule(self, steps: int) -> np.ndarray:
        """Sampling levels from noise to data, (steps + 1,)."""
        raise NotImplementedError

    def c_in(self, level: Array) -> Array:
        """Factor of x at the input of the network."""
        return jnp.ones_like(level)

    def c_noise(self, level: Array) -> Array:
        """What the network is told of the level."""
        return level

    # ---- training ----

    def corrupt(self, x0: Array, noise: Array, level: Array) -> Array:
        """x at `level`; from zeros at the first level of a schedule, where sampling starts."""
        alpha, sigma = self.alpha_sigma(level)
        return align(alpha, x0) * x0 + align(sigma, x0) * noise

    def target(self, x0: Array, noise: Array, level: Array) -> Array:
        """What the network regresses."""
        p, q = self.row(self.predicts, level)
        return align(p, x0) * x0 + align(q, x0) * noise

    def weight(self, level: Float[Array, "..."]) -> Float[Array, "..."]:
        """Weight of the squared error of an output."""
        if self.weighting == "uniform":
            return jnp.ones_like(level, dtype=float)
        if self.weighting == "min_snr":
            _, per_output = self._conversion(level, self.predicts, "x0")
            return jnp.minimum(self.ratio(level) ** -2.0, SNR_CEILING) * per_output**2
        raise ValueError(f"weighting {self.weighting!r} is not 'uniform' or 'min_snr'")

    def loss(self, output: Array, x0: Array, noise: Array, level: Array) -> Array:
        """Weighted loss of every element of `x0`, to be masked and averaged by the caller."""
        error = jnp.square(output - self.target(x0, noise, level))
        return align(self.weight(level), x0) * error

    # ---- what an output says ----

    def prediction(self, output: Array) -> Array:
        """The part of a network's output that is of kind `predicts`."""
        return output

    def log_variance(self, output: Array, small: Array, large: Array) -> Array:
        """Of an ancestral step, between the logarithms of the two variances of `posterior`."""
        del output, large
        return small

    def data(self, x: Array, output: Array, level: Array) -> Array:
        """The x0 that an output implies."""
        return self._read(x, output, level, "x0")

    def noise(self, x: Array, output: Array, level: Array) -> Array:
        """The eps that an output implies."""
        return self._read(x, output, level, "eps")

    def velocity(self, x: Array, output: Array, level: Array) -> Array:
        """The dx/dlevel that an output implies: the field of the probability-flow ODE."""
        return self._read(x, output, level, "velocity")

    def score(self, x: Array, output: Array, level: Array) -> Array:
        """The gradient of log p(x) that an output implies."""
        return self._read(x, output, level, "score")

    def convert(self, x: Array, value: Array, level: Array, source: str, target: str) -> Array:
        """From one kind of prediction to another; not finite where x and `source` cannot tell."""
        if source == target:
            return value
        on_x, on_value = self._conversion(level, source, target)
        return align(on_x, x) * x + align(on_value, x) * value

    def row(self, kind: str, level: Array) -> tuple[Array, Array]:
        """(p, q) of ``kind = p x0 + q eps``."""
        alpha, sigma = self.alpha_sigma(level)
        zero = jnp.zeros_like(sigma)
        if kind == "x0":
            return zero + 1, zero
        if kind == "eps":
            return zero, zero + 1
        if kind == "v":
            return -sigma, alpha
        if kind == "score":
            return zero, -1 / sigma
        if kind == "velocity":
            level = jnp.asarray(level, float)
            return jax.jvp(self.alpha_sigma, (level,), (jnp.ones_like(level),))[1]
        raise ValueError(f"{type(self).__name__} has no prediction {kind!r}; there is {KINDS}")

    # ---- going back ----

    def posterior(self, level: Array, previous: Array) -> tuple[Array, Array, Array, Array]:
        """The Gaussian of x at `previous`, a cleaner level, given x at `level` and x0.

        Returns:
          (factor of x, factor of x0, its variance, variance of the noise added on the way there).
          For DDPM the last two are beta-tilde and beta of the (respaced) chain, the lower and the
          upper bound of the variance of its reverse (arXiv 2006.11239, 3.2).
        """
        alpha, sigma = self.alpha_sigma(level)
        alpha_to, sigma_to = self.alpha_sigma(previous)
        added = sigma**2 - (alpha / alpha_to) ** 2 * sigma_to**2
        shrink = (sigma_to / sigma) ** 2
        return alpha / alpha_to * shrink, alpha_to * added / sigma**2, shrink * added, added

    def _read(self, x: Array, output: Array, level: Array, target: str) -> Array:
        return self.convert(x, self.prediction(output), level, self.predicts, target)

    def _conversion(self, level: Array, source: str, target: str) -> tuple[Array, Array]:
        """Factors of x and of `source` in `target`."""
        alpha, sigma = self.alpha_sigma(level)
        p, q = self.row(source, level)
        to_p, to_q = self.row(target, level)
        determinant = alpha * q - sigma * p
        return (to_p * q - to_q * p) / determinant, (to_q * alpha - to_p * sigma) / determinant


def align(level: Array, x: Array) -> Array:
    """Levels with as many trailing axes of length 1 as they need to broadcast against `x`."""
    return jnp.reshape(level, jnp.shape(level) + (1,) * (jnp.ndim(x) - jnp.ndim(level)))


def namespace(level: Any):
    """numpy for what numpy holds, else jax.numpy."""
    return np if isinstance(level, np.ndarray | np.generic | float | int) else jnp


def concrete(process: Process, levels: Array) -> Array:
    """A grid in numpy and float64 where its values are known; a traced one as it is.

    Raises:
      ValueError: a known grid that does not go from noise to data at every step.
    """
    if isinstance(levels, jax.core.Tracer):
        return levels
    levels = np.asarray(levels, np.float64)
    if not (np.diff(process.ratio(levels)) < 0).all():
        raise ValueError(f"levels {levels.tolist()} of a {type(process).__name__} do not go "
                         "from noise to data at every step")  # fmt: skip
    return levels
