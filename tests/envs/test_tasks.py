"""Tests scenes and success: valid starts, and success only for the right object and place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax.envs.tabletop import TASKS, Shift, instruction, reset, success, task_id
from wamjax.envs.tabletop import tasks as t
from wamjax.envs.tabletop.world import NUM_REGULAR

NONE = Shift.none()
EPISODES = 400


start = jax.jit(jax.vmap(reset, (0, 0, None)))


def scenes(shift=NONE, task=None, seed=0):
    ids = jnp.arange(EPISODES) % len(TASKS) if task is None else jnp.full(EPISODES, task)
    keys = jax.random.split(jax.random.key(seed), EPISODES)
    return start(keys, ids, shift)


def inside(points, area):
    low, high = np.asarray(area)
    return np.all((points >= low - 1e-6) & (points <= high + 1e-6))


def test_instructions_are_distinct_and_name_what_matters():
    words = [instruction(name) for name in TASKS]
    assert len(TASKS) >= 8 and len(set(words)) == len(TASKS)
    for name, text in zip(TASKS, words, strict=True):
        for word in ("red", "blue", "left", "right", "yellow"):
            assert (word in name) == (word in text), name


def test_unknown_task_gets_a_suggestion():
    with pytest.raises(KeyError, match="did you mean 'pick_red'"):
        task_id("pick_rde")
    with pytest.raises(KeyError, match="the tasks are reach_red"):
        instruction("zzz")


def test_scene_does_not_depend_on_the_task():
    one, other = scenes(task=0), scenes(task=5)
    for a, b in zip(one._replace(task=0), other._replace(task=0), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_key_determines_the_scene():
    jax.tree.map(np.testing.assert_array_equal, scenes(), scenes())
    assert np.abs(scenes().blocks - scenes(seed=1).blocks).max(axis=(1, 2)).min() > 0.01


def test_starts_are_inside_their_areas_apart_and_unsolved():
    state = jax.tree.map(np.asarray, scenes())
    regular = np.asarray(state.blocks[:, :NUM_REGULAR])
    assert inside(regular, t.BLOCK_AREA)
    assert inside(np.abs(state.zones), np.abs(t.ZONE_AREA))
    assert np.all(state.zones[:, 0, 0] < 0) and np.all(state.zones[:, 1, 0] > 0)
    assert inside(state.gripper, t.GRIPPER_AREA)
    gaps = np.linalg.norm(regular[:, :, None] - regular[:, None], axis=-1)
    gaps = gaps[:, ~np.eye(NUM_REGULAR, dtype=bool)].min(1)
    assert np.mean(gaps >= t.SEPARATION) > 0.98 and gaps.min() > 0.2
    assert 0.4 < np.mean(state.yellow) < 0.6
    assert not np.any(jax.jit(jax.vmap(success))(state))


def test_reserved_area_is_never_used_in_training():
    assert np.max(t.RESERVED_AREA[1][1]) < np.min(t.BLOCK_AREA[0][1])
    assert inside(scenes(Shift(unseen_positions=1.0)).blocks[:, :NUM_REGULAR], t.RESERVED_AREA)
    y = np.asarray(scenes(Shift(unseen_positions=0.3)).blocks[:, 0, 1])
    assert 0.2 < np.mean(y <= t.RESERVED_AREA[1][1]) < 0.4


achieved = jax.jit(success)
RED, BLUE = 0, 1
LEFT, RIGHT = (-0.5, 0.6), (0.5, 0.6)


def at(task, gripper=(0.0, -0.8, 0.6), red=(-0.3, 0.0), blue=(0.3, 0.0), held=-1, yellow=0):
    """Returns whether a hand-made scene counts as success."""
    state = jax.tree.map(lambda x: np.asarray(x)[0], scenes(task=task_id(task)))
    blocks = state.blocks.copy()
    blocks[RED], blocks[BLUE] = red, blue
    return bool(
        achieved(
            state._replace(
                gripper=jnp.array(gripper),
                blocks=blocks,
                zones=jnp.array([LEFT, RIGHT]),
                held=jnp.asarray(held),
                yellow=jnp.asarray(yellow),
            )
        )
    )


def test_success_requires_the_right_object_and_place():
    low_red, high_red, low_blue = (-0.3, 0.03, 0.1), (-0.3, 0.03, 0.4), (0.3, 0.03, 0.1)
    assert at("reach_red", low_red)
    assert not at("reach_red", high_red) and not at("reach_red", low_blue)

    assert at("reach_left_zone", (*LEFT, 0.1))
    assert not at("reach_left_zone", (*RIGHT, 0.1)) and not at("reach_left_zone", (*LEFT, 0.4))

    task = "push_red_to_yellow_zone"
    assert at(task, red=LEFT, yellow=0) and at(task, red=RIGHT, yellow=1)
    assert not at(task, red=LEFT, yellow=1) and not at(task, blue=LEFT, yellow=0)

    assert at("push_blue_right", blue=(0.65, -0.5)) and not at("push_blue_right", red=(0.65, -0.5))
    assert not at("push_blue_right", blue=(0.65, -0.5), held=BLUE)

    assert at("pick_red", (-0.3, 0.0, 0.6), held=RED)
    assert not at("pick_red", (-0.3, 0.0, 0.3), held=RED)
    assert not at("pick_red", (0.3, 0.0, 0.6), held=BLUE) and not at("pick_red")

    assert at("place_red_on_left_zone", red=LEFT) and at("place_red_on_right_zone", red=RIGHT)
    assert not at("place_red_on_left_zone", red=RIGHT)
    assert not at("place_red_on_left_zone", red=LEFT, held=RED), "it must be let go"
    assert at("place_blue_on_right_zone", blue=RIGHT)
    assert not at("place_blue_on_right_zone", red=RIGHT)
