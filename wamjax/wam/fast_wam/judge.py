"""Judges Fast-WAM's own proposals by a value token that sees the actions and everything they see.

A third expert of the mixture reads the first frame, the instruction, the state and a clean chunk of
actions, and predicts the return of the policy if it begins with them. No group sees it, so the
policy is the same with and without it, and it reads the first frame from the cache of acting. It is
one slot that is predicted in one step, starting from zero: its denoising is a regression.

The ladder of mode "adaptive" adds proposals rung by rung. They are generated directly, on learned
tokens, or on a future imagined for as many steps as the rung says, starting where the rung below
stopped (`rung_modes`).

It is trained on branches (`wamjax.runs.branches`): for one state, N chunks that the policy
proposed, each executed and continued by the policy itself. The differences between chunks of a
state matter most, so their squared error is added to the squared error of the values (`ranking`).
Branches of every fourth visited episode train the gate of the ladder instead (`wam.ladder`): the
judge has never seen those, so its errors on them are like those at test time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wamjax.config import did_you_mean
from wamjax.models.layers import at_least_float32, unconstrained
from wamjax.models.transformer import Cache
from wamjax.models.visibility import table
from wamjax.wam import ladder as ladders
from wamjax.wam import noise as noises
from wamjax.wam.denoiser import Denoiser
from wamjax.wam.fast_wam.objective import FastWAM
from wamjax.wam.fast_wam.uses import ACT_ONLY, SEEN, uses_of
from wamjax.wam.ladder import Decision, Features, Gate
from wamjax.wam.objectives import check_batch
from wamjax.wam.slots import Role, Slot, factorization
from wamjax.wam.uses import Use, use

Batch = dict[str, Array]
Params = dict[str, Any]

VALUE = Slot("value", "value", "value")


def uses_with_judge(variant: str) -> tuple[Use, Use]:
    """Returns the uses (acting, judging) of a variant, whose table gets a row: of the present
    groups, the value sees those that actions see, and the actions."""
    visibility = uses_of(variant)[0].visibility  # over all its groups
    rows = {g: " ".join(visibility.keys(g)) for g in visibility.groups}
    judge_table = table(f"{visibility.name}_judge", rows | {"value": "first action value"})
    absent = {g: Role.ABSENT for g in visibility.groups if g not in ("first", "action")}
    roles = {"first": Role.GIVEN, **absent, "action": Role.GIVEN, "value": Role.PREDICTED}
    return use(ACT_ONLY, judge_table), use(factorization("judge", **roles), judge_table)


class Denoisers(NamedTuple):
    """Holds one network twice, to propose chunks and to value them."""

    act: Denoiser
    judge: Denoiser


@dataclasses.dataclass(frozen=True)
class JudgedFastWAM(FastWAM):
    """Adds a judge to a variant that acts directly; only judge and gate are trained.

    Attributes:
      branches: proposals per state in a training example (n).
      rungs: proposals on each rung of the ladder.
      rung_modes: mode of the proposals that each rung adds; () is "direct" for all.
      discount: discount of the return, per control step.
      ranking: weight of the differences between proposals of a state.
    """

    branches: int = 8
    rungs: tuple[int, ...] = (1, 4, 8)
    rung_modes: tuple[str, ...] = ()
    discount: float = 0.9
    ranking: float = 1.0
    judges: ClassVar[bool] = True
    denoises: ClassVar[bool] = False

    @property
    def uses(self) -> tuple[Use, ...]:
        """Returns the use that is trained."""
        return (uses_with_judge(self.variant)[1],)

    @property
    def modes(self) -> tuple[str, ...]:
        """Returns the modes in which it can act, the default first; "plan:N" with any N."""
        return (*super().modes, "plan", "adaptive")

    @property
    def imagines(self) -> bool:
        """Returns False: the original policy may predict video, but parts that only video needs are
        not kept here."""
        return False

    # ---- training ----

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of a batch of states, each with its branches."""
        b, n = batch_size, self.branches
        windows = self._windows(b)
        spec = {k: windows[k] for k in (self.codec.key, self._told(), "proprio")}
        frames = spec[self.codec.key]
        shape = (b, 1, *frames.shape[2:])
        spec[self.codec.key] = jax.ShapeDtypeStruct(shape, frames.dtype)
        shapes = {
            "actions": ((b, n, self.chunk, self.action_dim), jnp.float32),
            "success": ((b, n), jnp.float32),
            "steps": ((b, n), jnp.float32),
            "gate": ((b,), jnp.bool_),
        }
        return spec | {k: jax.ShapeDtypeStruct(*s) for k, s in shapes.items()}

    def init(self, rng: Array) -> Params:
        """Returns new parameters of the policy, the judge and the gate."""
        params = super().init(rng)
        width = self.network.heads * self.network.head_dim
        blank = Features(jnp.zeros((1, width)), jnp.zeros((1, 4 + len(self.rungs))))
        gate = self._gate().init(jax.random.fold_in(rng, 2), blank)
        return params | {"gate": gate["params"]}

    def loss(
        self, params: Params, batch: Batch, rng: Array, average: Params | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Computes the loss of judge and gate.

        Returns:
          (loss, metrics): "loss_value" the squared error, "loss_ranking" that of differences
            between branches of a state, "loss_gate", and "agreement", the correlation of values and
            returns within a state, over states whose branches differ.
        """
        del average
        check_batch(batch, self.batch_spec)
        net = self._denoisers(params, self.network.constrain)
        first = self._encode(params, batch)
        conditions = self.bind(params, self.network.constrain)
        contexts = conditions("conditions", self._condition(batch)).contexts
        cache = self._cache(net, first, contexts)
        values = self._judge(net, self._for_each(cache, self.branches), batch["actions"])
        returns = batch["success"] * self.discount ** batch["steps"]
        error = values - returns
        difference = error - jnp.mean(error, axis=1, keepdims=True)
        n = self.branches
        judge_mask, gate_mask = ~batch["gate"], batch["gate"]
        value = _mean(jnp.mean(error**2, axis=1), judge_mask)
        ranking = _mean(jnp.sum(difference**2, axis=1) / max(n - 1, 1), judge_mask)
        gate = _mean(self._gate_error(params, cache, batch, values, returns, rng), gate_mask)
        metrics = {
            "loss_value": value,
            "loss_ranking": ranking,
            "loss_gate": gate,
            "agreement": within(values, returns, judge_mask),
            "agreement_unseen": within(values, returns, gate_mask),
        }
        return value + self.ranking * ranking + gate, metrics

    def _gate_error(self, params, cache, batch, values, returns, rng) -> Float[Array, " b"]:
        """Computes the mean squared error of the gate's predicted benefits, on shuffled branches:
        the order of branches that are generated alike is arbitrary."""
        order = ladders.shuffled(rng, self._ways, len(values))
        values = jnp.take_along_axis(jax.lax.stop_gradient(values), order, axis=1)
        returns = jnp.take_along_axis(returns, order, axis=1)
        proposals = jnp.take_along_axis(batch["actions"], order[:, :, None, None], axis=1)
        same_way = [i for i, way in enumerate(self._ways) if way == self._ways[0]]
        outcomes = ladders.outcomes(self.rungs, values, returns, same_way)
        benefits = self._benefits(params, _pooled(cache), proposals, values)
        errors = [
            ((benefits[:, h] - (outcomes - outcomes[:, h : h + 1])) ** 2)[:, h + 1 :]
            for h in range(len(self.rungs) - 1)
        ]
        return jnp.mean(jnp.concatenate(errors, axis=1), axis=1)

    def _benefits(self, params, pooled, proposals, values) -> Float[Array, "b h r"]:
        """Returns the gate's predictions on each rung but the last, for normalised proposals."""
        out = []
        for h, n in enumerate(self.rungs[:-1]):
            features = ladders.features(h, len(self.rungs), pooled, proposals[:, :n], values[:, :n])
            out.append(self._gate().apply({"params": params["gate"]}, features))
        return jnp.stack(out, axis=1)

    # ---- acting ----

    def policy(
        self, params, normalizers, observation, rng, mode=None, noise=None, prefix=None, costs=None
    ) -> Float[Array, "b j a"]:
        """Acts like `FastWAM.policy`, with further modes.

        Args:
          mode: "direct", "plan:N" (the judge's best of N; "plan" has as many as the ladder), or
            "adaptive".
          costs: cost of each rung, in units of the return, (r,) or (b, r); for mode "adaptive".
        """
        mode = mode or self.modes[0]
        self.check_mode(mode)
        if mode.partition(":")[0] in super().modes:
            return super().policy(params, normalizers, observation, rng, mode, noise, prefix)
        for name, argument in (("noise", noise), ("a prefix", prefix)):
            if argument is not None:
                raise ValueError(f"mode {mode!r} of {self.variant} with a judge takes no {name}")
        return self.decide(params, normalizers, observation, rng, mode, costs).actions

    def decide(
        self,
        params: Params,
        normalizers: dict[str, Any],
        observation: Batch,
        rng: Array,
        mode: str | None = None,
        costs: Float[Array, " r"] | Float[Array, "b r"] | None = None,
        gate: Callable | None = None,
    ) -> Decision:
        """Returns the decision behind `policy`; actions and proposals in robot units.

        Args:
          costs: cost of each rung, in units of the return; None: time is free.
          gate: ``gate(rung, proposals, values)`` instead of the learned gate, see `ladder.climb`.

        Raises:
          ValueError: there is no such mode, or there is not one cost per rung.
        """
        kind, count = self._mode(mode)
        rungs = self.rungs if kind == "adaptive" else (count,)
        net = self._denoisers(params)
        first, contexts = self._observe(params, normalizers, observation)
        cache = self._cache(net, first, contexts)
        pooled = _pooled(cache)
        if kind == "adaptive" and gate is None:
            costs = jnp.zeros(len(rungs)) if costs is None else costs
            if costs.shape[-1:] != (len(rungs),):
                raise ValueError(f"mode 'adaptive' needs one cost for each of its {len(rungs)} "
                                 f"rungs, not costs of shape {costs.shape}")  # fmt: skip

            def gate(rung, proposals, values):
                features = ladders.features(rung, len(rungs), pooled, proposals, values)
                benefit = self._gate().apply({"params": params["gate"]}, features)
                return ladders.pays(rung, benefit, costs)

        base_mode = mode if kind in super().modes else "direct"
        ways = self._rung_modes if kind == "adaptive" else (base_mode or "direct",)

        def propose(rung: int, future: Array):
            start, stop = (0, *rungs)[rung : rung + 2]
            action_cache, future = self._seen(net, cache, first, ways, rung, future)
            chunks = self._propose(net, action_cache, first, rng, start, stop)
            return chunks, self._judge(net, self._for_each(cache, stop - start), chunks), future

        future = self._start(first, rng, ways)
        decision = ladders.climb(len(rungs), propose, gate, future)
        inverse = normalizers["actions"].inverse
        return decision._replace(
            actions=inverse(decision.actions), proposals=inverse(decision.proposals)
        )

    def propose(
        self, params: Params, normalizers, observation: Batch, rng: Array, count: int, mode=None
    ) -> Float[Array, "b n j a"]:
        """Returns several chunks, see `Policy.propose`; all on one cache, and on one future if the
        mode imagines."""
        way, steps = self.way(mode or "direct")
        net = self._denoisers(params)
        first, contexts = self._observe(params, normalizers, observation)
        cache = self._cache(net, first, contexts)
        ways = (f"imagine:{steps}" if way == "imagine" else way,)
        action_cache, _ = self._seen(net, cache, first, ways, 0, self._start(first, rng, ways))
        return normalizers["actions"].inverse(
            self._propose(net, action_cache, first, rng, 0, count)
        )

    def value(
        self, params: Params, normalizers, observation: Batch, proposals: Float[Array, "b n j a"]
    ) -> Float[Array, "b n"]:
        """Returns the judge's predicted return of chunks in robot units."""
        return self._valued(params, normalizers, observation, proposals)[0]

    def benefits(
        self, params: Params, normalizers, observation: Batch, proposals: Float[Array, "b n j a"]
    ) -> Float[Array, "b h r"]:
        """Returns predicted benefits, see `Policy.benefits`; entries with r <= h have no
        meaning."""
        values, chunks, cache = self._valued(params, normalizers, observation, proposals)
        return self._benefits(params, _pooled(cache), chunks, values)

    def _valued(self, params: Params, normalizers, observation: Batch, proposals):
        """Returns (values, normalised proposals, the cache of the observation)."""
        net = self._denoisers(params)
        first, contexts = self._observe(params, normalizers, observation)
        cache = self._cache(net, first, contexts)
        chunks = normalizers["actions"].forward(proposals)
        values = self._judge(net, self._for_each(cache, proposals.shape[1]), chunks)
        return values, chunks, cache

    def expect(self, params, normalizers, observation, rng, mode=None, noise=None):
        """Returns the predicted return, see `Policy.expect`."""
        if noise is not None:
            raise ValueError("expect samples its own noise: give a key, not noise")
        decision = self.decide(params, normalizers, observation, rng, mode or "plan:1")
        best = jnp.take_along_axis(decision.values, decision.chosen[:, None], axis=1)[:, 0]
        return jnp.clip(best, 0.0, 1.0)

    # ---- parts ----

    @property
    def rows(self) -> dict[str, int]:
        """Returns the levels per group, see `FastWAM.rows`; the value has one."""
        return super().rows | {"value": 1}

    def check_mode(self, mode: str | None) -> None:
        """Checks a mode, see `Policy.check_mode`."""
        kind, colon, number = (mode or self.modes[0]).partition(":")
        if kind in super().modes:
            return super().check_mode(mode)
        if kind == "adaptive":
            if colon:
                ladders.terms(mode)
            return None
        if kind != "plan" or (colon and not (number.isdecimal() and int(number))):
            modes = ", ".join(super().modes)
            raise ValueError(f"this policy acts in modes {modes}, plan, plan:N (the best of N "
                             "proposals), adaptive:PRICE (of a millisecond) and "
                             f"adaptive:PRICE:BUDGET (in milliseconds), not {mode!r}"
                             f"{did_you_mean(kind, self.modes)}")  # fmt: skip

    def _mode(self, mode: str | None) -> tuple[str, int]:
        """Splits a mode into (name, number of proposals)."""
        self.check_mode(mode)
        kind, _, number = (mode or self.modes[0]).partition(":")
        if kind == "plan":
            return kind, int(number or self.rungs[-1])
        return kind, 1

    def _clean(self, params: Params, batch: Batch) -> dict[str, Array]:
        size = batch["proprio"].shape[0]
        return super()._clean(params, batch) | {"value": jnp.zeros((size, 1, 1))}

    def _gate(self) -> Gate:
        return Gate(len(self.rungs))

    def _denoisers(self, params: Params, constrain: Callable = unconstrained) -> Denoisers:
        """Returns the network under the tables of acting and of judging."""
        uses = uses_with_judge(self.variant)
        return Denoisers(*(self._denoiser(params, use, constrain) for use in uses))

    def _cache(self, net: Denoisers, first: Array, contexts: Batch) -> Cache:
        """Computes the cache of an observation, which serves all of its proposals."""
        return net.judge.prefill({"first": first}, contexts, ("action", "value"))[0]

    @property
    def _rung_modes(self) -> tuple[str, ...]:
        return self.rung_modes or ("direct",) * len(self.rungs)

    @property
    def _ways(self) -> tuple[str, ...]:
        """Returns how each branch is generated."""
        return ladders.ways(self.rungs, self.rung_modes, self.branches)

    def _start(self, first: Array, rng: Array, ways: Sequence[str]) -> Array:
        """Returns the initial noise of a future; a scalar zero if none of the ways imagines."""
        if not any(self.way(way)[0] == "imagine" for way in ways):
            return jnp.zeros(())
        return self._noise("future", first, noises.proposal(rng, 0), None)

    def _seen(
        self, net: Denoisers, cache: Cache, first: Array, ways: Sequence[str], rung: int,
        future: Array,
    ) -> tuple[Cache, Array]:  # fmt: skip
        """Returns (the cache that actions of a rung see, the future as far as it is imagined by
        then).

        Args:
          ways: way of acting of each rung.
          future: from the rungs below.
        """
        way, steps = self.way(ways[rung])
        if way == "direct":
            return cache, future
        if way == "imagine":
            below = [self.way(w) for w in ways[:rung]]
            first_step = max((n for w, n in below if w == "imagine"), default=0)
            schedule = {"future": self.levels_of("future")[first_step : steps + 1]}
            if steps > first_step:
                initial = {"future": future}
                samples, _ = net.act.sample({}, initial, schedule, {}, cache, self.solver)
                future = samples["future"].astype(future.dtype)
        given = {SEEN[way]: future if way == "imagine" else self._nothing(first)}
        return net.act.prefill(given, {}, ("action",), cache, self._levels(way, steps))[0], future

    def _propose(
        self, net: Denoisers, cache: Cache, first: Array, rng: Array, start: int, stop: int
    ) -> Float[Array, "b n j a"]:
        """Returns normalised chunks number `start` to `stop` of each state, (b, n, j, a)."""
        b, n = first.shape[0], stop - start
        keys = [noises.proposal(rng, i) for i in range(start, stop)]
        noise = jnp.stack([self._noise("action", first, key, None) for key in keys], axis=1)
        samples, _ = net.act.sample(
            {}, {"action": noise.reshape(b * n, *noise.shape[2:])},
            {"action": self.process_of("action").schedule(self.steps)}, {},
            self._for_each(cache, n), self.solver,
        )  # fmt: skip
        return at_least_float32(samples["action"]).reshape(b, n, self.chunk, self.action_dim)

    def _judge(
        self, net: Denoisers, cache: Cache, chunks: Float[Array, "b n j a"]
    ) -> Float[Array, "b n"]:
        """Returns values of normalised chunks; `cache` holds the state of each chunk."""
        b, n = chunks.shape[:2]
        flat = chunks.reshape(b * n, *chunks.shape[2:])
        initial = {"value": jnp.zeros((b * n, 1, 1))}
        one_step = {"value": np.array([1.0, 0.0])}
        samples, _ = net.judge.sample({"action": flat}, initial, one_step, {}, cache)
        return at_least_float32(samples["value"]).reshape(b, n)

    @staticmethod
    def _for_each(cache: Cache, count: int) -> Cache:
        """Repeats the cache of every state for its `count` chunks; the batch axis is the fourth
        from the end, with or without stacked layers."""
        return jax.tree.map(lambda x: jnp.repeat(x, count, axis=x.ndim - 4), cache)


def within(
    values: Float[Array, "b n"], returns: Float[Array, "b n"], mask: Array
) -> Float[Array, ""]:
    """Returns the correlation of values and returns within a state, averaged over states whose
    returns differ; NaN if there are none."""
    x, y = (z - jnp.mean(z, axis=1, keepdims=True) for z in (values, returns))
    scale = jnp.sqrt(jnp.sum(x**2, axis=1) * jnp.sum(y**2, axis=1))
    varies = mask & (jnp.sum(y**2, axis=1) > 0)
    correlation = jnp.sum(x * y, axis=1) / jnp.maximum(scale, 1e-9)
    return jnp.sum(jnp.where(varies, correlation, 0)) / jnp.sum(varies)


def _mean(x: Float[Array, " b"], mask: Array) -> Float[Array, ""]:
    return jnp.sum(jnp.where(mask, x, 0)) / jnp.maximum(jnp.sum(mask), 1)


def _pooled(cache: Cache) -> Float[Array, "b d"]:
    """Returns the attention values of the first frame in the last layer, averaged over the
    picture."""
    last = cache.tokens["first"][1][-1]  # (b, heads, tokens, k), stacked or of a list
    mean = jnp.mean(at_least_float32(last), axis=2)
    return jax.lax.stop_gradient(mean.reshape(mean.shape[0], -1))
