"""Runs the quickstart in miniature, from nothing to a video, and uses its result."""

import hashlib
import json
import math
import shutil

import imageio_ffmpeg
import jax
import numpy as np
import pytest
from PIL import Image
from test_configs import get

from wamjax import config as configs
from wamjax import train
from wamjax.envs import tabletop
from wamjax.runs import evaluation, sampling, trained
from wamjax.training import metrics


def asked():
    """Returns quickstart:debug, evaluated in batches of four, whose programs other tests share."""
    config = get("quickstart", "debug")
    config.eval.batch_size = 4
    return config


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Returns (config, run directory) of quickstart:debug, without its data set."""
    root = tmp_path_factory.mktemp("job")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        config = asked()
        assert train.run(config, root / "run")  # on all devices: nothing else has real data on many
        data = root / "cache" / "wamjax" / "data"
        assert [len(list(d.glob("*.arrayrecord*"))) > 0 for d in data.iterdir()] == [True]
        shutil.rmtree(root / "cache")
        yield config, root / "run"


def contents(folder):
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p: (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).digest()) for p in files}


def check_report(report, episodes):
    rates = report["per_task"].values()
    assert report["episodes"] == episodes == sum(t["episodes"] for t in rates)
    assert all(0 <= t["success_rate"] <= 1 for t in rates)
    mean = sum(t["success_rate"] * t["episodes"] for t in rates) / episodes
    assert math.isclose(report["success_rate"], mean, abs_tol=1e-6)
    assert 0 <= report["untrained_success_rate"] <= 1 and 0 <= report["blind_success_rate"] <= 1
    assert report["env"] == "tabletop" and {"jax", "wamjax"} <= report["versions"].keys()
    assert 0 < report["latency_ms"]["p50"] <= report["latency_ms"]["p99"] < 60_000


def test_a_run_leaves_everything_that_is_promised(job):
    config, run = job
    assert {p.name for p in run.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoints", "media", "eval.json", "DONE", ".lock",
        "episodes.jsonl",
    }  # fmt: skip
    assert configs.load(run / "config.json").to_dict() == config.to_dict()
    rows = metrics.read(run)
    assert [row["step"] for row in rows] == list(range(1, config.total_steps + 1))
    assert all(np.isfinite(row["loss"]) and row["skips"] == 0 for row in rows)
    assert sorted(int(p.name) for p in (run / "checkpoints").iterdir()) == [3, 6]
    report = json.loads((run / "eval.json").read_text())
    check_report(report, 9)  # 8 asked, three tasks in equal shares
    assert set(report["per_task"]) == {"reach_red", "reach_left_zone", "pick_red"}
    assert (report["step"], report["variant"], report["shift"]) == (6, "fast", "none")


def test_its_pictures_can_be_opened(job):
    media = job[1] / "media"
    assert {p.name for p in media.iterdir()} == {
        "mask_fast_wam.png", "batch.png", "losses.png", "success.png", "rollout.mp4"
    }  # fmt: skip
    for path in media.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 50 and len(set(picture.convert("L").tobytes())) > 3
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(media / "rollout.mp4"))
    assert 5 <= frames <= 60 and seconds > 0.5


def test_the_same_command_again_says_done_and_changes_nothing(job, capsys):
    config, run = job
    before = contents(run)
    assert train.run(asked(), run)
    assert "is done at step 6" in capsys.readouterr().err
    assert contents(run) == before


def test_a_checkpoint_alone_can_be_evaluated_under_a_shift(job):
    config, run = job
    before = contents(run)
    config = configs.load(run / "config.json")
    config.eval.episodes, config.eval.tasks = 4, ("reach_red", "pick_red")
    report = evaluation.run(config, run, shift="lighting")
    check_report(report, 4)
    assert json.loads((run / "eval_lighting.json").read_text()) == report
    assert report["shift"] == "lighting"
    after = contents(run)
    assert before.items() <= after.items()
    assert {p.name for p in after.keys() - before.keys()} == {
        "eval_lighting.json", "success_lighting.png", "rollout_lighting.mp4",
        "episodes_lighting.jsonl",
    }  # fmt: skip


def test_a_policy_is_what_was_trained(job):
    policy, config, step = trained.load(job[1])
    assert step == 6 and config.total_steps == 6
    observation = trained.observe_example(policy, 2)
    key = jax.random.key(0)
    act = jax.jit(lambda p: p.actions(p.params, observation, key))
    actions = act(policy)
    assert actions.shape == (2, config.data.chunk, tabletop.ACTION_DIM)
    words = {w for task in tabletop.TASKS for w in tabletop.instruction(task).split()}
    assert set(policy.words) <= words and list(policy.words) == sorted(policy.words) != []
    fresh = trained.untrained(policy, config)
    assert jax.tree.structure(fresh.params) == jax.tree.structure(policy.params)
    assert not np.allclose(actions, act(fresh))
    earlier, _, step = trained.load(job[1], step=3)
    assert step == 3
    assert not np.allclose(actions, act(earlier))
    with pytest.raises(ValueError, match="'dirct', did you mean 'direct'"):
        trained.load(job[1], mode="dirct")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 4; it has \[3, 6\]"):
        trained.load(job[1], step=4)
    with pytest.raises(ValueError, match="trained a policy .'fast_wam'.; use .*wamjax.evaluate"):
        sampling.load(job[1])
