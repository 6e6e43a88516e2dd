"""Defines the tasks on the table as rows of a table, so that they mix freely inside a vmap.

Red, blue and green blocks and both zones are always present, so no picture reveals the task: only
the instruction does. Zones are selected by position (left, right) or by colour (yellow, purple;
sides vary), blocks by colour. A new task is a new row.

In the tasks of the turntable (`TURNING`) the table turns under the blocks, always the same way, so
one picture shows where a block will be. They follow the others and are a world of their own,
"turntable": training or acting on all tasks of the tabletop does not include them.

The instructions of `VIDEO_ONLY` recombine words of `LABELLED`. Together they are the world
"recombined", for policies that see videos of all eight tasks and actions of five.
"""

from __future__ import annotations

import difflib
import enum
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wamjax.envs.tabletop import world
from wamjax.envs.tabletop.shifts import Shift
from wamjax.envs.tabletop.world import (
    BLOCK_HEIGHT,
    MAX_DELAY,
    NUM_BLOCKS,
    NUM_REGULAR,
    Look,
    State,
)

ZONE_SIZE = 0.17  # half the side of a zone
ON_ZONE = 0.14  # a block or gripper is on a zone when its centre is this near to the zone's
AT_BLOCK = 0.08  # the gripper has reached a block at this distance
RIGHT_EDGE = 0.6  # blocks beyond this x are "on the right"
LIFTED = 0.45  # height at which a block counts as picked up

BLOCK_AREA = ((-0.6, -0.35), (0.4, 0.2))  # where blocks start: (low x, low y), (high x, high y)
RESERVED_AREA = ((-0.6, -0.65), (0.4, -0.4))  # where they start only under `unseen_positions`
EXTRA_AREA = ((-0.75, -0.7), (0.75, 0.25))  # where distractors start
ZONE_AREA = ((0.35, 0.45), (0.65, 0.7))  # the right zone; the left one is its mirror image
GRIPPER_AREA = ((-0.5, -0.4, 0.5), (0.5, 0.3, 0.8))
SEPARATION = 0.34  # between blocks at the start: a gripper fits in between to push
PARKED = 9.0  # coordinate of absent blocks
SPIN = 0.06  # of the turntable, in rad a control step: up to 0.04, half of AT_BLOCK
NUM_TINTS = NUM_BLOCKS + 3  # the blocks, the two zones, the table


class Kind(enum.IntEnum):
    """Defines the shape of a task: its success condition and the expert's strategy."""

    REACH_BLOCK = 0
    REACH_GOAL = 1
    PUSH = 2
    PICK = 3
    PLACE = 4


class Goal(enum.IntEnum):
    """Defines the target: a zone by position or colour, or the right side of the table."""

    LEFT = 0
    RIGHT = 1
    YELLOW = 2
    PURPLE = 3
    RIGHT_SIDE = 4


class Task(NamedTuple):
    """Holds one row. `block` is an index into `world.COLOURS`; unused fields hold any value."""

    instruction: str
    kind: Kind
    block: int = 0
    goal: Goal = Goal.LEFT
    spin: float = 0.0  # of the table, rad a control step, counter-clockwise around its centre


RED, BLUE = 0, 1
TABLE: dict[str, Task] = {
    "reach_red": Task("reach the red block", Kind.REACH_BLOCK, RED),
    "reach_left_zone": Task("reach the left zone", Kind.REACH_GOAL, RED, Goal.LEFT),
    "push_red_to_yellow_zone": Task(
        "push the red block to the yellow zone", Kind.PUSH, RED, Goal.YELLOW
    ),
    "push_blue_right": Task("push the blue block to the right", Kind.PUSH, BLUE, Goal.RIGHT_SIDE),
    "pick_red": Task("pick up the red block", Kind.PICK, RED),
    "place_red_on_left_zone": Task(
        "put the red block on the left zone", Kind.PLACE, RED, Goal.LEFT
    ),
    "place_red_on_right_zone": Task(
        "put the red block on the right zone", Kind.PLACE, RED, Goal.RIGHT
    ),
    "place_blue_on_right_zone": Task(
        "put the blue block on the right zone", Kind.PLACE, BLUE, Goal.RIGHT
    ),
    "reach_red_turning": Task(
        "reach the red block on the turning table", Kind.REACH_BLOCK, RED, spin=SPIN
    ),
    "pick_red_turning": Task(
        "pick up the red block from the turning table", Kind.PICK, RED, spin=SPIN
    ),
    "reach_blue": Task("reach the blue block", Kind.REACH_BLOCK, BLUE),
    "reach_right_zone": Task("reach the right zone", Kind.REACH_GOAL, BLUE, Goal.RIGHT),
    "pick_blue": Task("pick up the blue block", Kind.PICK, BLUE),
}
VIDEO_ONLY: tuple[str, ...] = ("reach_blue", "reach_right_zone", "pick_blue")
LABELLED: tuple[str, ...] = (
    "reach_red", "reach_left_zone", "pick_red", "place_red_on_left_zone",
    "place_blue_on_right_zone",
)  # fmt: skip
TASKS: tuple[str, ...] = tuple(
    name for name, row in TABLE.items() if not row.spin and name not in VIDEO_ONLY
)
TURNING: tuple[str, ...] = tuple(name for name, row in TABLE.items() if row.spin)
_KIND, _BLOCK, _GOAL = (
    np.array([getattr(row, field) for row in TABLE.values()], np.int32)
    for field in ("kind", "block", "goal")
)
_SPIN = np.array([row.spin for row in TABLE.values()], np.float32)


