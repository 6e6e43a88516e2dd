import dataclasses
import json
import os
import pathlib
import sys
import types

import jax
import numpy as np
import pytest
import toy

from wamjax import config as configs
from wamjax import files, train
from wamjax.data.sources import data_root
from wamjax.training import continuing, guards, metrics
from wamjax.training.checkpoint import Checkpoints, restore_params
from wamjax.tree import flatten


def one():
    return jax.devices()[:1]


def run(config, workdir, **kwargs):
    return toy.run(config, workdir, devices=one(), **kwargs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("done")
    assert run(toy.config(total_steps=6), workdir)
    return workdir


def test_a_run_leaves_these_files(finished):
    assert {p.name for p in finished.iterdir()} >= {
        "config.json", "metrics.jsonl", "checkpoints", "media", "DONE"
    }  # fmt: skip
    rows = metrics.read(finished)
    assert [r["step"] for r in rows] == list(range(1, 7))
    for row in rows:
        assert {"loss", "loss_action", "grad_norm", "learning_rate", "skips"} <= row.keys()
        assert ("step_time" in row) == ("mfu" in row) == (row["step"] % 3 == 0)
        if "step_time" in row:
            assert row["step_time"] > 0 and 0 <= row["data_wait"] <= 1 and 0 < row["mfu"] < 1
    assert not (finished / "metrics.tmp").exists()


def test_a_done_run_says_so_and_more_steps_continue_it(tmp_path, capsys):
    assert run(toy.config(total_steps=3), tmp_path)
    capsys.readouterr()

    def forbidden(*_):
        raise AssertionError("a done run builds nothing")

    for steps in (3, 2):
        assert train.run(toy.config(total_steps=steps), tmp_path, forbidden, forbidden)
        assert "is done at step 3" in capsys.readouterr().err
    assert run(toy.config(total_steps=5), tmp_path)
    err = capsys.readouterr().err
    assert "config.total_steps: 3 -> 5" in err and "continuing from checkpoint 3" in err
    assert json.loads((tmp_path / "DONE").read_text())["step"] == 5
    assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_done_run_is_not_taken_for_one_of_another_config(tmp_path, capsys):
    assert run(toy.config(total_steps=3), tmp_path)
    with pytest.raises(ValueError, match=r"config.seed was 0 when .* \(done at step 3\) .* now 9"):
        run(toy.config(total_steps=3, seed=9), tmp_path)
    assert run(toy.config(total_steps=3, **{"optim.learning_rate": 0.5}), tmp_path)
    assert "config.optim.learning_rate: 0.01 -> 0.5 since" in capsys.readouterr().err
    (tmp_path / "DONE").unlink()
    with pytest.raises(ValueError, match="total_steps = 2 is behind checkpoint 3"):
        run(toy.config(total_steps=2), tmp_path)


def test_the_last_step_is_saved_even_if_it_was_skipped(tmp_path):
    assert run(toy.config(total_steps=6), tmp_path, bad=range(40, 48), shuffle=False)
    rows = metrics.read(tmp_path)
    assert [r["skips_in_a_row"] for r in rows] == [0, 0, 0, 0, 0, 1]
    found = restore_params(tmp_path)
    assert found.step == 6 == json.loads((tmp_path / "DONE").read_text())["step"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found.params))


def test_double_precision_that_is_not_on_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="'float64'.*JAX_ENABLE_X64=1"):
        run(toy.config(**{"precision.compute": "float64"}), tmp_path)


