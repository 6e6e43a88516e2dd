"""Tests acting programs: their traffic is counted by hand, and a small one is compiled."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from test_configs import get, spec_of

from wamjax import tree, wam
from wamjax.bench import act, traffic

ROOT = pathlib.Path(__file__).parents[1]


def test_each_step_reads_the_action_expert_and_the_cache(capsys):
    config = get("fast_wam_libero", "debug")
    report = act.run(config, "cpu", ["direct:10", "direct:1"])
    ten, one = report["rows"]
    objective = wam.build(config, spec_of(config))
    flat = tree.flatten(act.programs(objective, config, spec_of(config))["direct:1"]().params)
    once = r"cross_attn/(k|v|k_norm)/"  # keys and values of the context, in the prefill
    mine = {p: x for p, x in flat.items() if p.startswith("blocks_") and "/action/" in p}
    steps = [x for p, x in mine.items() if not re.search(once, p)]
    steps += [x for p, x in flat.items() if p.startswith(("action/encoder", "action/head"))]
    each = sum(x.size * x.dtype.itemsize for x in steps)
    assert ten["read_bytes"] - one["read_bytes"] == 9 * each
    assert one["weights_bytes"] == ten["weights_bytes"] < sum(
        x.size * x.dtype.itemsize for x in flat.values()
    )
    model, (tokens, words) = config.model, (1, 129)  # of 32 x 32 pixels twice
    keys = 2 * model.layers * model.heads * model.head_dim * 2 * (2 * tokens + words)
    assert keys <= ten["cache_bytes"] < 1.2 * keys  # and tables of the rotary embedding
    assert ten["operations_run"] > one["operations_run"] > one["operations"] / 2
    assert "estimate" not in ten and "floor_seconds" not in ten
    act.show(report)
    assert "direct:10" in capsys.readouterr().out
    assert json.loads(json.dumps(report)) == report


def test_floors_come_from_the_data_sheet_without_a_compiler():
    config = get("cosmos_policy_libero", "debug")
    report = act.run(config, "h100", ["direct:1", "plan:1"])
    direct, plan = report["rows"]
    for row in (direct, plan):
        assert row["floor_seconds"]["weights"] == row["read_bytes"] / 3350e9
        assert row["floor_seconds"]["flops"] == row["flops"] / 989e12
        assert "operations" not in row
    # 8 proposals, 24 futures and 120 values, of 5 steps each but the first.
    assert plan["flops"] > 100 * direct["flops"]


def test_a_parameter_is_read_where_it_is_used():
    params = {"a": jnp.zeros((4, 8), jnp.bfloat16), "b": jnp.zeros((3, 8, 8), jnp.bfloat16),
              "rows": jnp.zeros((100, 4), jnp.bfloat16), "unused": jnp.zeros(5)}  # fmt: skip

    def function(params, x):
        x = x[None] @ params["a"].astype(jnp.float32)  # 64 bytes, as it is stored
        still = jnp.sin(x)

        def outer(x, _):
            x = jax.lax.scan(lambda x, k: (x @ k + still, None), x, params["b"])[0]
            return jax.jit(jnp.add)(x, jnp.take(params["rows"], 3, axis=0).sum()), None

        return jax.lax.scan(outer, x, None, length=5)[0]

    count = traffic.count(function, params, jnp.zeros(4))
    assert count.weights == 64 + 384 + 800
    assert count.read == 64 + 5 * (384 + 8)
    assert count.cache == 32


def test_usage_errors_are_reported():
    config = get("fast_wam_libero", "debug")
    with pytest.raises(ValueError, match="--rows=direct:3 must be one of direct:10, direct:1,"):
        act.run(config, "cpu", ["direct:3"])
    with pytest.raises(ValueError, match="pictures"):
        act.run(get("dit_digits", "debug"), "cpu")


@pytest.mark.slow
def test_a_small_policy_compiles_for_a_tpu():
    pytest.importorskip("libtpu")
    command = [sys.executable, "-m", "wamjax.bench", "act", "--target=v5e", "--json"]
    command += ["--config=fast_wam_libero:debug", "--rows=direct:10,direct:1"]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    ten, one = json.loads(done.stdout)["rows"]
    assert ten["memory"]["fits"]
    for row in (ten, one):
        guess = row["estimate"]
        assert guess["cycles"] == sum(guess["parts"].values())
        assert guess["seconds"] == pytest.approx(guess["cycles"] / 1.5e9)
        assert row["times_the_floor"] == guess["seconds"] / max(row["floor_seconds"].values())
    # A loop of one step counts as none.
    assert ten["estimate"]["cycles_in_loops"] > 0.5 * (
        ten["estimate"]["cycles"] - one["estimate"]["cycles"]
    )
