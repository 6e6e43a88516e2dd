"""Tests that rollouts of a policy become training data unchanged."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from wamjax import rollouts
from wamjax.config import base_config
from wamjax.data.records import Reader
from wamjax.data.spec import DataSpec
from wamjax.data.windows import Windows
from wamjax.envs import tabletop
from wamjax.runs import trained
from wamjax.wam import noise as draws
from wamjax.wam.protocols import Policy

TASKS = ("reach_left_zone", "pick_red")
STEPS = 24
EPISODES = 18  # a batch and a half


@dataclasses.dataclass(frozen=True)
class Left(Policy):
    """Goes to where left zones tend to be, for any instruction."""

    def batch_spec(self, batch_size):
        return {}

    def policy(self, params, normalizers, observation, key, mode):
        there = jnp.array([-0.5, 0.57, 0.0])
        move = jnp.clip(5 * (there - observation["proprio"][:, :3]), -1, 1)
        action = jnp.concatenate([move, jnp.ones((len(move), 1))], axis=1)
        noise = 0.1 * draws.normal(key, (len(move), 8, 4))
        return action[:, None] + noise


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    config = base_config()
    config.eval.max_steps, config.eval.execute, config.eval.batch_size = STEPS, 2, 12
    policy = trained.Policy(Left(), {}, {})
    path = tmp_path_factory.mktemp("rollouts") / "made"
    run = {"run": "r"}
    summary = rollouts.record(policy, config, path, TASKS, EPISODES, 7, run, progress=False)
    return config, policy, path, summary


def test_every_episode_is_stored_unchanged(recorded):
    config, _, path, summary = recorded
    reader = Reader(path)
    made = list(reader)
    assert len(made) == summary["episodes"] == EPISODES
    assert summary["steps"] == sum(e.length for e in made)
    assert [e.task for e in made] == list(TASKS) * (EPISODES // 2)
    assert reader.info.collection["run"] == "r"
    wins = [e for e in made if e.success]
    assert 3 < len(wins) <= EPISODES // 2
    assert summary["success_rate"] == len(wins) / EPISODES
    for e in made:
        # Ends a few steps after the action that achieves the task, which has the reward.
        end = min(np.argmax(e.returns) + 1 + 3, STEPS) if e.success else STEPS
        assert e.length == end
        assert (e.returns.max() == 1) == e.success and e.instruction == tabletop.instruction(e.task)
        assert e.proprio.shape == (e.length + 1, 5)
        # Pictures match their states: consecutive ones are equal only if the gripper rests.
        frames = e.frames("overhead", [0, e.length])
        moved = np.abs(e.proprio[0, :3] - e.proprio[-1, :3]).max() > 0.1
        assert np.any(frames[0] != frames[1]) == moved


def test_rollouts_are_read_as_a_source_of_windows(recorded):
    *_, path, _ = recorded
    cameras = {name: tabletop.CAMERAS[name] for name in ("overhead", "gripper")}
    spec = DataSpec(cameras, 5, 4, 8, 2, 8, 12, tabletop.CONTROL_HZ)
    for ended, score in (("success", 1), ("failure", 0)):
        windows = Windows(Reader(path), spec, rollout=True, ended=ended)
        window = windows[len(windows) - 1]
        assert window["score"] == score and window["rollout"]
        if score:
            assert window["to_go"] == 0


def test_episodes_differ_from_those_of_the_evaluation_and_are_reproducible(recorded, tmp_path):
    config, policy, path, _ = recorded
    with pytest.raises(ValueError, match="seed 0 makes the episodes that config.eval.seed"):
        rollouts.record(policy, config, tmp_path / "a", TASKS, 2, config.eval.seed)
    # Results depend on the batch size, so it uses the same arguments.
    rollouts.record(policy, config, tmp_path / "b", TASKS, EPISODES, 7, progress=False)
    for a, b in zip(Reader(path), Reader(tmp_path / "b"), strict=True):
        np.testing.assert_array_equal(a.actions, b.actions)
        assert a.images == b.images
