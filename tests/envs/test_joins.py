"""Tests chunks under a delay: which action of which plan is executed when, in all worlds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from envs import fake

from wamjax.envs.joins import AGE, SYNC, WAYS, Join, jerk
from wamjax.envs.tabletop import TASKS, TURNING, Shift, rollout, task_id

CHUNK, EXECUTE, HOLD = 8, 3, (False, False, False, True)
KEYS = jax.random.split(jax.random.key(0), 3)
IDS = np.array([0, 4, task_id(TURNING[1])])


def plan(number):
    """Returns plan `number`, whose i-th action is 100 number + i in all dimensions."""
    return jnp.broadcast_to(100.0 * number + jnp.arange(CHUNK)[:, None], (1, CHUNK, 4))


def carried_out(way, delay, plans=4, make=plan):
    join = Join(way, delay, HOLD)
    ahead, out, told = join.begin(1, CHUNK, 4), [], []
    for number in range(1, plans + 1):
        told.append(join.committed(ahead))
        actions, ahead = join(ahead, make(number), EXECUTE)
        assert actions.shape[1] == join.span(EXECUTE)
        out.append(actions)
    return np.concatenate(out, axis=1)[0], told


def test_sync_stands_still_and_starts_at_the_first_action():
    motion, grip = carried_out("sync", 2, plans=2)[0][:, [0, 3]].T
    np.testing.assert_array_equal(motion, [0, 0, 100, 101, 102, 0, 0, 200, 201, 202])
    np.testing.assert_array_equal(grip, [0, 0, 100, 101, 102, 102, 102, 200, 201, 202])
    at_once = carried_out("sync", 0, 2)[0][:, 0]
    np.testing.assert_array_equal(at_once, [100, 101, 102, 200, 201, 202])


@pytest.mark.parametrize("way", ["switch", "prefix"])
def test_switch_continues_the_old_plan_until_the_new_one_arrives(way):
    """The first plan starts at its first action after a wait; the others at the delay's index."""
    got = carried_out(way, 2, plans=4)[0][:, 0]
    np.testing.assert_array_equal(got, [0, 0, 100, 101, 102, 202, 203, 204, 302, 303, 304, 402])


def test_the_prefix_is_the_actions_executed_during_planning():
    got, told = carried_out("prefix", 2, plans=3)
    assert [int(count[0]) for _, count in told] == [0, 2, 2]
    for cycle in (1, 2):
        np.testing.assert_array_equal(told[cycle][0][0], got[cycle * EXECUTE :][:2])
    assert all(carried_out(way, 2)[1] == [None] * 4 for way in WAYS if way != "prefix")
    assert carried_out("prefix", 0)[1] == [None] * 4


def test_blending_goes_linearly_from_the_old_plan_to_the_new_one():
    got = carried_out("blend", 2, plans=2, make=lambda n: 0 * plan(n) + n)[0][:, 0]
    # The first plan reaches 5 steps beyond its 3: 2 are committed, 3 are shared.
    np.testing.assert_allclose(got, [0, 0, 1, 1, 1, 1.25])
    long = carried_out("blend", 0, plans=2, make=lambda n: 0 * plan(n) + n)[0][:, 0]
    np.testing.assert_allclose(long, [1, 1, 1, 1 + 1 / 6, 1 + 2 / 6, 1 + 3 / 6], rtol=1e-6)


def test_ensembling_weighs_all_plans_of_a_step_by_their_age():
    got = carried_out("ensemble", 2, plans=3, make=lambda n: 0 * plan(n) + n)[0][:, 0]
    weight = np.exp(-AGE * np.arange(3))
    two = np.average([1, 2], weights=weight[:2])
    three = np.average([1, 2, 3], weights=weight)
    # The first plan covers the 8th step, but not the 9th.
    np.testing.assert_allclose(
        got, [0, 0, 1, 1, 1, two, two, two, np.average([2, 3], weights=weight[:2])], rtol=1e-6
    )
    slow = carried_out("ensemble", 0, plans=3, make=lambda n: 0 * plan(n) + n)[0][:, 0]
    np.testing.assert_allclose(slow[6:8], [three, three], rtol=1e-6)


def test_without_delay_all_ways_but_blend_and_ensemble_equal_sync():
    want = carried_out("sync", 0)[0]
    for way in ("switch", "prefix"):
        np.testing.assert_array_equal(carried_out(way, 0)[0], want)


def test_jerk_is_of_motions_before_the_end():
    actions = np.zeros((3, 6, 4))
    actions[:, 3, 0], actions[:, 5, 1], actions[:, :, 3] = 1.0, 9.0, np.arange(6)
    got = jerk(actions, np.array([6, 5, 2]), HOLD)
    np.testing.assert_allclose(got, [(1 + 2 + np.hypot(1, 9)) / 4, 3 / 3, 0])  # of 4, 3, no steps
    assert (jerk(actions * 0 + 1, np.array([6, 6, 6]), HOLD) == 0).all()
    motions = actions[..., : HOLD.index(True)]
    positions = np.concatenate([np.zeros_like(motions[:, :1]), np.cumsum(motions, axis=1)], axis=1)
    every = jerk(positions, np.array([7, 6, 3]), (True,) * motions.shape[2])
    np.testing.assert_allclose(every, got, atol=1e-6)  # positions whose steps are the motions


def homing(observation, keys, prefix=None):
    """Returns chunks that repeat the observation, and reports the prefix that it received."""
    del keys
    now = -observation["proprio"][:, :1]
    chunk = jnp.repeat(now[:, None], CHUNK, axis=1) * jnp.linspace(0.5, 1.0, CHUNK)[:, None]
    chunk = jnp.concatenate([chunk] * 4, axis=2)
    told = (jnp.zeros(len(now)), jnp.zeros(len(now), int)) if prefix is None else (
        prefix[0][:, 0, 0], prefix[1])  # fmt: skip
    return chunk, {"first": told[0], "count": told[1]}


