"""Tests the study of joins under a delay: its cells, and the table of results."""

import json

import pytest
from data import synthetic
from test_configs import get
from test_denoising_runs import study

from wamjax.envs.joins import WAYS, Join


@pytest.fixture
def realtime():
    module = study("realtime_tabletop")
    with synthetic.command(module, "--delays=0,6", "--episodes=10"):
        yield module


def test_every_way_is_measured_under_every_delay_that_its_chunks_allow(realtime):
    cells = realtime.ways()
    assert cells["sync, 0"]["execute"] == 2 and cells["blend, 6"]["execute"] == 6
    late = {f"{way}, 6" for way in WAYS}
    assert cells.keys() == {"sync, 0", "blend, 0", "ensemble, 0"} | late
    config = get("realtime_tabletop", realtime.KINDS["prefix"])
    assert config.objective.prefix_max == 6
    for how in cells.values():
        Join(how["join"], how["delay"]).check(how["execute"], config.data.chunk)
    assert get("realtime_tabletop", realtime.KINDS["plain"]).objective.prefix_max == 0


def test_table(realtime, tmp_path):
    assert realtime.table(tmp_path) == "no run has been measured yet"
    found = {"prefix-0": (0.9, 0.8), "plain-0": (0.9, 0.3), "plain-1": (0.9, 0.5)}
    for run, rates in found.items():
        (tmp_path / run).mkdir()
        rows = {
            name: {"success_rate": rate, "jerk": 1 - rate, "episodes": 10, "steps": 7,
                   "blind_success_rate": 0.1}
            for name, rate in zip(("sync, 0", "switch, 6"), rates, strict=True)
        }
        (tmp_path / run / "ways.json").write_text(json.dumps(rows))
    lines = realtime.table(tmp_path).splitlines()
    assert lines == (tmp_path / "table.md").read_text().splitlines()
    rows = {tuple(x.strip() for x in line.split("|")[1:3]): line for line in lines if "|" in line}
    # The mean jerk of two seeds; t has one degree of freedom.
    assert "| plain | switch | 0.100 [0.100, 0.100] | 0.600 [-0.671, 1.871] |" in lines
    assert "90.0" in lines[2] and rows["plain", "switch"] in lines
    # Without a delay, all ways but blend and ensemble equal sync, which is measured once.
    assert rows["plain", "switch"].split("|")[3] == rows["plain", "sync"].split("|")[3]
    assert "10 episodes a cell and seed, 2 seed(s), 7 training steps" in lines[-3]
    assert lines[-1].startswith("plain: the same actions in another scene, without a delay, 10.0")
