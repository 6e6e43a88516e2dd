"""Tests the configs of Cosmos Policy: published sizes and schedules, and a trainable miniature."""

import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax import config as configs
from wamjax import flops, tree, wam
from wamjax.data import pipeline
from wamjax.data.spec import DataSpec
from wamjax.doctor import diagnose
from wamjax.envs import tabletop
from wamjax.training import optim, partition, sharding
from wamjax.training import state as states
from wamjax.training.sharding import Shape
from wamjax.training.step import forward_flops, model_flops
from wamjax.wam.cosmos_policy import presets
from wamjax.wam.cosmos_policy.layouts import LAYOUTS
from wamjax.wam.cosmos_policy.uses import uses

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "configs"
PUBLISHED = ("libero", "robocasa", "aloha")


def get(name, arg=""):
    path = FOLDER / f"cosmos_policy_{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg)
    configs.validate(config)
    return config


def build(config):
    data = config.data
    spec = pipeline.declared(data) or DataSpec(
        cameras={name: tabletop.CAMERAS[name] for name in data.cameras},
        proprio_dim=tabletop.PROPRIO_DIM, action_dim=tabletop.ACTION_DIM, chunk=data.chunk,
        frames=data.frames, frame_stride=data.frame_stride,
        instruction_length=data.instruction_length, control_hz=tabletop.CONTROL_HZ,
    )  # fmt: skip
    return wam.build(config, spec)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_count_and_shard(name):
    config = get(name)
    objective = build(config)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    codec = params.pop("codec")
    assert tree.count(params) == 1_956_413_440 and tree.count(codec) == 126_892_531
    assert objective.latent == (28, 28, 16)
    assert objective.layout.words == LAYOUTS[name]
    # Sharded as on the machine: rules for every parameter, moments for those that are trained.
    mesh = Shape({"data": 1, "fsdp": 8, "tensor": 1})
    sharding.check_config(config, mesh)
    paths = tree.flatten(params) | {f"codec/{p}": x for p, x in tree.flatten(codec).items()}
    spread = {p: sharding.spec_of(p, x.shape, mesh) for p, x in paths.items()}
    assert all(any(a for a in axes) for p, axes in spread.items()
               if p.endswith("kernel") and not p.startswith("codec"))  # fmt: skip
    assert all(not any(axes) for p, axes in spread.items() if p.startswith("codec"))
    is_trained = partition.trained(config.optim.freeze)
    assert {p for p in paths if not is_trained(p)} == {p for p in paths if p.startswith("codec/")}
    video = objective.batch_spec(1)["video"].shape
    assert video == (1, 2, 224, 224 * len(config.data.cameras), 3)
    assert objective.batch_spec(1)["context"].shape == (1, 64, 1024)


def test_the_doctor_knows_a_published_config():
    """Uses fewer layers, since counts are proportional to them."""
    config = get("libero")
    config.model.layers = 2
    report = diagnose(config, 8)
    assert set(report["tables"]) == {"bidirectional"}
    assert report["roles"].count("hidden") == 0 and report["roles"].count("loss") == 5 + 4 + 1
    assert {"act/direct", "act/frozen", "act/plan", "forward"} <= set(report["flops"])
    work = report["flops"]
    # The codec encodes 29 frames to train on and 13 to act on.
    assert work["act/frozen"] < work["act/direct"] < work["act/plan"]
    assert report["parameters"]["codec"] == 126_892_531
    assert json.dumps(report)


def test_the_work_of_a_published_step_counts_the_frozen_codec_once():
    """The network has three times 6.56 TFLOP per sample; the frozen codec 6.95."""
    config = get("libero")
    config.data.batch_size = 4
    objective = build(config)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    batch = objective.batch_spec(4)
    mesh = sharding.abstract_mesh({"data": 1, "fsdp": 1, "tensor": 1}, 1)
    with jax.sharding.use_abstract_mesh(mesh):
        forward = forward_flops(objective, config, params, batch) / 4
        model = model_flops(objective, config, params, batch) / 4
    assert forward == pytest.approx((6.56 + 6.95) * 1e12, rel=1e-3)
    assert model == pytest.approx((3 * 6.56 + 6.95) * 1e12, rel=1e-3)


