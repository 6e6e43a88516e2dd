"""Tests the ablation of Fast-WAM's variants: its table, with differences seed by seed."""

import json
from types import SimpleNamespace

import pytest
from data import synthetic
from test_denoising_runs import study

from wamjax.envs import tabletop
from wamjax.runs import closed_loop, trained


@pytest.fixture
def ablation():
    module = study("ablation_tabletop")
    with synthetic.command(module):
        yield module


def test_table(ablation, tmp_path):
    assert ablation.table(tmp_path) == "no run has been measured yet"

    def measured(run, name, rates, shifts=tuple(tabletop.SHIFTS)):
        (tmp_path / run).mkdir(exist_ok=True)
        for shift in shifts:
            rate = rates[0] if shift == "none" else rates[1]
            row = {"success_rate": rate, "episodes": 96, "latency_ms": {"p50": 1.25}}
            file = "ways.json" if shift == "none" else f"ways-{shift}.json"
            (tmp_path / run / file).write_text(json.dumps({n: row for n in name}))

    for seed, rates in enumerate([(0.5, 0.1), (0.7, 0.3)]):
        measured(f"fast-{seed}", ["fast"], rates)
        measured(f"idm-{seed}", ["idm"], (0.7, 0.3))
    measured("optional_idm-0", ["optional_idm, direct", "optional_idm, imagine"], (0.25, 0.3))
    measured("joint-0", ["joint"], (0.5, 0.5), ["none", "lighting"])  # not yet done
    (tmp_path / "video").mkdir()
    head, _, fast, idm, _, imagine, end, *_ = (
        [c.strip() for c in line.split("|")[1:-1]] for line in ablation.table(tmp_path).splitlines()
    )
    assert head[2:] == [*tabletop.SHIFTS, "mean", "mean against fast"] and end == []
    assert fast[:2] == ["fast", "1.2"] and fast[-1] == "-"
    mean = (0.6 + 6 * 0.2) / 7
    assert [c.split()[0] for c in fast[2:-1]] == ["60.0"] + ["20.0"] * 6 + [f"{100 * mean:.1f}"]
    assert imagine[0] == "optional_idm, imagine" and imagine[2] == "25.0 [17.4, 34.5]"  # Wilson
    assert imagine[-1] == f"{100 * ((0.25 + 6 * 0.3) - (0.5 + 6 * 0.1)) / 7:.1f}"  # to fast-0
    half = 100 * 12.7062047 * 0.1  # t of one degree of freedom times the error of (0.2, 0)
    assert idm[-1] == f"10.0 [{10 - half:.1f}, {10 + half:.1f}]"
    assert (tmp_path / "ablation.png").exists() and (tmp_path / "table.json").exists()


def test_difference_without_a_base(ablation):
    assert ablation.study.by_seed({"0": 0.5}, {}) == "-"
    assert ablation.study.by_seed({"0": 0.5, "1": 0.1}, {"0": 0.25}) == "25.0"


def test_every_way_to_act_is_measured_under_every_shift(ablation, tmp_path, monkeypatch):
    """Everything is measured once, and latency only in the world without a shift."""
    asked, timed = [], []

    def load(run, mode):
        policy = trained.Policy(None, {}, {}, mode)
        return policy, SimpleNamespace(eval=SimpleNamespace(env="tabletop")), 7

    def roll_out(policy, config, shift, world):
        assert (config.eval.episodes, config.eval.execute) == (192, 4)
        asked.append((policy.mode, next(n for n, s in world.shifts.items() if s == shift)))
        return {"success_rate": 0.5, "episodes": 192}

    monkeypatch.setattr(trained, "load", load)
    monkeypatch.setattr(closed_loop, "roll_out", roll_out)
    monkeypatch.setattr(
        trained, "latency", lambda policy, *a, **k: timed.append(policy.mode) or {"p50": 1.0}
    )
    for _ in range(2):
        ablation.measure("optional_idm", tmp_path)
    modes = ("direct", "imagine")
    assert sorted(asked) == sorted((m, s) for m in modes for s in tabletop.SHIFTS)
    assert timed == list(modes)
