"""Cosmos Policy's sampler: n network calls from sigma 80 to 4; the last x0 is the answer.

The public code's "2ab" on the grid of section 6.1 of the specification: n - 1 steps of a
second-order exponential multistep solver, and one clean call at the last level. That is
`multistep.exponential` on Karras' grid with data behind it, run in the levels of the flow, in which
the states are smaller by 1 + sigma and the answers are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wamjax.diffusion.process import Process
from wamjax.diffusion.schedules import karras
from wamjax.models.transformer import Cache
from wamjax.models.visibility import Visibility
from wamjax.wam import cosmos_programs as programs
from wamjax.wam.cosmos_programs import Use
from wamjax.wam.layouts import Layout
from wamjax.wam.sampling import Denoiser

Groups = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Denoises what a use predicts.

    Attributes:
      net: the network with bound parameters, ``net(method, *args, **kwargs)``.
      layout, process: of the clip.
      sigma_max, sigma_min: of the grid.
      visibility: of training, see `cosmos_programs.visibility`.
      told: what the network is told of noise levels.
      solver: a key of `solvers.SOLVERS`.
    """

    net: Callable
    layout: Layout
    process: Process
    sigma_max: float
    sigma_min: float
    visibility: str
    told: Callable[[Array], Array]
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
        """All slots: those that the use is given as they are, the others denoised.

        Args:
          use: what the model is to be.
          latents: of the slots that are given; the others do not matter.
          text: from `read`.
          noise: standard normal.
          steps: network calls.
          frozen: reuse the keys and values that the given slots have at the first level. Without
            effect under a prefix visibility, where they never change.
          states: return the whole way, (steps + 1, ...), at the levels of `schedule`; in the public
            code's coordinates they are larger by 1 + sigma, that is by 1 / (1 - level).
        """
        grid = self.schedule(steps)
        given = {g: x for g, x in split(self.layout, latents).items() if g in use.given}
        start = {g: grid[0] * x for g, x in split(self.layout, noise).items() if g not in given}
        kind, cache = self.visibility, text
        if frozen and kind != "prefix":
            cache = self._freeze(use, given, start, grid[0], text)
            kind = "prefix"  # of what is computed from here on; the cache has seen everything
        denoiser = self._denoiser(use, programs.visibility(kind, use))
        schedules = dict.fromkeys(start, grid)
        done, _ = denoiser.sample(given, start, schedules, {}, cache, self.solver, states=states)
        if states:
            still = {g: jnp.broadcast_to(x, (len(grid), *x.shape)) for g, x in given.items()}
            return jnp.concatenate([(still | done)[g] for g in self.layout.groups], axis=2)
        return join(self.layout, given | done)

    def schedule(self, steps: int) -> Float[np.ndarray, " n"]:
        """Levels of the network calls, and then 0."""
        return self.process.level_of(karras(steps, self.sigma_max, self.sigma_min))

    def read(self, text: Mapping[str, Array]) -> Cache:
        """Keys and values of an instruction: "instruction" ids, or "context" embeddings."""
        _, contexts, _ = self.net("conditions", dict(text))
        use = programs.USES["policy"]
        denoiser = self._denoiser(use, programs.visibility("bidirectional", use))
        return denoiser.prefill({}, contexts, ())[0]

    def _freeze(self, use: Use, given: Groups, start: Groups, level, text: Cache) -> Cache:
        """Keys and values of the given slots, in a full call at the first level."""
        denoiser = self._denoiser(use, programs.visibility("bidirectional", use))
        sizes, values = self.layout.sizes, given | start
        told = {g: jnp.full((1, sizes[g]), 0.0 if g in given else level) for g in values}
        _, made = denoiser.network(
            values, denoiser.times(told), {}, denoiser.visibility, cache=text, emit=use.given
        )
        return Cache(made.tokens, text.context)

    def _denoiser(self, use: Use, table: Visibility) -> Denoiser:
        def network(values, times, contexts, table, **options):
            values = {g: masked(x, jnp.asarray(g in use.given, x.dtype)) for g, x in values.items()}
            return self.net("__call__", values, times, contexts, table, **options)

        def times(levels):
            return self.net("times", {g: self.told(x) for g, x in levels.items()})

        return Denoiser(network, times, table, self.layout.sizes, process=self.process)


def masked(latents: Float[Array, "b t h w c"], given: Array) -> Float[Array, "b t h w d"]:
    """Latents with the two further channels of the network: which slots are given, and 0.

    Args:
      given: 1 where a slot is given, () or (b, t). The other channel tells padded pixels, and there
        are none.
    """
    shape = (*latents.shape[:-1], 1)
    flag = given if given.ndim == 0 else given[:, :, None, None, None]
    flag = jnp.broadcast_to(flag, shape).astype(latents.dtype)
    return jnp.concatenate([latents, flag, jnp.zeros_like(flag)], axis=-1)


def split(layout: Layout, x: Array) -> Groups:
    """(b, t, ...) to group -> (b, m, ...)."""
    return {g: x[:, at[0] : at[-1] + 1] for g, at in layout.groups.items()}


def join(layout: Layout, groups: Mapping[str, Array]) -> Array:
    """The reverse of `split`."""
    return jnp.concatenate([groups[g] for g in layout.groups], axis=1)


def published_noise(seed: int, shape: tuple[int, int, int, int, int]) -> Float[Array, "b t h w c"]:
    """The noise that the public code starts from: the same on every machine.

    An element of the batch does not depend on how many follow. Source: ``arch_invariant_rand``.
    """
    b, t, h, w, c = shape
    draw = np.random.RandomState(seed).standard_normal((b, c, t, h, w))
    return jnp.asarray(np.moveaxis(draw.astype(np.float32), 1, -1))


def frozen_error(objective, params, normalizers, observation, rng: Array) -> dict[str, Array]:
    """What mode "frozen" does to the actions of an observation, in robot units.

    Returns:
      {"mean", "max"}: of the absolute differences from "direct"; "relative": their root mean square
      over that of the actions about their mean.
    """
    direct, frozen = (
        objective.policy(params, normalizers, observation, rng, mode)
        for mode in ("direct", "frozen")
    )
    error = jnp.abs(frozen - direct)
    relative = jnp.sqrt(jnp.mean(jnp.square(error)) / jnp.maximum(jnp.var(direct), 1e-12))
    return {"mean": jnp.mean(error), "max": jnp.max(error), "relative": relative}
