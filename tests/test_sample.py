"""Tests sampling from a run: conditions and output files."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from models.helpers import random_params
from PIL import Image
from test_configs import FOLDER, get

from wamjax import foresight, train
from wamjax.data import scenes
from wamjax.runs import sampling, trained
from wamjax.training import optim
from wamjax.viz import sheet


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns a run of text_scenes:debug with joint attention, from its last step on.

    Its parameters and their average are random: no training step is compiled.
    """
    workdir = tmp_path_factory.mktemp("scenes")
    config = get("text_scenes", "route=joint,debug")
    config.total_steps = 2

    def prepare(job):
        (workdir / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n')
        abstract = train.plan(job.objective, optim.make(config), config, job.mesh).state
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
        state = dataclasses.replace(
            state, step=np.int32(2), params=random_params(abstract.params, seed=0),
            ema=random_params(abstract.ema, seed=1),
        )  # fmt: skip
        return jax.device_put(state, jax.tree.map(lambda x: x.sharding, abstract)), None, 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "prepare", prepare)
        assert train.run(config, workdir, devices=jax.devices()[:1])
    return workdir


@pytest.fixture(scope="module")
def loaded(run):
    return sampling.load(run)


def test_captions_of_the_test_data_by_default(run, loaded):
    with np.load(run / "media" / "samples.npz", allow_pickle=False) as made:
        assert made["video"].shape == (64, 1, 24, 24, 3)
        ids = made["instruction"]
    _, config = loaded
    shown = sampling.titles(config, {"instruction": ids})
    test = scenes.make(64, 2**20, size=24, length=13)
    assert shown == test.texts
    assert shown != scenes.make(64, 0, size=24).texts


def test_one_program_whatever_the_count_and_the_batches_do_not_repeat(loaded):
    sampler, config = loaded
    condition, given = sampling.inputs(sampler, config, 7, caption="a red circle")
    assert given is None
    words = scenes.encode("a red circle", 13)
    np.testing.assert_array_equal(condition["instruction"], np.tile(words, (7, 1)))
    programs = sampling.program._cache_size()
    made = sampling.draw(sampler, condition, 7, seed=3, batch=4)
    assert made.shape == (7, 1, 24, 24, 3) and sampling.program._cache_size() == programs + 1
    again = sampling.draw(sampler, condition, 7, seed=3, batch=4)
    np.testing.assert_array_equal(made, again)
    assert sampling.program._cache_size() == programs + 1
    assert len({picture.tobytes() for picture in made}) == 7
    assert np.any(made != sampling.draw(sampler, condition, 7, seed=4, batch=4))


def test_sampling_uses_the_ema(run, loaded):
    from wamjax.training.checkpoint import restore_params

    sampler, _ = loaded
    average, raw = (restore_params(run, ema=e).params for e in (True, False))
    used = sampler.params["video"]["patch_embed"]["kernel"]
    np.testing.assert_array_equal(used, average["video"]["patch_embed"]["kernel"])
    assert np.any(np.asarray(used) != raw["video"]["patch_embed"]["kernel"])


def test_mismatched_options_are_errors(run, loaded):
    sampler, config = loaded
    with pytest.raises(ValueError, match="not conditioned by 'label', but by .*'instruction'"):
        sampling.inputs(sampler, config, 2, label=1)
    with pytest.raises(KeyError, match="no word 'cirle'; did you mean 'circle'"):
        sampling.inputs(sampler, config, 2, caption="a red cirle")
    with pytest.raises(ValueError, match=r"'denoising' has no \['temperature'\]"):
        sampling.load(run, temperature=0.5)


def test_a_run_of_another_kind_is_an_error_that_names_the_right_command(run):
    message = f"{run} trained a model of pictures .'denoising'.; use python -m wamjax.sample"
    for command in (trained.load, foresight.run):
        with pytest.raises(ValueError, match=message):
            command(run)


@pytest.mark.slow
def test_command_line(run, tmp_path):
    command = [sys.executable, "-m", "wamjax.sample", f"--workdir={run}", "--count=3", "--seed=1"]
    command += ["--caption=two red circles and a blue square", "--guidance=1", "--steps=1"]
    command += [f"--output={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent.parent)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"samples.png", "samples.npz"}
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        # Two pictures of 72 pixels side by side, below a caption of four lines.
        assert picture.size == (2 * 72 + 4, 2 * (72 + 4 * 18) + 4)


def test_sheets_of_grey_images_of_clips_and_of_latents():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 255, (6, 1, 8, 8, 1)).astype(np.uint8)
    made = sheet.sheet(grey, columns=3)
    assert made.shape == (2 * 64 + 4, 3 * 64 + 8, 3) and np.ptp(made, axis=-1).max() == 0
    np.testing.assert_array_equal(made[:64:8, :64:8, 0], grey[0, 0, :, :, 0])
    clips = rng.integers(0, 255, (2, 5, 16, 16, 3)).astype(np.uint8)
    assert sheet.sheet(clips).shape == (2 * 64 + 4, 5 * 64 + 4 * 4, 3)
    latents = rng.standard_normal((2, 1, 4, 4, 9)).astype(np.float32)
    assert sheet.rgb(latents).shape == (2, 1, 4, 4, 3)
    assert {sheet.rgb(latents).min(), sheet.rgb(latents).max()} == {0, 255}
