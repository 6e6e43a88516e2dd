"""Tests codecs in the training loop, and picture models on their latents."""

import json
import shutil

import jax
import numpy as np
import pytest
from test_configs import get

from wamjax import train, tree, wam
from wamjax.data.arrays import ArraySpec
from wamjax.runs import reconstruction, sampling
from wamjax.training import metrics
from wamjax.training.checkpoint import restore_params

ONE = jax.devices()[:1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def config_of(name, arg, root, **changes):
    config = get(name, f"{arg},debug")
    config.data.root = str(root)
    config.optim.warmup_fraction, config.optim.final_fraction = 0.0, 1.0  # of no given length
    config.update_from_flattened_dict(changes)
    return config


def losses(workdir):
    return np.array([row["loss"] for row in metrics.read(workdir)])


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """Trains a KL codec for twenty steps on one device."""
    workdir = tmp_path_factory.mktemp("codec")
    assert train.run(config_of("codec_tabletop", "kind=kl", root, total_steps=20), workdir,
                     devices=ONE)  # fmt: skip
    return workdir


def test_a_run_leaves_reconstructions_and_what_its_latents_are(whole):
    assert {"reconstructions.png", "codec.json"} < {p.name for p in (whole / "media").iterdir()}
    rows = metrics.read(whole)
    assert np.mean(losses(whole)[-3:]) < 0.6 * losses(whole)[0]
    assert rows[-1]["psnr"] > rows[0]["psnr"] and rows[-1]["kl"] > 0
    report = json.loads((whole / "media" / "codec.json").read_text())
    assert report["clips"] == 256 and len(report["mean"]) == len(report["std"]) == 4
    codec, config = reconstruction.load(whole)
    video = sampling.test_data(config, 256)["video"]
    latents = np.asarray(jax.jit(type(codec).encode)(codec, video))
    np.testing.assert_allclose(report["mean"], latents.mean(axis=(0, 1, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(report["std"], latents.std(axis=(0, 1, 2, 3)), rtol=1e-4)
    with pytest.raises(ValueError, match="trained a codec .'codec'.; use .*wamjax.reconstruct"):
        sampling.load(whole)


@pytest.mark.slow
def test_eight_devices_train_as_one(whole, root, tmp_path):
    config = config_of("codec_tabletop", "kind=kl", root, total_steps=2)
    config.mesh.data, config.mesh.fsdp, config.data.batch_size = 2, 4, 8
    one = config_of("codec_tabletop", "kind=kl", root, total_steps=2)
    one.data.batch_size = 8
    assert train.run(config, tmp_path / "eight")
    assert train.run(one, tmp_path / "one", devices=ONE)
    np.testing.assert_allclose(losses(tmp_path / "eight"), losses(tmp_path / "one"), rtol=2e-5)


@pytest.mark.slow
def test_resuming_a_run_is_bitwise_exact(whole, root, tmp_path):
    assert train.run(config_of("codec_tabletop", "kind=kl", root, total_steps=3), tmp_path,
                     devices=ONE)  # fmt: skip
    with pytest.raises(ValueError, match="model.codec.width was 8.*now 16"):
        changed = config_of("codec_tabletop", "kind=kl", root, **{"model.codec.width": 16})
        train.run(changed, tmp_path, devices=ONE)
    assert train.run(config_of("codec_tabletop", "kind=kl", root, total_steps=20), tmp_path,
                     devices=ONE)  # fmt: skip
    np.testing.assert_array_equal(losses(tmp_path), losses(whole))
    a, b = (restore_params(run).params for run in (whole, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_a_model_trains_on_latents_of_unit_variance_and_draws_pixels(whole, root, tmp_path):
    folder = tmp_path / "codec"
    shutil.copytree(whole, folder)
    config = config_of("video_latents", f"codec={folder},scheme=blocks", root, total_steps=12)
    assert train.run(config, tmp_path / "run", devices=ONE)
    # A fresh network outputs zero, so the loss is the variances of noise and latents.
    assert losses(tmp_path / "run")[0] == pytest.approx(2, rel=0.1)
    assert np.mean(losses(tmp_path / "run")[-3:]) < losses(tmp_path / "run")[0]
    before, after = (restore_params(p, ema=e).params
                     for p, e in ((whole, True), (tmp_path / "run", False)))  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, after["codec"], before)
    shutil.rmtree(folder)  # the checkpoint contains it
    sampler, config = sampling.load(tmp_path / "run")
    condition, given = sampling.inputs(sampler, config, 3, given=2)
    made = sampling.draw(sampler, condition, 3, 0, given, 3)
    assert made.dtype == np.uint8 and made.shape == (3, 4, 16, 16, 3)
    through = np.asarray(reconstruction.through(reconstruction.load(whole)[0], given)[0])
    assert np.abs(made[:, :2].astype(int) - through).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsq", "vq"])
def test_tokens_of_a_trained_code_book(kind, root, tmp_path):
    config = config_of("codec_tabletop", f"kind={kind}", root)
    assert train.run(config, tmp_path / "codec", devices=ONE)
    report = json.loads((tmp_path / "codec" / "media" / "codec.json").read_text())
    vocabulary = {"fsq": 512, "vq": 32}[kind]
    assert 0 < report["usage"] <= 1 and 1 <= report["perplexity"] <= vocabulary
    assert {"usage", "perplexity"} < metrics.read(tmp_path / "codec")[-1].keys()
    arg = f"codec={tmp_path / 'codec'},scheme=tokens"
    assert train.run(config_of("video_latents", arg, root), tmp_path / "run", devices=ONE)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    assert restore_params(tmp_path / "run").params["code_embed"]["embedding"].shape[0] == vocabulary
    with np.load(tmp_path / "run" / "media" / "samples.npz") as made:
        assert made["video"].shape == (64, 4, 16, 16, 3) and made["video"].dtype == np.uint8


def test_errors_name_the_key_and_the_fix(tmp_path):
    shapes = {"video": (4, 16, 16, 3), "label": ()}
    spec = ArraySpec(shapes, {"video": "uint8", "label": "int32"}, {"label": 8}, 1)
    config = get("video_latents", "debug")
    assert {"codec", "video"} < set(jax.eval_shape(wam.build(config, spec).init, jax.random.key(0)))
    config.optim.freeze = ()
    with pytest.raises(ValueError, match=r"kind='kl' has parameters.*optim.freeze=\('codec"):
        wam.build(config, spec)
    config = get("codec_tabletop", "debug")
    paths = tree.flatten(jax.eval_shape(wam.build(config, spec).init, jax.random.key(0)))
    assert not any(path.startswith("codec/") for path in paths)
    grey = ArraySpec(shapes | {"video": (4, 16, 16, 1)}, spec.dtypes, spec.sizes, 1)
    with pytest.raises(ValueError, match="needs pictures of 3 colours, the data has 1"):
        wam.build(config, grey)
    config.model.codec.kind = "pixel"
    with pytest.raises(ValueError, match=r"codec.kind to be one of \['fsq', 'kl', 'vq'\]"):
        wam.build(config, spec)
    with pytest.raises(FileNotFoundError, match="no finished run of a codec"):
        get("video_latents", f"codec={tmp_path},debug")
