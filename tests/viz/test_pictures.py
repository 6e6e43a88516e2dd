"""Tests that masks, batches and plots are written, and show their input."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from wamjax.models.visibility import table
from wamjax.viz import batch, masks, plots

FAST = table("fast", {"first": "first", "future": "first future", "action": "first action"})
LENGTHS = {"first": 98, "future": 196, "action": 32}


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def share(image, colour):
    return (np.abs(image - np.array(colour)).max(-1) < 12).sum()


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_mask_picture_fills_the_attended_share(tmp_path, lengths):
    image = pixels(masks.save(FAST, tmp_path / "sub" / "mask.png", lengths))
    filled, empty = share(image, (0, 114, 178)), share(image, (232, 235, 239))
    mask = FAST.mask(lengths or dict.fromkeys(LENGTHS, 1))
    assert filled / (filled + empty) == pytest.approx(mask.mean(), abs=0.02)


def test_mask_text():
    assert "67% of 326 x 326" in masks.text(FAST, LENGTHS)
    assert masks.text(FAST) == str(FAST)
    with pytest.raises(KeyError, match="action"):
        masks.text(FAST, {"first": 1, "future": 1})
    with pytest.raises(KeyError, match=r"lengths lacks \['action'\]"):
        masks.save(FAST, "never.png", {"first": 1, "future": 1})


def example_batch(b=3, f=5, j=8):
    rng = np.random.default_rng(0)
    return {
        "video": rng.integers(0, 64, (b, f, 16, 32, 3), np.uint8),
        "proprio": rng.uniform(-1, 1, (b, 4)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (b, j, 3)).astype(np.float32),
        "instruction": np.array([[5, 9, 0]] * b, np.int32),
        "frame_valid": np.ones((b, f), bool),
        "action_valid": np.ones((b, j), bool),
        "episode": np.arange(b),
    }


def test_batch_picture_marks_padding(tmp_path):
    data = example_batch()
    plain = pixels(batch.save(data, tmp_path / "a.png"))
    data["frame_valid"][1, 3:] = False
    data["action_valid"][2] = False
    padded = pixels(batch.save(data, tmp_path / "b.png"))
    red = (200, 16, 46)
    assert share(plain, red) == 0 < share(padded, red)


def test_batch_picture_of_latents_with_fewer_frames_than_flags(tmp_path):
    data = example_batch(f=9)
    latents = np.random.default_rng(0).normal(size=(3, 3, 7, 14, 48))
    data = {k: v for k, v in data.items() if k != "video"} | {"latents": latents}
    assert batch.save(data, tmp_path / "a.png", examples=1, decode=lambda ids: "reach").exists()
    with pytest.raises(KeyError, match="'video' or 'latents'"):
        batch.save({k: v for k, v in data.items() if k != "latents"}, tmp_path / "b.png")


def test_losses_from_a_run(tmp_path):
    rows = [
        {"step": s, "loss": 2 / s, "loss_video": 1 / s, "grad_norm": 1.0} for s in range(1, 250)
    ]
    rows[9]["loss"] = None  # a skipped step
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 250, "lo')  # killed while writing
    path = plots.losses(tmp_path)
    assert path == tmp_path / "media" / "losses.png" and pixels(path).std() > 5


def test_losses_of_a_run_without_any(tmp_path):
    with pytest.raises(ValueError, match="no metric that starts with 'loss'"):
        plots.losses(tmp_path)


def result(rate):
    tasks = {f"task_{i}": {"success_rate": rate, "episodes": 50} for i in range(3)}
    return {"success_rate": rate, "episodes": 150, "per_task": tasks, "variant": "fast"}


def test_success_bars_are_as_long_as_the_rates(tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps(result(0.8)))
    high = pixels(plots.success(tmp_path / "eval.json", tmp_path / "high.png"))
    low = pixels(plots.success(result(0.4), tmp_path / "low.png"))
    bar = np.array((0, 114, 178)) * 0.85 + 255 * 0.15  # drawn with alpha
    assert share(high, bar) / share(low, bar) == pytest.approx(2, rel=0.05)


def test_ablation_takes_missing_cells_and_single_seeds(tmp_path):
    cells = {
        "fast": {"none": [0.8, 0.9, 0.85], "camera": [0.4, 0.0, 0.2]},
        "idm": {"none": [0.7]},
    }
    path = plots.ablation(cells, tmp_path / "a.png", latency={"fast": 12.0})
    assert pixels(path).std() > 5


def test_drawing_needs_neither_pyplot_nor_a_display(tmp_path):
    code = (
        "import sys, os; os.environ.pop('DISPLAY', None)\n"
        "from wamjax.models.visibility import causal\n"
        "from wamjax import viz\n"
        "from wamjax.viz import masks, batch, plots, video\n"
        "assert 'matplotlib' not in sys.modules and 'imageio_ffmpeg' not in sys.modules\n"
        f"masks.save(causal('a', 'b'), {str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "a.png").exists()
