"""Tests that every dial changes what it should, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax.envs.tabletop import MAX_STEPS, SHIFTS, TASKS, Shift, expert_episodes, render, reset
from wamjax.envs.tabletop.world import NUM_REGULAR

NONE = Shift.none()
EPISODES = 4 * len(TASKS)
KEYS = jax.random.split(jax.random.key(0), EPISODES)
IDS = jnp.arange(EPISODES) % len(TASKS)
LOOKS = ("camera_offset", "colours", "lighting")


def run(shift):
    return expert_episodes(KEYS, IDS, 0.2, MAX_STEPS, shift)


@jax.jit
def starts(shift):
    return jax.vmap(reset, (0, 0, None))(KEYS, IDS, shift)


@jax.jit
def overhead(states, shift):
    return jax.vmap(render, (0, None))(states, shift)["overhead"].astype(jnp.float32)


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)))


def test_every_dial_has_a_named_shift_of_its_own():
    assert set(SHIFTS) == {"none"} | {field.name for field in dataclasses.fields(Shift)}
    for name, shift in SHIFTS.items():
        turned = {k for k, v in dataclasses.asdict(shift).items() if v}
        assert turned == ({name} - {"none"})


def test_one_program_serves_every_shift():
    run(NONE)
    size = expert_episodes._cache_size()
    for shift in SHIFTS.values():
        run(shift)
    assert expert_episodes._cache_size() == size


@pytest.mark.parametrize("name", LOOKS)
def test_visual_shifts_change_every_picture_and_no_dynamics(name):
    assert same(run(SHIFTS[name]), run(NONE))
    change = jnp.abs(overhead(starts(NONE), SHIFTS[name]) - overhead(starts(NONE), NONE))
    assert np.all(change.mean((1, 2, 3)) > 0.5)
    half = jax.tree.map(lambda dial: dial / 2, SHIFTS[name])
    weaker = jnp.abs(overhead(starts(NONE), half) - overhead(starts(NONE), NONE))
    assert weaker.mean() < change.mean()


def test_lighting_is_monotone_in_the_dial_and_keeps_black_black():
    state = starts(NONE)
    dim = state._replace(look=state.look._replace(light=state.look.light.at[:].set([-1.0, 0, 0])))
    bright, dark = overhead(dim, NONE), overhead(dim, Shift(lighting=0.5))
    np.testing.assert_allclose(dark, bright * 0.5, atol=1.0)


def test_camera_offset_translates_the_picture():
    state = starts(NONE)
    right = jnp.broadcast_to(jnp.array([1.0, 0.0]), state.look.camera.shape)
    state = state._replace(look=state.look._replace(camera=right))
    pixels = 4
    moved = overhead(state, Shift(camera_offset=pixels * 2 * 1.1 / 64))
    np.testing.assert_allclose(moved[:, :, :-pixels], overhead(state, NONE)[:, :, pixels:], atol=1)


@pytest.mark.parametrize("count", [1, 2])
def test_distractors_are_added_and_nothing_else(count):
    plain, more = starts(NONE), starts(Shift(distractors=count))
    on_table = np.abs(more.blocks).max(-1) < 1
    assert np.all(on_table.sum(1) == NUM_REGULAR + count)
    assert same(plain._replace(blocks=0), more._replace(blocks=0))
    np.testing.assert_array_equal(plain.blocks[:, :NUM_REGULAR], more.blocks[:, :NUM_REGULAR])


def test_unseen_positions_move_the_blocks_only():
    plain, unseen = starts(NONE), starts(SHIFTS["unseen_positions"])
    assert same(plain._replace(blocks=0), unseen._replace(blocks=0))
    assert np.abs(plain.blocks - unseen.blocks)[:, :NUM_REGULAR].max((1, 2)).min() > 0.04


def test_action_delay_changes_the_dynamics_only():
    assert same(starts(NONE), starts(SHIFTS["action_delay"]))
    assert not same(run(NONE).states.gripper, run(SHIFTS["action_delay"]).states.gripper)


@pytest.mark.parametrize("name", SHIFTS)
def test_tasks_stay_solvable(name):
    assert expert_episodes(KEYS, IDS, 0.0, MAX_STEPS, SHIFTS[name]).success.mean() > 0.9