def task_id(name: str) -> int:
    """Returns the index of a task in `TABLE`; those of `TASKS` come first."""
    names = tuple(TABLE)
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"the tasks are {', '.join(names)}"
        raise KeyError(f"tabletop has no task {name!r}; {hint}")
    return names.index(name)


def instruction(task: str) -> str:
    """Returns the instruction of a task in words."""
    return tuple(TABLE.values())[task_id(task)].instruction


def instruction_tokens(length: int, words: tuple[str, ...] = ()) -> Int[np.ndarray, "tasks n"]:
    """Returns the instructions of all tasks as token ids, padded to `length`; row i is `TASKS[i]`.

    Args:
      words: words of the policy, see `wamjax.data.tokens.Vocabulary`.
    """
    from wamjax.data.tokens import Vocabulary  # here: the world does not depend on the data

    vocabulary = Vocabulary(words)
    return np.stack([vocabulary.tokenize(TABLE[name].instruction, length) for name in TASKS])


def kind(state: State) -> Int[Array, ""]:
    """Returns the `Kind` of the state's task."""
    return jnp.asarray(_KIND)[state.task]


def target_block(state: State) -> Int[Array, ""]:
    """Returns the index of the task's block."""
    return jnp.asarray(_BLOCK)[state.task]


def goal(state: State) -> Float[Array, "2"]:
    """Returns the target position of the block (or of the gripper, to reach a zone)."""
    right_side = jnp.stack([RIGHT_EDGE + 0.1, state.blocks[target_block(state), 1]])
    zones = (state.zones[0], state.zones[1])
    coloured = (state.zones[state.yellow], state.zones[1 - state.yellow])
    return jnp.stack([*zones, *coloured, right_side])[jnp.asarray(_GOAL)[state.task]]


def step(state: State, action: Float[Array, "4"], shift: Shift) -> State:
    """Executes one control step of `world.step`; then the table turns, in a turntable's task."""
    state = world.step(state, action, shift)
    return state._replace(blocks=state.blocks + drift(state))


def drift(state: State) -> Float[Array, "blocks 2"]:
    """Returns how far the table will carry each block in the next step; a held block does not
    move."""
    spin = jnp.asarray(_SPIN)[state.task]
    less, sine = jnp.cos(spin) - 1, jnp.sin(spin)
    turn = jnp.array([[less, -sine], [sine, less]])
    lies = (jnp.arange(NUM_BLOCKS) != state.held) & (state.blocks[:, 0] < PARKED)
    return jnp.where(((spin != 0) & lies)[:, None], state.blocks @ turn.T, 0.0)


def success(state: State) -> Bool[Array, ""]:
    """Returns whether the task is achieved now: a sparse predicate of the state alone."""
    target, where = target_block(state), goal(state)
    block, (x, y, z) = state.blocks[target], state.gripper
    low, held = z < BLOCK_HEIGHT, state.held == target
    xy = jnp.stack([x, y])
    to_right = jnp.asarray(_GOAL)[state.task] == Goal.RIGHT_SIDE
    arrived = jnp.where(to_right, block[0] > RIGHT_EDGE, _near(block, where, ON_ZONE)) & ~held
    return jnp.stack(
        [
            low & _near(xy, block, AT_BLOCK),  # REACH_BLOCK
            low & _near(xy, where, ON_ZONE),  # REACH_GOAL
            arrived,  # PUSH; carrying it there is as good
            held & (z > LIFTED),  # PICK
            arrived,  # PLACE
        ]
    )[kind(state)]


