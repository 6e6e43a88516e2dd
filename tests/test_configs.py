"""Tests every experiment file, under every argument that it takes."""

import functools
import importlib.util
import pathlib
import tempfile

import jax
import numpy as np
import pytest

from wamjax import config as configs
from wamjax import tree, wam
from wamjax.data import arrays, pipeline
from wamjax.data.arrays import ArraySpec
from wamjax.data.spec import DataSpec
from wamjax.data.write import write_episodes
from wamjax.diffusion.ddpm import DDPM
from wamjax.diffusion.edm import EDM
from wamjax.diffusion.flow import RectifiedFlow
from wamjax.diffusion.noise import NoiseLaw
from wamjax.envs import tabletop
from wamjax.models.dit import CONDITIONING, SIZES, TEXT
from wamjax.training import sharding
from wamjax.training.sharding import Shape
from wamjax.wam.fast_wam.uses import MODES, USES

FOLDER = pathlib.Path(__file__).parent.parent / "experiments" / "configs"
FILES = sorted(path.stem for path in FOLDER.glob("*.py"))
FAST_WAM = ["fast_wam_libero", "fast_wam_robotwin", "fast_wam_tabletop", "quickstart"]
PICTURES = ["dit_digits", "dit_imagenet", "sd3_medium", "text_scenes"]
VARIANTS = sorted(USES)
PUBLISHED = ("fast_wam_libero", "fast_wam_robotwin")
MIXTURE = ("video", "action")


def own_data(
    path, cameras=None, actions=7, state=8, texts=("lift the block", "open it"), names=None,
    count=3, **known,
):  # fmt: skip
    """Writes random episodes into `path`; `known` has the outcome of each, success by default."""
    rng, cameras = np.random.default_rng(0), cameras or {"front": (32, 32), "wrist": (32, 32)}

    def episodes():
        for i in range(count):
            steps = 5 + i
            yield {
                "images": {c: rng.integers(0, 255, (steps + 1, *size, 3), np.uint8)
                           for c, size in cameras.items()},
                "proprio": rng.normal(size=(steps + 1, state)),
                "actions": rng.uniform(-1, 1, (steps, actions)),
                "instruction": texts[i % len(texts)],
                **(known or {"success": True}),
            }  # fmt: skip

    if names is None:
        names = (*(f"joint_{i}" for i in range(actions - 1)), "gripper")
    write_episodes(path, {"control_hz": 20.0, "action_names": names}, episodes())
    return path


@functools.cache
def some_data():
    """Writes a data set for configs that follow from one."""
    return own_data(pathlib.Path(tempfile.mkdtemp()) / "mine")


