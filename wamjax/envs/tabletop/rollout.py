"""Runs whole episodes as one compiled program: a policy in closed loop, or the expert collecting.

Shapes are static, so an episode that has succeeded is simulated further; its success is latched at
the first step that achieves the task, and later steps do not count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wamjax.envs.joins import SYNC, Join
from wamjax.envs.tabletop import tasks
from wamjax.envs.tabletop.expert import intention, with_noise
from wamjax.envs.tabletop.render import observe
from wamjax.envs.tabletop.shifts import Shift
from wamjax.envs.tabletop.tasks import step
from wamjax.envs.tabletop.world import ACTION_DIM, State, proprio
from wamjax.envs.world import SETTLE

MAX_STEPS = 40  # control steps within which the expert almost always succeeds
DISCOUNT = 0.98
NO_SHIFT = Shift.none()


class Outcome(NamedTuple):
    """Holds the outcome of an episode: sparse success, latched."""

    success: Bool[Array, " e"]
    steps: Int[Array, " e"]  # actions until success; the episode's length where it failed
    rewards: Float[Array, "e t"]  # 1 for the action that achieves the task, else 0
    returns: Float[Array, "e t"]  # discounted sum of the rewards from each step on


class Rollout(NamedTuple):
    """Holds closed-loop episodes of a policy."""

    success: Bool[Array, " e"]
    steps: Int[Array, " e"]
    rewards: Float[Array, "e t"]
    returns: Float[Array, "e t"]
    actions: Float[Array, "e t 4"]  # as the policy sent them
    proprio: Float[Array, "e t+1 5"]
    states: State  # leading axes (e, t + 1); frames: render_episodes(states, shift)
    extras: Any  # whatever else the policy returned, leading axes (plans, e), or None


class Episodes(NamedTuple):
    """Holds expert episodes, padded to one length; steps beyond `length` are simulated but not
    data."""

    success: Bool[Array, " e"]
    steps: Int[Array, " e"]
    length: Int[Array, " e"]  # actions in the episode: until a few steps after success
    rewards: Float[Array, "e t"]
    returns: Float[Array, "e t"]
    actions: Float[Array, "e t 4"]  # as executed, noise included
    intended: Float[Array, "e t 4"]  # the expert's actions without noise
    proprio: Float[Array, "e t+1 5"]
    states: State  # leading axes (e, t + 1); frames: render_episodes(states, shift)


def rollout(
    policy: Callable,
    keys: Array,
    task_ids: Int[Array, " e"],
    shift: Shift,
    told: Mapping[str, Array] | None = None,
    max_steps: int = MAX_STEPS,
    execute: int = 8,
    join: Join = SYNC,
    start: State | None = None,
) -> Rollout:
    """Runs a policy in closed loop, all episodes at once, as one jitted program.

    Args:
      policy: ``policy(observation, keys) -> actions (e, j, 4)``, see `World.roll_out`; images are
        uint8 (e, 64, 64, 3) each.
      keys: (e,) one per episode; they determine the scene, and the policy's keys at each plan.
      task_ids: the task of each episode.
      shift: the dials, shared by all episodes.
      told: further keys of the observation.
      max_steps: steps after which an episode has failed.
      execute: actions executed of each chunk before the policy observes again.
      join: how plans follow each other, and their delay.
      start: states to start from, leading axis e; new scenes by default.

    Raises:
      ValueError: the policy returns fewer actions than `execute`, or actions of another dimension.
    """
    if not isinstance(policy, jax.tree_util.Partial):
        policy = jax.tree_util.Partial(policy)
    task_ids, told = jnp.asarray(task_ids), dict(told or {})
    options = max_steps, execute, join
    return _rollout(policy, keys, task_ids, shift, told, start, *options)


@functools.partial(jax.jit, static_argnames=("max_steps", "execute", "join"))
def _rollout(policy, keys, task_ids, shift, told, start, max_steps, execute, join) -> Rollout:
    def act(states, actions):
        states = jax.vmap(step, (0, 0, None))(states, actions, shift)
        return states, (states, jax.vmap(tasks.success)(states))

    def plan(states, number, committed):
        observation = jax.vmap(observe, (0, None))(states, shift)
        # Derived from the episode's own key, so it does not depend on its neighbours.
        own = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, 1), number))(keys)
        prefix = () if committed is None else (committed,)
        return _checked(policy({**observation, **told}, own, *prefix), len(task_ids), execute)

    def plan_and_act(carry, number):
        states, ahead = carry
        chunk, extras = plan(states, number, join.committed(ahead))
        actions, ahead = join(ahead, chunk, execute)
        actions = jnp.swapaxes(actions, 0, 1)
        states, (visited, achieved) = jax.lax.scan(act, states, actions)
        return (states, ahead), (visited, achieved, actions, extras)

    first = jax.vmap(tasks.reset, (0, 0, None))(keys, task_ids, shift) if start is None else start
    plans = jnp.arange(-(-max_steps // join.span(execute)))
    ahead = join.begin(len(task_ids), join.delay, ACTION_DIM)  # the first plan determines the rest
    if join != SYNC:
        chunk, _ = jax.eval_shape(plan, first, 0, join.committed(ahead))
        join.check(execute, chunk.shape[1])
        ahead = join.begin(*chunk.shape)
    _, (visited, achieved, actions, extras) = jax.lax.scan(plan_and_act, (first, ahead), plans)
    # (plans, execute, e, ...) -> (e, t, ...)
    visited, achieved, actions = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, *x.shape[2:])[:max_steps], 0, 1),
        (visited, achieved, actions),
    )
    states = _prepend(first, visited)
    return Rollout(
        *_outcome(achieved),
        actions=actions,
        proprio=jax.vmap(jax.vmap(proprio))(states),
        states=states,
        extras=extras,
    )


@functools.partial(jax.jit, static_argnames=("max_steps",))
def expert_episodes(
    keys: Array,
    task_ids: Int[Array, " e"],
    noise: Float[Array, " e"] | float,
    max_steps: int = MAX_STEPS,
    shift: Shift = NO_SHIFT,
    mistaken: Bool[Array, " e"] | None = None,
) -> Episodes:
    """Runs episodes of the scripted expert, all at once, as one jitted program.

    Args:
      keys: (e,) one per episode.
      task_ids: the task of each episode.
      noise: standard deviation of the action noise, shared or per episode.
      max_steps: length of the simulation, and of a failed episode.
      shift: the dials, shared by all episodes.
      mistaken: episodes whose expert sees the scene as in `tasks.mistaken`: it stops when it
        believes that it is done, and rarely achieves the task.
    """

    def seen(state, wrong):
        if wrong is None:
            return state
        return jax.tree.map(lambda a, b: jnp.where(wrong, a, b), tasks.mistaken(state), state)

    def act(state, key, noise, wrong):
        intended = intention(seen(state, wrong))
        action = with_noise(intended, key, noise)
        state = step(state, action, shift)
        done = tasks.success(seen(state, wrong))
        return state, (state, tasks.success(state), done, action, intended)

    def episode(key, task, noise, wrong):
        first = tasks.reset(key, task, shift)
        keys = jax.random.split(jax.random.fold_in(key, 1), max_steps)
        _, record = jax.lax.scan(lambda state, key: act(state, key, noise, wrong), first, keys)
        return first, record

    noise = jnp.broadcast_to(jnp.asarray(noise, jnp.float32), task_ids.shape)
    first, record = jax.vmap(episode)(keys, task_ids, noise, mistaken)
    visited, achieved, done, actions, intended = record
    states = _prepend(first, visited)
    outcome = _outcome(achieved)
    end = jnp.minimum(outcome.steps, _outcome(done).steps)
    return Episodes(
        success=outcome.success,
        steps=outcome.steps,
        length=jnp.minimum(end + SETTLE, max_steps),
        rewards=outcome.rewards,
        returns=outcome.returns,
        actions=actions,
        intended=intended,
        proprio=jax.vmap(jax.vmap(proprio))(states),
        states=states,
    )


def _outcome(achieved: Bool[Array, "e t"]) -> Outcome:
    """Latches success at the first step that achieves the task."""
    max_steps = achieved.shape[1]
    success = jnp.any(achieved, axis=1)
    steps = jnp.where(success, jnp.argmax(achieved, axis=1) + 1, max_steps)
    ahead = steps[:, None] - 1 - jnp.arange(max_steps)  # steps from this action to the last one
    rewards = (success[:, None] & (ahead == 0)).astype(jnp.float32)
    returns = jnp.where(success[:, None] & (ahead >= 0), DISCOUNT ** jnp.maximum(ahead, 0), 0.0)
    return Outcome(success, steps, rewards, returns)


def _prepend(first: State, later: State) -> State:
    """Prepends the first state (e, ...) to the others (e, t, ...): (e, t + 1, ...)."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a[:, None], b], axis=1), first, later)


def _checked(result: Any, episodes: int, execute: int) -> tuple[Array, Any]:
    """Returns the policy's (actions, extras) after checking the shape."""
    actions, extras = result if isinstance(result, tuple) else (result, None)
    shape = jnp.shape(actions)
    if len(shape) != 3 or shape[0] != episodes or shape[2] != ACTION_DIM:
        raise ValueError(
            f"the policy returned actions of shape {shape}; the tabletop needs "
            f"({episodes}, chunk, {ACTION_DIM})"
        )
    if shape[1] < execute:
        raise ValueError(
            f"execute={execute} is more than the {shape[1]} actions that the policy plans: lower "
            "config.eval.execute, or train with a longer config.data.chunk"
        )
    return actions, extras
