"""Plans with Cosmos Policy: best of N action chunks, scored by imagined futures.

    N proposals of the policy, each with its own noise             steps network calls
    M futures of each, by the world model                          future_steps
    K values of each future, by the value function                 value_steps

Copies form a batch: 10 + 5 + 5 calls instead of 8 (10 + 3 (5 + 5 5)). With more depth, each
imagined future becomes the present, including proprioception, and all of its branches continue.
World model and value function may come from another checkpoint than the policy, fine-tuned on the
policy's rollouts. With a value function Q(s, a) there are no futures.

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
SUCCESS = 0.05  # a value above it predicts success


@dataclasses.dataclass(frozen=True)
class Planning:
    """Holds the options of planning.

    Attributes:
      proposals, futures, values: N, M and K.
      future_steps, value_steps: network calls per future and per value.
      aggregate: how the M K values of a proposal are aggregated, one of `AGGREGATES`.
      depth: number of chunks to imagine.
      over_depth: how several depths are combined, one of `OVER_DEPTH`.
      limit: samples per network call, to bound memory; 0 = all.
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
        for key, choices in (("aggregate", AGGREGATES), ("over_depth", OVER_DEPTH)):
            value = getattr(self, key)
            if value not in choices:
                raise ValueError(f"objective.plan.{key} {value!r} is not one of {choices}"
                                 f"{did_you_mean(value, choices)}")  # fmt: skip
        for key in ("proposals", "futures", "values", "future_steps", "value_steps", "depth"):
            if getattr(self, key) < 1:
                raise ValueError(f"objective.plan.{key} {getattr(self, key)} must be positive")


class Plan(NamedTuple):
    """Holds the result of planning.

    Attributes:
      actions: the chosen chunk, normalised.
      scores: scores of all proposals.
      values: values behind the last scores, M K per proposal.
      chosen: index of the best proposal; the first one if there is a tie.
      proposals: all chunks, normalised.
    """

    actions: Float[Array, "b j a"]
    scores: Float[Array, "b n"]
    values: Float[Array, "b n s"]
    chosen: Int[Array, " b"]
    proposals: Float[Array, "b n j a"]


Noise = Sequence[Mapping[str, Array]]


def noise_shapes(policy, count: int) -> list[dict[str, tuple[int, ...]]]:
    """Returns the noise shapes of a plan for `count` observations: use -> (n, b, t, h, w, c), by
    depth.

    The n are N proposals (one per branch at larger depth), N M futures and N M K values. Branches
    of the same proposal are neighbours, and so are values of the same branch.
    """
    options, (act, predict, judge) = policy.planning, policy.uses
    blind = model_free(judge)
    branches = options.proposals * (1 if blind else options.futures)
    shape = count, len(policy.layout), *policy.latent
    return [
        {act.name: (branches if depth else options.proposals, *shape)}
        | ({} if blind else {predict.name: (branches, *shape)})
        | {judge.name: (branches * options.values, *shape)}
        for depth in range(options.depth)
    ]


