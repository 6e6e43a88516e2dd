"""Tests branches on disk: how they are served, and when they are refused."""

import json

import numpy as np
import pytest

from wamjax import config as configs
from wamjax import files
from wamjax.data import branches as store
from wamjax.runs import branches


def arrays(states=6, proposals=4, continuations=2, seed=0):
    rng = np.random.default_rng(seed)
    shape = states, proposals, continuations
    return {
        "video": rng.integers(0, 255, (states, 1, 8, 8, 3), np.uint8),
        "proprio": rng.normal(size=(states, 5)).astype(np.float32),
        "instruction": rng.integers(0, 9, (states, 3)).astype(np.int32),
        "actions": rng.normal(size=(states, proposals, 2, 4)).astype(np.float32),
        "success": rng.random(shape) < 0.5,
        "steps": rng.integers(1, 40, shape).astype(np.int32),
        "episode": np.arange(states), "at": np.zeros(states, int),
        "tasks": np.array(["reach_red"] * states),
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    statistics = {
        key: {"min": [-1.0] * n, "max": [3.0] * n, "mean": [1.0] * n, "std": [1.0] * n,
              "q01": [-1.0] * n, "q99": [3.0] * n, "count": 5}
        for key, n in (("actions", 4), ("proprio", 5))
    }  # fmt: skip
    spec = {
        "cameras": [["overhead", 8, 8]], "proprio_dim": 5, "action_dim": 4, "chunk": 2,
        "frames": 2, "frame_stride": 1, "instruction_length": 3, "control_hz": 10.0,
    }  # fmt: skip
    files.write_text(tmp_path / store.STATISTICS, json.dumps(statistics | {"spec": spec}))
    files.write_text(tmp_path / store.ABOUT, json.dumps({"policy": "abc", "parts": 2}))
    for number in range(2):
        np.savez(tmp_path / f"part-{number:05d}.npz", **arrays(seed=number))
    return files.path(tmp_path)


def config_of(folder):
    config = configs.base_config()
    config.data.kind, config.data.branches = "branches", str(folder)
    return config


def test_branches_are_served_as_the_policy_was_trained(folder):
    spec, statistics, table = store.open_branches(config_of(folder))
    whole = {k: np.concatenate([arrays(seed=0)[k], arrays(seed=1)[k]]) for k in arrays()}
    got = table.take(np.arange(12))
    np.testing.assert_allclose(got["actions"], (whole["actions"] - 1) / 2, rtol=1e-5)
    np.testing.assert_allclose(got["proprio"], (whole["proprio"] - 1) / 2, rtol=1e-5)
    np.testing.assert_allclose(got["success"], whole["success"].mean(axis=2))
    for i, n in np.ndindex(12, 4):  # steps are of the continuations that succeed
        good = whole["steps"][i, n][whole["success"][i, n]]
        assert got["steps"][i, n] == pytest.approx(good.mean() if len(good) else 0)
    assert got["gate"].sum() == 4 and spec.chunk == 2 and "spec" not in statistics


def test_a_part_that_is_missing_is_named(folder):
    (folder / "part-00001.npz").unlink()
    with pytest.raises(ValueError, match="has only 1 of 2 parts"):
        store.open_branches(config_of(folder))


def test_branches_of_another_policy_are_refused(folder, monkeypatch):
    config = config_of(folder)
    config.init_from.path = "runs/other"
    monkeypatch.setattr(store, "fingerprint", lambda run: "def")
    with pytest.raises(ValueError, match="another policy"):
        store.open_branches(config)
    monkeypatch.setattr(store, "fingerprint", lambda run: "abc")
    store.open_branches(config)


def test_branches_of_another_ladder_are_refused(folder):
    about = json.loads((folder / store.ABOUT).read_text())
    made = {"rungs": [1, 2, 4], "modes": ["direct", "anticipate", "direct"], "proposals": 4}
    files.write_text(folder / store.ABOUT, json.dumps(about | made))
    config = config_of(folder)
    with pytest.raises(ValueError, match=r"judge.rungs = \(1, 4, 8\) must be \(1, 2, 4\)"):
        store.open_branches(config)
    judge = config.objective.judge
    judge.rungs, judge.modes, judge.branches = store.ladder_of(folder)
    assert judge.branches == 4
    store.open_branches(config)


def test_proposals_of_a_cohort_are_made_in_the_modes_of_its_rungs():
    plain = branches.Cohort(states=8, proposals=3)
    assert plain.ways() == (None, None, None)
    ladder = branches.Cohort(8, 5, rungs=(1, 2, 4), modes=("direct", "imagine:2", "anticipate"))
    assert ladder.ways() == ("direct", "imagine:2", *["anticipate"] * 3)


@pytest.mark.parametrize("rungs, modes", [
    ((1, 2), ("direct",)), ((2, 1), ("direct", "direct")), ((1, 9), ("direct", "direct")),
    ((), ("direct",)), ((1,), ()),
])  # fmt: skip
def test_rungs_without_modes_and_too_high_ones_are_refused(rungs, modes):
    cohort = branches.Cohort(states=8, proposals=8, rungs=rungs, modes=modes)
    with pytest.raises(ValueError, match="--rungs=.*: a rung has a mode"):
        branches._check(None, cohort)


def test_missing_branches_are_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="wamjax.branches"):
        store.open_branches(config_of(tmp_path))


def test_best_of_is_the_mean_over_groups_of_the_best():
    rng = np.random.default_rng(0)
    scores, outcomes = rng.normal(size=(30, 8)), rng.random((30, 8))
    for count in (2, 4, 8):
        gains = []
        for s, o in zip(scores, outcomes, strict=True):
            for g in range(0, 8, count):
                gains.append(o[g + s[g : g + count].argmax()] - o.mean())
        assert branches.best_of(scores, outcomes, count) == pytest.approx(np.mean(gains))


def test_headroom_is_what_a_perfect_judge_gains():
    one = arrays(states=50, proposals=8, continuations=1)
    found = branches.summary(one)
    success = one["success"][..., 0]
    assert found["direct"] == pytest.approx(success.mean(), abs=1e-4)
    assert found["headroom"][8] == pytest.approx(
        100 * (success.any(axis=1).mean() - success.mean()), abs=0.06
    )
    assert found["choice"] == pytest.approx((success.any(1) & ~success.all(1)).mean(), abs=1e-4)