def reset(key: Array, task: Int[Array, ""] | int, shift: Shift) -> State:
    """Starts an episode: a random scene for a task.

    One key gives one scene: turning a dial of `shift` changes only what the dial controls.
    """
    draws = _draw(key)
    unseen = draws["unseen"] < shift.unseen_positions
    area = jnp.where(unseen, jnp.asarray(RESERVED_AREA), jnp.asarray(BLOCK_AREA))
    regular = _first_apart(_within(area, draws["blocks"]), jnp.zeros((0, 2)))
    extras = _first_apart(_within(EXTRA_AREA, draws["extras"]), regular)
    present = jnp.arange(NUM_BLOCKS) < NUM_REGULAR + jnp.asarray(shift.distractors)
    angle = 2 * jnp.pi * draws["camera"]
    return State(
        task=jnp.asarray(task, jnp.int32),
        gripper=_within(GRIPPER_AREA, draws["gripper"]),
        opening=jnp.ones(()),
        held=jnp.full((), -1, jnp.int32),
        blocks=jnp.where(present[:, None], jnp.concatenate([regular, extras]), PARKED),
        zones=_within(ZONE_AREA, draws["zones"]) * jnp.array([[-1, 1], [1, 1]]),
        yellow=(draws["yellow"] < 0.5).astype(jnp.int32),
        queue=jnp.zeros((MAX_DELAY, 4)),
        look=Look(
            camera=jnp.stack([jnp.cos(angle), jnp.sin(angle)]),
            light=2 * draws["light"] - 1,
            tint=2 * draws["tint"] - 1,
        ),
    )


_TRIES = 32
_DRAWS = {  # what is random about a scene: name -> shape
    "blocks": (_TRIES, NUM_REGULAR, 2),
    "extras": (_TRIES, NUM_BLOCKS - NUM_REGULAR, 2),
    "zones": (2, 2),
    "gripper": (3,),
    "yellow": (),
    "unseen": (),
    "camera": (),
    "light": (3,),
    "tint": (NUM_TINTS, 3),
}


def _draw(key: Array) -> dict[str, Array]:
    """Draws all randomness of a scene, uniform in [0, 1), in one call, which compiles much
    faster."""
    sizes = [math.prod(shape) for shape in _DRAWS.values()]
    parts = jnp.split(jax.random.uniform(key, (sum(sizes),)), np.cumsum(sizes)[:-1])
    return {n: part.reshape(_DRAWS[n]) for n, part in zip(_DRAWS, parts, strict=True)}


def _within(area: Array | tuple, unit: Array) -> Array:
    """Maps the unit box to the box (low, high)."""
    low, high = jnp.asarray(area)
    return low + (high - low) * unit


def _first_apart(scenes: Float[Array, "tries n 2"], others: Float[Array, "m 2"]) -> Array:
    """Returns the first scene whose points are far enough apart, also from `others`: (n, 2).

    If there is none, it returns the scene that comes closest.
    """
    tries, count, _ = scenes.shape
    others = jnp.broadcast_to(others, (tries, *others.shape))
    everything = jnp.concatenate([scenes, others], axis=1)
    gaps = jnp.linalg.norm(scenes[:, :, None] - everything[:, None], axis=-1)
    gaps = jnp.where(jnp.eye(count, everything.shape[1], dtype=bool), jnp.inf, gaps)
    return scenes[jnp.argmax(jnp.minimum(gaps.min((1, 2)), SEPARATION))]


def mistaken(state: State) -> State:
    """Returns the state as seen by an expert who confuses red with blue and left with right."""
    blocks = state.blocks[jnp.array([BLUE, RED, *range(2, NUM_BLOCKS)])]
    swapped = jnp.array([BLUE, RED, *range(2, NUM_BLOCKS), -1])  # last: no block is held
    return state._replace(
        blocks=blocks, zones=state.zones[::-1], yellow=1 - state.yellow, held=swapped[state.held]
    )


def _near(a: Array, b: Array, tolerance: float) -> Array:
    return jnp.sum((a - b) ** 2) < tolerance**2
