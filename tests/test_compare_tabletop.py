"""Tests the study that compares both methods: budgets, ways to act, and the table of results."""

import json

import pytest
from data import synthetic
from test_denoising_runs import study


@pytest.fixture
def compare():
    module = study("compare_tabletop")
    with synthetic.command(module, "--tflop=0.001", "--arg=debug", "--episodes=6"):
        yield module


def test_budgets_are_equal_in_flops(compare):
    found = {kind: compare.steps(kind) for kind in ("cosmos_policy", "fast", "no_cotrain")}
    for count, each in found.values():
        assert abs(count * each - 1e9) <= each / 2
    assert found["no_cotrain"][1] < found["fast"][1]  # no future to denoise: more steps


def test_a_budget_is_shared_between_the_model_of_the_world_and_the_policy(
    compare, tmp_path, monkeypatch
):
    """--world_share of the FLOPs is spent first, once per method; the rest is for the policy."""
    trained = []
    monkeypatch.setattr(compare.study, "train", lambda *args: trained.append(args))
    monkeypatch.setattr(compare, "measure", lambda *args: None)
    monkeypatch.setattr(compare, "steps", lambda kind: ({"fast": 400}.get(kind, 100), 0))
    each = []
    monkeypatch.setattr(compare.study, "run", lambda argv, name, one, table: each.append(one))
    compare.main([""])
    compare.flags.FLAGS.world_share = 0.75
    for kind in ("idm", "cosmos_policy"):
        each[0](kind, "3", tmp_path / f"{kind}-3")
    found = [(arg, seed, run.name, [o for o in options if "total" in o or "path" in o])
             for _, arg, seed, run, *options in trained]  # fmt: skip
    start, steps = "--config.init_from.path=", "--config.total_steps="
    assert found == [
        ("variant=fast", "100", "world-fast_wam", [f"{steps}300"]),
        ("variant=idm", "3", "idm-3", [f"{start}{tmp_path / 'world-fast_wam'}", f"{steps}25"]),
        ("action_weight=0", "100", "world-cosmos_policy", [f"{steps}75"]),
        ("", "3", "cosmos_policy-3",
         [f"{start}{tmp_path / 'world-cosmos_policy'}", f"{steps}25"]),
    ]  # fmt: skip


def test_every_variant_acts_in_its_own_modes(compare):
    rows = {name: how for kind in compare.KINDS for name, how in compare.ways(kind).items()}
    assert {"fast", "joint", "idm", "no_cotrain"} < rows.keys()
    assert rows["optional_idm, imagine"] == {"mode": "imagine"}
    assert rows["cosmos_policy, 1 call"] == {"mode": "direct", "steps": 1}


def test_table(compare, tmp_path):
    assert compare.table(tmp_path) == "no run has been measured yet"
    for run, rate in {"fast-0": 0.5, "fast-1": 0.7, "cosmos_policy-0": 0.5}.items():
        row = {
            "success_rate": rate, "episodes": 10, "parameters": 1_800_000, "steps": 7,
            "latency_ms": {"p50": 2.0}, "per_task": {"reach": {"success_rate": rate}},
        }  # fmt: skip
        (tmp_path / run).mkdir()
        name = "cosmos_policy, 1 call" if "cosmos" in run else "fast"
        (tmp_path / run / "ways.json").write_text(json.dumps({name: row}))
    darker = {"fast": row | {"success_rate": 0.25}}
    (tmp_path / "fast-1" / "ways-lighting.json").write_text(json.dumps(darker))
    head, _, cosmos, fast, *_ = compare.table(tmp_path).splitlines()
    assert "| reach | lighting | latency p50 ms | seeds |" in head
    assert cosmos == "| cosmos_policy, 1 call | 1.80 M | 7 | 50.0 [23.7, 76.3] | 50 | - | 2.0 | 1 |"
    assert fast.startswith("| fast | 1.80 M | 7 | 60.0 [") and fast.endswith(
        "| 60 | 25 | 2.0 | 2 |"
    )
    assert (tmp_path / "compare.png").exists() and (tmp_path / "table.json").exists()
