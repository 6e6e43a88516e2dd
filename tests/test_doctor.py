"""Tests the doctor's numbers against closed forms, and its warnings."""

import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from data import synthetic
from test_configs import FOLDER, get

from wamjax import config as configs
from wamjax import doctor, tree, wam
from wamjax.data import pipeline
from wamjax.training import optim, sharding
from wamjax.training import state as states

# Parameters of fast_wam_libero that are replicated on purpose (biases, norms, modulation).
BLOCK = {"video": 21 * 3072 + 14336, "action": 10 * 3072 + 11 * 1024 + 4096}
OUTSIDE = (13 * 3072 + 192) + (11 * 1024 + 7) + 4096  # video, action, proprio
TOTAL = 6_020_710_599


@pytest.fixture(scope="module")
def libero():
    return doctor.diagnose(get("fast_wam_libero"), devices=64)


def test_parameters_and_flops_of_the_published_model(libero):
    assert libero["parameters"] == {
        "video": 4_999_787_712, "action": 1_020_886_023, "proprio": 36_864, "total": TOTAL
    }  # fmt: skip
    assert libero["flops"]["forward"] == pytest.approx(2.85e12, rel=0.005)  # spec 5.4
    # The inputs (patches, actions, state and noise levels) need no gradient.
    came = 294 * 192 * 3072 + 32 * 7 * 1024 + 8 * 4096 + 256 * (3 * 3072 + 1024)
    assert libero["flops"]["train"] == 3 * libero["flops"]["forward"] - 2 * came
    # Spec 6.5: a prefill of 1.0 TFLOP and ten steps; those cost less here, see tests of bench.
    assert 1.0e12 < libero["flops"]["act/direct"] < 2.04e12
    assert ["no data in" in w for w in libero["warnings"]] == [True]
    assert libero["batch"]["latents"] == ["bfloat16", 128, 3, 14, 28, 48]
    assert json.loads(json.dumps(libero)) == libero


def test_memory_of_a_mesh_by_closed_form(libero):
    small = 30 * sum(BLOCK.values()) + OUTSIDE
    parameters = 4 * (small + (TOTAL - small) / 16)
    memory = libero["memory"]
    assert memory["mesh"] == {"data": 4, "fsdp": 16, "tensor": 1} and memory["devices"] == 64
    assert memory["parameters"] == parameters == memory["gradients"]
    moments = pytest.approx(2 * parameters, abs=64)  # and counters
    assert memory["optimiser"] == moments
    assert memory["total"] == parameters + memory["gradients"] + memory["optimiser"]
    assert "ema" not in memory


def test_a_mesh_that_cannot_be_trained_on_is_an_error():
    config = get("fast_wam_libero", "debug")
    with pytest.raises(ValueError, match="batch_size 8 does not divide.*16 shards"):
        doctor.diagnose(config, devices=16)
    config.mesh.data, config.mesh.fsdp = -1, 4
    with pytest.raises(ValueError, match="does not fit 6 devices: 4 do not divide 6.*--devices"):
        doctor.diagnose(config, devices=6)
    config.mesh.data = 2
    with pytest.raises(ValueError, match="does not fit 16 devices: 8 is not 16.*--devices"):
        doctor.diagnose(config, devices=16)
    config.mesh.fsdp, config.model.layers = 1, 0
    with pytest.raises(ValueError, match="model.layers = 0"):
        doctor.diagnose(config, devices=2)


def test_imagining_costs_an_order_of_magnitude_more_than_acting(libero):
    """The public article measures 4.3x; by FLOPs it is 12 to 14."""
    direct = libero["flops"]["act/direct"]
    for variant, modes in {"joint": ["joint"], "optional_idm": ["direct", "imagine"]}.items():
        flops = doctor.diagnose(get("fast_wam_libero", f"variant={variant}"), devices=16)["flops"]
        acts = [k.removeprefix("act/") for k in flops if k.startswith("act/")]
        assert acts == modes
        assert 11 < flops[f"act/{modes[-1]}"] / direct < 14
    assert flops["act/direct"] == direct  # the same checkpoint acts without imagining


