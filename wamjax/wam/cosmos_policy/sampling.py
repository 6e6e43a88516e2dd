"""Samples from Cosmos Policy: n network calls from sigma 80 to 4; the last x0 is the answer.

This is the public code's "2ab" on the grid of section 6.1 of the specification: n - 1 steps of a
second-order exponential multistep solver, and one clean call at the last level. That equals
`multistep.exponential` on Karras' grid with data at its end. It runs in the levels of the flow,
where the states are smaller by 1 + sigma and the answers are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wamjax.diffusion.flow import RectifiedFlow
from wamjax.diffusion.schedules import karras
from wamjax.models.transformer import Cache
from wamjax.models.visibility import Visibility, bidirectional, cacheable, prefix
from wamjax.wam.cosmos_policy.layouts import Layout
from wamjax.wam.denoiser import Denoiser
from wamjax.wam.uses import Use

Groups = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Denoises the groups that a use predicts.

    Attributes:
      net: the network with bound parameters, ``net(method, *args, **kwargs)``.
      layout, process: of the clip.
      sigma_max, sigma_min: ends of the grid.
      solver: a key of `solvers.SOLVERS`.
    """

    net: Callable
    layout: Layout
    process: RectifiedFlow
    sigma_max: float
    sigma_min: float
    solver: str = "exponential"

    def __call__(
        self,
        use: Use,
        latents: Float[Array, "b t h w c"],
        text: Cache,
        noise: Float[Array, "b t h w c"],
        steps: int,
        frozen: bool = False,
        states: bool = False,
    ) -> Float[Array, "*n b t h w c"]:
        """Returns all slots: the given ones unchanged, the others denoised.

        Args:
          use: the use of the model.
          latents: latents of the given slots; the others are ignored.
          text: from `read`.
          noise: standard normal.
          steps: network calls.
          frozen: reuse the keys and values that the given slots have at the first level. Has no
            effect if they are constant.
          states: return all intermediate states, (steps + 1, ...), at the levels of `schedule`; in
            the public code's coordinates they are larger by 1 + sigma, that is by 1 / (1 - level).
        """
        grid = self.schedule(steps)
        given = {g: x for g, x in split(self.layout, latents).items() if g in use.given}
        start = {g: grid[0] * x for g, x in split(self.layout, noise).items() if g not in given}
        denoiser, cache, first = self.denoiser(use.table), text, dict.fromkeys(start, grid[0])
        if frozen and set(cacheable(use.table, given)) != set(given):
            cache = denoiser.freeze(given, start, first, text)
            # This table applies to the steps from here on; the cache was computed with all groups.
            denoiser = self.denoiser(prefix(tuple(given), tuple(start)))
        schedules = dict.fromkeys(start, grid)
        samples, _ = denoiser.sample(given, start, schedules, {}, cache, self.solver, states=states)
        if states:
            constant = {g: jnp.broadcast_to(x, (len(grid), *x.shape)) for g, x in given.items()}
            return jnp.concatenate([(constant | samples)[g] for g in self.layout.groups], axis=2)
        return join(self.layout, given | samples)

    def schedule(self, steps: int) -> Float[np.ndarray, " n"]:
        """Returns the levels of the network calls, followed by 0."""
        return self.process.level_of(karras(steps, self.sigma_max, self.sigma_min))

    def read(self, text: Mapping[str, Array]) -> Cache:
        """Computes keys and values of an instruction: "instruction" ids, or "context"
        embeddings."""
        contexts = self.net("conditions", dict(text)).contexts
        return self.denoiser(bidirectional(*self.layout.groups)).prefill({}, contexts, ())[0]

    def denoiser(self, table: Visibility) -> Denoiser:
        """Returns the denoiser of all slots under a table."""
        return Denoiser(
            lambda *args, **kwargs: self.net("__call__", *args, **kwargs),
            lambda levels: self.net("times", levels),
            table,
            self.layout.sizes,
            process=self.process,
            encode=marked,
        )


@dataclasses.dataclass(frozen=True)
class HalfToldFlow(RectifiedFlow):
    """Rounds noise levels to bfloat16 before the network receives them; otherwise a
    `RectifiedFlow`."""

    def c_noise(self, level: Array) -> Array:
        """Returns the network's input for a level."""
        return level.astype(jnp.bfloat16).astype(level.dtype)


def marked(values: Groups, given: Groups) -> Groups:
    """Adds the network's two mask channels to groups of latents: whether a slot is given, and 0,
    which marks padded pixels, of which there are none.

    Args:
      given: group -> (b | 1, m | 1).
    """
    return {g: _marked(x, given[g]) for g, x in values.items()}


def _marked(x: Float[Array, "b t h w c"], given: Array) -> Float[Array, "b t h w d"]:
    flag = given.astype(x.dtype)[:, :, None, None, None]
    flag = jnp.broadcast_to(flag, (*x.shape[:-1], 1))
    return jnp.concatenate([x, flag, jnp.zeros_like(flag)], axis=-1)


def split(layout: Layout, x: Array) -> Groups:
    """Splits (b, t, ...) into group -> (b, m, ...)."""
    return {g: x[:, index[0] : index[-1] + 1] for g, index in layout.groups.items()}


def join(layout: Layout, groups: Mapping[str, Array]) -> Array:
    """Reverses `split`."""
    return jnp.concatenate([groups[g] for g in layout.groups], axis=1)


def published_noise(seed: int, shape: tuple[int, int, int, int, int]) -> Float[Array, "b t h w c"]:
    """Returns the noise from which the public code starts, the same on every machine.

    An element of the batch does not depend on the number of elements after it. Source:
    ``arch_invariant_rand``.
    """
    b, t, h, w, c = shape
    draw = np.random.RandomState(seed).standard_normal((b, c, t, h, w))
    return jnp.asarray(np.moveaxis(draw.astype(np.float32), 1, -1))


def frozen_error(objective, params, normalizers, observation, rng: Array) -> dict[str, Array]:
    """Measures how mode "frozen" changes the actions of an observation, in robot units.

    Returns:
      {"mean", "max"}: of the absolute differences from "direct"; "relative": their root mean square
        divided by the standard deviation of the actions.
    """
    direct, frozen = (
        objective.policy(params, normalizers, observation, rng, mode)
        for mode in ("direct", "frozen")
    )
    error = jnp.abs(frozen - direct)
    relative = jnp.sqrt(jnp.mean(jnp.square(error)) / jnp.maximum(jnp.var(direct), 1e-12))
    return {"mean": jnp.mean(error), "max": jnp.max(error), "relative": relative}
