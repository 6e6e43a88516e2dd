"""Tests fine-tuning on data of any shape: derived settings, and all steps from files to acting."""

import functools
import math
import pathlib
import re
import shutil
import tempfile

import jax
import numpy as np
import pytest
from test_configs import get, own_data, spec_of

import wamjax
import wamjax.data
from wamjax import config as configs
from wamjax import export_policy, train, tree, wam
from wamjax.data import layout, pipeline
from wamjax.data.embeddings import FAST_WAM
from wamjax.data.normalize import KEYS
from wamjax.runs import fine_tuning, preparation, trained
from wamjax.training import init_from, partition, sharding
from wamjax.training import state as states
from wamjax.weights import conversion, downloads, families, store

LONG = "put the " + "very heavy old wooden box with the broken lid on the shelf beside the " * 6
ONE = dict(cameras={"front": (48, 64)}, actions=7, state=8)
THREE = dict(cameras={"head": (60, 80), "left_wrist": (48, 64), "right_wrist": (36, 48)},
             actions=14, state=14, texts=("fold it", LONG))  # fmt: skip
TWO = dict(cameras={"image": (64, 64), "wrist_image": (64, 64)}, actions=7, state=9)
SHAPES = {"one": ONE, "two": TWO, "three": THREE}


@functools.cache
def _data(shape):
    """Writes a data set that tests only read."""
    return own_data(pathlib.Path(tempfile.mkdtemp()) / shape, **SHAPES[shape])


@functools.cache
def _published(backbone):
    """Returns the shapes of a published model's parameters, by path."""
    params = families.family(backbone).params(families.sizes(backbone))
    return {path: tuple(x.shape) for path, x in tree.flatten(params).items()}


def tuned(base, shape="one", **more):
    place = more.pop("data", None) or _data(shape)
    words = [f"base={base}", f"data={place}", *(f"{k}={v}" for k, v in more.items())]
    return get("finetune", ",".join(words))


