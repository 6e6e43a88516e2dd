"""Planning with Cosmos Policy: best of N action chunks, judged by imagined futures.

    N proposals of the policy, each with noise of its own          steps network calls
    M futures of each, by the world model                          future_steps
    K values of each future, by the value function                 value_steps

Copies are a batch: 10 + 5 + 5 calls instead of 8 (10 + 3 (5 + 5 5)). Deeper, each imagined future
becomes the present, proprioception included, and all of its branches live on. World model and value
function may be of another checkpoint than the policy, fine-tuned on what the policy did. With a
value function Q(s, a) there are no futures.

Source: section 6.4 of the specification; the public ``deploy.py`` and ``cosmos_utils.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wamjax.config import did_you_mean
from wamjax.models.transformer import Cache
from wamjax.wam import noise as noises
from wamjax.wam.cosmos_policy import injection
from wamjax.wam.cosmos_policy.layouts import Layout
from wamjax.wam.cosmos_policy.uses import model_free

AGGREGATES = ("mean", "majority_mean", "lcb", "success_vote")
OVER_DEPTH = ("last", "mean")
SUCCESS = 0.05  # a value above it foresees success


@dataclasses.dataclass(frozen=True)
class Planning:
    """How to plan.

    Attributes:
      proposals, futures, values: N, M and K.
      future_steps, value_steps: network calls for a future and for a value.
      aggregate: of the M K values of a proposal, one of `AGGREGATES`.
      depth: chunks of actions that are imagined.
      over_depth: what counts of several depths, one of `OVER_DEPTH`.
      limit: samples in one call of the network, to bound memory; 0 = all.
    """

    proposals: int = 8
    futures: int = 3
    values: int = 5
    future_steps: int = 5
    value_steps: int = 5
    aggregate: str = "majority_mean"
    depth: int = 1
    over_depth: str = "last"
    limit: int = 0

    def __post_init__(self):
        for key, known in (("aggregate", AGGREGATES), ("over_depth", OVER_DEPTH)):
            value = getattr(self, key)
            if value not in known:
                raise ValueError(f"objective.plan.{key} {value!r} is not one of {known}"
                                 f"{did_you_mean(value, known)}")  # fmt: skip
        for key in ("proposals", "futures", "values", "future_steps", "value_steps", "depth"):
            if getattr(self, key) < 1:
                raise ValueError(f"objective.plan.{key} {getattr(self, key)} must be positive")


class Plan(NamedTuple):
    """What came of planning.

    Attributes:
      actions: the chosen chunk, normalised.
      scores: of all proposals.
      values: that the last scores are made of, M K for each proposal.
      chosen: index of the best proposal; the first of equals.
      proposals: all chunks, normalised.
    """

    actions: Float[Array, "b j a"]
    scores: Float[Array, "b n"]
    values: Float[Array, "b n s"]
    chosen: Int[Array, " b"]
    proposals: Float[Array, "b n j a"]


Noise = Sequence[Mapping[str, Array]]


def noise_shapes(policy, count: int) -> list[dict[str, tuple[int, ...]]]:
    """What a plan for `count` observations starts from: use -> (n, b, t, h, w, c), by depth.

    The n are N proposals (deeper, of every branch one), N M futures and N M K values; branches of
    the same proposal are neighbours, and values of the same branch.
    """
    how, (act, predict, judge) = policy.planning, policy.uses
    blind = model_free(judge)
    branches = how.proposals * (1 if blind else how.futures)
    shape = count, len(policy.layout), *policy.latent
    return [
        {act.name: (branches if depth else how.proposals, *shape)}
        | ({} if blind else {predict.name: (branches, *shape)})
        | {judge.name: (branches * how.values, *shape)}
        for depth in range(how.depth)
    ]


def draw_noise(policy, count: int, rng: Array) -> list[dict[str, Array]]:
    """Standard normals of these shapes: those that `plan` draws of the same key."""
    keys = iter(jax.random.split(rng, 3 * policy.planning.depth))
    return [
        {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
        for shapes in noise_shapes(policy, count)
    ]


def plan(
    policy, params, normalizers, observation, rng: Array | None, noise: Noise | None = None
) -> Plan:
    """Acts by imagining, in one jittable program.

    Args:
      policy: a `CosmosPolicy`; its `planning` says how.
      params: of the policy; those of a separate planner are in ``params["planner"]``.
      normalizers, observation: see `CosmosPolicy.policy`.
      noise: to start from instead of draws of `rng`, see `noise_shapes`.
    """
    how, layout = policy.planning, policy.layout
    act, predict, judge = policy.uses
    blind = model_free(judge)
    futures = 1 if blind else how.futures
    planner = params.get("planner", params)
    seen = policy.observe(params, normalizers, observation)
    text = policy.read(planner, observation) if "planner" in params else seen.text
    if noise is not None:
        _check_noise(noise, noise_shapes(policy, seen.latents.shape[0]))
    keys = iter([None] * 3 * how.depth if rng is None else noises.split(rng, 3 * how.depth))

    def run(params, use, latents, text, steps, depth):
        given = None if noise is None else noise[depth][use.name]
        begin = noises.start(given, next(keys), latents.shape, axis=1)
        sampler = policy.sampler(params)
        return _batched(lambda *x: sampler(use, *x, steps), latents, text, begin, how.limit)

    start = _copies(seen.latents[None], how.proposals)
    acted = run(params, act, start, seen.text, policy.steps, 0)
    proposals = _each(lambda x: injection.extract(layout, x, "action"), acted)
    branches, scores = _copies(acted, futures), []
    for depth in range(how.depth):
        if depth:
            present = _each(_carry(layout), branches)
            branches = run(planner, act, present, text, policy.steps, depth)
        if not blind:
            branches = run(planner, predict, branches, text, how.future_steps, depth)
        judged = run(planner, judge, _copies(branches, how.values), text, how.value_steps, depth)
        values = _each(lambda x: injection.read_value(layout, x), judged)
        values = jnp.moveaxis(values.reshape(how.proposals, -1, values.shape[-1]), 2, 0)
        scores.append(aggregate(values, how.aggregate, "zero_minority" in policy.compat))
    total = scores[-1] if how.over_depth == "last" else sum(scores) / how.depth
    chosen = jnp.argmax(total, axis=1)
    proposals = jnp.moveaxis(proposals, 0, 1)
    actions = jnp.take_along_axis(proposals, chosen[:, None, None, None], axis=1)[:, 0]
    return Plan(actions, total, values, chosen, proposals)


def aggregate(
    values: Float[Array, "... s"], how: str, zero_minority: bool = False
) -> Float[Array, "..."]:
    """One score of several values in [0, 1].

    Args:
      how: "mean"; "lcb", the mean less one standard deviation of a sample, as published (of one
        value it is 0 here, and not a number there); "success_vote", the share that foresees
        success; "majority_mean", the mean of those that do, if they are half or more, else of those
        that do not.
      zero_minority: as in the public code, 0 instead of the latter.
    """
    foresees = values > SUCCESS
    if how == "mean":
        score = jnp.mean(values, axis=-1)
    elif how == "lcb":
        spread = jnp.std(values, axis=-1, ddof=1) if values.shape[-1] > 1 else 0.0
        score = jnp.mean(values, axis=-1) - spread
    elif how == "success_vote":
        score = jnp.mean(foresees, axis=-1)
    else:
        majority = 2 * jnp.sum(foresees, axis=-1, keepdims=True) >= values.shape[-1]
        among = foresees == majority
        score = jnp.sum(values * among, axis=-1) / jnp.sum(among, axis=-1)
        if zero_minority:
            score = jnp.where(majority[..., 0], score, 0)
    return jnp.clip(score, 0, 1)


def sample_bytes(network, slots: int) -> int:
    """A bound on what one sample takes while the network runs, beside the parameters.

    The widest moment of a layer, in float32: logits and weights of the attention, or the hidden
    units, beside the residual stream, queries, keys, values and the modulation of three sub-layers.
    """
    h, w, _ = network.latent
    tokens = slots * (h // network.patch) * (w // network.patch)
    spec, inner = network.video_spec, network.heads * network.head_dim
    attention = 2 * network.heads * tokens**2
    stream = tokens * (2 * spec.width + 4 * inner)
    return 4 * (stream + max(attention, 2 * tokens * spec.ffn) + 9 * slots * spec.width)


def _check_noise(noise: Noise, shapes: list[dict[str, tuple[int, ...]]]) -> None:
    """That noise is of these shapes; ValueError names what is not."""
    if len(noise) != len(shapes):
        raise ValueError(f"noise is of depth {len(noise)}, the plan of depth {len(shapes)}")
    for depth, (given, wanted) in enumerate(zip(noise, shapes, strict=True)):
        if set(given) != set(wanted):
            raise ValueError(
                f"noise[{depth}] is of {sorted(given)}, the plan of {sorted(wanted)}"
            )
        for name, shape in wanted.items():
            if given[name].shape != shape:
                raise ValueError(
                    f"noise[{depth}][{name!r}] is {given[name].shape}, the plan starts from {shape}"
                )


def _carry(layout: Layout):
    """A future becomes the present: its pictures, and its proprioception written anew."""

    def carry(latents: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        out = latents
        for camera, i in layout.decoded.items():
            out = out.at[:, layout.index(camera)].set(latents[:, i])
        if "future_proprio" in layout.numbers:
            state = injection.extract(layout, latents, "future_proprio")
            out = injection.inject(layout, out, {"proprio": state})
        return out

    return carry


def _copies(x: Float[Array, "n b ..."], count: int) -> Float[Array, "m b ..."]:
    """Every one of n becomes `count` neighbours."""
    return jnp.repeat(x, count, axis=0)


def _each(function, x: Array) -> Array:
    """A function of batches on (n, b, ...)."""
    out = function(x.reshape(-1, *x.shape[2:]))
    return out.reshape(*x.shape[:2], *out.shape[1:])


def _batched(function, latents: Array, text: Cache, noise: Array, limit: int) -> Array:
    """``function(latents, text, noise)`` on (n, b, ...), at most `limit` samples together.

    Results do not depend on how many: the noise is drawn before.
    """
    n, b = latents.shape[:2]
    total = n * b
    calls = -(-total // limit) if limit else 1
    together = -(-total // calls)

    def call(inputs):
        first, second, sample = inputs
        # The batch axis of keys and values is the fourth from the end, with or without layers
        # stacked; all of the n read the same text.
        read = jax.tree.map(lambda x: jnp.take(x, sample % b, axis=x.ndim - 4), text)
        return function(first, read, second)

    flat = [x.reshape(total, *x.shape[2:]) for x in (latents, noise)]
    if calls == 1:
        return call((*flat, jnp.arange(total))).reshape(latents.shape)
    # What the last call lacks are copies of the last sample, whose results are dropped.
    at = jnp.minimum(jnp.arange(calls * together), total - 1).reshape(calls, together)
    done = jax.lax.map(call, (flat[0][at], flat[1][at], at))
    return done.reshape(-1, *done.shape[2:])[:total].reshape(latents.shape)
