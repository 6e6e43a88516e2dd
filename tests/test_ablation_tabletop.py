"""The ablation of Fast-WAM's variants: its table, with differences seed by seed."""

import json

import pytest
from data import synthetic
from test_denoising_runs import study


@pytest.fixture
def ablation():
    module = study("ablation_tabletop")
    with synthetic.command(module):
        yield module


def test_table(ablation, tmp_path):
    assert ablation.table(tmp_path) == "no run has been measured yet"
    runs = {"fast-0": (0.5, 0.1), "fast-1": (0.7, 0.3), "idm-0": (0.7, 0.3), "idm-1": (0.7, 0.3)}
    for run, rates in runs.items():
        shifts = zip(("none", "lighting"), rates, strict=True)
        found = {s: {"success_rate": rate, "episodes": 96} for s, rate in shifts}
        (tmp_path / run).mkdir()
        (tmp_path / run / "shifts.json").write_text(
            json.dumps({"direct": {"shifts": found, "latency_ms": {"p50": 1.25}}})
        )
    (tmp_path / "video").mkdir()
    (tmp_path / "optional_idm-0").mkdir()  # acts in two ways, and has one seed
    found = {"none": {"success_rate": 0.25, "episodes": 96}} | {"lighting": found["lighting"]}
    ways = {m: {"shifts": found, "latency_ms": {"p50": 5}} for m in ("direct", "imagine")}
    (tmp_path / "optional_idm-0" / "shifts.json").write_text(json.dumps(ways))
    head, _, fast, idm, _, imagine, *_ = (
        [c.strip() for c in line.split("|")[1:-1]] for line in ablation.table(tmp_path).splitlines()
    )
    assert head[2:] == ["none", "lighting", "mean", "mean against fast"]
    assert fast[:2] == ["fast", "1.2"] and fast[-1] == "-"
    assert [c.split()[0] for c in fast[2:-1]] == ["60.0", "20.0", "40.0"]
    assert imagine[:3] == ["optional_idm (imagine)", "5.0", "25.0 [17.4, 34.5]"]  # Wilson
    assert imagine[-1] == "-2.5"  # to fast-0
    half = 100 * 12.7062047 * 0.1  # t of one degree of freedom times the error of (0.2, 0)
    assert idm[-1] == f"10.0 [{10 - half:.1f}, {10 + half:.1f}]"
    assert (tmp_path / "ablation.png").exists() and (tmp_path / "table.json").exists()


def test_difference_without_a_base(ablation):
    assert ablation.study.by_seed({"0": 0.5}, {}) == "-"
    assert ablation.study.by_seed({"0": 0.5, "1": 0.1}, {"0": 0.25}) == "25.0"
