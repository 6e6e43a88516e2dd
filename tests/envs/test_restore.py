"""Tests episodes that start from a state of another one, and experts that confuse objects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax.envs.collection import Settings, collect
from wamjax.envs.tabletop import tasks
from wamjax.envs.world import open_world
from wamjax.runs.closed_loop import replay

NAMES = ["reach_red", "pick_red", "reach_left_zone", "pick_red"]
KEYS = jax.vmap(jax.random.key)(np.arange(len(NAMES)))
WORLD = open_world("tabletop")


def play(actions, **options):
    steps = actions.shape[1]
    return WORLD.roll_out(
        jax.tree_util.Partial(replay), NAMES, KEYS, shift={}, told={"actions": actions},
        max_steps=steps, execute=steps, save=True, **options,
    )  # fmt: skip


def test_an_episode_continued_from_a_saved_state_is_the_same():
    shown = WORLD.demonstrate(NAMES, KEYS, noise=0.1, draw=lambda done: [])
    actions = shown.recording.actions[:, :16]
    whole = play(actions)
    begin = jax.tree.map(lambda x: x[:, 6], whole.states)
    rest = play(actions[:, 6:], start=begin)
    for name in ("proprio", "states"):
        want = jax.tree.map(lambda x: x[:, 6:], getattr(whole, name))
        jax.tree.map(np.testing.assert_array_equal, getattr(rest, name), want)
    assert np.ptp(rest.proprio) > 0.1


def test_the_mistaken_expert_achieves_the_confused_task():
    """It achieves the task that it believes to have; applying the mistake twice changes nothing."""
    done = WORLD.demonstrate(NAMES * 8, jax.vmap(jax.random.key)(np.arange(32)), noise=0.0,
                             draw=lambda done: [], confusion=1.0)  # fmt: skip
    assert done.recording.success.mean() < 0.1
    again = WORLD.demonstrate(NAMES * 8, jax.vmap(jax.random.key)(np.arange(32)), noise=0.0,
                              draw=lambda done: [])  # fmt: skip
    assert again.recording.success.mean() > 0.9
    state = jax.jit(tasks.reset)(KEYS[0], 4, _no_shift())
    mistaken = jax.jit(tasks.mistaken)
    twice = mistaken(mistaken(state))
    jax.tree.map(np.testing.assert_array_equal, twice, state)
    held = state._replace(held=jnp.int32(1))
    assert mistaken(held).held == 0


def test_confusion_without_failures_would_keep_nothing(tmp_path):
    with pytest.raises(ValueError, match="keep_failures"):
        collect(tmp_path / "out", Settings(episodes=4, confusion=0.5), progress=False)


def _no_shift():
    from wamjax.envs.tabletop import Shift

    return Shift.none()