def small(root):
    config = synthetic.config(root, a={"path": "a"})
    model = config.model
    model.layers, model.heads, model.head_dim = 1, 2, 8
    model.codec.patch, model.patch = 2, 1
    config.optim.ema_decay = 0.9
    return config


def test_warns_of_a_constant_action_and_of_nothing_else(tmp_path):
    """In synthetic data the first action is the number of the episode."""
    for name, lengths in (("one", (12,)), ("two", (12, 12, 12))):
        synthetic.write(tmp_path / name / "a", lengths)
    one = doctor._data_warnings(small(tmp_path / "one"))
    two = doctor.diagnose(small(tmp_path / "two"), 1)
    assert any("actions[0] is constant (0)" in w for w in one)
    assert not any("actions[1]" in w for w in one)
    assert not any("constant" in w for w in two["warnings"])
    assert two["memory"]["ema"] == two["memory"]["parameters"] == 4 * two["parameters"]["total"]
    assert two["batch"]["video"] == ["uint8", 4, 3, 8, 16, 3]
    assert np.isclose(two["memory"]["total"], 5 * two["memory"]["parameters"], rtol=1e-3)


def test_memory_depends_on_trained_parameters_and_optimiser(tmp_path):
    synthetic.write(tmp_path / "a", (12,) * 3)
    config = small(tmp_path)
    config.optim.ema_decay = 0.0
    objective = wam.build(config, pipeline.spec_of(config))

    def count():
        """Returns (state, the report of its memory)."""
        create = functools.partial(states.create, objective, optim.make(config), config)
        state = jax.eval_shape(create)
        one = sharding.Shape({"data": 1, "fsdp": 1, "tensor": 1})
        return state, doctor.memory(state, config, one)

    whole = count()[1]
    config.optim.freeze = (r"(blocks/)?video/.*",)
    state, part = count()
    parameters = tree.count_by_expert(state.params)
    trained = 4 * (parameters["total"] - parameters["video"])
    assert part["parameters"] == whole["parameters"]
    assert part["gradients"] == trained < whole["gradients"]
    assert part["optimiser"] == pytest.approx(2 * trained, abs=64)
    config.optim.freeze, config.optim.name = (), "muon"  # one moment of the matrices
    one = count()[1]["optimiser"]
    assert whole["parameters"] < one < whole["optimiser"]


def test_unchecked_data_is_reported(tmp_path):
    config = get("fast_wam_libero", "debug")
    config.data.root = str(tmp_path)
    warnings = doctor._data_warnings(config)
    names = list(config.data.sources)
    assert len(warnings) == len(names) and all(n in w for n, w in zip(names, warnings, strict=True))
    assert all("nothing of the data was checked" in w for w in warnings)
    next(pipeline.open_data(config)[2])  # makes the stand-ins
    assert not any("no data" in w for w in doctor._data_warnings(config))


def test_command_line_prints_json_and_draws_the_tables(tmp_path):
    command = [sys.executable, "-m", "wamjax.doctor", "--json", f"--out={tmp_path}"]
    command += [f"--config={FOLDER / 'fast_wam_libero.py'}:variant=idm,debug"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent.parent)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["memory"]["devices"] == 1 and "fast_wam_idm" in report["tables"]
    assert (tmp_path / "mask_fast_wam_idm.png").stat().st_size > 1000


def test_keys_are_listed_with_what_they_mean(capsys):
    with synthetic.command(doctor, f"--config={FOLDER / 'fast_wam_libero.py'}", "--keys"):
        doctor.main([""])
    lines = capsys.readouterr().out.splitlines()
    config = get("fast_wam_libero")
    assert len(lines) == len(configs.flatten(config))
    assert any(x.startswith("optim.learning_rate = 0.0001 ") and "peak" in x for x in lines)