@pytest.mark.parametrize("lora", [0, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "base, shape",  # for two cameras see test_compile and the configs of LIBERO
    [(base, shape) for base in fine_tuning.BASES for shape in ("one", "three")],
)
def test_the_published_model_fits_data_of_any_shape(base, shape, lora):
    """At full size, its weights load, and a step with the data's shapes can be traced."""
    config, want = tuned(base, shape, lora=lora), SHAPES[shape]
    configs.validate(config)
    wam.check_training(config)
    spec = spec_of(config)
    objective = wam.build(config, spec)
    assert (spec.action_dim, spec.proprio_dim) == (want["actions"], want["state"])
    assert set(spec.cameras) == set(want["cameras"]) and spec.resize == "stretch"
    batch = objective.batch_spec(4)
    assert batch["actions"].shape == (4, 32 if base == "fast_wam" else 16, want["actions"])
    params = jax.eval_shape(lambda: states.init_params(objective, config))
    flat = tree.flatten(params)
    backbone = {"fast_wam": "wan22_ti2v", "cosmos_policy": "cosmos_predict2"}[base]
    found = dict(_published(backbone))
    found |= {p: tuple(x.shape) for p, x in flat.items() if p.startswith("codec/")}
    lacking = init_from.check(found, flat, config.init_from)
    assert any(p.startswith("action/") for p in lacking) == (base == "fast_wam")
    is_trained = partition.trained(config.optim.freeze)
    partition.check(config.optim.freeze, params, "optim.freeze")
    adapters = [path for path in flat if path.endswith("lora_down")]
    assert len(adapters) == (10 if lora else 0)
    if lora:
        moved = {path for path in found if is_trained(path)}
        assert not moved and all(x.shape[-1] == 16 for p, x in flat.items() if p in adapters)
    with jax.set_mesh(sharding.make_mesh(config.mesh)):
        batch, key = objective.batch_spec(8), jax.random.key(0)
        loss, _ = jax.eval_shape(objective.loss, params, batch, key)
    assert loss.shape == ()


def test_pictures_are_arranged_as_published():
    libero = layout.arrange({"image": (256, 256), "wrist_image": (256, 256)})
    assert str(libero) == "image:224x224+wrist_image:224x224"
    robotwin = {"cam_left_wrist": (240, 320), "cam_high": (240, 320), "cam_right_wrist": (240, 320)}
    want = "cam_high:256x320/cam_left_wrist:128x160+cam_right_wrist:128x160"
    assert str(layout.arrange(robotwin)) == want
    with pytest.raises(ValueError, match="no camera"):
        layout.arrange({})


@pytest.mark.parametrize("count", range(1, 6))
def test_any_cameras_make_a_picture_of_whole_tokens(count):
    rng = np.random.default_rng(count)
    for _ in range(50):
        sizes = {f"c{i}": tuple(map(int, rng.integers(90, 900, 2))) for i in range(count)}
        picture = layout.arrange(sizes)
        assert set(picture.cells) == set(sizes)
        assert all(n % 32 == 0 and n > 0 for size in picture.cells.values() for n in size)
        assert sum(h * w for h, w in picture.cells.values()) == math.prod(picture.size)
        assert layout.parse(str(picture)) == picture


def test_rows_of_text_grow_with_the_instructions():
    assert tuned("fast_wam", "one").data.instruction_length == 128
    assert tuned("cosmos_policy", "one").data.instruction_length == 64
    for base in fine_tuning.BASES:
        length = tuned(base, "three").data.instruction_length
        assert length % 64 == 0 and length > len(LONG.split()) * 1.5
    rng = np.random.default_rng(0)
    for _ in range(100):
        letters = ["".join(rng.choice(list("abcdef"), rng.integers(1, 12))) for _ in range(40)]
        short, more = " ".join(letters[:20]), " ".join(letters)
        both = [fine_tuning.rows([t], "{instruction}", 64) for t in (short, more)]
        assert both[0] <= both[1] and both[0] > 20 and both[1] > 40
        assert fine_tuning.rows([short, more], "{instruction}", 64) == both[1]
        assert fine_tuning.rows([more], FAST_WAM, 128) >= both[1]


def observation(spec, cameras, text):
    rng = np.random.default_rng(1)
    shown = {c: rng.integers(0, 255, (*size, 3), np.uint8) for c, size in cameras.items()}
    state = rng.normal(size=spec.proprio_dim).astype(np.float32)
    return {"images": shown, "proprio": state, "instruction": text}


@pytest.mark.parametrize(
    "base, shape, lora",
    [("fast_wam", "three", 4), pytest.param("cosmos_policy", "one", 0, marks=pytest.mark.slow)],
)
def test_from_files_to_acting(base, shape, lora, tmp_path, monkeypatch, capsys):
    place = own_data(tmp_path / "DATA" / "mine", **SHAPES[shape])
    config = tuned(base, data=place, debug=True, steps=2, lora=lora)
    config.objective.infer_steps, one = 2, jax.devices()[:1]
    assert train.run(config, tmp_path / "run", devices=one)
    told = capsys.readouterr().err
    assert told.count("converting") == (3 if base == "fast_wam" else 2) and "cut" not in told
    # Running it again writes nothing, and reads no published file.
    monkeypatch.setattr(conversion, "bring_in", None)
    preparation.ensure(config)
    again = tuned(base, data=place, debug=True, steps=2, lora=lora)
    again.objective.infer_steps = 2
    assert again.to_dict() == config.to_dict() and train.run(again, tmp_path / "run", devices=one)
    policy, _, step = trained.load(tmp_path / "run")
    assert step == 2 and set(policy.normalizers) == set(KEYS)
    # Frozen parameters equal the converted ones.
    source = init_from.sources(config.init_from.path)
    flat = tree.flatten(checkpoint_params(tmp_path / "run"))
    kept = [p for p in source.arrays if lora]
    for path in kept[:5]:
        np.testing.assert_array_equal(flat[path], source.arrays[path].read().result())
    assert bool(kept) == bool(lora)
    export_policy.from_run(tmp_path / "run", tmp_path / "bundle", progress=False)
    acting = wamjax.load_policy(tmp_path / "bundle")
    spec, text = acting.manifest.spec, "lift the block" if shape == "one" else LONG
    seen = observation(spec, SHAPES[shape]["cameras"], text)
    actions = acting(seen, 0)
    assert actions.shape == (spec.chunk, SHAPES[shape]["actions"])
    assert np.isfinite(actions).all()


def checkpoint_params(workdir):
    from wamjax.training.checkpoint import restore_params

    return restore_params(workdir)[0]


def test_pixels_of_the_layout_are_what_the_latents_were_made_of(tmp_path):
    place = own_data(tmp_path / "DATA" / "mine", **THREE)
    config = tuned("fast_wam", data=place, debug=True)
    preparation.ensure(config)
    spec, _, sources = pipeline.open_episodes(config)
    info = sources[0].latents.info
    assert info.layout == config.data.layout == spec.layout
    assert spec.cameras == {"head": (64, 64), "left_wrist": (32, 32), "right_wrist": (32, 32)}
    assert info.shape == (3, 6, 4, 48)
    shutil.rmtree(place)
    own_data(place, **THREE, count=2)
    with pytest.raises(ValueError, match="made of other episodes than .*: remove it"):
        preparation.ensure(tuned("fast_wam", data=place, debug=True))


def test_the_gripper_is_found_by_name_or_by_its_numbers(tmp_path):
    place = own_data(tmp_path / "nameless", **ONE, names=())
    with pytest.raises(ValueError, match="does not name its actions.*hold=NUMBER"):
        tuned("fast_wam", data=place)
    assert tuned("fast_wam", data=place, hold="6").data.padding == "hold:6"
    assert tuned("fast_wam", data=place, hold="none").data.padding == "hold:"
    assert tuned("fast_wam").data.padding == "hold:6"


def test_demonstrations_without_outcomes_can_count_as_successes(tmp_path):
    unknown = own_data(tmp_path / "mine", **ONE, task="x")
    with pytest.raises(ValueError, match="neither rewards nor success.*successes"):
        tuned("cosmos_policy", data=unknown)
    known = own_data(tmp_path / "same", **ONE)
    batches = []
    for place in (unknown, known):
        config = tuned("cosmos_policy", data=place, debug=True, batch=8, chunk=2, successes=True)
        preparation.ensure(config)
        spec, statistics, sources = pipeline.open_episodes(config)
        batches.append(pipeline.batches(config, spec, statistics, sources)[0])
    for key in ("score", "to_go", "future_proprio", "actions"):
        np.testing.assert_array_equal(batches[0][key], batches[1][key])
    assert (batches[0]["score"] == 1).all() and batches[0]["to_go"].max() > 0


def test_unsuitable_data_is_an_error_that_names_the_fix(tmp_path):
    stateless = own_data(tmp_path / "stateless", **ONE | {"state": 0})
    for more, message in (
        (dict(data=stateless), "holds no state.*--state=KEY"),
        (dict(cameras="frunt"), "no camera 'frunt', did you mean 'front'"),
        (dict(layout="top:32x32"), r"layout=top:32x32 shows \['top'\]"),
        (dict(data=tmp_path), "there is no data set.*wamjax.ingest"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            tuned("fast_wam", **more)
    with pytest.raises(ValueError, match="did you mean 'fast_wam'"):
        tuned("fast_wan")
    with pytest.raises(ValueError, match="the data set is missing: make it by"):
        get("finetune", "base=fast_wam,data=")
    with pytest.raises(ValueError, match="layout is Fast-WAM's"):
        tuned("cosmos_policy", layout="front:32x32")
    words = tuned("cosmos_policy", data=stateless).objective.slots
    assert words == ("blank", "camera:front", "action:16x7", "future_camera:front", "value")
    long = own_data(tmp_path / "long", **ONE | {"texts": (LONG * 3,)})
    with pytest.raises(ValueError, match="rows of text, the model counts 512: shorten"):
        tuned("cosmos_policy", data=long)


def test_missing_published_files_are_errors_before_anything_is_written(tmp_path):
    place = own_data(tmp_path / "DATA" / "mine", **ONE)
    (tmp_path / "wan").mkdir()
    (tmp_path / "wan" / "Wan2.2_VAE.pth").write_bytes(b"")
    for weights in (None, tmp_path / "wan"):
        more = {"weights": weights} if weights else {}
        config = tuned("fast_wam", data=place, **more)
        with pytest.raises(FileNotFoundError, match="umt5 is made: download Wan-AI/Wan2.2"):
            preparation.ensure(config)
    assert not (tmp_path / "DATA" / "weights").exists()


def test_weights_that_are_kept_are_those_of_the_published_file(tmp_path):
    place = own_data(tmp_path / "DATA" / "mine", **ONE)
    config = tuned("fast_wam", data=place, debug=True)
    preparation.ensure(config)
    folder = tmp_path / "DATA" / config.prepare.weights
    about = store.about(folder / "wan22_ti2v")
    assert about["source"] == str(folder / "published") and about["sizes"]["model.heads"] == 3
    other = tmp_path / "other"
    other.mkdir()
    (other / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="was converted from .*, not from .*other: remove it"):
        downloads.converted("wan22_ti2v", other, folder)
    # A folder of `convert` stands for the file.
    assert downloads.converted("wan22_ti2v", folder, tmp_path / "none") == folder / "wan22_ti2v"


def test_a_released_policy_keeps_what_fits_the_robot(tmp_path, monkeypatch):
    """The release has 7 actions and 8 state dimensions; for other robots those layers start
    fresh."""
    place = own_data(tmp_path / "DATA" / "mine", **THREE)
    folder = tmp_path / "DATA" / "weights" / "fast_wam"
    sizes = families.sizes("fast_wam")
    monkeypatch.setattr(downloads, "sizes", lambda *_: sizes)
    folder.mkdir(parents=True)
    config = tuned("fast_wam", data=place, lora=8)
    assert config.init_from.path == str(folder) and not config.init_from.missing
    assert config.init_from.fresh == ("action/encoder/.*", "action/head/.*", "proprio/.*")
    assert not config.objective.action_from_video
    objective = wam.build(config, spec_of(config))
    flat = tree.flatten(jax.eval_shape(lambda: states.init_params(objective, config)))
    shapes = tree.flatten(families.family("fast_wam").params(sizes))
    found = {path: tuple(x.shape) for path, x in shapes.items()}
    fresh = init_from.check(found, flat, config.init_from)
    assert {re.sub("/[^/]*$", "", p) for p in fresh if "lora" not in p} == {
        "action/encoder", "action/head", "proprio",
    }  # fmt: skip
    is_trained = partition.trained(config.optim.freeze)
    ends = {p for p in found if is_trained(p)}
    assert ends == {p for p in flat if p.startswith(("action/encoder", "action/head", "proprio"))}
