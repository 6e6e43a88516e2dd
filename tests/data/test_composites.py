"""Tests composites of cameras with different heights, from pixels and for latents."""

import jax.numpy as jnp
import numpy as np
import pytest
from data import synthetic
from PIL import Image

from wamjax import config as configs
from wamjax import wam
from wamjax.bundle.observation import Observer
from wamjax.data import images, layout, pipeline, precompute
from wamjax.data.records import Episode, Reader, Writer
from wamjax.data.spec import DataSpec
from wamjax.data.transforms import views
from wamjax.runs import trained
from wamjax.wam.cosmos_policy import layouts
from wamjax.wam.fast_wam import presets

CAMERAS = {"head": (24, 30), "left": (20, 21), "right": (8, 8)}
LAYOUT = "head:16x16/left:8x8+right:8x8"
CELLS = {"head": (16, 16), "left": (8, 8), "right": (8, 8)}
LENGTHS = (6, 4)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def pictures(number):
    return {c: noise(LENGTHS[number] + 1, *size, seed=number + 7 * i)
            for i, (c, size) in enumerate(CAMERAS.items())}  # fmt: skip


def by_hand(shown):
    """Returns (frames, 24, 16, 3), with the head above both wrists, made by PIL alone."""
    def small(x, h, w):
        return np.stack([Image.fromarray(p).resize((w, h), Image.Resampling.BILINEAR) for p in x])

    out = np.zeros((len(shown["head"]), 24, 16, 3), np.uint8)
    out[:, :16], out[:, 16:, :8], out[:, 16:, 8:] = (
        small(shown["head"], 16, 16), small(shown["left"], 8, 8), small(shown["right"], 8, 8)
    )  # fmt: skip
    return out


@pytest.fixture
def config(tmp_path):
    info = synthetic.info(cameras=CAMERAS)
    with Writer(tmp_path / "demos", info) as writer:
        for i, length in enumerate(LENGTHS):
            plain = synthetic.episode(i, length, synthetic.info(cameras={}))
            shown = {c: [images.encode(x) for x in xs] for c, xs in pictures(i).items()}
            writer.write(Episode(**vars(plain) | {"images": shown}))
    config = configs.base_config()
    presets.fast_wam(config, "fast", "2026-08")
    presets.tabletop(config)
    presets.tabletop_debug(config)
    config.model.codec.patch, config.data.root = 4, str(tmp_path)
    data = config.data
    data.cameras, data.layout, data.resize = tuple(CAMERAS), LAYOUT, "stretch"
    data.frames, data.frame_stride, data.chunk, data.batch_size = 3, 2, 4, 4
    data.sources.demos = configs.source(path="demos")
    return config


def test_batches_hold_the_picture_that_is_made_by_hand(config):
    spec, statistics, sources = pipeline.open_episodes(config)
    assert spec.cameras == CELLS and spec.composite == (24, 16) and spec.layout == LAYOUT
    assert DataSpec.from_json(spec.to_json()) == spec
    batches = pipeline.batches(config, spec, statistics, sources)
    whole = [by_hand(pictures(i)) for i in range(len(LENGTHS))]
    windows = {tuple(x[np.minimum(s + 2 * np.arange(3), n)].tobytes() for x in [whole[i]])
               for i, n in enumerate(LENGTHS) for s in range(n)}  # fmt: skip
    seen = {(video.tobytes(),) for i in range(5) for video in batches[i]["video"]}
    assert seen <= windows and len(seen) > 4


def test_the_layout_is_that_of_precomputed_latents(config, tmp_path):
    """A codec receives the same pictures ahead of time as in the training step."""
    seen = []

    def encode(video):
        seen.extend(x.tobytes() for x in video)
        return np.zeros((len(video), 1, 12, 8, 3), np.float32)

    config.model.codec.kind = "cached"
    config.model.codec.channels, config.model.codec.spatial = 3, 2
    config.model.codec.temporal = 4
    with pytest.raises(ValueError, match="layout 'head:8x8'.*config.data.layout = "):
        precompute.latent_info(config, "head:8x8", "toy")
    info = precompute.LatentInfo("toy", LAYOUT, {"composite": (24, 16)}, 3, 2, 1, (1, 12, 8, 3))
    reader = Reader(tmp_path / "demos")
    precompute.precompute(reader, tmp_path / "latents", info, encode, progress=False)
    config.data.sources.demos.path = "latents"
    spec, _, sources = pipeline.open_episodes(config)
    assert spec.cameras == CELLS and spec.layout == LAYOUT and sources[0].latents
    config.model.codec.kind = "pixel"
    config.data.sources.demos.path = "demos"
    same, statistics, sources = pipeline.open_episodes(config)
    batch = pipeline.batches(config, same, statistics, sources)[0]["video"]
    assert same.to_json() == spec.to_json() and {x.tobytes() for x in batch} <= set(seen)
    config.data.layout = LAYOUT.replace("8x8", "4x8")
    config.model.codec.kind, config.data.sources.demos.path = "cached", "latents"
    with pytest.raises(ValueError, match="computed with layout .*config.data.layout is"):
        pipeline.open_episodes(config)


def test_training_robot_and_world_see_the_same_picture(config):
    spec = pipeline.open_episodes(config)[0]
    objective = wam.build(config, spec)
    assert objective.batch_spec(4)["video"].shape == (4, 3, 24, 16, 3)
    shown = {c: x[0] for c, x in pictures(0).items()}
    want = by_hand(pictures(0))[0]
    told = {"images": shown, "proprio": np.zeros(3, np.float32), "instruction": "lift the block"}
    observation, _ = Observer(spec)(told)
    assert np.array_equal(observation["video"][0, 0], want)
    policy = trained.Policy(
        objective, {}, {}, None, tuple(CELLS), tuple(CELLS.items()), "stretch", LAYOUT
    )
    seen = policy.see({c: jnp.asarray(x) for c, x in shown.items()})
    assert np.abs(np.asarray(seen).astype(int) - want).max() <= 1
    apart = views(spec).inverse({"video": want})["images"]
    assert {c: x.shape for c, x in apart.items()} == {c: (*s, 3) for c, s in CELLS.items()}
    assert np.array_equal(layout.parse(LAYOUT).join(apart), want)


def test_mismatched_layouts_are_errors(config):
    for key, value, message in (
        ("cameras", ("head", "left"), r"config.data.layout = .*config.data.cameras is"),
        ("image_size", (8, 8), r"config.data.image_size = \(8, 8\) must be .* with config.data"),
        ("layout", "head:16x16/left:8x8", "not equally wide"),
        ("layout", "head:16x16/head:8x16", r"shows \['head'\] more than once"),
    ):
        before = config.data[key]
        config.data[key] = value
        with pytest.raises(ValueError, match=message):
            pipeline.open_episodes(config)
        config.data[key] = before
    config.data.layout = ""
    with pytest.raises(ValueError, match="not equally high.*config.data.layout = "):
        pipeline.open_episodes(config)


def test_a_method_that_sees_cameras_one_by_one_refuses_a_layout(config):
    spec = pipeline.open_episodes(config)[0]
    words = ["blank", "camera:head", "action:4x2", "future_camera:head", "value"]
    with pytest.raises(ValueError, match="config.data.layout = .*must be '' .*a slot for each"):
        layouts.parse(words).check_data(spec)
