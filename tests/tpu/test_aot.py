import json
import pathlib
import subprocess
import sys

import jax
import pytest
import xla_flags

from wamjax import tree

ROOT = pathlib.Path(__file__).parents[2]


def test_parameters_are_counted_by_owner():
    leaf = jax.ShapeDtypeStruct((2, 3), "float32")
    block = {"video": {"ffn": leaf}, "action": {"ffn": leaf}}
    params = {"video": {"head": leaf}, "blocks": block, "proprio": {"kernel": leaf}}
    assert tree.count_by_expert(params) == {"video": 12, "action": 6, "proprio": 6, "total": 24}


def test_every_flag_has_a_reason_and_an_unknown_chip_is_named():
    for flags in xla_flags.CHIPS.values():
        assert all(flag.reason for flag in flags)
        assert len({flag.name for flag in flags}) == len(flags)
    with pytest.raises(KeyError, match="v9.*v5p"):
        xla_flags.options("v9")


@pytest.mark.slow
def test_a_small_config_compiles_for_a_slice_with_all_flags(tmp_path):
    pytest.importorskip("libtpu")
    out = tmp_path / "report.json"
    command = [sys.executable, "tpu/aot.py", f"--out={out}", "--topology=v5e:2x2"]
    command += ["--config=experiments/configs/fast_wam_libero.py:debug", "--mesh=data=2,fsdp=2"]
    subprocess.run(command, check=True, cwd=ROOT)
    report = json.loads(out.read_text())
    assert report["devices"] == 4 and report["memory"]["fits"]
    assert report["compiler_options"] == xla_flags.options("v5e")
    assert report["collectives"]["all-gather"]["bytes"] > 0