def test_forward_passes_of_planning_are_batched_and_text_is_read_once():
    config = get("tabletop")
    objective = build(config)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    key = jax.eval_shape(lambda: jax.random.key(0))
    spec = objective.batch_spec(1)
    seen = {k: spec[k] for k in ("proprio", "instruction")}
    seen["video"] = jax.ShapeDtypeStruct((1, 1, *spec["video"].shape[2:]), jnp.uint8)

    class Same:
        forward = inverse = staticmethod(lambda x: x)

    same = {"actions": Same, "proprio": Same}

    def cost(mode):
        act = functools.partial(objective.policy, mode=mode)
        return flops.count(lambda p, o, k: act(p, same, o, k), params, seen, key)

    direct, plan = cost("direct"), cost("plan")
    # 5 forward passes against 8 (5 + 3 (5 + 5 5)), and a little less than in proportion: levels are
    # embedded once for all samples of a call, and a value alone needs one slot of the head.
    assert 760 / 5 * 0.93 < plan / direct < 760 / 5
    assert 0.55 < cost("frozen") / direct < 0.9


ANCHORS = {  # section 5.7, after so many updates
    "libero": {0: 1e-10, 500: 5e-5, 1000: 1e-4, 15_500: 6.5e-5, 30_000: 3e-5, 30_001: 6e-6,
               40_000: 6e-6},
    "aloha": {2000: 1e-4, 11_000: 6.5e-5, 20_000: 3e-5, 20_001: 6e-6},
    "aloha:planner": {1500: 1e-4, 15_000: 3e-5, 15_001: 6e-6},
}  # fmt: skip


@pytest.mark.parametrize("name", ANCHORS)
def test_learning_rates_are_the_published_ones(name):
    config = get(*name.split(":"))
    rate = optim.schedule(config)
    for step, want in ANCHORS[name].items():
        np.testing.assert_allclose(rate(jnp.asarray(step)), want, rtol=2e-4, atol=1.1e-10)
    assert (config.optim.b1, config.optim.b2) == (0.9, 0.99)
    assert (config.optim.weight_decay, config.optim.clip_norm) == (0.1, 1.0)
    config.optim.anchor_factors = (1.0,)
    with pytest.raises(ValueError, match="with a factor for each in optim.anchor_factors"):
        optim.schedule(config)


def test_settings_that_differ_between_benchmarks():
    rows = {n: get(n) for n in PUBLISHED}
    assert [c.data.batch_size for c in rows.values()] == [1920, 800, 200]
    assert [c.total_steps for c in rows.values()] == [40_000, 45_000, 50_000]
    assert [c.objective.discount for c in rows.values()] == [0.99, 0.99, 0.998]
    assert [c.objective.infer_steps for c in rows.values()] == [5, 5, 10]
    assert [c.eval.execute for c in rows.values()] == [16, 16, 50]
    planner = get("aloha", "planner")
    assert build(planner).uses[2] == uses("value_v")[2] and build(planner).mix == (2, 9, 9)
    shares = {n: s.weight for n, s in planner.data.sources.items()}
    assert shares == {"demos": 2, "successes": 9, "failures": 9}
    assert not any(s.rollout for s in rows["aloha"].data.sources.values())


@pytest.mark.parametrize("name", [*PUBLISHED, "tabletop"])
def test_debug_is_small_and_keeps_the_structure(name, tmp_path):
    config = get(name, "debug")
    objective = build(config)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    assert tree.count(params) < 2e5 and config.total_steps <= 20
    extra = {"tokens"} if name == "tabletop" else set()
    assert set(params) == {"video", "blocks"} | extra
    sharding.check_config(config, sharding.make_mesh(config.mesh))  # eight devices
    tx = optim.make(config)
    jax.eval_shape(functools.partial(states.create, objective, tx, config))
    configs.save(config, tmp_path / "config.json")
    loaded = configs.load(tmp_path / "config.json")
    assert loaded.to_dict() == config.to_dict() and build(loaded) == objective


