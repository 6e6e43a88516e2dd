"""Denoises in two stages: ``prefill -> cache`` once, then steps that only compute what changes.

Which groups can be cached is derived from the visibility table and the roles (`cacheable`), so the
same function serves acting from the first frame, imagining a video, joint denoising, and acting on
an imagined video.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from wamjax.diffusion.flow import STRAIGHT
from wamjax.diffusion.process import Process, align
from wamjax.diffusion.solvers import SOLVERS
from wamjax.diffusion.stochastic import ancestral
from wamjax.models.layers import widest
from wamjax.models.transformer import Cache
from wamjax.models.visibility import Visibility, cacheable
from wamjax.wam.loss import plain
from wamjax.wam.prefix import Pin

Groups = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """Runs both stages of a network under one visibility table.

    Attributes:
      network: ``network(values, times, contexts, table, cache, predict, emit)`` with bound
        parameters, see `Shell.__call__`.
      times: ``times({group: (1, m)})``, the conditioning of noise levels, also with bound
        parameters.
      visibility: the table; groups that a call does not mention are absent.
      rows: group -> number of levels that the network receives for it.
      use_cache: False recomputes everything at every step (the reference path).
      process: the process of everything that is denoised.
      encode: see `loss.denoising_loss`.
    """

    network: Callable
    times: Callable
    visibility: Visibility
    rows: dict[str, int]
    use_cache: bool = True
    process: Process = STRAIGHT
    encode: Callable[[Groups, Groups], Groups] = plain

    def prefill(
        self,
        given: Groups,
        contexts: Groups,
        predicted: tuple[str, ...],
        cache: Cache | None = None,
        levels: Mapping[str, float] | None = None,
    ) -> tuple[Cache, Groups]:
        """Computes everything that stays constant while `predicted` is denoised.

        Args:
          given: groups that do not change.
          contexts: expert -> embedded context.
          predicted: names of the groups to be denoised later.
          cache: from an earlier stage; its entries are not recomputed.
          levels: levels of given groups that are not clean.

        Returns:
          (the cache, the given groups that could not be cached and take part in every step).
        """
        cache = cache or Cache({}, {})
        given = {g: v for g, v in given.items() if g not in cache.tokens}
        contexts = {e: v for e, v in contexts.items() if e not in cache.context}
        table = self.visibility.restrict({*given, *predicted, *cache.tokens})
        cacheable_groups = cacheable(table, {*given, *cache.tokens})
        if stale := set(cache.tokens) - set(cacheable_groups):
            raise ValueError(f"groups {sorted(stale)} are in the cache, but see groups that change "
                             "during sampling: cache groups that see only given ones")  # fmt: skip
        constant = {g: v for g, v in given.items() if g in cacheable_groups}
        changing = {g: v for g, v in given.items() if g not in cacheable_groups}
        if not constant and not contexts:
            return cache, changing
        times = self._clean_times(constant, levels)
        values = self._encoded(constant, ())
        _, new = self.network(values, times, contexts, table, cache=cache, emit=tuple(constant))
        return Cache(cache.tokens | new.tokens, cache.context | new.context), changing

    def freeze(
        self, given: Groups, noise: Groups, levels: Mapping[str, float], cache: Cache
    ) -> Cache:
        """Returns the keys and values of the given groups, computed once with the others at their
        first levels.

        They are then used under `visibility.prefix` as if they were constant, which is an
        approximation if the given groups see what is denoised.

        Args:
          levels: levels of the groups of `noise`.
          cache: cache of the contexts.
        """
        current = {g: jnp.asarray(v, widest()) for g, v in levels.items()}
        times = self._clean_times(given) | self._times_at(current)
        table = self.visibility.restrict({*given, *noise})
        values = self._encoded(given | noise, tuple(noise))
        emit = tuple(given)
        _, new = self.network(values, times, {}, table, cache=cache, emit=emit)
        return Cache(new.tokens, cache.context)

    def step(
        self,
        cache: Cache,
        values: Groups,
        times,
        predict: tuple[str, ...],
        pins: Mapping[str, Pin] | None = None,
        **extra,
    ):
        """Runs one evaluation and returns the outputs for `predict`, using the cache."""
        table = self.visibility.restrict({*values, *cache.tokens})
        values = self._encoded(values, predict, pins)
        return self.network(values, times, {}, table, cache=cache, predict=predict, **extra)[0]

    def sample(
        self,
        given: Groups,
        noise: Groups,
        schedules: dict[str, np.ndarray],
        contexts: Groups,
        cache: Cache | None = None,
        solver: str = "euler",
        rng: Array | None = None,
        extras: dict[str, Array] | None = None,
        states: bool = False,
        fresh: Groups | None = None,
        pins: Mapping[str, Pin] | None = None,
        levels: Mapping[str, float] | None = None,
    ) -> tuple[Groups, Cache]:
        """Denoises `noise` along `schedules` while `given` stays unchanged.

        Args:
          given: group -> values, clean unless listed in `levels`.
          noise: group -> starting point, at the first level of its schedule.
          schedules: group -> (steps + 1,) levels from noise to data; all of the same length.
          contexts, cache: see `prefill`.
          solver: a key of `SOLVERS`, or "ancestral", which needs `rng`.
          extras: further arguments of the network with one value per level, (steps + 1,).
          states: return all intermediate states.
          fresh: group -> standard normals (steps, ...) for "ancestral", instead of draws from
            `rng`.
          pins: for groups of `noise`: slots that are clean at every step and in the result. The
            network receives one level per slot for such a group.
          levels: see `prefill`.

        Returns:
          (denoised groups, the cache for a later stage); with `states`, the groups at every level
            of their schedules, (steps + 1, ...), from the start to the denoised result.
        """
        predicted, pins = tuple(noise), dict(pins or {})
        if self.use_cache:
            cache, changing = self.prefill(given, contexts, predicted, cache, levels)
            contexts = {}
        else:
            changing = given
        constant = self._clean_times(changing, levels)
        grids = {g: jnp.asarray(s, widest()) for g, s in schedules.items()}
        clean = self._clean_times({g: noise[g] for g in pins})
        points = jax.vmap(self._times_at)(grids), extras or {}
        scale = {g: self.process.c_in(s) for g, s in grids.items()}

        def output(x: Groups, point):
            (times, extra), factor = point
            x = {g: v * factor[g].astype(v.dtype) for g, v in x.items()}
            x |= {g: pinned(pin, x[g]) for g, pin in pins.items()}
            times = times | {g: _pinned_times(pin, clean[g], times[g]) for g, pin in pins.items()}
            if self.use_cache:
                return self.step(cache, changing | x, constant | times, predicted, pins, **extra)
            table = self.visibility.restrict({*changing, *x})
            values = self._encoded(changing | x, predicted, pins)
            return self.network(
                values, constant | times, contexts, table, predict=predicted, **extra
            )[0]

        points = points, scale
        if fresh is not None and solver != "ancestral":
            raise ValueError(f"solver {solver!r} adds no noise at its steps: leave out that noise, "
                             "or use solver 'ancestral'")  # fmt: skip
        if solver == "ancestral":
            if rng is None and fresh is None:
                raise ValueError(
                    "solver 'ancestral' adds noise at every step: give a key or that noise"
                )
            options = {"states": states, "noise": fresh}
            result = ancestral(output, noise, schedules, points, self.process, rng, **options)
        else:
            result = SOLVERS[solver](output, noise, schedules, points, self.process, states)
        # The values that solvers compute for pinned slots on the way are never read.
        return result | {g: pinned(pin, result[g]) for g, pin in pins.items()}, cache

    def _encoded(
        self,
        values: Groups,
        predicted: tuple[str, ...],
        pins: Mapping[str, Pin] | None = None,
    ) -> Groups:
        given = {g: jnp.full((1, 1), g not in predicted) for g in values}
        return self.encode(values, given | {g: pin.mask for g, pin in (pins or {}).items()})

    def _times_at(self, levels: Groups):
        """Returns the time conditioning of one level per group."""
        inputs = {g: self.process.c_noise(v) for g, v in levels.items()}
        return self.times({g: jnp.broadcast_to(v, (1, self.rows[g])) for g, v in inputs.items()})

    def _clean_times(self, groups: Groups, levels: Mapping[str, float] | None = None):
        """Returns the time conditioning of groups at the level of data, except for those in
        `levels`."""
        all_levels = dict.fromkeys(groups, float(self.process.schedule(1)[-1]))
        all_levels |= {g: level for g, level in (levels or {}).items() if g in all_levels}
        return self._times_at({g: jnp.asarray(level, widest()) for g, level in all_levels.items()})


def pinned(pin: Pin, values: Array) -> Array:
    """Replaces values (..., b, m, ...) by those of the pin in its slots."""
    return jnp.where(align(pin.mask, pin.values), pin.values.astype(values.dtype), values)


def _pinned_times(pin: Pin, clean: Any, current: Any) -> Any:
    """Returns the time conditioning of slots: that of data for pinned ones."""
    return jax.tree.map(lambda c, n: jnp.where(align(pin.mask, n), c, n), clean, current)
