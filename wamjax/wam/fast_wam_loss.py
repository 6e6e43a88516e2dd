"""What Fast-WAM is trained on: the draws of a batch, the losses of their slots, and their mean.

See `wamjax.wam.losses`. A batch is shared among the programs of a variant, so there is one `Draw`
for each of them. Its groups are those of the network, "cond" being the video that imagine-then-act
is conditioned on, at a level of its own (0 where it is clean); its `use` says which slots are
valid: {"future": (b, t), "action": (b, j)}, and an example without a valid action has none.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wamjax.models.layers import at_least_float32
from wamjax.wam import segments
from wamjax.wam.losses import Draw, SlotLosses, in_order
from wamjax.wam.objectives import bind
from wamjax.wam.slots import Program, Role, levels, loss_mask

Batch = dict[str, Array]
Metrics = dict[str, Array]


def draws(objective, params, batch: Batch, rng: Array) -> tuple[Draw, ...]:
    """One for each program of the variant."""
    size = batch["action_valid"].shape[0]
    numbered = batch | {"at": jnp.arange(size)}
    parts = segments.split(numbered, segments.columns(objective.shares), jax.random.fold_in(rng, 0))
    return tuple(
        draw(objective, params, program, part, jax.random.fold_in(rng, i + 1))
        for i, (program, part) in enumerate(zip(objective.programs, parts, strict=True))
    )


def draw(objective, params, program: Program, batch: Batch, rng: Array) -> Draw:
    """Of the examples of one program."""
    o = objective
    purposes = "future", "action", "cond", "level"
    keys = dict(zip(purposes, jax.random.split(rng, 4), strict=True))
    present, size = program.factorization.present, batch["action_valid"].shape[0]
    latents = o._clean(params, batch)
    clean, noise, level = {g: latents[g] for g in present}, {}, {}
    for i, group in enumerate(program.factorization.groups(Role.PREDICTED)):
        noise[group] = jax.random.normal(keys[group], clean[group].shape)
        key = jax.random.fold_in(keys["level"], i)
        level[group] = flow_of(o, group).sample_level(key, (size, 1))
    if "cond" in present:
        noise["cond"], level["cond"] = o._cond_draw(clean["cond"], keys["cond"])
    text = "instruction" if o.network.vocabulary else "context"
    condition = {k: batch[k] for k in (text, "proprio")}
    at = batch.get("at", jnp.arange(size))
    return Draw(clean, noise, level, o._valid(batch), condition, at)


def denoising_loss(objective, params, program: Program, draw: Draw) -> dict[str, SlotLosses]:
    """Losses of the slots of every group that the program predicts; nothing is left to chance."""
    o, role = objective, roles(objective, program, draw)
    values, level, target = dict(draw.clean), {g: jnp.zeros(r.shape) for g, r in role.items()}, {}
    predicted = program.factorization.groups(Role.PREDICTED)
    for group in predicted:
        flow, noise, clean = flow_of(o, group), draw.noise[group], draw.clean[group]
        level[group] = levels(role[group], draw.level[group])
        values[group] = flow.corrupt(clean, noise, level[group])
        target[group] = flow.target(clean, noise, level[group])
    if "cond" in role:
        tau = draw.level["cond"]
        values["cond"] = o.video_flow.corrupt(draw.clean["cond"], draw.noise["cond"], tau)
        level["cond"] = jnp.broadcast_to(tau[:, None], role["cond"].shape)
    outputs = _velocities(o, params, program, draw.condition, values, level, predicted)
    losses = {}
    for group in predicted:
        error = jnp.square(at_least_float32(outputs[group]) - target[group])
        error = error.mean(axis=tuple(range(2, error.ndim)))
        weight = flow_of(o, group).weight(draw.level[group][:, 0])
        losses[group] = SlotLosses(error, loss_mask(role[group], draw.use[group]), weight)
    return losses


def examples(losses: dict[str, SlotLosses], size: int) -> tuple[Array, Array]:
    """Losses of the video and of the actions of every example, (b,) each; 0 where there is none."""
    none = jnp.zeros(size)
    video, action = (losses[g].examples() if g in losses else none for g in ("future", "action"))
    return video, action


def total(
    objective, parts: list[tuple[Array, Array, Array]]
) -> tuple[Float[Array, ""], Metrics]:
    """The loss and its metrics.

    Args:
      parts: for each program, losses of video and actions, and which examples have actions.
    """
    metrics = {}
    for program, (_, action, has_action) in zip(objective.programs, parts, strict=True):
        if len(parts) > 1:
            name = program.factorization.name
            count = jnp.maximum(jnp.sum(has_action), 1)
            metrics[f"loss_action/{name}"] = jnp.sum(action) / count
    video, action, labelled = (jnp.concatenate(x) for x in zip(*parts, strict=True))
    video_loss = jnp.mean(video)
    action_loss = jnp.sum(action) / jnp.maximum(jnp.sum(labelled), 1)
    metrics |= {"loss_video": video_loss, "loss_action": action_loss}
    return objective.lambda_video * video_loss + objective.lambda_action * action_loss, metrics


def example_losses(
    objective, parts: list[tuple[Array, Array, Array]], at: Array
) -> dict[str, Array]:
    """The same for every example of the batch: "video", "action" and "loss", (b,) each.

    The mean of "loss" is the loss, so an action counts for as much more as examples lack actions.
    """
    video, action, labelled = (jnp.concatenate(x) for x in zip(*parts, strict=True))
    share = labelled.shape[0] / jnp.maximum(jnp.sum(labelled), 1)
    loss = objective.lambda_video * video + objective.lambda_action * action * share
    rows = {"video": video, "action": action, "loss": loss}
    return {name: in_order(x, at) for name, x in rows.items()}


def roles(objective, program: Program, draw: Draw) -> dict[str, Array]:
    """The role of every slot of every example, (b, slots) for each group that is present."""
    factorization = program.factorization
    slots = {g: objective.slots[g] for g in factorization.present}
    row = factorization.array(slots)
    size = draw.use["action"].shape[0]
    edges = np.cumsum(list(slots.values()))[:-1]
    role = {
        group: jnp.broadcast_to(part, (size, part.size))
        for group, part in zip(slots, np.split(row, edges), strict=True)
    }
    labelled = jnp.any(draw.use["action"], axis=1, keepdims=True)
    return role | {"action": jnp.where(labelled, role["action"], Role.ABSENT)}


def flow_of(objective, group: str):
    """The process of a group."""
    return objective.action_flow if group == "action" else objective.video_flow


def _velocities(o, params, program: Program, condition: Batch, values, level, predicted):
    net = bind(o.network, params, o.network.constrain)
    contexts = net("contexts", o._text(condition), condition["proprio"])
    times = net("times", level)
    return net("__call__", values, times, contexts, program.table, predict=predicted)[0]
