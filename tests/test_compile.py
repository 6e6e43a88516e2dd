"""Tests that every experiment's training step lowers at full size; flags; the program cache."""

import functools
import math
from unittest import mock

import jax
import pytest
import toy
from test_configs import FILES, get, spec_of
from test_video_configs import clips

from wamjax import hardware, train, wam
from wamjax.models.palette import Palette
from wamjax.models.transformer import REMAT_POLICIES
from wamjax.training import compile as compiling
from wamjax.training import optim, sharding
from wamjax.training.compile import keep_programs
from wamjax.training.step import compute_cast, plan
from wamjax.wam.video import builder as builders

# Clips, and the patches for their tokens, take long to make; only sizes matter here.
CLIPS = {"codec_tabletop", "video_latents", "video_tabletop", "video_tokens"}
MORE = ["cosmos_policy_aloha:planner", "fast_wam_libero:variant=idm", "wan_t2v:size=5b"]
POD = 64
# These have the same parts as another config in other sizes. Gradient and optimiser come from the
# same code for any size, so it suffices to lower the loss.
LIKE = {
    "aloha": "quickstart", "fast_wam_tabletop": "quickstart", "libero_object": "quickstart",
    "metaworld": "quickstart", "pusht": "quickstart", "fast_wam_robotwin": "fast_wam_libero",
    "cosmos_policy_libero": "cosmos_policy_aloha", "cosmos_policy_robocasa": "cosmos_policy_aloha",
    "wan_t2v:size=5b": "wan_t2v",
}  # fmt: skip


def planned(name):
    """Traces the step of a config at full size, on as many devices as its batch allows.

    Returns:
      (the plan of the step, its trace; for those in `LIKE` that of the loss alone).
    """
    config = get(*name.split(":"))
    config.data.arrays = config.data.arrays.replace("scenes:", "scenes:count=64,")
    devices = math.gcd(config.data.batch_size, POD)
    mesh = sharding.abstract_mesh(config.mesh, devices)
    sharding.check_config(config, mesh)
    patches = mock.patch.object(builders, "tokenizer", lambda _: Palette(4, codes=bytes(512 * 48)))
    with jax.sharding.use_abstract_mesh(mesh), patches:
        objective = wam.build(config, clips() if name in CLIPS else spec_of(config))
        work = plan(objective, optim.make(config), config, mesh)
        if name not in LIKE:
            return work, work.step.trace(*work.arguments)
        loss = jax.jit(functools.partial(loss_of, objective, config))
        key = jax.eval_shape(lambda: jax.random.key(0))
        return work, loss.trace(work.state.params, work.batch, key)


def loss_of(objective, config, params, batch, key):
    return objective.loss(compute_cast(params, config.precision.compute), batch, key)[0]


@pytest.mark.parametrize("name", FILES + MORE)
def test_every_training_step_lowers_at_its_published_size(name):
    work, traced = planned(name)
    # An array on a device was made outside the compiled function, so it is on a device of this
    # machine, not of the one that the program is for.
    strays = [c.shape for c in traced.jaxpr.consts if isinstance(c, jax.Array) and c.size > 0]
    assert not strays
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "func.func public @main" in text
    if name in LIKE:
        assert traced.out_info.shape == ()
    else:
        assert jax.tree.structure(traced.out_info[0]) == jax.tree.structure(work.state)


def test_configs_lowered_by_their_loss_alone_match_a_fully_lowered_one():
    """They have the same objective, the same variant of it, and the same optimiser."""

    def parts(name):
        config = get(*name.split(":"))
        objective = wam.build(config, clips() if name in CLIPS else spec_of(config))
        optim = config.optim.name, config.optim.accumulate, config.optim.freeze
        return type(objective), config.objective.get("variant"), *optim

    for name, other in LIKE.items():
        assert other in FILES and other not in LIKE and parts(name) == parts(other)


def test_every_flag_has_a_reason_and_every_tpu_a_list():
    for flags in compiling.FLAGS.values():
        assert all(flag.reason for flag in flags)
        assert len({flag.name for flag in flags}) == len(flags)
    tpus = {chip.name for chip in hardware.CHIPS.values() if chip.name.startswith("TPU")}
    assert set(compiling.FLAGS) == tpus