# DiT's table 4: Gflops (multiply-accumulates), with which the article's table agrees.
GFLOPS = {
    "S/8": 0.36, "S/4": 1.41, "S/2": 6.06, "B/8": 1.42, "B/4": 5.56, "B/2": 23.01,
    "L/8": 5.01, "L/4": 19.70, "L/2": 80.71, "XL/8": 7.39, "XL/4": 29.05, "XL/2": 118.64,
}  # fmt: skip
DESIGNS = {"adaln": 118.57, "cross_attention": 137.62, "in_context": 119.37}  # of XL/2
ARTICLE = {"S/4": 1.4, "B/4": 5.6, "L/4": 19.7, "XL/4": 29.1}
TRAINED = {  # parameters without the buffer of positions, which public counts include
    "S/2": 32_963_360 - 256 * 384, "B/2": 130_512_416 - 256 * 768, "XL/2": 675_129_632 - 256 * 1152
}  # fmt: skip


@pytest.fixture(scope="module")
def imagenet():
    return doctor.diagnose(get("dit_imagenet"), devices=8, sizes=True)


def test_gflops_table_of_dit_within_one_percent(imagenet):
    gmac = {name: row["forward"] / 2e9 for name, row in imagenet["sizes"].items()}
    for name, published in GFLOPS.items():
        # The smallest are printed with two digits only.
        rounding = 0.005 if published < 1 else 0
        assert gmac[f"DiT-{name} adaln_zero"] == pytest.approx(published, rel=0.01, abs=rounding)
    for name, published in ARTICLE.items():
        assert gmac[f"DiT-{name} adaln_zero"] == pytest.approx(published, abs=0.06)
    for design, published in DESIGNS.items():
        assert gmac[f"DiT-XL/2 {design}"] == pytest.approx(published, rel=0.01)
    base = gmac["DiT-XL/2 adaln_zero"]
    assert 1.14 < gmac["DiT-XL/2 cross_attention"] / base < 1.18  # "about 15 %"
    assert imagenet["flops"]["forward"] / 2e9 == pytest.approx(118.64, rel=0.01)
    came = 256 * 16 * 1152 + 256 * 1152  # patches and timesteps need no gradient
    assert imagenet["flops"]["train"] == 3 * imagenet["flops"]["forward"] - 2 * came
    # 250 steps on a batch of twice the size, for guidance.
    assert imagenet["flops"]["sample"] / 500e9 == pytest.approx(2 * 118.64, rel=0.01)


def test_parameters_of_dit_are_exactly_the_published_ones(imagenet):
    for name, parameters in TRAINED.items():
        assert imagenet["sizes"][f"DiT-{name} adaln_zero"]["parameters"] == parameters
    assert imagenet["parameters"]["total"] == TRAINED["XL/2"]
    # Table 4 in millions, buffer and all.
    rounded = {"DiT-XL/2 in_context": 449, "DiT-XL/2 cross_attention": 598,
               "DiT-XL/2 adaln": 600, "DiT-L/2 adaln_zero": 458}  # fmt: skip
    for name, millions in rounded.items():
        assert imagenet["sizes"][name]["parameters"] / 1e6 == pytest.approx(millions, abs=0.8)


def test_flops_at_512_pixels_and_unsupported_configs():
    large = doctor.diagnose(get("dit_imagenet", "resolution=512"), devices=8)
    assert large["flops"]["forward"] / 2e9 == pytest.approx(524.60, rel=0.01)
    with pytest.raises(ValueError, match="--sizes needs a config of a DiT without text"):
        doctor.diagnose(get("sd3_medium"), devices=16, sizes=True)


def test_stable_diffusion_3_medium_has_the_published_parameters():
    config = get("sd3_medium")
    objective = wam.build(config, pipeline.spec_of(config))
    params = jax.eval_shape(objective.init, jax.random.key(0))
    assert tree.count_by_expert(params)["total"] == 2_028_328_000
