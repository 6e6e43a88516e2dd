"""Tests picture models in the training loop: on a mesh, resumed, and what a run leaves."""

import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from test_configs import FOLDER, get

from wamjax import train, tree
from wamjax.scores.classifier import Outputs
from wamjax.training import metrics
from wamjax.training.checkpoint import restore_params


def losses(workdir):
    return np.array([row["loss"] for row in metrics.read(workdir)])


def digits(**changes):
    config = get("dit_digits", "debug")
    config.optim.warmup_fraction, config.optim.final_fraction = 0.0, 1.0  # of no given length
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Trains for six steps on one device."""
    workdir = tmp_path_factory.mktemp("whole")
    assert train.run(digits(), workdir, devices=jax.devices()[:1])
    return workdir


def test_a_run_leaves_pictures_and_no_evaluation(whole):
    names = {p.name for p in whole.iterdir() if not p.name.startswith(".")}
    assert names == {"config.json", "metrics.jsonl", "checkpoints", "media", "DONE"}
    media = {p.name for p in (whole / "media").iterdir()}
    assert media == {
        "mask_bidirectional.png", "batch.png", "losses.png", "samples.png", "samples.npz"
    }  # fmt: skip
    with Image.open(whole / "media" / "batch.png") as picture:
        assert picture.width == 4 * 64 + 3 * 4  # 16 digits, 64 pixels wide
    with np.load(whole / "media" / "samples.npz", allow_pickle=False) as made:
        assert made["video"].shape == (64, 1, 8, 8, 1) and made["video"].dtype == np.uint8
        assert made["label"].tolist() == [i % 10 for i in range(64)]
    assert np.all(np.isfinite(losses(whole))) and len(losses(whole)) == 6


@pytest.mark.slow
def test_eight_devices_train_as_one(whole, tmp_path):
    config = digits(**{"mesh.data": 2, "mesh.fsdp": 4, "total_steps": 2})
    assert train.run(config, tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(whole)[:2], rtol=2e-5)


@pytest.mark.slow
def test_resuming_a_run_is_bitwise_exact(whole, tmp_path):
    one = jax.devices()[:1]
    assert train.run(digits(total_steps=3), tmp_path, devices=one)
    with pytest.raises(ValueError, match="objective.process was 'flow'.*now 'edm'"):
        train.run(digits(**{"objective.process": "edm"}), tmp_path, devices=one)
    (tmp_path / "media" / "samples.png").unlink()
    assert train.run(digits(), tmp_path, devices=one)
    assert json.loads((tmp_path / "DONE").read_text()) == {"step": 6}
    np.testing.assert_array_equal(losses(tmp_path), losses(whole))
    a, b = (restore_params(run).params for run in (whole, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    pictures = [np.load(run / "media" / "samples.npz")["video"] for run in (whole, tmp_path)]
    np.testing.assert_array_equal(*pictures)


@pytest.mark.slow
def test_training_on_precomputed_latents(tmp_path):
    """A miniature of ImageNet training: DDPM with learned variance on a file of latents."""
    rng = np.random.default_rng(0)
    latents, label = rng.standard_normal((40, 4, 4, 4)).astype(np.float32), np.arange(40) % 7
    np.savez(tmp_path / "latents.npz", latents=latents, label=label)
    config = get("dit_imagenet", "debug")
    config.update_from_flattened_dict({
        "data.root": str(tmp_path), "data.arrays": "latents:path=latents.npz", "total_steps": 2,
        "model.codec.kind": "cached", "precision.compute": "bfloat16",
    })  # fmt: skip
    assert train.run(config, tmp_path / "run", devices=jax.devices()[:1])
    with np.load(tmp_path / "run" / "media" / "samples.npz", allow_pickle=False) as made:
        assert made["latents"].shape == (64, 1, 4, 4, 4) and np.all(np.isfinite(made["latents"]))
        assert made["label"].max() == 6
    assert (tmp_path / "run" / "media" / "samples.png").exists()
    params = restore_params(tmp_path / "run").params
    assert params["video"]["head"]["kernel"].shape == (32, 2 * 4 * 4)  # noise and variance


# ---- the two studies ----


def study(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER.parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def brightness(pictures):
    """Stands in for a classifier: reads the class from the mean grey level."""
    grey = np.asarray(pictures, np.float64).mean(axis=(1, 2, 3))
    logits = -np.abs(grey[:, None] - 25 * np.arange(10))
    return Outputs((logits,), np.stack([grey, grey**2 / 255], axis=1))


@pytest.mark.slow
def test_scores_and_table_of_the_designs(whole, tmp_path, monkeypatch):
    designs = study("designs_digits")
    assert designs.table(tmp_path) == "no run has been measured yet"
    monkeypatch.setattr(designs, "judge", lambda workdir: brightness)
    found = designs.measure(whole, brightness, 20, 1.5)
    written = json.loads((whole / "scores.json").read_text())
    again = designs.measure(whole, None, 20, 1.5)  # measured results stay
    assert again == written and written["guided"]["accuracy"] == found["guided"]["accuracy"]
    with np.load(whole / "samples.npz") as samples:
        assert samples["video"].shape == (20, 8, 8, 1)
        score = designs.score(samples["video"], samples["label"], brightness)
    assert score["frechet"][0] == pytest.approx(found["guided"]["frechet"][0])
    assert found["parameters"] == tree.count(restore_params(whole).params)
    for run in ("adaln_zero-0", "adaln_zero-1", "in_context-0"):
        (tmp_path / run).mkdir()
        other = written | {"plain": written["plain"] | {"accuracy": 0.5 + 0.1 * int(run[-1])}}
        (tmp_path / run / "scores.json").write_text(json.dumps(other))
        shutil.copy(whole / "samples.npz", tmp_path / run)
    rows = {line.split("|")[1].strip(): line for line in designs.table(tmp_path).splitlines()
            if line.startswith("|")}  # fmt: skip
    assert list(rows)[2:] == ["adaln_zero", "in_context", "real pictures, held out (297)"]
    assert "55.0 [" in rows["adaln_zero"] and "50.0 [29.9, 70.1]" in rows["in_context"]  # Wilson
    assert len({line.count("|") for line in rows.values()}) == 1
    assert (tmp_path / "designs.png").exists() and (tmp_path / "table.md").exists()


def test_verdicts_and_table_of_the_routes(tmp_path):
    routes = study("routes_scenes")
    batch = routes.held_out("combination", 300)
    true = routes.verdicts(batch.captions, batch.scenes)
    assert all(right == asked > 20 for right, asked in true.values())
    assert true["colour"][1] == true["all"][1] == 300 > true["binding"][1] > true["position"][1]
    empty = routes.verdicts(batch.captions, [()] * 300)
    assert all(right == 0 for right, _ in empty.values()) and empty["relation"][1] == 0
    assert true["relation"] == true["position"]
    other = routes.chance("combination", 300)
    assert 0.05 < other["count"][0] / other["count"][1] < 0.7
    assert other["all"][0] < 0.1 * 300 and other["position"][0] < 0.5 * other["position"][1]
    for route, share in {"pooled": 0.25, "cross": 0.75}.items():
        (tmp_path / f"{route}-0").mkdir()
        scores = {c: [round(share * n), n] for c, (_, n) in true.items()}
        if route == "pooled":
            scores["relation"] = [0, 0]
        scores = {"combination": scores, "object": scores, "parameters": 1, "guidance": 3.0}
        (tmp_path / f"{route}-0" / "scores.json").write_text(json.dumps(scores))
        some = {"video": batch.images[:8], "instruction": batch.tokens[:8]}
        np.savez(tmp_path / f"{route}-0" / "samples_combination.npz", **some)
    lines = routes.table(tmp_path).splitlines()
    assert lines[0].count("|") == 9 and lines[2].startswith("| pooled | 25.0 [")
    assert lines[2].split("|")[7].strip() == "-"
    assert lines[3].startswith("| cross | 75.0 [") and lines[4].startswith("| other scenes |")
    for name in ("routes.png", "pictures.png", "table.md", "table.json"):
        assert (tmp_path / name).exists()