def test_automatic_remat_takes_the_first_policy_that_fits():
    tried, chip = [], device("tpu", "TPU v5")

    def compile_step(work, *_):
        tried.append(work)
        if work == compiling.LADDER[0]:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM")
        return mock.Mock(memory={"fits": work == "full"})

    with mock.patch.object(compiling, "compile_step", compile_step):
        *_, remat = compiling.compile_fitting(lambda policy: policy, "auto", chip)
        assert remat == "full" and tried == ["dots", "projections", "attention", "full"]
        cpu = device("cpu", "cpu")
        assert compiling.compile_fitting(lambda policy: policy, "auto", cpu)[2] == "none"
        with pytest.raises(jax.errors.JaxRuntimeError, match="EXHAUSTED"):
            compiling.compile_fitting(lambda policy: policy, compiling.LADDER[0], chip)
    assert set(compiling.LADDER) <= set(REMAT_POLICIES) - {"auto"}


def test_flags_that_do_not_fit_are_left_out(monkeypatch):
    monkeypatch.setattr(compiling, "say", lambda text: None)
    tried = []

    def compile_(compiler_options):
        tried.append(compiler_options)
        if len(tried) == 1:
            raise jax.errors.JaxRuntimeError("Ran out of memory in memory space vmem")
        return mock.Mock(memory_analysis=lambda: None)

    lowered = mock.Mock(compile=compile_)
    program = compiling.compile_step(None, device("tpu", "TPU v5"), lowered=lowered)
    left_out = {flag.name for flag in compiling.SCATTER}
    assert left_out <= set(tried[0]) and program.options == tried[1]
    assert set(tried[1]) == set(tried[0]) - left_out


def device(platform, kind):
    return mock.Mock(platform=platform, device_kind=kind)


def test_flags_are_those_of_the_chip(monkeypatch):
    said = []
    monkeypatch.setattr(compiling, "say", said.append)
    v5p = {flag.name: flag.value for flag in compiling.FLAGS["TPU v5p"]}
    assert compiling.options(device("tpu", "TPU v5")) == v5p and len(v5p) == 11
    assert compiling.options(device("gpu", "NVIDIA H100 80GB HBM3")) == {}
    assert compiling.options(jax.devices()[0]) == {} and not said
    assert compiling.options(device("tpu", "TPU v9")) == {}
    assert "no compiler flags are known for TPU v9" in said[0]


def test_training_compiles_with_the_flags_of_its_chip(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "options", lambda device: {"xla_no_such_flag": "true"})
    with pytest.raises(ValueError, match="rejects a flag.*xla_no_such_flag.*compile.flags = False"):
        toy.run(toy.config(total_steps=1), tmp_path / "with")
    said = []
    monkeypatch.setattr(train, "say", said.append)
    assert toy.run(toy.config(total_steps=1, **{"compile.flags": False}), tmp_path / "without")
    assert any("step compiled in" in line and "MB a device" in line for line in said)


@pytest.fixture
def said(monkeypatch):
    """Returns the messages; the cache is restored afterwards."""
    folder, seconds = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    old = {key: getattr(jax.config, key) for key in (folder, seconds)}
    for key, value in {folder: None, seconds: 0.0}.items():
        jax.config.update(key, value)
    lines = []
    monkeypatch.setattr(compiling, "say", lines.append)
    yield lines
    for key, value in old.items():
        jax.config.update(key, value)
    compiling.compilation_cache.reset_cache()


def test_programs_are_cached_in_the_requested_folder(said, monkeypatch, tmp_path):
    monkeypatch.delenv(compiling.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    home = tmp_path / "wamjax" / "compiled"
    assert keep_programs("") == str(home) and home.is_dir()
    monkeypatch.setenv(compiling.VARIABLE, str(tmp_path / "jax"))
    assert keep_programs("") == str(tmp_path / "jax")
    assert keep_programs("none") is None and jax.config.jax_compilation_cache_dir is None
    assert keep_programs("gs://bucket/programs") == "gs://bucket/programs"
    monkeypatch.setenv(compiling.VARIABLE, "")
    assert keep_programs("") is None
    mine = tmp_path / "mine"
    assert keep_programs(str(mine)) == str(mine) and not said
    jax.jit(lambda x: x * 3 + 1)(2.0).block_until_ready()
    assert any(mine.iterdir())


def test_an_unwritable_home_only_disables_the_cache(said, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv(compiling.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert keep_programs("") is None and jax.config.jax_compilation_cache_dir is None
    assert "compiled programs are not kept" in said[0] and "config.compile.cache" in said[0]
