"""Tests the study of video schemes: scores of two miniature runs, and its table."""

import json

import jax
import numpy as np
import pytest
from test_configs import get
from test_denoising_runs import study

from wamjax import train
from wamjax.runs import sampling
from wamjax.scores import video


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Trains blocks and tokens for two steps on clips of 4 frames."""
    folder = tmp_path_factory.mktemp("schemes")
    for run, config in {
        "blocks-0": get("video_tabletop", "scheme=blocks,debug"),
        "tokens-0": get("video_tokens", "debug"),
    }.items():
        config.data.root, config.total_steps = str(folder / "data"), 2
        assert train.run(config, folder / run, devices=jax.devices()[:1])
    return folder


@pytest.mark.slow
def test_scores_and_table_of_the_schemes(workdir, monkeypatch):
    schemes = study("schemes_video")
    monkeypatch.setattr(schemes, "BATCH", 8)
    assert schemes.table(workdir, 32) == "no run has been measured yet"
    found = {s: schemes.measure(workdir / f"{s}-0", s, 12, 32) for s in ("blocks", "tokens")}
    assert {"0", "2", "long"} < set(found["blocks"]) and "1" not in found["blocks"]
    assert {"0", "1", "2", "long"} < set(found["tokens"])
    # A prefill and two steps for one chunk; a prefill and a pass for each of 16 tokens per frame.
    assert found["blocks"]["2"]["passes"] == 3 and found["blocks"]["long"]["passes"] == 9
    assert found["tokens"]["2"]["passes"] == 1 + 2 * 16
    assert "mse" not in found["blocks"]["0"]
    assert len(found["blocks"]["2"]["mse"]) == 2 and len(found["tokens"]["long"]["mse"]) == 6
    again = schemes.measure(workdir / "blocks-0", "blocks", 12, 32)  # measured results stay
    assert again == json.loads((workdir / "blocks-0" / "scores.json").read_text())
    lines = schemes.table(workdir, 32).splitlines()
    tables = [line for line in lines if line.startswith("|") and "given" in line]
    assert len(tables) == 4 and sum(line.startswith("| copying") for line in lines) == 3
    for line in lines:
        assert not line.startswith("|") or line.count("|") in (5, 9)
    for name in ("clips.png", "long.png", "errors.png", "table.md", "table.json"):
        assert (workdir / name).exists()


def test_true_futures_score_better_than_copies():
    schemes = study("schemes_video")
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 255, (6, 4, 16, 16, 3), np.uint8)
    near = np.clip(truth + rng.integers(-3, 4, truth.shape), 0, 255).astype(np.uint8)

    def features(clips):
        return clips.reshape(len(clips), -1)[:, :5].astype(np.float64)

    good, poor = (
        schemes.score(x, truth, 1, truth, features) for x in (near, video.copy_last(truth, 1))
    )
    assert good["psnr"][0] > 30 > poor["psnr"][0] and len(good["mse"]) == 3
    assert good["psnr"][1] <= good["psnr"][0] <= good["psnr"][2]
    # Longer clips are scored on their second half; the curve covers all frames.
    half = truth[:, 2:]
    late = schemes.score(near, truth, 1, half, lambda x: features(np.asarray(x)))
    np.testing.assert_allclose(10 ** (-late["psnr"][0] / 10), np.mean(late["mse"][1:]), rtol=1e-6)


@pytest.mark.slow
def test_clips_continue_beyond_the_training_length(workdir):
    sampler, config = sampling.load(workdir / "blocks-0")
    condition, given = sampling.inputs(sampler, config, 3, given=2)
    short, long = (sampling.draw(sampler, condition, 3, 0, given, 3, frames) for frames in (0, 8))
    assert long.shape == (3, 8, 16, 16, 3)
    np.testing.assert_array_equal(long[:, :2], given)
    difference = np.abs(long[:, :4].astype(int) - short)
    assert np.quantile(difference, 0.99) <= 1 and np.any(long[:, 6:] != long[:, 4:6])
