"""Defines the physics of the tabletop: a gripper, a few blocks, two zones painted on the table.

Units: the table is [-1, 1]^2 with x to the right and y away from the robot; height z is in [0, 1].
One step is 0.1 s. The physics is quasi-static and has five rules:

* The gripper moves by the commanded displacement, at most `MAX_XY` and `MAX_Z` per step, inside
  its workspace. Its fingers open and close by `FINGER_SPEED` per step.
* An open gripper straddles blocks and touches nothing.
* A closed gripper that is low is a disc: a block (a disc too) that it runs into is displaced along
  the contact normal until they just touch. From above it does not enter a block, but rests on it.
* Fingers that close low around a block hold it: it follows the gripper's motion until released,
  and then drops onto the table where it is.
* Blocks do not collide with each other: they may overlap, and they do not stack.

So a block moves only when touched or held. No block can leave the table, because the gripper's
workspace ends `CONTACT` before the edge.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wamjax.envs.tabletop.shifts import Shift

CONTROL_HZ = 10.0
ACTION_DIM, PROPRIO_DIM = 4, 5

COLOURS = ("red", "blue", "green", "magenta", "cyan")  # of block i; the last 2 are distractors
NUM_BLOCKS, NUM_REGULAR = len(COLOURS), 3

MAX_XY, MAX_Z = 0.12, 0.15  # displacement per step of a full-scale action
FINGER_SPEED = 0.5  # of the full opening, per step
WORKSPACE = 0.84  # the gripper stays within |x|, |y| <= WORKSPACE
BLOCK_RADIUS, GRIPPER_RADIUS = 0.09, 0.06
CONTACT = BLOCK_RADIUS + GRIPPER_RADIUS  # distance between centres at which gripper and block touch
GRASP = 0.09  # maximum distance between centres at which closing fingers grasp a block
BLOCK_HEIGHT = 0.2  # below this height the gripper is among the blocks: "low"
HELD_OPENING = 0.5  # the fingers stop at the block
MAX_DELAY = 4


class Look(NamedTuple):
    """Holds random values that visual shifts scale; drawn at reset, invisible at zero dials."""

    camera: Float[Array, "2"]  # unit vector
    light: Float[Array, "3"]  # overall, along x, along y; each in [-1, 1]
    tint: Float[Array, "colours 3"]  # of every colour of the palette, in [-1, 1]


class State(NamedTuple):
    """Holds the complete state of an episode, as a pytree of arrays."""

    task: Int[Array, ""]
    gripper: Float[Array, "3"]  # x, y, z
    opening: Float[Array, ""]  # 1 open, 0 closed
    held: Int[Array, ""]  # index of the held block, -1 for none
    blocks: Float[Array, "blocks 2"]  # an absent block is parked far off the table
    zones: Float[Array, "2 2"]  # centres of the left and the right zone
    yellow: Int[Array, ""]  # which of the two zones is yellow; the other one is purple
    queue: Float[Array, "delay 4"]  # the latest actions, newest first, for the delay
    look: Look


def step(state: State, action: Float[Array, "4"], shift: Shift) -> State:
    """Executes one control step.

    Args:
      state: the current state.
      action: (dx, dy, dz, grip), each in [-1, 1] (clipped) and in units of the maximum
        displacement; grip > 0 closes the fingers, otherwise they open.
      shift: only `action_delay` matters here.
    """
    action, queue = _delayed(state.queue, action, shift)
    closing = action[3] > 0
    opening = jnp.clip(state.opening + jnp.where(closing, -FINGER_SPEED, FINGER_SPEED), 0.0, 1.0)
    gripper = _move(state.gripper, action)

    distance = jnp.linalg.norm(state.blocks - gripper[:2], axis=-1)
    is_held = jnp.arange(NUM_BLOCKS) == state.held
    solid = opening < 0.75  # the fingers no longer straddle a block
    touching = (distance < CONTACT) & ~is_held & solid
    rests = jnp.any(touching) & (state.gripper[2] >= BLOCK_HEIGHT)
    z = jnp.where(rests, jnp.maximum(gripper[2], BLOCK_HEIGHT), gripper[2])
    gripper = gripper.at[2].set(z)
    low = z < BLOCK_HEIGHT

    # Fingers grasp a block only in the step in which they close from fully open.
    closes = closing & (state.opening > HELD_OPENING) & low
    nearest = jnp.argmin(distance)
    grasped = jnp.where(closes & (distance[nearest] < GRASP), nearest, -1)
    held = jnp.where(closing, jnp.where(state.held >= 0, state.held, grasped), -1)

    carried = (is_held & (held == state.held))[:, None]
    pushed = (touching & low & (jnp.arange(NUM_BLOCKS) != held))[:, None]
    normal = (state.blocks - gripper[:2]) / jnp.maximum(distance, 1e-6)[:, None]
    blocks = jnp.where(carried, state.blocks + gripper[:2] - state.gripper[:2], state.blocks)
    blocks = jnp.where(pushed, gripper[:2] + CONTACT * normal, blocks)

    return state._replace(
        gripper=gripper,
        opening=jnp.where(held >= 0, HELD_OPENING, opening),
        held=held,
        blocks=blocks,
        queue=queue,
    )


def proprio(state: State) -> Float[Array, "5"]:
    """Returns what a real robot could measure: x, y, z, finger opening, and whether it holds a
    block."""
    holding = (state.held >= 0).astype(jnp.float32)
    return jnp.concatenate([state.gripper, jnp.stack([state.opening, holding])])


def _delayed(queue: Array, action: Array, shift: Shift) -> tuple[Array, Array]:
    """Returns the action that is due now, and the queue with the new action in front."""
    line = jnp.concatenate([jnp.clip(action, -1.0, 1.0)[None], queue])
    delay = jnp.clip(jnp.asarray(shift.action_delay, jnp.int32), 0, MAX_DELAY)
    return line[delay], line[:-1]


def _move(gripper: Array, action: Array) -> Array:
    """Moves the gripper as commanded, within its speed limit and workspace.

    The limit on the horizontal speed holds in every direction: MAX_XY < CONTACT, so the gripper
    can never jump across a block's centre.
    """
    speed = jnp.linalg.norm(action[:2])
    delta = action[:2] * MAX_XY / jnp.maximum(speed, 1.0)
    xy = jnp.clip(gripper[:2] + delta, -WORKSPACE, WORKSPACE)
    z = jnp.clip(gripper[2] + action[2] * MAX_Z, 0.0, 1.0)
    return jnp.append(xy, z)