def test_a_new_robot_is_one_config():
    config, words = configs.base_config(), (
        "blank", "proprio:6", "camera:front", "camera:side", "action:10x6",
        "future_proprio:6", "future_camera:front", "future_camera:side", "value",
    )  # fmt: skip
    presets.objective(config, words)
    presets.predict2_2b(config)
    presets.training(config, (10, 20))
    presets.declare(config, control_hz=15.0)
    config.data.sources.demos = configs.source(path="robot-demos")
    presets.miniature(config)
    configs.validate(config)
    objective = build(config)
    assert objective.layout.words == words and config.data.cameras == ("front", "side")
    shapes = objective.batch_spec(4)
    assert shapes["actions"].shape == (4, 10, 6) and shapes["video"].shape == (4, 2, 32, 64, 3)
    with pytest.raises(ValueError, match="there is no layout 'alhoa', did you mean 'aloha'"):
        presets.objective(config, "alhoa")


def test_arguments_of_the_tabletop_study():
    config = get("tabletop", "tasks=pick_red,steps=7,seed=3,value=value_q,auxiliary=False,"
                 "uniform=0.0,sigma_min=0.002,infer_steps=2,visibility=prefix")  # fmt: skip
    objective = build(config)
    assert objective.process.law.uniform == 0 and objective.sigma_min == 0.002
    assert (objective.steps, objective.visibility, objective.auxiliary) == (2, "prefix", False)
    assert objective.uses[2].name == "value_q" and config.total_steps == 7
    assert config.eval.tasks == ("pick_red",) and config.seed == 3
    assert build(get("tabletop", "planner")).mix == (2, 9, 9)
    assert get("tabletop").data.batch_size % 4 == 0


def test_a_memory_budget_becomes_samples():
    config = get("libero")
    config.objective.plan.memory_gb = 10.0
    per_sample = 10 * 2**30 / build(config).planning.limit
    assert 4e8 < per_sample < 8e8
    config.objective.plan.memory_gb = 1e-3
    assert build(config).planning.limit == 1
    assert build(get("libero")).planning.limit == 0


def test_data_that_do_not_fit_are_named():
    for changes, message in (
        (
            {"objective.prefix_max": 2},
            "objective.prefix_max = 2: .* One slot is its whole chunk, repeated to fill a latent",
        ),
        ({"data.frames": 3}, "config.data.frames = 3 must be 2"),
        ({"data.frame_stride": 4}, "config.data.frame_stride = 4 must be 16"),
        ({"data.outcome": False}, "config.data.outcome = False must be True"),
        ({"data.chunk": 8}, "need chunk of size 16, the data has 8"),
        (
            {"objective.mix": (9, 1, 1)},
            "needs 9 demonstrations in every 11 consecutive .* some have only 5",
        ),
        (
            {
                "objective.mix": (1, 1, 1),
                "data.batch_size": 24,
                "data.sources.demos.weight": 2.5,
                "data.sources.failures.weight": 3.0,
            },
            "some have only 0, because demonstrations",
        ),
        ({"objective.plan.memory_gb": -1.0}, "plan.memory_gb = -1.0 must be positive, or 0"),
        ({"objective.uniform": 1.5}, r"objective.uniform = 1.5 must lie in \[0, 1\]"),
        ({"data.sources.demos.action_free": True}, "cannot train on sources without actions"),
        ({"model.codec.kind": "cached"}, "cannot use the latents of CachedLatents"),
        ({"objective.value": "value_s"}, "'value_s' is not one of"),
    ):
        config = get("libero")
        config.update_from_flattened_dict(changes)
        with pytest.raises(ValueError, match=message):
            configs.validate(config)
            wam.check_training(config)
            build(config)