@functools.cache
def rolled(way, delay):
    return rollout(
        jax.tree_util.Partial(homing), KEYS, IDS, Shift.none(), max_steps=12, execute=EXECUTE,
        join=Join(way, delay, HOLD),
    )  # fmt: skip


def test_in_the_tabletop_observations_are_late_and_the_prefix_is_what_was_sent():
    """Without a delay, joins change nothing; `states` show what was observed when."""
    plain = rollout(jax.tree_util.Partial(homing), KEYS, IDS, Shift.none(), max_steps=12,
                    execute=EXECUTE)  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, plain, rolled("sync", 0))
    jax.tree.map(np.testing.assert_array_equal, plain.actions, rolled("switch", 0).actions)
    ramp = np.linspace(0.5, 1.0, CHUNK, dtype=np.float32)
    waits = rolled("sync", 3)
    seen = np.asarray(waits.proprio)[:, :, 0]
    np.testing.assert_array_equal(waits.actions[:, [0, 1, 2, 6, 7, 8], 0], 0)
    np.testing.assert_allclose(waits.actions[:, 9:, 0], -seen[:, 6:7] * ramp[:3], rtol=1e-5)
    late = rolled("prefix", 2)
    seen = np.asarray(late.proprio)[:, :, 0]
    np.testing.assert_allclose(late.actions[:, 8, 0], -seen[:, 6] * ramp[2], rtol=1e-5)
    np.testing.assert_array_equal(late.extras["count"][:, 0], [0, 2, 2, 2])
    np.testing.assert_array_equal(late.extras["first"][1:].T, late.actions[:, 3::3, 0])


def test_host_environments_join_chunks_as_the_tabletop_does():
    def act(observation, keys, prefix=None):
        del keys
        chunk = jnp.repeat(1.0 + observation["proprio"][:, :1, None], 6, axis=1)
        count = jnp.zeros(len(chunk), int) if prefix is None else prefix[1]
        return chunk * jnp.linspace(0.5, 1.0, 6)[:, None], {"count": count}

    world, keys = fake.world(), jax.random.split(jax.random.key(1), 3)

    def play(join):
        return world.roll_out(
            jax.tree_util.Partial(act), ["left"] * 3, keys, shift={}, told={}, execute=3,
            max_steps=12, record=True, join=join,
        )  # fmt: skip

    plain, late = play(SYNC), play(Join("prefix", 2))
    np.testing.assert_array_equal(late.extras["count"][:, 0], [0, 2, 2, 2])
    ramp = np.linspace(0.5, 1.0, 6, dtype=np.float32)
    first = 1 + late.proprio[:, 0, :1]
    np.testing.assert_array_equal(late.actions[:, :2], 0)
    np.testing.assert_allclose(late.actions[:, 2:5, 0], first * ramp[:3], rtol=1e-6)
    second = 1 + late.proprio[:, 3, 0]
    np.testing.assert_allclose(late.actions[:, 5, 0], second * ramp[2], rtol=1e-6)
    np.testing.assert_allclose(
        plain.actions[:, 3:6, 0], (1 + plain.proprio[:, 3, :1]) * ramp[:3], rtol=1e-6
    )


def test_chunks_that_are_too_short_are_named():
    with pytest.raises(ValueError, match="eval.join = 'swich' must be .* did you mean 'switch'"):
        Join("swich").check(4, 8)
    with pytest.raises(ValueError, match="eval.delay = -1 must not be negative"):
        Join("switch", -1).check(4, 8)
    for execute in (2, 6):
        with pytest.raises(ValueError, match=rf"execute = {execute} must lie in 3 to 5: plans"):
            Join("blend", 3).check(execute, 8)
    Join("sync", 9).check(8, 8)
    with pytest.raises(ValueError, match="execute = 3 must lie in 6 to 2"):
        rolled("switch", 6)


def test_only_the_turntable_moves_blocks():
    from wamjax.envs import tabletop
    from wamjax.envs.tabletop.tasks import SPIN
    from wamjax.envs.world import open_world

    still = jnp.array([0.0, 0.0, 1.0, -1.0])
    step = jax.jit(tabletop.step)
    state = jax.jit(tabletop.reset)(KEYS[0], task_id("pick_red_turning"), Shift.none())
    first, moved = state, step(state, still, Shift.none())
    there = first.blocks[:3, 0] + 1j * first.blocks[:3, 1]
    now = moved.blocks[:3, 0] + 1j * moved.blocks[:3, 1]
    np.testing.assert_allclose(now, there * np.exp(1j * SPIN), atol=1e-6)
    np.testing.assert_array_equal(moved.blocks[3:], first.blocks[3:])  # absent ones
    held = step(state._replace(held=jnp.int32(0)), still.at[3].set(1.0), Shift.none())
    np.testing.assert_array_equal(held.blocks[0], first.blocks[0])
    plain = state._replace(task=jnp.int32(task_id("pick_red")))
    np.testing.assert_array_equal(step(plain, still, Shift.none()).blocks, first.blocks)
    world = open_world("turntable")
    assert tuple(world.tasks) == TURNING and not set(TURNING) & set(open_world("tabletop").tasks)
    assert [task_id(name) for name in TASKS] == list(range(len(TASKS)))
    keys = jax.random.split(jax.random.key(2), 64)
    done = tabletop.expert_episodes(keys, np.resize(list(map(task_id, TURNING)), 64), 0.1)
    assert np.mean(done.success) >= 0.95
