"""Tests that the report of a run has its numbers, files and changes, and no external content."""

import base64
import json
import types

import numpy as np
import pytest
from PIL import Image
from viz import browser

from wamjax import config as configs
from wamjax.viz import __main__ as command
from wamjax.viz import run_page
from wamjax.viz.intervals import wilson
from wamjax.viz.video import save_mp4


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "<mine>"
    config = configs.base_config()
    config.objective.name = "cosmos_policy"
    config.total_steps, config.seed = 4, 7
    config.data.sources.demos = configs.source(path="somewhere", weight=2.0)
    (folder / "media").mkdir(parents=True)
    configs.save(config, folder / "config.json")
    rows = [{"step": i + 1, "loss": 2.0 / (i + 1), "loss_action": 1.0} for i in range(4)]
    rows[1]["step_time"] = 0.25
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = {"success_rate": 0.75, "episodes": 40}
    result = {
        "step": 4, "variant": "fast", "mode": None, "shift": "none", "episodes": 40,
        "success_rate": 0.75, "per_task": {"lift <b>it</b>": task},
        "versions": {"jax": "9.9.9"}, "latency_ms": {"p50": 2.0, "p99": 3.0},
    }  # fmt: skip
    (folder / "eval.json").write_text(json.dumps(result))
    (folder / "eval_lighting.json").write_text(json.dumps(result | {"success_rate": 0.0}))
    save_mp4(np.zeros((3, 16, 16, 3), np.uint8), folder / "media" / "rollout.mp4", 5)
    Image.new("RGB", (4, 4)).save(folder / "media" / "batch.png")
    return folder


def test_the_report_holds_the_run(run, monkeypatch, capsys, tmp_path):
    given = types.SimpleNamespace(workdir=str(run), output=None)
    monkeypatch.setattr(command, "flags", types.SimpleNamespace(FLAGS=given))
    command.main(["viz", "run"])
    text = (run / "report.html").read_text()
    assert str(run / "report.html") in capsys.readouterr().out
    interval = wilson(30, 40)
    assert f"{100 * interval.low:.1f} to {100 * interval.high:.1f} %" in text
    assert text.index("<h2>Success: eval</h2>") < text.index("<h2>Success: eval_lighting</h2>")
    for name in ("rollout.mp4", "batch.png"):
        held = base64.b64encode((run / "media" / name).read_bytes()).decode()
        assert text.count(held) == 1
    assert "losses so far" in text  # drawn, since the run left none
    assert "jax 9.9.9" in text and "250.0 ms (median)" in text and "4 of 4, not done" in text
    assert "lift &lt;b&gt;it" in text and "<b>" not in text and "<mine>" not in text
    shown = browser.run(text, tmp_path, "return document.querySelectorAll('video').length")
    assert shown == 1


def test_only_what_the_config_changes_is_listed(run):
    changed = run_page.changes(configs.load(run / "config.json"))
    assert set(changed) == {
        "objective.name", "total_steps", "seed", "data.sources.demos.path",
        "data.sources.demos.weight",
    }  # fmt: skip
    assert changed["total_steps"] == (configs.base_config().total_steps, 4)
    assert changed["data.sources.demos.weight"][1] == 2.0


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        run_page.write(tmp_path)
