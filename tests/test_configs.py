"""Every experiment file, under every argument it takes."""

import importlib.util
import pathlib

import jax
import pytest

from wamjax import config as configs
from wamjax import sharding, tree, wam
from wamjax.data import pipeline
from wamjax.data.spec import DataSpec
from wamjax.doctor import Shape
from wamjax.envs import tabletop
from wamjax.wam.programs import MODES, TRAINING

FOLDER = pathlib.Path(__file__).parent.parent / "experiments" / "configs"
FILES = sorted(path.stem for path in FOLDER.glob("*.py"))
VARIANTS = sorted(TRAINING)
PUBLISHED = ("fast_wam_libero", "fast_wam_robotwin")
MIXTURE = ("video", "action")


def get(name, arg=None):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def spec_of(config):
    """As declared; for the embedded world what its data would say, without collecting them."""
    data = config.data
    return pipeline.declared(data) or DataSpec(
        cameras={name: tabletop.CAMERAS[name] for name in data.cameras},
        proprio_dim=tabletop.PROPRIO_DIM,
        action_dim=tabletop.ACTION_DIM,
        chunk=data.chunk,
        frames=data.frames,
        frame_stride=data.frame_stride,
        instruction_length=data.instruction_length,
        control_hz=tabletop.CONTROL_HZ,
    )


def test_the_files_are_those_that_are_documented():
    assert FILES == ["fast_wam_libero", "fast_wam_robotwin", "fast_wam_tabletop", "quickstart"]


@pytest.mark.parametrize("debug", [False, True], ids=["full", "debug"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FILES)
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
        assert len(objective.pictures()) == len(TRAINING[variant])
        batch = objective.batch_spec(3)
        assert batch["actions"].shape == (3, config.data.chunk, spec_of(config).action_dim)
        assert objective.imagines == (variant != "no_cotrain")
        configs.save(config, tmp_path / "config.json")
        loaded = configs.load(tmp_path / "config.json")
        assert loaded.to_dict() == config.to_dict()
        assert configs.check_resume(configs.to_json(config), loaded, "a copy") == {}
        assert wam.build(loaded, spec_of(loaded)) == objective


@pytest.mark.parametrize("name", FILES)
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


@pytest.mark.parametrize("name", FILES)
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
