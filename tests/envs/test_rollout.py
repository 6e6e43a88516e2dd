"""Tests closed-loop episodes of a policy, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax.envs.tabletop import (
    TASKS,
    Shift,
    composite,
    expert_episodes,
    instruction_tokens,
    observe,
    render_episodes,
    reset,
    rollout,
    step,
)
from wamjax.envs.tabletop.embedded import Tabletop

NONE = Shift.none()
EPISODES = 2 * len(TASKS)
IDS = jnp.arange(EPISODES) % len(TASKS)
KEYS = jax.random.split(jax.random.key(3), EPISODES)


def follow(gain, observation, key):
    """A feedback policy that needs pictures, proprioception and instruction alike."""
    proprio, words = observation["proprio"], observation["instruction"]
    sign = jnp.where(words.sum(1) % 2 == 0, 1.0, -1.0)
    video = composite(observation["images"])
    light = video.astype(jnp.float32).mean((1, 2, 3)) / 255
    first = jnp.stack([-gain * proprio[:, 0], sign * light, -proprio[:, 2], sign], axis=-1)
    chunk = first[:, None] * jnp.linspace(1.0, 0.5, 6)[:, None]
    return chunk, {"video": video, "draw": jax.vmap(jax.random.uniform)(key)}


WORDS = instruction_tokens(12)[np.asarray(IDS)]
TOLD = {"instruction": WORDS}
POLICY = jax.tree_util.Partial(follow, jnp.asarray(0.7))


def play(**options):
    return rollout(POLICY, KEYS, IDS, NONE, TOLD, max_steps=10, execute=4, **options)


@pytest.fixture(scope="module")
def recorded():
    return play()


def test_replaying_the_expert_gives_the_same_episode():
    episodes = expert_episodes(KEYS, IDS, 0.1, 40, NONE)
    replay = jax.tree_util.Partial(lambda actions, observation, key: actions, episodes.actions)
    played = rollout(replay, KEYS, IDS, NONE, max_steps=40, execute=40)
    assert played.extras is None
    np.testing.assert_allclose(played.states.blocks, episodes.states.blocks, atol=1e-5)
    for name in ("success", "rewards", "returns", "actions"):
        np.testing.assert_array_equal(getattr(played, name), getattr(episodes, name))
    assert played.success.mean() > 0.8


def test_closed_loop_equals_a_plain_loop(recorded):
    """Computes the expected episode in Python: reset, observe every fourth step, step."""
    look = jax.jit(jax.vmap(observe, (0, None)))
    act = jax.jit(jax.vmap(step, (0, 0, None)))
    state = jax.jit(jax.vmap(reset, (0, 0, None)))(KEYS, IDS, NONE)
    plan = jax.jit(POLICY)
    for time in range(10):
        if time % 4 == 0:
            seen = look(state, NONE)
            chunk, _ = plan({**seen, **TOLD}, KEYS)
        np.testing.assert_allclose(recorded.actions[:, time], chunk[:, time % 4], atol=1e-4)
        state = act(state, chunk[:, time % 4], NONE)
        np.testing.assert_allclose(recorded.states.gripper[:, time + 1], state.gripper, atol=1e-4)
        np.testing.assert_allclose(recorded.proprio[:, time + 1, :3], state.gripper, atol=1e-4)


def test_frames_are_the_states_and_what_the_policy_saw(recorded):
    shown = composite(render_episodes(recorded.states, NONE))
    assert shown.shape == (EPISODES, 11, 64, 128, 3)
    seen = jnp.swapaxes(recorded.extras["video"], 0, 1)  # (e, plans, 64, 128, 3)
    assert np.abs(seen.astype(int) - shown[:, ::4]).max() <= 1


def test_recording_takes_no_other_program_and_shows_the_shifted_world():
    from wamjax.envs.tabletop.rollout import _rollout

    names = [TASKS[i] for i in IDS[:3]]

    def run(record):
        return Tabletop().roll_out(
            POLICY, names, KEYS[:3], shift={"lighting": 0.5}, told={"instruction": WORDS[:3]},
            max_steps=10, execute=4, record=record, save=True,
        )  # fmt: skip

    plain = run(False)
    size = _rollout._cache_size()
    whole, part = run(True), run(2)
    assert _rollout._cache_size() == size and plain.frames is None
    np.testing.assert_array_equal(plain.actions, whole.actions)
    shown = composite(whole.frames)
    seen = np.swapaxes(whole.extras["video"], 0, 1)
    assert np.abs(seen.astype(int) - shown[:, ::4]).max() <= 1
    first = whole.first(2)
    assert first.tasks == tuple(names[:2]) and first.extras["draw"].shape == (3, 2)
    for name, frames in part.frames.items():
        np.testing.assert_array_equal(frames, first.frames[name])


def test_keys_are_fresh(recorded):
    assert len(np.unique(recorded.extras["draw"])) == recorded.extras["draw"].size


def test_new_parameters_do_not_recompile(recorded):
    from wamjax.envs.tabletop.rollout import _rollout

    play()
    size = _rollout._cache_size()
    other = jax.tree_util.Partial(follow, jnp.asarray(-0.2))
    result = rollout(other, KEYS, IDS, NONE, TOLD, max_steps=10, execute=4)
    assert _rollout._cache_size() == size
    assert np.abs(result.actions - recorded.actions).max() > 0.01


@pytest.mark.parametrize(
    "shape, message",
    [
        ((EPISODES, 3, 4), "execute=4 is more than the 3 actions"),
        ((EPISODES, 8, 7), r"of shape \(16, 8, 7\)"),
        ((8, 4), r"needs \(16, chunk, 4\)"),
    ],
)
def test_invalid_policies_are_errors_that_name_the_problem(shape, message):
    with pytest.raises(ValueError, match=message):
        rollout(lambda o, k: jnp.zeros(shape), KEYS, IDS, NONE, max_steps=4, execute=4)


def test_unknown_words_are_not_instructions():
    tokens = instruction_tokens(12)
    assert tokens.shape == (len(TASKS), 12) and len({tuple(row) for row in tokens}) == len(TASKS)