def get(name, arg=None):
    if name == "finetune" and "data=" not in (arg or ""):
        arg = f"data={some_data()}" + (f",{arg}" if arg else "")
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def spec_of(config):
    """Returns the declared spec; else the spec of the embedded world's data, without collecting."""
    data = config.data
    if data.kind == "arrays":
        return pipeline.spec_of(config)
    return pipeline.declared(data) or DataSpec(
        cameras={name: tabletop.CAMERAS.get(name, (64, 64)) for name in data.cameras},
        proprio_dim=tabletop.PROPRIO_DIM,
        action_dim=tabletop.ACTION_DIM,
        chunk=data.chunk,
        frames=data.frames,
        frame_stride=data.frame_stride,
        instruction_length=data.instruction_length,
        control_hz=tabletop.CONTROL_HZ,
    )


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_how_to_run_it_and_has_a_miniature(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert f"--config=experiments/configs/{name}.py" in text.split('"""')[1]
    for arg in ("", "debug"):
        config = get(name, arg)
        configs.validate(config)
        wam.check_training(config)
    assert get(name, "debug").total_steps <= 20
    assert {*FAST_WAM, *PICTURES} <= set(FILES)


@pytest.mark.parametrize("debug", [False, True], ids=["full", "debug"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FAST_WAM)
def test_every_config_builds_under_every_argument(name, variant, debug, tmp_path):
    for preset, shift in (("paper", 5.0), ("2026-08", 1.0)):
        config = get(name, f"variant={variant},preset={preset}" + ",debug" * debug)
        configs.validate(config)
        assert config.objective.variant == variant and config.objective.preset == preset
        assert config.objective.action_shift == shift and config.objective.video_shift == 5.0
        sharding.check_config(config, Shape({"data": 1, "fsdp": config.mesh.fsdp, "tensor": 1}))
        objective = wam.build(config, spec_of(config))
        assert objective.action_flow.shift == shift and objective.video_flow.shift == 5.0
        assert objective.variant == variant and objective.steps == config.objective.infer_steps
        assert len(objective.tables) == len(USES[variant])
        batch = objective.batch_spec(3)
        assert batch["actions"].shape == (3, config.data.chunk, spec_of(config).action_dim)
        assert objective.imagines == (variant != "no_cotrain")
        configs.save(config, tmp_path / "config.json")
        loaded = configs.load(tmp_path / "config.json")
        assert loaded.to_dict() == config.to_dict()
        assert configs.check_resume(configs.to_json(config), loaded, "a copy") == {}
        assert wam.build(loaded, spec_of(loaded)) == objective


@pytest.mark.parametrize("name", FAST_WAM)
def test_debug_is_small_and_can_be_trained_on_eight_devices(name):
    config = get(name, "variant=optional_idm,debug")
    objective = wam.build(config, spec_of(config))
    params = jax.eval_shape(objective.init, jax.random.key(0))
    assert tree.count(params) < 1e6 and config.total_steps <= 20
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_config(config, mesh)
    sharding.params_shardings(params, mesh)  # a rule for every parameter
    # Miniatures keep the structure: the same parameters, of other sizes.
    names = {"video", "action", "proprio", "blocks"}
    assert set(params) == (names if name in PUBLISHED else names | {"text"})


@pytest.mark.parametrize(
    "name, action", [("fast_wam_libero", 1_020_886_023), ("fast_wam_robotwin", 1_020_900_366)]
)
def test_published_configs_have_exactly_the_published_parameters(name, action):
    config = get(name)
    params = jax.eval_shape(wam.build(config, spec_of(config)).init, jax.random.key(0))
    sizes = {e: tree.count(params[e]) + tree.count(params["blocks"][e]) for e in MIXTURE}
    assert sizes == {"video": 4_999_787_712, "action": action}


@pytest.mark.parametrize("name", FAST_WAM)
def test_errors_name_the_offender_and_suggest(name):
    for arg, message in {
        "variant=optional_idn": "variant 'optional_idn'.*did you mean 'optional_idm'",
        "preset=2026-09": "preset '2026-09'.*did you mean '2026-08'",
        "varient=idm": "'varient'.*did you mean 'variant'",
        "debug=maybe": "debug='maybe' is not a bool",
    }.items():
        with pytest.raises(ValueError, match=message):
            get(name, arg)
    config = get(name)
    with pytest.raises(AttributeError, match="infer_steps"):
        config.objective.infer_step = 3
    with pytest.raises(KeyError, match="instruction_length"):
        config.update_from_flattened_dict({"data.instruction_lenght": 3})


def test_dials_of_the_tabletop_study():
    config = get("fast_wam_tabletop", "labelled=64,videos=7,steps=11")
    sources = config.data.sources
    assert sources.demos.collect.episodes == 64 and not sources.demos.action_free
    assert sources.videos.collect.episodes == 7 and sources.videos.action_free
    assert sources.demos.collect.seed != sources.videos.collect.seed
    assert config.total_steps == 11
    assert "videos" not in get("fast_wam_tabletop", "videos=0").data.sources
    assert set(MODES) == set(VARIANTS)


# ---- pictures ----

ARGUMENTS = {
    "dit_digits": [f"design={d},process={p}" for d in CONDITIONING for p in ("flow", "ddpm")],
    "dit_imagenet": [f"size={s},patch=4" for s in SIZES] + [f"design={d}" for d in CONDITIONING],
    "sd3_medium": [""],
    "text_scenes": [f"route={route}" for route in TEXT[1:]],
}


@pytest.mark.parametrize("debug", [False, True], ids=["full", "debug"])
@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_config_builds_and_shards_under_every_argument(name, debug, tmp_path):
    for arg in ARGUMENTS[name]:
        config = get(name, arg + ",debug" * debug)
        if name == "text_scenes":
            config.data.arrays = "scenes:count=8,size=24"  # only captions matter
        configs.validate(config)
        spec = spec_of(config)
        objective = wam.build(config, spec)
        assert objective.network.conditioning == config.model.conditioning
        assert objective.network.text == config.model.text.route
        learned = "learned" in config.objective.process
        assert isinstance(objective.process, DDPM if learned else RectifiedFlow)
        assert objective.network.outputs == objective.network.latent[-1] * (1 + learned)
        params = jax.eval_shape(objective.init, jax.random.key(0))
        mesh = {"data": 2, "fsdp": config.mesh.fsdp if not debug else 4, "tensor": 1}
        sharding.check_config(config, Shape(mesh))
        for path, leaf in tree.flatten(params).items():
            sharding.spec_of(path, leaf.shape, Shape(mesh))
        assert not debug or tree.count(params) < 1e6
        # Batches have the shapes of the data.
        batch = objective.batch_spec(3)
        assert {k: v.shape[1:] for k, v in batch.items()} == {k: spec.shapes[k] for k in batch}
        assert {k: v.dtype.name for k, v in batch.items()} == {k: spec.dtypes[k] for k in batch}
        configs.save(config, tmp_path / "config.json")
        loaded = configs.load(tmp_path / "config.json")
        assert loaded.to_dict() == config.to_dict()
        assert wam.build(loaded, spec) == objective


def test_published_picture_models_are_built_as_published():
    config = get("dit_imagenet", "size=B,patch=8,resolution=512")
    network = wam.build(config, spec_of(config)).network
    assert network.latent == (64, 64, 4) and network.patch == 8 and network.classes == 1000
    assert (network.layers, network.heads, network.head_dim) == (12, 12, 64)
    assert network.time_scale == 1.0 and network.positions == "sincos"
    config = get("sd3_medium")
    objective = wam.build(config, spec_of(config))
    assert objective.process == RectifiedFlow(3.0, "uniform", NoiseLaw(0.0, 1.0))
    batch = {k: v.shape for k, v in objective.batch_spec(2).items()}
    assert batch == {
        "latents": (2, 1, 128, 128, 16), "context": (2, 154, 4096), "pooled": (2, 2048)
    }  # fmt: skip


def test_processes_by_name_and_option():
    def process(text, **changes):
        config = get("dit_digits", "debug")
        config.objective.process = text
        config.objective.update(changes)
        return wam.build(config, spec_of(config)).process

    assert process("flow", video_shift=3.0) == RectifiedFlow(3.0, "uniform")
    assert process("flow", weighting="min_snr").weighting == "min_snr"
    assert process("ddpm:noising=cosine,predicts=v") == DDPM("cosine", predicts="v")
    assert process("edm:sigma_data=0.7") == EDM(0.7)
    with pytest.raises(ValueError, match="there is no 'ddmp', did you mean 'ddpm'"):
        process("ddmp")
    with pytest.raises(ValueError, match="'ddpm:varience=learned'.*did you mean 'variance'"):
        process("ddpm:varience=learned")
    with pytest.raises(ValueError, match="law 'normal' is not one of"):
        process("flow:law=normal")


def test_a_config_that_does_not_fit_its_arrays_says_what_to_change():
    def build(spec=None, **changes):
        config = get("dit_digits", "debug")
        config.update_from_flattened_dict(changes)
        return wam.build(config, spec or spec_of(config))

    for message, changes in {
        "route='cross', text.kind='tokens' needs 'instruction' in the data": {
            "model.text.route": "cross"
        },
        "kind='cached' needs 'latents' in the data, config.data.arrays has": {
            "model.codec.kind": "cached"
        },
        "config.objective.scheme 'block' does not exist, did you mean 'blocks'": {
            "objective.scheme": "block"
        },
        "config.objective.solver 'eular' does not exist, did you mean 'euler'": {
            "objective.solver": "eular"
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            build(**changes)
    with pytest.raises(ValueError, match="'denoising' trains on arrays: set config.data.kind"):
        build(spec_of(get("quickstart")))
    latents = ArraySpec({"latents": (1, 4, 4, 3)}, {"latents": "bfloat16"}, {}, 5)
    changes = {"model.codec.kind": "cached", "model.label": False}
    with pytest.raises(ValueError, match="codec.channels = 48 must be 3"):
        build(latents, **changes)
    small = {"model.codec.channels": 3, "model.codec.spatial": 2, "model.patch": 2}
    objective = build(latents, **changes, **small)
    assert objective.network.latent == (4, 4, 3) and objective.network.classes == 0
    assert objective.picture == (8, 8, 3) and objective.frames == 1


def test_declared_arrays():
    config = get("dit_digits")
    assert arrays.declared(config.data) is None
    config.data.declared.arrays = "latents=3x4x4x8,label=:10,instruction=7:30,context=7x16"
    spec = arrays.declared(config.data)
    assert spec.shapes == {
        "latents": (3, 4, 4, 8), "label": (), "instruction": (7,), "context": (7, 16)
    }  # fmt: skip
    assert spec.sizes == {"label": 10, "instruction": 30}
    assert spec.dtypes["latents"] == spec.dtypes["context"] == "bfloat16"
    assert spec.dtypes["label"] == "int32"
    wrong = {"latent=1x2": "'latent' is not one of", "label=a": "not KEY=SHAPE"}
    for text, message in wrong.items():
        config.data.declared.arrays = text
        with pytest.raises(ValueError, match=message):
            arrays.declared(config.data)


def test_a_preset_is_more_than_a_label():
    config = get("quickstart")
    wam.check_training(config)
    config.objective.preset = "paper"
    with pytest.raises(ValueError, match="action_shift = 1.0, and preset 'paper' has 5.0.*FILE"):
        wam.check_training(config)
    config.objective.preset = "papr"
    with pytest.raises(ValueError, match="'papr' must be one of .* did you mean 'paper'"):
        wam.check_training(config)
    config.objective.preset, config.objective.action_shift = "none", 3.0
    wam.check_training(config)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("objective.solver", "eulr", "must be one of .*, did you mean 'euler'"),
        ("objective.solver", "ancestral", "'ancestral' must be one of"),
        ("data.frames", 1, "config.data.frames = 1 must be at least 2"),
        ("model.head_dim", 15, "config.model.head_dim = 15 must be even"),
    ],
)
def test_values_that_build_no_fast_wam_are_named(key, value, message):
    config = get("fast_wam_libero", "debug")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        wam.build(config, pipeline.spec_of(config))
