"""Defines `Process`, the base of all processes: a Gaussian path, and what a network predicts on it.

    x = alpha(level) x0 + sigma(level) eps,    eps ~ N(0, 1)

Every quantity that a network may predict has the form ``p x0 + q eps``, with p and q given by the
level. Together with x these are two equations for x0 and eps, so one formula converts between all
quantities. It is linear, so it also converts their expectations given x, which a network learns.
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
    """Describes a Gaussian path and what is regressed on it; subclasses define the path.

    Levels broadcast from the left: (b,) or (b, t) against data (b, t, h, w, c).

    Attributes:
      predicts: what the network predicts, one of `KINDS`:
        x0        the data
        eps       the noise
        v         alpha eps - sigma x0 (Salimans and Ho, arXiv 2202.00512)
        velocity  dx/dlevel along the path, as regressed in flow matching
        score     the gradient of log p(x) at this level, -eps / sigma
      weighting: "uniform" weights all squared errors of the output equally; "min_snr" weights the
        squared errors of x0 by min(SNR, 5).
    """

    predicts: str
    weighting: str

    @property
    def outputs(self) -> int:
        """Returns how many values the network outputs per value of the data."""
        return 1

    # ---- the path ----

    def alpha_sigma(self, level: Array) -> tuple[Array, Array]:
        """Returns (alpha, sigma); in numpy and float64 for a numpy level, so grids stay precise."""
        raise NotImplementedError

    def ratio(self, level: Array) -> Array:
        """Returns the noise-to-signal ratio sigma / alpha, which is EDM's level."""
        alpha, sigma = self.alpha_sigma(level)
        with np.errstate(divide="ignore"):
            return sigma / alpha

    def sample_level(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Draws training levels."""
        raise NotImplementedError

    def schedule(self, steps: int) -> np.ndarray:
        """Returns the sampling levels from noise to data, (steps + 1,)."""
        raise NotImplementedError

    def c_in(self, level: Array) -> Array:
        """Returns the factor of x at the network's input."""
        return jnp.ones_like(level)

    def c_noise(self, level: Array) -> Array:
        """Returns the level as the network receives it."""
        return level

    # ---- training ----

    def corrupt(self, x0: Array, noise: Array, level: Array) -> Array:
        """Returns x at `level`.

        For zero data and the first level of a schedule, this is where sampling starts.
        """
        alpha, sigma = self.alpha_sigma(level)
        return align(alpha, x0) * x0 + align(sigma, x0) * noise

    def target(self, x0: Array, noise: Array, level: Array) -> Array:
        """Returns the network's regression target."""
        p, q = self.row(self.predicts, level)
        return align(p, x0) * x0 + align(q, x0) * noise

    def weight(self, level: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the weight of an output's squared error."""
        if self.weighting == "uniform":
            return jnp.ones_like(level, dtype=float)
        if self.weighting == "min_snr":
            _, per_output = self._conversion(level, self.predicts, "x0")
            return jnp.minimum(self.ratio(level) ** -2.0, SNR_CEILING) * per_output**2
        raise ValueError(f"weighting {self.weighting!r} is not 'uniform' or 'min_snr'")

    def loss(self, output: Array, x0: Array, noise: Array, level: Array) -> Array:
        """Returns the weighted loss of every element of `x0`; the caller masks and averages it."""
        error = jnp.square(output - self.target(x0, noise, level))
        return align(self.weight(level), x0) * error

    # ---- from outputs to quantities ----

    def prediction(self, output: Array) -> Array:
        """Returns the part of a network's output that is the quantity `predicts`."""
        return output

    def log_variance(self, output: Array, small: Array, large: Array) -> Array:
        """Returns the log variance of an ancestral step, between those of the two variances of
        `posterior`."""
        del output, large
        return small

    def data(self, x: Array, output: Array, level: Array) -> Array:
        """Returns the x0 that an output implies."""
        return self._read(x, output, level, "x0")

    def noise(self, x: Array, output: Array, level: Array) -> Array:
        """Returns the eps that an output implies."""
        return self._read(x, output, level, "eps")

    def velocity(self, x: Array, output: Array, level: Array) -> Array:
        """Returns the dx/dlevel that an output implies: the field of the probability-flow ODE."""
        return self._read(x, output, level, "velocity")

    def score(self, x: Array, output: Array, level: Array) -> Array:
        """Returns the gradient of log p(x) that an output implies."""
        return self._read(x, output, level, "score")

    def convert(self, x: Array, value: Array, level: Array, source: str, target: str) -> Array:
        """Converts one kind of prediction to another; not finite if x and `source` do not determine
        it."""
        if source == target:
            return value
        on_x, on_value = self._conversion(level, source, target)
        return align(on_x, x) * x + align(on_value, x) * value

    def row(self, kind: str, level: Array) -> tuple[Array, Array]:
        """Returns (p, q) of ``kind = p x0 + q eps``."""
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

    # ---- the reverse step ----

    def posterior(self, level: Array, previous: Array) -> tuple[Array, Array, Array, Array]:
        """Returns the Gaussian of x at `previous`, a cleaner level, given x at `level` and x0.

        Returns:
          (factor of x in the mean, factor of x0 in the mean, variance, variance of the noise added
          from `previous` to `level`). For DDPM the last two are beta-tilde and beta of the
          (respaced) chain, the lower and the upper bound of the variance of its reverse step (arXiv
          2006.11239, 3.2).
        """
        alpha, sigma = self.alpha_sigma(level)
        alpha_to, sigma_to = self.alpha_sigma(previous)
        added = sigma**2 - (alpha / alpha_to) ** 2 * sigma_to**2
        shrink = (sigma_to / sigma) ** 2
        return alpha / alpha_to * shrink, alpha_to * added / sigma**2, shrink * added, added

    def _read(self, x: Array, output: Array, level: Array, target: str) -> Array:
        return self.convert(x, self.prediction(output), level, self.predicts, target)

    def _conversion(self, level: Array, source: str, target: str) -> tuple[Array, Array]:
        """Returns the factors of x and of `source` in `target`."""
        alpha, sigma = self.alpha_sigma(level)
        p, q = self.row(source, level)
        to_p, to_q = self.row(target, level)
        determinant = alpha * q - sigma * p
        return (to_p * q - to_q * p) / determinant, (to_q * alpha - to_p * sigma) / determinant


def align(level: Array, x: Array) -> Array:
    """Appends axes of length 1 to levels, so that they broadcast against `x` from the left."""
    return jnp.reshape(level, jnp.shape(level) + (1,) * (jnp.ndim(x) - jnp.ndim(level)))


def namespace(level: Any):
    """Returns numpy for numbers and numpy arrays, else jax.numpy."""
    return np if isinstance(level, np.ndarray | np.generic | float | int) else jnp


def concrete(process: Process, levels: Array) -> Array:
    """Returns a grid in numpy and float64, or a traced one unchanged.

    Raises:
      ValueError: some step of a grid that is not traced does not go from noise to data.
    """
    if isinstance(levels, jax.core.Tracer):
        return levels
    levels = np.asarray(levels, np.float64)
    if not (np.diff(process.ratio(levels)) < 0).all():
        raise ValueError(f"levels {levels.tolist()} of a {type(process).__name__} do not go "
                         "from noise to data at every step")  # fmt: skip
    return levels
