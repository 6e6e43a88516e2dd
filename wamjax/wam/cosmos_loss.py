"""What Cosmos Policy is trained on: the latents of a batch, and the errors of every slot.

The public loss is EDM's, 10 w(sigma) |x0 - D|^2 with w = ((1 + sigma) / sigma)^2, and equals the
squared error of the velocity times 10, which is how it is computed here (specification, 5.3).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wamjax.models.layers import at_least_float32
from wamjax.wam import clips, injection
from wamjax.wam import cosmos_programs as programs
from wamjax.wam.augment import STRENGTHS, augment
from wamjax.wam.cosmos_sampling import join, masked, split
from wamjax.wam.losses import in_order
from wamjax.wam.objectives import bound_codec
from wamjax.wam.slots import Role, levels

Batch = dict[str, Array]


class Errors(NamedTuple):
    """Of every slot of every example; the examples may come in another order than in the batch.

    Attributes:
      velocity: mean squared error of the velocity.
      l1: mean absolute error of x0.
      weight: of the slot in the loss; 0 where it has none.
      use: index of the use that the example trains.
      at: which example of the batch it is.
    """

    velocity: Float[Array, "b t"]
    l1: Float[Array, "b t"]
    weight: Float[Array, "b t"]
    use: Int[Array, " b"]
    at: Int[Array, " b"]


class Draw(NamedTuple):
    """All that the loss of a batch depends on, beside the parameters; see `wamjax.wam.losses`.

    Attributes:
      clean: latents of all slots.
      noise: standard normal.
      level: of the process, one for each example.
      use: index of the use that each example trains.
      rollout: examples that are not to be imitated.
      text: what the instruction is told by, see `CosmosPolicy.text`.
      order: the columns of each row of the batch by their use (`cosmos_programs.ordered`), read
        under a visibility that differs between uses; each use is in every row as often as
        `CosmosPolicy.mix` says. None where uses were drawn by coins.
    """

    clean: Float[Array, "b t h w c"]
    noise: Float[Array, "b t h w c"]
    level: Float[Array, "b 1"]
    use: Int[Array, " b"]
    rollout: Bool[Array, " b"]
    text: Batch
    order: Int[Array, "r p"] | None


def draw(objective, params, batch: Batch, keys: dict[str, Array], level: Array) -> Draw:
    """Of a batch, at one noise level (b, 1) for each example.

    Args:
      objective: a `CosmosPolicy`.
      keys: for "assign", "noise" and "augment".
    """
    o = objective
    clean = targets(o, params, batch, keys["augment"])
    noise = jax.random.normal(keys["noise"], clean.shape)
    if "tossed_mix" in o.compat:
        use, order = programs.toss(keys["assign"], o.mix, batch["rollout"]), None
    else:
        use, order = programs.assign(keys["assign"], o.mix, batch["rollout"])
    return Draw(clean, noise, level, use, batch["rollout"], o.text(batch), order)


def denoising_loss(objective, params, draw: Draw) -> Errors:
    """Errors of every slot, without chance."""
    o, names = objective, ("clean", "noise", "level", "use", "rollout")
    part = {k: getattr(draw, k) for k in names} | draw.text
    part["at"] = jnp.arange(draw.use.shape[0])
    if o.visibility == "bidirectional":  # one table, so all uses go through the network together
        return _errors(o, params, o.tables[0], part)
    parts = zip(o.tables, _regroup(part, draw.order, o.mix), strict=True)
    found = [_errors(o, params, table, part) for table, part in parts]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *found)


def errors(objective, params, batch: Batch, keys: dict[str, Array], level: Array) -> Errors:
    """The errors of a `draw`."""
    return denoising_loss(objective, params, draw(objective, params, batch, keys, level))


def example_losses(objective, found: Errors, scale: float) -> dict[str, Array]:
    """Of every example of the batch: "loss" (b,), whose mean is the loss, "use" (b,), and the parts
    of it that each slot has, "slots" (b, t), which sum to it."""
    slots = scale * found.weight * found.velocity / found.weight.shape[1]
    rows = {"loss": jnp.sum(slots, axis=1), "slots": slots, "use": found.use}
    return {name: in_order(x, found.at) for name, x in rows.items()}


def metrics(objective, found: Errors, scale: float) -> dict[str, Array]:
    """Means over the examples of each use; NaN for a use that no example trains.

    Returns:
      loss_USE, which weighted by the shares of the uses sum to the loss; for slots that have a loss
      velocity/USE/SLOT, the mean squared error, and l1/USE/SLOT, that of x0 in absolute value.
    """
    out, layout = {}, objective.layout
    has_loss = programs.trained(layout, objective.uses, objective.auxiliary)
    total = scale * jnp.mean(found.weight * found.velocity, axis=1)
    for i, use in enumerate(objective.uses):
        mine = (found.use == i) & jnp.any(found.weight, axis=1)
        count = jnp.sum(mine)

        def mean(x, mine=mine, count=count):
            return jnp.where(count > 0, jnp.sum(jnp.where(mine, x, 0)) / count, jnp.nan)

        out[f"loss_{use.name}"] = mean(total)
        for t, slot in enumerate(layout.names):
            if has_loss[i, t]:
                out[f"velocity/{use.name}/{slot}"] = mean(found.velocity[:, t])
                out[f"l1/{use.name}/{slot}"] = mean(found.l1[:, t])
    return out


def targets(objective, params, batch: Batch, key: Array) -> Float[Array, "b t h w c"]:
    """The clean latents of all slots."""
    o = objective
    images = clips.split(batch["video"], o.widths)
    if o.augment:
        strength = STRENGTHS[o.augment]
        images = {c: augment(key, x, strength) for c, x in images.items()}  # all alike
    latents = clips.encode(o.layout, bound_codec(o.codec, params), images, len(o.layout))
    return injection.inject(o.layout, latents, numbers(o, batch))


def numbers(objective, batch: Batch) -> dict[str, Array]:
    """What is written into the slots of numbers, normalised.

    The last action goes on where an episode ends within the chunk. The value is the return from the
    end of the chunk on: the score, partial or not, discounted by the steps until it is given.
    """
    o = objective
    valid = batch["action_valid"]
    last = jnp.maximum(jnp.sum(valid, axis=1, keepdims=True) - 1, 0)
    at = jnp.minimum(jnp.arange(valid.shape[1]), last)
    score = batch["score"]
    if "erased_scores" in o.compat:
        score = (score > 0).astype(score.dtype)
    returns = score * o.discount ** batch["to_go"]
    out = {
        "action": jnp.take_along_axis(batch["actions"], at[:, :, None], axis=1),
        "value": injection.value_target(returns),
        **{n: batch[n] for n in ("proprio", "future_proprio") if n in o.layout.numbers},
    }
    if "bf16_targets" in o.compat:
        out = {n: x.astype(jnp.bfloat16).astype(x.dtype) for n, x in out.items()}
    return out


def _errors(o, params, table, part: Batch) -> Errors:
    """Errors of examples that go through the network together."""
    use, clean, noise = part["use"], part["clean"], part["noise"]
    role = jnp.asarray(programs.roles(o.layout, o.uses))[use]
    level = levels(role, jnp.broadcast_to(part["level"], role.shape))
    values = masked(o.process.corrupt(clean, noise, level), role == Role.GIVEN)
    net = o.bind(params, o.network.constrain)
    told = split(o.layout, o.told(level))
    outputs = net("evaluate", split(o.layout, values), told, o.text(part), table)
    error = at_least_float32(join(o.layout, outputs)) - o.process.target(clean, noise, level)
    # Rollouts are not imitated: one that there was no better use for has no loss.
    teaches = ~(part["rollout"] & (use == 0))[:, None]
    has_loss = jnp.asarray(programs.trained(o.layout, o.uses, o.auxiliary))[use] & teaches
    weight = jnp.where(jnp.arange(len(o.layout)) == o.layout.index("action"), o.action_weight, 1.0)
    # x0 = x - level velocity, so an error of the velocity is one of x0 times the level.
    l1 = level * jnp.mean(jnp.abs(error), axis=(2, 3, 4))
    velocity = jnp.mean(jnp.square(error), axis=(2, 3, 4))
    return Errors(velocity, l1, has_loss * weight, use, part["at"])


def _regroup(part: Batch, order: Array, mix: tuple[int, ...]) -> list[Batch]:
    """One part for each use, row by row."""
    rows, period = order.shape

    def take(x: Array, chosen: Array) -> Array:
        x = x.reshape(rows, period, *x.shape[1:])
        at = chosen.reshape(*chosen.shape, *[1] * (x.ndim - 2))
        x = jnp.take_along_axis(x, at, axis=1)
        return x.reshape(-1, *x.shape[2:])

    out, start = [], 0
    for count in mix:
        chosen = order[:, start : start + count]
        out.append({k: take(v, chosen) for k, v in part.items()})
        start += count
    return out