def draw_noise(policy, count: int, rng: Array) -> list[dict[str, Array]]:
    """Draws standard normals of these shapes, the same as `plan` draws from the same key."""
    keys = iter(jax.random.split(rng, 3 * policy.planning.depth))
    return [
        {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
        for shapes in noise_shapes(policy, count)
    ]


def plan(
    policy, params, normalizers, observation, rng: Array | None, noise: Noise | None = None
) -> Plan:
    """Plans the actions of an observation, in one jittable program.

    Args:
      policy: a `CosmosPolicy`; its `planning` holds the options.
      params: parameters of the policy; those of a separate planner are in ``params["planner"]``.
      normalizers, observation: see `CosmosPolicy.policy`.
      noise: starting point instead of draws from `rng`, see `noise_shapes`.
    """
    options, layout = policy.planning, policy.layout
    act, predict, judge = policy.uses
    blind = model_free(judge)
    futures = 1 if blind else options.futures
    planner = params.get("planner", params)
    seen = policy.observe(params, normalizers, observation)
    text = policy.read(planner, observation) if "planner" in params else seen.text
    if noise is not None:
        _check_noise(noise, noise_shapes(policy, seen.latents.shape[0]))
    keys = iter([None] * 3 * options.depth if rng is None else noises.split(rng, 3 * options.depth))

    def run(params, use, latents, text, steps, depth):
        override = None if noise is None else noise[depth][use.name]
        initial = noises.start(override, next(keys), latents.shape, axis=1)
        sampler = policy.sampler(params)
        return _batched(lambda *x: sampler(use, *x, steps), latents, text, initial, options.limit)

    start = _copies(seen.latents[None], options.proposals)
    samples = run(params, act, start, seen.text, policy.steps, 0)
    proposals = _each(lambda x: injection.extract(layout, x, "action"), samples)
    branches, scores = _copies(samples, futures), []
    for depth in range(options.depth):
        if depth:
            present = _each(_carry(layout), branches)
            branches = run(planner, act, present, text, policy.steps, depth)
        if not blind:
            branches = run(planner, predict, branches, text, options.future_steps, depth)
        copies = _copies(branches, options.values)
        value_latents = run(planner, judge, copies, text, options.value_steps, depth)
        values = _each(lambda x: injection.read_value(layout, x), value_latents)
        values = jnp.moveaxis(values.reshape(options.proposals, -1, values.shape[-1]), 2, 0)
        scores.append(aggregate(values, options.aggregate, "zero_minority" in policy.compat))
    total = scores[-1] if options.over_depth == "last" else sum(scores) / options.depth
    best = jnp.argmax(total, axis=1)
    proposals = jnp.moveaxis(proposals, 0, 1)
    actions = jnp.take_along_axis(proposals, best[:, None, None, None], axis=1)[:, 0]
    return Plan(actions, total, values, best, proposals)


def aggregate(
    values: Float[Array, "... s"], how: str, zero_minority: bool = False
) -> Float[Array, "..."]:
    """Aggregates several values in [0, 1] to one score.

    Args:
      how: "mean"; "lcb", the mean minus one sample standard deviation, as published (for a single
        value that deviation is 0 here and NaN there); "success_vote", the share of values that
        predict success; "majority_mean", the mean of the values that predict success if they are at
        least half, otherwise of the others.
      zero_minority: in the latter case return 0, as in the public code.
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
    """Bounds the memory of one sample while the network runs, without the parameters.

    The bound is the peak of a layer, in float32: logits and weights of the attention, or the hidden
    units, plus the residual stream, queries, keys, values and the modulation of three sub-layers.
    """
    h, w, _ = network.latent
    tokens = slots * (h // network.patch) * (w // network.patch)
    spec, inner = network.video_spec, network.heads * network.head_dim
    attention = 2 * network.heads * tokens**2
    stream = tokens * (2 * spec.width + 4 * inner)
    return 4 * (stream + max(attention, 2 * tokens * spec.ffn) + 9 * slots * spec.width)


def _check_noise(noise: Noise, shapes: list[dict[str, tuple[int, ...]]]) -> None:
    """Raises ValueError if the noise does not have these shapes; names the entry."""
    if len(noise) != len(shapes):
        raise ValueError(f"noise has depth {len(noise)}, the plan has depth {len(shapes)}")
    for depth, (actual, expected) in enumerate(zip(noise, shapes, strict=True)):
        if set(actual) != set(expected):
            raise ValueError(
                f"noise[{depth}] has entries {sorted(actual)}, the plan needs {sorted(expected)}"
            )
        for name, shape in expected.items():
            if actual[name].shape != shape:
                raise ValueError(
                    f"noise[{depth}][{name!r}] has shape {actual[name].shape}, "
                    f"the plan needs {shape}"
                )


def _carry(layout: Layout):
    """Returns a function that turns a future into the present: copies its pictures and writes its
    proprioception."""

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
    """Repeats each of the n entries `count` times, next to each other."""
    return jnp.repeat(x, count, axis=0)


def _each(function, x: Array) -> Array:
    """Applies a function of batches to (n, b, ...)."""
    out = function(x.reshape(-1, *x.shape[2:]))
    return out.reshape(*x.shape[:2], *out.shape[1:])


def _batched(function, latents: Array, text: Cache, noise: Array, limit: int) -> Array:
    """Applies ``function(latents, text, noise)`` to (n, b, ...), at most `limit` samples at a time.

    Results do not depend on the limit: the noise is drawn before.
    """
    n, b = latents.shape[:2]
    total = n * b
    calls = -(-total // limit) if limit else 1
    size = -(-total // calls)

    def call(inputs):
        first, second, sample = inputs
        # The batch axis of keys and values is the fourth from the end, with or without stacked
        # layers; all n samples of an observation read the same text.
        read = jax.tree.map(lambda x: jnp.take(x, sample % b, axis=x.ndim - 4), text)
        return function(first, read, second)

    flat = [x.reshape(total, *x.shape[2:]) for x in (latents, noise)]
    if calls == 1:
        return call((*flat, jnp.arange(total))).reshape(latents.shape)
    # The last call is filled up with copies of the last sample, whose results are dropped.
    indices = jnp.minimum(jnp.arange(calls * size), total - 1).reshape(calls, size)
    outputs = jax.lax.map(call, (flat[0][indices], flat[1][indices], indices))
    return outputs.reshape(-1, *outputs.shape[2:])[:total].reshape(latents.shape)
