"""Tests the physics: nothing moves by itself, and everything stays in its bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax.envs.tabletop import TASKS, Shift, expert, reset, step
from wamjax.envs.tabletop import world as w

NONE = Shift.none()


@pytest.fixture(scope="module")
def rough_play():
    """Returns (states (t+1, e), actions) of clumsy experts near the table: all kinds of contact."""
    episodes, steps = 160, 60
    tasks = jnp.arange(episodes) % len(TASKS)
    keys = jax.random.split(jax.random.key(0), episodes)
    first = jax.jit(jax.vmap(reset, (0, 0, None)))(keys, tasks, NONE)

    def act(state, key):
        keys = jax.random.split(key, episodes)
        action = jax.vmap(expert, (0, 0, 0))(state, keys, jnp.linspace(0.0, 1.0, episodes))
        action = action.at[:, 2].add(-0.4)
        state = jax.vmap(step, (0, 0, None))(state, action, NONE)
        return state, (state, action)

    keys = jax.random.split(jax.random.key(1), steps)
    _, (later, actions) = jax.jit(lambda s: jax.lax.scan(act, s, keys))(first)
    states = jax.tree.map(lambda a, b: np.concatenate([a[None], b]), first, later)
    return states, np.asarray(actions)


def test_blocks_move_only_when_touched_or_held(rough_play):
    states, _ = rough_play
    before = jax.tree.map(lambda x: x[:-1], states)
    after = jax.tree.map(lambda x: x[1:], states)
    moved = np.abs(after.blocks - before.blocks).max(-1) > 1e-6
    index = np.arange(w.NUM_BLOCKS)
    held = (before.held[..., None] == index) & (after.held[..., None] == index)
    xy = after.gripper[..., None, :2]
    reach = np.linalg.norm(before.blocks - xy, axis=-1) < w.CONTACT + 1e-5
    body_low = ((after.gripper[..., 2] < w.BLOCK_HEIGHT) & (after.opening < 0.75))[..., None]
    pushed = moved & ~held
    assert held[moved].sum() > 100 and pushed.sum() > 100, "the test must see both"
    assert np.all(held | (reach & body_low) | ~moved)
    # A pushed block ends up just touching, a held one moves like the gripper.
    gap = np.linalg.norm(after.blocks - xy, axis=-1)
    np.testing.assert_allclose(gap[pushed], w.CONTACT, atol=1e-5)
    travelled = (after.gripper - before.gripper)[..., None, :2] * np.ones((w.NUM_BLOCKS, 1))
    np.testing.assert_allclose((after.blocks - before.blocks)[held], travelled[held], atol=1e-6)


def test_everything_stays_on_the_table(rough_play):
    states, _ = rough_play
    assert np.abs(states.gripper[..., :2]).max() <= w.WORKSPACE + 1e-6
    assert states.gripper[..., 2].min() >= 0 and states.gripper[..., 2].max() <= 1
    assert np.abs(states.blocks[..., : w.NUM_REGULAR, :]).max() <= 1
    assert np.all(states.blocks[..., w.NUM_REGULAR :, :] == states.blocks[0, 0, -1, 0]), "parked"


def test_speed_limit_holds_in_every_direction(rough_play):
    states, actions = rough_play
    assert np.abs(actions[..., :2]).sum(-1).max() > 1.5, "diagonal commands must occur"
    motion = np.diff(states.gripper, axis=0)
    assert np.linalg.norm(motion[..., :2], axis=-1).max() <= w.MAX_XY + 1e-6
    assert np.abs(motion[..., 2]).max() <= w.MAX_Z + 1e-6


start = jax.jit(reset)


def scene(**changes):
    state = start(jax.random.key(0), 0, NONE)
    far = jnp.array([[0.0, 0.0], [0.6, 0.6], [-0.6, 0.6], [9.0, 9.0], [9.0, 9.0]])
    state = state._replace(blocks=far, gripper=jnp.array([-0.4, 0.0, 0.1]))
    return state._replace(**changes)


physics = jax.jit(step)


def drive(state, action, steps, shift=NONE):
    for _ in range(steps):
        state = physics(state, jnp.asarray(action, jnp.float32), shift)
    return state


def test_closed_gripper_pushes_and_open_gripper_straddles():
    pushed = drive(scene(opening=jnp.zeros(())), [1, 0, 0, 1], 5)
    np.testing.assert_allclose(pushed.blocks[0], [0.2 + w.CONTACT, 0.0], atol=1e-5)
    straddled = drive(scene(), [1, 0, 0, -1], 5)
    np.testing.assert_array_equal(straddled.blocks, scene().blocks)
    above = drive(scene(gripper=jnp.array([-0.4, 0.0, 0.5])), [1, 0, 0, 1], 5)
    np.testing.assert_array_equal(above.blocks, scene().blocks)


def test_off_centre_push_goes_along_the_contact_normal():
    before = scene(opening=jnp.zeros(()), gripper=jnp.array([-0.15, -0.05, 0.1]))
    after = drive(before, [1, 0, 0, 1], 1)
    hand = np.asarray(after.gripper[:2])
    normal = (np.asarray(before.blocks[0]) - hand) / np.linalg.norm(hand)
    moved = np.asarray(after.blocks[0]) - np.asarray(before.blocks[0])
    assert moved[1] > 0, "hit from below the centre line, it goes up"
    np.testing.assert_allclose(moved, normal * np.linalg.norm(moved), atol=1e-6)


def test_closed_gripper_rests_on_a_block():
    above = scene(opening=jnp.zeros(()), gripper=jnp.array([0.03, 0.0, 0.5]))
    after = drive(above, [0, 0, -1, 1], 6)
    np.testing.assert_allclose(after.gripper[2], w.BLOCK_HEIGHT, atol=1e-6)
    np.testing.assert_array_equal(after.blocks, above.blocks)


def test_grasp_carry_release():
    over = scene(gripper=jnp.array([0.03, 0.02, 0.1]))
    held = drive(over, [0, 0, 0, 1], 2)
    assert held.held == 0 and held.opening == w.HELD_OPENING
    np.testing.assert_array_equal(w.proprio(held)[3:], [w.HELD_OPENING, 1.0])
    carried = drive(held, [0.5, 0.5, 1, 1], 4)
    np.testing.assert_allclose(carried.blocks[0], [0.24, 0.24], atol=1e-5)
    dropped = drive(carried, [1, 0, 0, -1], 2)
    assert dropped.held == -1 and dropped.opening == 1
    np.testing.assert_array_equal(dropped.blocks[0], carried.blocks[0])


@pytest.mark.parametrize("where", [(0.0, 0.1, 0.1), (0.0, 0.02, 0.3)])
def test_fingers_grasp_nothing_too_far_away_or_too_low(where):
    assert drive(scene(gripper=jnp.array(where)), [0, 0, 0, 1], 3).held == -1


@pytest.mark.parametrize("delay", [1, 3, w.MAX_DELAY])
def test_delay_is_the_same_actions_later(delay):
    actions = jax.random.uniform(jax.random.key(2), (12, 4), minval=-1)

    @jax.jit
    def simulate(actions, shift):
        return jax.lax.scan(lambda s, a: (step(s, a, shift),) * 2, scene(), actions)[1].gripper

    late = jnp.concatenate([jnp.zeros((delay, 4)), actions[:-delay]])
    delayed = simulate(actions, Shift(action_delay=delay))
    np.testing.assert_array_equal(delayed, simulate(late, NONE))
    assert np.abs(delayed - simulate(actions, NONE)).max() > 0.05