def test_an_impossible_evaluation_is_an_error_before_training(tmp_path):
    with pytest.raises(ValueError, match="eval.episodes = 4: 'fast_wam' is no policy, set it to 0"):
        run(toy.config(**{"eval.episodes": 4}), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_killed_during_evaluation_resumes_it(finished, monkeypatch):
    (finished / "DONE").unlink()
    before = (finished / "metrics.jsonl").read_text()
    assert run(toy.config(total_steps=6), finished)
    assert (finished / "DONE").exists()
    assert (finished / "metrics.jsonl").read_text() == before


def test_a_frozen_key_refuses_to_change(finished):
    with pytest.raises(ValueError, match="config.model.layers was 4 when checkpoint 6 .* now 5"):
        run(toy.config(total_steps=7, **{"model.layers": 5}), finished)


def test_other_statistics_are_refused(finished):
    other = {"actions": {"min": [0.0, -1.25], "count": 3}}
    with pytest.raises(ValueError, match="'actions.min'.*-1.25.*checkpoint 6"):
        run(toy.config(total_steps=7), finished, statistics=other)


def test_a_refused_run_changes_nothing(finished):
    def names():
        return sorted(p.name for p in finished.rglob("*"))

    before, config = names(), (finished / "config.json").read_text()
    with pytest.raises(ValueError):
        run(toy.config(total_steps=7, **{"seed": 5}), finished)
    assert names() == before and (finished / "config.json").read_text() == config


def test_a_folder_in_use_by_another_training_is_refused(finished):
    """Two trainings in one folder would overwrite each other's checkpoints."""
    config = (finished / "config.json").read_text()
    with guards.alone(finished):
        with pytest.raises(guards.Occupied, match=f"in use: process {os.getpid()} on .*--workdir"):
            run(toy.config(total_steps=7), finished)
    assert (finished / "config.json").read_text() == config
    with guards.alone(finished):  # the lock was released
        pass


@dataclasses.dataclass(frozen=True)
class Wants(toy.Toy):
    key: str = "video"
    shape: tuple = (3,)

    def batch_spec(self, b):
        return super().batch_spec(b) | {
            self.key: jax.ShapeDtypeStruct((b, *self.shape), np.float32)
        }


def test_a_batch_that_does_not_fit_the_objective(tmp_path):
    with pytest.raises(ValueError, match="data has no 'video'.*'actions'"):
        run(toy.config(), tmp_path / "a", make_objective=lambda *_: Wants())
    # Integers instead of floats: same key, other dtype.
    with pytest.raises(ValueError, match=r"batch\['episode'\] is int32\(8,\).*float32\(8,\)"):
        run(toy.config(), tmp_path / "b", make_objective=lambda *_: Wants(key="episode", shape=()))


# ---- guards ----


def test_nan_at_step_0_is_skipped_and_counted(tmp_path, capsys):
    run(toy.config(total_steps=4), tmp_path, bad=range(8), shuffle=False)
    rows = metrics.read(tmp_path)
    assert [r["skips"] for r in rows] == [1, 1, 1, 1]
    assert [r["skips_in_a_row"] for r in rows] == [1, 0, 0, 0]
    assert np.isnan(rows[0]["loss"]) and np.isfinite([r["loss"] for r in rows[1:]]).all()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["loss"] is None
    assert "step 1 skipped" in capsys.readouterr().err
    leaves = jax.tree.leaves(restore_params(tmp_path).params)
    assert all(np.isfinite(x).all() for x in leaves)


def test_k_skips_in_a_row_stop_the_run_with_the_last_good_checkpoint(tmp_path):
    # Batches 5, 6, 7 of 8 are bad: steps 6 to 8. A checkpoint is due at 6 and at 8.
    config = toy.config(total_steps=12, **{"guard.max_consecutive_skips": 3,
                                           "checkpoint.every": 2})  # fmt: skip
    with pytest.raises(guards.Diverged, match="3 steps in a row, up to step 8; checkpoint 4"):
        run(config, tmp_path, bad=range(40, 64), shuffle=False)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest == 4
    assert not (tmp_path / "DONE").exists()
    with pytest.raises(guards.Diverged):  # the same command meets the same data
        run(config, tmp_path, bad=range(40, 64), shuffle=False)
    config.guard.max_consecutive_skips = 4
    assert run(config, tmp_path, bad=range(40, 64), shuffle=False)
    assert metrics.read(tmp_path)[-1]["skips"] == 3


def test_divergence_without_a_checkpoint_is_reported():
    row = {"skips_in_a_row": 10.0, "loss": float("nan"), "grad_norm": 1.0, "step": 10.0}
    with pytest.raises(guards.Diverged, match="no checkpoint was saved"):
        guards.check_streak(row, 10, None)
    guards.check_streak(row | {"skips_in_a_row": 9.0}, 10, None)


# ---- metrics ----


def test_rewind_drops_later_and_torn_lines(tmp_path):
    lines = [json.dumps({"step": i, "loss": i / 3}) for i in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "lo')
    metrics.rewind(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_text() == "\n".join(lines[:3]) + "\n"
    metrics.rewind(tmp_path, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("key, package, value", [
    ("log.tensorboard", "tensorboardX", True), ("log.wandb", "wandb", "project"),
])  # fmt: skip
def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch, key, package, value):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"config.{key} needs {package}.*wamjax\[log\]"):
        metrics.writers(tmp_path, toy.config(**{key: value}))


def test_wandb_runs_have_unique_ids_and_resume(tmp_path, monkeypatch):
    asked = []
    fake = types.SimpleNamespace(
        init=lambda **options: asked.append(options) or types.SimpleNamespace(finish=None)
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for parent in ("a", "b", "a", "old"):
        folder = tmp_path / parent / "base-0"
        folder.mkdir(parents=True, exist_ok=True)
        if parent == "old":  # started when the folder's name was its identity
            (folder / "wandb").mkdir()
        metrics.WandB("project", folder, toy.config())
    a, b, again, old = (options["id"] for options in asked)
    assert a == again != b and old == "base-0"
    assert {options["name"] for options in asked} == {"base-0"}


def test_profile_traces_the_steps_asked_for(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    config = toy.config(**{"profile.start": 2, "profile.steps": 3})
    with metrics.Profile(config, tmp_path) as profile:
        for step in range(8):
            profile.before(step)
            calls.append(step)
    assert calls == [0, 1, "start", 2, 3, 4, "stop", 5, 6, 7]
    calls.clear()
    with metrics.Profile(config, tmp_path) as profile:
        profile.before(4)
    assert calls == ["start", "stop"]
    with metrics.Profile(toy.config(), tmp_path) as profile:
        profile.before(0)
    assert calls == ["start", "stop"]


def test_the_loop_really_optimises(tmp_path):
    assert run(toy.config(total_steps=60, log_every=30, **{"checkpoint.every": 60}), tmp_path)
    loss = [r["loss"] for r in metrics.read(tmp_path)]
    assert np.mean(loss[-10:]) < 0.8 * np.mean(loss[:10])
    changed = flatten(restore_params(tmp_path, ema=False).params)
    fresh = flatten(toy.Toy().init(train.states.key(0, "init")))
    assert all((changed[k] != fresh[k]).any() for k in fresh)


# ---- files of a run ----


@pytest.mark.parametrize("text", ["", '{"st', "[3]", '{"step": null}'])
def test_a_damaged_done_file_is_reported_and_ignored(finished, capsys, text):
    (finished / "DONE").write_text(text)
    assert run(toy.config(total_steps=6), finished)
    said = capsys.readouterr().err
    assert ("DONE is ignored, it is damaged" in said) and "is done at step" not in said
    assert json.loads((finished / "DONE").read_text()) == {"step": 6}


def test_a_damaged_config_of_a_finished_run_is_reported_and_ignored(finished, capsys):
    whole = (finished / "config.json").read_text()
    (finished / "config.json").write_text(whole[:50])
    assert run(toy.config(total_steps=6), finished)
    said = capsys.readouterr().err
    assert "config.json is ignored, it is damaged" in said and "is done at step 6" in said
    (finished / "config.json").write_text(whole)


def test_a_file_is_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "DONE"
    files.write_text(path, "old")
    monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)  # simulates a crash of the machine
    with pytest.raises(ZeroDivisionError):
        files.write_text(path, "a longer text")
    assert path.read_text() == "old"


@pytest.mark.parametrize("workdir", ["az://bucket/runs/first", pathlib.Path("s3://bucket/run")])
def test_a_bucket_is_refused_before_anything_is_made(tmp_path, monkeypatch, workdir):
    monkeypatch.chdir(tmp_path)
    for use in (lambda: run(toy.config(), workdir), lambda: restore_params(workdir)):
        with pytest.raises(files.NotWritable, match=r"--workdir=\w\w:/.*mount the bucket"):
            use()
    with pytest.raises(files.NotWritable, match="config.data.root=s3://x.*mount the bucket"):
        data_root("s3://x")
    assert not list(tmp_path.iterdir())


def test_an_unwritable_home_is_an_error_that_names_what_to_set(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("no folder")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = toy.config(**{"data.frames": 1})
    config.data.sources.demos = configs.source(collect={"episodes": 1})
    with pytest.raises(files.NotWritable, match=r"home/.cache/.*config.data.root .*XDG_CACHE_HOME"):
        train.build_data(config)
    with pytest.raises(files.NotWritable, match="cannot make the folder .*another --workdir"):
        run(toy.config(), tmp_path / "home" / "run")


def test_flipped_bits_of_a_run_are_trained_again_from_the_checkpoint_before(tmp_path, capsys):
    config = toy.config(total_steps=8)
    assert run(config, tmp_path)
    want, rows = flatten(restore_params(tmp_path, ema=False).params), metrics.read(tmp_path)
    (tmp_path / "DONE").unlink()
    newest = tmp_path / "checkpoints" / "8"
    path = max(newest.glob("optimizer/d/*"), key=lambda p: p.stat().st_size)
    path.write_bytes(b"".join(bytes([b ^ 1]) for b in path.read_bytes()))
    capsys.readouterr()
    assert run(config, tmp_path)
    said = capsys.readouterr().err
    assert "Going on from the one before, checkpoint 4" in said
    assert "continuing from checkpoint 4" in said and "damaged-8, which can be deleted" in said
    got = flatten(restore_params(tmp_path, ema=False).params)
    assert all(np.array_equal(got[p], want[p]) for p in want)
    assert [r["loss"] for r in metrics.read(tmp_path)] == [r["loss"] for r in rows]
    assert (tmp_path / "checkpoints" / "damaged-8" / "params").is_dir()


# ---- the average ----


def test_an_ema_too_long_for_the_run_gives_a_warning(capsys):
    def said(**values):
        continuing.check_average(toy.config(**{f"optim.{k}": v for k, v in values.items()},
                                        total_steps=250))  # fmt: skip
        return capsys.readouterr().err

    text = said(ema_decay=0.9999, ema_warmup=False)
    assert "warning: 250 steps are few for optim.ema_decay = 0.9999: 98% of the average" in text
    assert "its decay ends at 0.9654, not at optim.ema_decay = 0.9999" in said(ema_decay=0.9999)
    assert not said(ema_decay=0.9) and not said(ema_decay=0.0)
    assert not said(ema_decay=0.9, ema_warmup=False)
