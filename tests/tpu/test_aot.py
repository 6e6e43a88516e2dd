import json
import pathlib
import subprocess
import sys

import jax
import pytest

from wamjax import tree
from wamjax.training import compile as compiling

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
