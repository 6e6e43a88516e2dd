"""Tests that one object resizes pictures to the model's size everywhere."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from data import synthetic
from PIL import Image

from wamjax import config as configs
from wamjax.bundle.observation import BadObservation, Observer
from wamjax.data import images, pipeline
from wamjax.data.sources import open_sources
from wamjax.data.spec import DataSpec
from wamjax.data.transforms import views
from wamjax.envs import tabletop
from wamjax.runs import trained

SIZES = {"top": (20, 12), "wrist": (9, 33)}


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


@pytest.mark.parametrize("how", images.RESIZES)
@pytest.mark.parametrize("size", [(16, 16), (7, 40), (64, 64), (1, 3)])
def test_matrices_resize_as_pil_does(how, size):
    x = noise(2, 20, 33)
    here, there = images.resize(x, size, how), images.resize(jnp.asarray(x), size, how)
    assert here.shape == there.shape == (2, *size, 3) and here.dtype == there.dtype == np.uint8
    assert np.abs(here.astype(int) - np.asarray(there)).max() <= 1
    if how == "stretch":
        pil = Image.fromarray(x[0]).resize(size[::-1], Image.Resampling.BILINEAR)
        assert np.array_equal(here[0], np.asarray(pil))


def test_padding_shows_the_whole_picture_in_the_middle():
    x = np.full((10, 20, 3), 200, np.uint8)
    y = images.resize(x, (16, 16), "pad")
    assert (y[4:12] == 200).all() and not y[:4].any() and not y[12:].any()
    assert images.resize(x, (10, 20), "pad") is x


def test_cameras_of_any_size_are_trained_on_in_one(tmp_path):
    synthetic.write(tmp_path / "a", (6, 5), cameras=SIZES)
    synthetic.write(tmp_path / "b", (6, 5), cameras=SIZES | {"top": (10, 12)})
    both = {"a": {"path": "a"}, "b": {"path": "b"}}
    config = synthetic.config(tmp_path, **both)
    with pytest.raises(ValueError, match=r"sources.b .*of size .*config.data.image_size = "):
        open_sources(config.data)
    config = synthetic.config(tmp_path, a=both["a"])
    with pytest.raises(ValueError, match=r"not equally high .*config.data.image_size = \(HEIGHT"):
        open_sources(config.data)
    config = synthetic.config(tmp_path, **both)
    config.data.image_size, config.data.resize = (8, 16), "stretch"
    spec, statistics, sources = pipeline.open_sources(config.data)
    assert spec.cameras == dict.fromkeys(SIZES, (8, 16)) and spec.resize == "stretch"
    assert DataSpec.from_json(spec.to_json()) == spec
    batch = pipeline.batches(config, spec, statistics, sources)[0]
    assert batch["video"].shape == (4, 3, 8, 32, 3)
    # synthetic pictures are of one colour, so resizing keeps it: episode, step, camera
    assert (batch["video"][..., 16:, 2] == 1).all() and (batch["video"][..., :16, 2] == 0).all()


def test_a_spec_without_resizing_is_written_as_before():
    spec = DataSpec(SIZES, 3, 2, 4, 3, 2, 8, 10.0)
    assert "resize" not in spec.to_json() and DataSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("how", images.RESIZES)
def test_a_robot_sees_what_training_saw(how):
    sizes = dict.fromkeys(SIZES, (8, 16))
    spec = DataSpec(sizes, 3, 2, 4, 3, 2, 8, 10.0, how)
    shown = {camera: noise(*size) for camera, size in SIZES.items()}
    observation = {"images": shown, "proprio": np.zeros(3, np.float32), "instruction": "lift it"}
    seen, _ = Observer(spec)(observation)
    assert np.array_equal(seen["video"][0, 0], views(spec).forward({"images": shown})["video"])
    with pytest.raises(BadObservation, match=r"images\['top'\] is \(20, 12\)"):
        Observer(spec)(observation | {"images": shown | {"top": shown["top"][..., 0]}})
    with pytest.raises(BadObservation, match="resize pictures to 8x16"):
        Observer(dataclasses.replace(spec, resize=""))(observation)


def test_the_tabletop_shows_what_training_saw():
    sizes = dict.fromkeys(tabletop.CAMERAS, (24, 32))
    shown = {camera: noise(2, 1, *size) for camera, size in tabletop.CAMERAS.items()}
    spec = DataSpec(sizes, 3, 2, 4, 3, 2, 8, 10.0, "pad")
    video = jnp.concatenate([jnp.asarray(x) for x in shown.values()], axis=-2)
    names = tuple(sizes)
    policy = trained.Policy(None, {}, {}, None, names, tuple(sizes.items()), "pad")
    out = policy.see({name: jnp.asarray(x) for name, x in shown.items()})
    want = views(spec).forward({"images": shown})["video"]
    assert out.shape == want.shape
    assert np.abs(np.asarray(out).astype(int) - want).max() <= 1
    plain = trained.Policy(None, {}, {}, None, names).see(shown)
    np.testing.assert_array_equal(plain, video)


def test_an_unknown_way_of_resizing_is_an_error():
    config = configs.base_config()
    config.data.resize = "crop"
    with pytest.raises(ValueError, match="config.data.resize = 'crop' must be one of"):
        configs.validate(config)
