import functools
import json
import pathlib
import subprocess
import sys

import aot
import jax
import pytest
import search
from test_configs import get, spec_of

from wamjax import tree, wam
from wamjax.training import compile as compiling
from wamjax.training import optim, sharding
from wamjax.training import state as states
from wamjax.training.step import model_flops

ROOT = pathlib.Path(__file__).parents[2]


def test_parameters_are_counted_by_owner():
    leaf = jax.ShapeDtypeStruct((2, 3), "float32")
    block = {"video": {"ffn": leaf}, "action": {"ffn": leaf}}
    params = {"video": {"head": leaf}, "blocks": block, "proprio": {"kernel": leaf}}
    assert tree.count_by_expert(params) == {"video": 12, "action": 6, "proprio": 6, "total": 24}


@pytest.mark.slow
def test_a_small_config_compiles_for_a_slice_with_all_flags(tmp_path):
    pytest.importorskip("libtpu")
    out = tmp_path / "report.json"
    command = [sys.executable, "tpu/aot.py", f"--out={out}", "--topology=v5e:2x2"]
    command += ["--config=experiments/configs/fast_wam_libero.py:debug", "--mesh=data=2,fsdp=2"]
    subprocess.run(command, check=True, cwd=ROOT)
    report = json.loads(out.read_text())
    assert report["devices"] == 4 and report["memory"]["fits"]
    flags = compiling.FLAGS["TPU v5e"]
    assert report["compiler_options"] == {flag.name: flag.value for flag in flags}
    assert report["collectives"]["all-gather"]["bytes"] > 0


REPORTS = sorted((ROOT / "tpu" / "reports").glob("*.json"))


def test_the_page_matches_every_report():
    page = (ROOT / "tpu" / "README.md").read_text()
    rows = [
        search.row(path.stem, report)
        for path in REPORTS
        for report in json.loads(path.read_text())["search"]
    ]
    assert rows and all(row in page for row in rows)
    assert page.count("| v5p:") == len(rows)


@pytest.mark.parametrize("name", [path.stem for path in REPORTS])
def test_reports_match_the_current_models(name):
    """Only traces it; the slow test below compiles the smallest again."""
    report = json.loads((ROOT / f"tpu/reports/{name}.json").read_text())["search"][0]
    config = get(name)
    config.data.batch_size = report["batch_size"]
    objective = wam.build(config, spec_of(config))
    state = jax.eval_shape(functools.partial(states.create, objective, optim.make(config), config))
    batch = objective.batch_spec(config.data.batch_size)
    chip = jax.sharding.AbstractDevice("TPU v5", num_cores=1, platform="tpu")
    mesh = sharding.abstract_mesh(config.mesh, report["devices"]).update(abstract_device=chip)
    with jax.sharding.use_abstract_mesh(mesh):  # padding is not useful work
        work = model_flops(objective, config, state.params, batch)
    assert work == report["flops"]["model"]
    assert tree.count_by_expert(state.params) == report["parameters"]


@pytest.mark.slow
def test_a_report_compiles_again_to_the_same_estimate(tmp_path):
    pytest.importorskip("libtpu")
    report = json.loads((ROOT / "tpu/reports/dit_imagenet.json").read_text())["search"][0]
    if report["versions"] != aot.VERSIONS:
        pytest.skip(f"the report is of {report['versions']}")
    out, mesh = tmp_path / "report.json", report["mesh"]
    command = [sys.executable, "tpu/aot.py", f"--out={out}", f"--topology={report['topology']}"]
    command += ["--config=experiments/configs/dit_imagenet.py", f"--remat={report['remat']}"]
    command += [f"--mesh=data={mesh['data']},fsdp={mesh['fsdp']}"]
    command += [f"--batch_per_device={report['batch_size'] // report['devices']}"]
    subprocess.run(command, check=True, cwd=ROOT)
    again = json.loads(out.read_text())
    for what in ("compute", "collectives_exposed", "step"):
        seconds = [r["estimate"]["seconds"][what] for r in (again, report)]
        assert seconds[0] == pytest.approx(seconds[1], rel=0.03), what
    assert again["memory"]["peak_bytes"] == pytest.approx(report["memory"]["peak_bytes"], rel=0.03)
