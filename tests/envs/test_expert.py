"""Tests that the expert solves every task, and that noise, chance and doing nothing do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax.envs.tabletop import (
    MAX_STEPS,
    TASKS,
    Shift,
    expert,
    expert_episodes,
    reset,
    step,
    success,
)
from wamjax.envs.tabletop.rollout import DISCOUNT, SETTLE

NONE = Shift.none()
PER_TASK = 60
IDS = jnp.repeat(jnp.arange(len(TASKS)), PER_TASK)
KEYS = jax.random.split(jax.random.key(11), len(IDS))


def by_task(x):
    return np.asarray(x).reshape(len(TASKS), PER_TASK)


@pytest.fixture(scope="module")
def clean():
    return expert_episodes(KEYS, IDS, 0.0, MAX_STEPS, NONE)


def test_expert_succeeds_on_every_task_in_short_episodes(clean):
    rates = by_task(clean.success).mean(1)
    assert np.all(rates >= 0.95), dict(zip(TASKS, rates, strict=True))
    lengths = by_task(clean.length).mean(1)
    assert lengths.min() > 6 and lengths.max() < 35, dict(zip(TASKS, lengths, strict=True))


@pytest.fixture(scope="module")
def clumsy():
    return expert_episodes(KEYS, IDS, 0.5, MAX_STEPS, NONE)


def test_light_noise_mostly_succeeds_and_heavy_noise_sometimes_fails(clumsy):
    light = expert_episodes(KEYS, IDS, 0.1, MAX_STEPS, NONE)
    assert np.all(by_task(light.success).mean(1) > 0.85)
    assert 0.1 < clumsy.success.mean() < 0.9


def test_noise_can_differ_between_episodes(clean):
    noise = jnp.where(jnp.arange(len(IDS)) % 2 == 0, 0.0, 0.3)
    mixed = expert_episodes(KEYS, IDS, noise, MAX_STEPS, NONE)
    np.testing.assert_array_equal(mixed.actions[::2], clean.actions[::2])
    np.testing.assert_array_equal(mixed.actions[::2], mixed.intended[::2])
    assert np.abs(mixed.actions[1::2, 0] - mixed.intended[1::2, 0]).max(-1).min() > 0.01


def test_random_actions_fail():
    @jax.jit
    @jax.vmap
    def episode(key, task):
        keys = jax.random.split(key, 60)
        actions = jax.vmap(lambda k: jax.random.uniform(k, (4,), minval=-1))(keys)
        state = reset(key, task, NONE)
        _, achieved = jax.lax.scan(lambda s, a: (n := step(s, a, NONE), success(n)), state, actions)
        return achieved.any()

    assert np.all(by_task(episode(KEYS, IDS)).mean(1) < 0.1)


def test_batched_is_single_and_repeatable(clean):
    jax.tree.map(
        np.testing.assert_array_equal, clean, expert_episodes(KEYS, IDS, 0.0, MAX_STEPS, NONE)
    )
    first = jax.jit(reset)
    one_step = jax.jit(lambda s: step(s, expert(s, jax.random.key(0), 0.0), NONE))
    for index in (7, 3 * PER_TASK, 5 * PER_TASK + 2):
        state = first(KEYS[index], IDS[index], NONE)
        for time in range(clean.length[index]):
            state = one_step(state)
            np.testing.assert_allclose(
                state.gripper, clean.states.gripper[index, time + 1], atol=1e-4
            )


def test_actions_are_within_range_and_smooth_near_the_end(clean):
    assert np.abs(clean.actions).max() <= 1
    reach = slice(0, PER_TASK)  # reach_red: one approach, nothing else
    speed = np.linalg.norm(np.asarray(clean.actions[reach, :, :2]), axis=-1)
    distance = np.linalg.norm(
        np.asarray(clean.states.blocks[reach, :-1, 0] - clean.states.gripper[reach, :-1, :2]),
        axis=-1,
    )
    near = distance < 0.1
    assert near.sum() > PER_TASK
    assert np.all(speed[near] <= 0.5 * distance[near] / 0.12 + 1e-4), "slow near the target"


def test_records_of_an_episode_agree(clean):
    achieved = np.asarray(jax.jit(jax.vmap(jax.vmap(success)))(clean.states))[:, 1:]
    for index in range(0, len(IDS), 37):
        wins = np.flatnonzero(achieved[index])
        assert bool(clean.success[index]) == bool(len(wins))
        end = wins[0]
        assert clean.length[index] == min(end + 1 + SETTLE, MAX_STEPS)
        np.testing.assert_array_equal(np.flatnonzero(clean.rewards[index]), [end])
        value, expected = 0.0, np.zeros(MAX_STEPS)
        for time in reversed(range(MAX_STEPS)):
            value = float(clean.rewards[index, time]) + DISCOUNT * value
            expected[time] = value
        np.testing.assert_allclose(clean.returns[index], expected, rtol=1e-5)


def test_failures_have_no_return(clumsy):
    failed = ~np.asarray(clumsy.success)
    assert not np.any(clumsy.returns[failed]) and not np.any(clumsy.rewards[failed])
    assert np.all(clumsy.length[failed] == MAX_STEPS)
