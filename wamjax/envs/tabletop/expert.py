"""Defines a scripted expert, a function of the state alone without memory of phases.

Its phase follows from the geometry that the cameras and the proprioception show, and its speeds are
proportional to the remaining distance, so its behaviour can be learned from pictures. Every task is
a waypoint for the gripper plus open or closed; `_approach` turns a place into a waypoint that comes
down only near the place and rises before it leaves.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wamjax.envs.tabletop import tasks
from wamjax.envs.tabletop.world import BLOCK_HEIGHT, CONTACT, MAX_XY, MAX_Z, State

GAIN = 0.5  # fraction of the remaining distance per step
HOVER, DOWN, UP = 0.42, 0.08, 0.65  # heights: to travel, to work, to retreat or show a block
OPEN, CLOSE = -1.0, 1.0


def expert(state: State, key: Array, noise: Float[Array, ""] | float) -> Float[Array, "4"]:
    """Returns the expert's action; `noise` as in `with_noise`."""
    return with_noise(intention(state), key, noise)


def intention(state: State) -> Float[Array, "4"]:
    """Returns the expert's intended action, a function of the state."""
    waypoint, grip = _plan(state)
    # With this lead the error to a block that the table carries away halves like any other.
    lead = jnp.append(tasks.drift(state)[tasks.target_block(state)] / GAIN, 0.0)
    error = waypoint - state.gripper + lead
    # Rise first while far below the waypoint, so that blocks are lifted over others, not dragged.
    rise_first = jnp.clip(1.4 - error[2] / 0.2, 0.0, 1.0)
    horizontal = _limit(GAIN * error[:2] / MAX_XY) * rise_first
    vertical = jnp.clip(GAIN * error[2] / MAX_Z, -1.0, 1.0)
    return jnp.concatenate([horizontal, jnp.stack([vertical, grip])])


def with_noise(action: Array, key: Array, noise: Float[Array, ""] | float) -> Float[Array, "4"]:
    """Adds white noise of standard deviation `noise`, in action units, to every component.

    0.1 is a slightly shaky hand; 0.5 fails about half the time; 1 nearly always fails.
    """
    return jnp.clip(action + noise * jax.random.normal(key, (4,)), -1.0, 1.0)


def _plan(state: State) -> tuple[Array, Array]:
    """Returns the waypoint (x, y, z) and the grip command of the state's task."""
    block, goal = state.blocks[tasks.target_block(state)], tasks.goal(state)
    plans = (  # in the order of `tasks.Kind`
        (_approach(state, block), OPEN),
        (_approach(state, goal), OPEN),
        _push(state, block, goal),
        _pick(state, block),
        _place(state, block, goal),
    )
    waypoints = jnp.stack([waypoint for waypoint, _ in plans])
    grips = jnp.stack([jnp.asarray(grip, jnp.float32) for _, grip in plans])
    kind = tasks.kind(state)
    return waypoints[kind], grips[kind]


def _push(state: State, block: Array, goal: Array) -> tuple[Array, Array]:
    """Comes down behind the block, as seen from the goal, then drives it there."""
    way, remaining = _direction(goal - block)
    behind, lateral = _along(state.gripper[:2] - block, -way)
    engaged = (
        (state.gripper[2] < BLOCK_HEIGHT)
        & (behind > 0.5 * CONTACT)
        & (behind < 2 * CONTACT)
        & (jnp.linalg.norm(lateral) < 0.4 * CONTACT)
    )
    contact = block - CONTACT * way  # aiming from the ideal contact point also steers sideways
    drive = jnp.append(contact + jnp.minimum(remaining, 0.14) * way, DOWN)
    waypoint = jnp.where(engaged, drive, _approach(state, block - 1.2 * CONTACT * way))
    return jnp.where(tasks.success(state), _above(state), waypoint), CLOSE


def _pick(state: State, block: Array) -> tuple[Array, Array]:
    """Closes the fingers around the block, then lifts."""
    holding = _holding(state)
    grip = jnp.where(holding | _ready_to_close(state, block), CLOSE, OPEN)
    return jnp.where(holding, _above(state), _approach(state, block)), grip


def _place(state: State, block: Array, goal: Array) -> tuple[Array, Array]:
    """Picks, carries the block (not the gripper) over the goal, lowers it, lets go, retreats."""
    holding, done = _holding(state), tasks.success(state)
    carry = _approach(state, state.gripper[:2] + goal - block)
    waypoint = jnp.where(holding, carry, _approach(state, block))
    over_goal = jnp.linalg.norm(goal - block) < 0.07
    release = holding & over_goal & (state.gripper[2] < BLOCK_HEIGHT)
    grip = jnp.where((holding & ~release) | _ready_to_close(state, block), CLOSE, OPEN)
    return jnp.where(done, _above(state), waypoint), jnp.where(done, OPEN, grip)


def _approach(state: State, place: Array) -> Array:
    """Returns a waypoint at `place`: high while far away, coming down as the distance shrinks."""
    distance = jnp.linalg.norm(place - state.gripper[:2])
    far = jnp.clip((distance - 0.03) / 0.2, 0.0, 1.0)
    return jnp.append(place, DOWN + (HOVER - DOWN) * far)


def _above(state: State) -> Array:
    """Returns a waypoint straight above the gripper."""
    return state.gripper.at[2].set(UP)


def _holding(state: State) -> Array:
    return state.held == tasks.target_block(state)


def _ready_to_close(state: State, block: Array) -> Array:
    """Returns whether the gripper is low and centred enough to grip the block."""
    distance = jnp.linalg.norm(block - state.gripper[:2])
    return (state.held < 0) & (distance < 0.05) & (state.gripper[2] < 0.8 * BLOCK_HEIGHT)


def _direction(vector: Array) -> tuple[Array, Array]:
    """Returns unit vector and length."""
    length = jnp.linalg.norm(vector)
    return vector / jnp.maximum(length, 1e-6), length


def _along(vector: Array, way: Array) -> tuple[Array, Array]:
    """Returns the component along the unit vector `way`, and the rest."""
    along = jnp.dot(vector, way)
    return along, vector - along * way


def _limit(vector: Array) -> Array:
    """Limits a vector to unit length."""
    return vector / jnp.maximum(jnp.linalg.norm(vector), 1.0)
