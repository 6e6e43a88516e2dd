"""Tests data sets written from arrays."""

import numpy as np
import pytest
from data import synthetic

import wamjax.data
from wamjax.data import images, pipeline
from wamjax.data.records import Reader


def episodes(final=True, count=3, **more):
    for i in range(count):
        rng, steps = np.random.default_rng(i), 6 + i
        seen = steps + final
        yield {
            "images": {"front": rng.integers(0, 255, (seen, 8, 12, 3), np.uint8)},
            "proprio": rng.normal(size=(seen, 3)),
            "actions": rng.normal(size=(steps, 2)),
            "instruction": f"push {i}",
        } | {k: x(i, steps) for k, x in more.items()}


def test_arrays_come_back_as_they_were_given(tmp_path):
    info = {"control_hz": 15.0, "action_names": ("x", "gripper"), "robot": "mine"}
    said = wamjax.data.write_episodes(tmp_path / "a", info, episodes())
    reader = Reader(tmp_path / "a")
    assert reader.info == said and said.robot == "mine" and said.cameras == {"front": (8, 12)}
    assert said.final_observation and not said.outcomes
    for episode, want in zip(reader, episodes(), strict=True):
        assert np.array_equal(episode.actions, np.float32(want["actions"]))
        assert np.array_equal(episode.proprio, np.float32(want["proprio"]))
        shown = np.stack([images.decode(x) for x in episode.images["front"]])
        assert np.array_equal(shown, want["images"]["front"])
        assert episode.returns.shape == (0,) and episode.instruction == want["instruction"]


def test_rewards_and_success_give_returns(tmp_path):
    rewards = {"rewards": lambda i, n: np.eye(n)[3]}
    wamjax.data.write_episodes(tmp_path / "a", 10, episodes(**rewards), discount=0.5)
    assert np.allclose(Reader(tmp_path / "a")[0].returns, [1 / 8, 1 / 4, 1 / 2, 1, 0, 0])
    success = {"success": lambda i, n: i != 1}
    wamjax.data.write_episodes(tmp_path / "b", 10, episodes(**success))
    won, lost, _ = Reader(tmp_path / "b")
    assert np.allclose(won.returns, 0.99 ** np.arange(5, -1, -1.0)) and won.success
    assert not lost.returns.any() and not lost.success and Reader(tmp_path / "b").info.outcomes


def test_as_many_observations_as_actions_and_jpeg(tmp_path):
    info = wamjax.data.write_episodes(tmp_path / "a", 10, episodes(final=False), pictures="jpeg")
    episode = Reader(tmp_path / "a")[0]
    assert not info.final_observation and len(episode.images["front"]) == 7
    assert episode.images["front"][-1] == episode.images["front"][-2]
    assert episode.images["front"][0][:2] == b"\xff\xd8"


@pytest.mark.parametrize("change, fault", [
    ({"action": lambda i, n: 0}, "there is no key 'action', did you mean 'actions'"),
    ({"actions": lambda i, n: np.zeros((n * (i < 2), 2))}, "episode 2: it has no steps"),
    ({"success": lambda i, n: None if i else True}, "episode 1: only some episodes have "),
    ({"proprio": lambda i, n: np.zeros((n + 1 - i, 3))}, "episode 1: 7 proprio, but 7 actions"),
    ({"actions": lambda i, n: np.zeros(n)}, r"actions is \(6,\), it must be \(steps, dimensions\)"),
    ({"images": lambda i, n: {"front": np.zeros((n + 1, 8 + i, 12, 3), np.uint8)}},
     r"episode 1: a picture of camera 'front' is \(9, 12\), others are \(8, 12\)"),
    ({"proprio": lambda i, n: np.full((n + 1, 3), np.nan)}, "episode 0 .*non-finite"),
])  # fmt: skip
def test_mismatches_are_errors_and_leave_nothing(tmp_path, change, fault):
    with pytest.raises(ValueError, match=fault):
        wamjax.data.write_episodes(tmp_path / "a", 10, episodes(**change))
    assert list(tmp_path.iterdir()) == []


def test_the_rate_must_be_given(tmp_path):
    with pytest.raises(ValueError, match="lacks 'control_hz'"):
        wamjax.data.write_episodes(tmp_path / "a", {"robot": "x"}, episodes())
    with pytest.raises(ValueError, match="no field 'hz'"):
        wamjax.data.write_episodes(tmp_path / "a", {"hz": 3}, episodes())


def test_values_are_not_learned_without_outcomes(tmp_path):
    wamjax.data.write_episodes(tmp_path / "a", 10, episodes())
    config = synthetic.config(tmp_path, a={"path": "a"})
    spec, statistics, sources = pipeline.open_episodes(config)
    batch = pipeline.batches(config, spec, statistics, sources)[0]
    assert np.isfinite(batch["actions"]).all()
    config.data.outcome = True
    with pytest.raises(ValueError, match="neither rewards nor success.*config.data.outcome"):
        pipeline.batches(config, spec, statistics, sources)
