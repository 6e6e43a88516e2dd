"""Tests the study of planning: the ways of acting of each training, and the table of results."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from data import synthetic
from test_denoising_runs import study
from wam import cosmos_tiny as tiny

from wamjax import config as configs
from wamjax import foresight
from wamjax.data.normalize import Normalizer
from wamjax.runs import closed_loop, trained
from wamjax.wam.cosmos_policy.planning import Plan


@pytest.fixture
def planning():
    module = study("planning_tabletop")
    with synthetic.command(module, "--proposals=2,4", "--plan_calls=3,1", "--episodes=10"):
        yield module


def test_ways_of_acting_change_the_stated_fields(planning):
    rows = planning.ways("base")
    assert len(rows) == 4 + 2 + 2 * 2 and set(planning.ways("log_normal")) == {"direct"}
    assert set(planning.ways("prefix")) == {"direct", "frozen"}
    objective = tiny.objective()
    one = planning.acting(objective, dict(rows["direct, 1 calls"]))
    assert (one.steps, one.sigma_min) == (1, objective.sigma_min)
    low = planning.acting(objective, dict(rows["direct, to sigma 0.002"]))
    assert (low.steps, low.sigma_min) == (objective.steps, 0.002)
    way = dict(rows["plan, 4 proposals, own values"])
    assert way.pop("mode") == "plan" and way.pop("planner") is False
    how = planning.acting(objective, way).planning
    assert (how.proposals, how.future_steps, how.value_steps) == (4, 3, 1)


def test_measured_ways_stay_and_planners_are_loaded(planning, tmp_path, monkeypatch):
    loaded = []

    def load(run, mode=None, planner=None):
        loaded.append((mode, planner))
        return trained.Policy(tiny.objective(), {}, {}, mode), configs.base_config(), 7

    def roll_out(policy, config, shift, world):
        assert (config.eval.episodes, config.eval.execute) == (10, 4)
        return {"success_rate": policy.objective.steps / 10, "episodes": 10}

    monkeypatch.setattr(trained, "load", load)
    monkeypatch.setattr(closed_loop, "roll_out", roll_out)
    monkeypatch.setattr(trained, "latency", lambda *args, calls: {"p50": 1.0, "p99": 2.0})
    run = tmp_path / "base-0"
    run.mkdir()
    planning.measure("base", run, tmp_path / "planner-0")
    assert loaded.count(("plan", tmp_path / "planner-0")) == loaded.count(("plan", None)) == 2
    found = json.loads((run / "ways.json").read_text())
    assert found["direct, 10 calls"]["success_rate"] == 1.0
    del found["direct, 2 calls"]
    (run / "ways.json").write_text(json.dumps(found))
    loaded.clear()
    planning.measure("base", run, tmp_path / "planner-0")
    assert loaded == [(None, None)]
    for step, again in (("7", 0), ("9", len(found) + 1)):  # trained on since
        (run / "checkpoints" / step).mkdir(parents=True)
        loaded.clear()
        planning.measure("base", run, tmp_path / "planner-0")
        assert len(loaded) == again


def test_table_of_all_runs(planning, tmp_path):
    assert planning.table(tmp_path) == "no run has been measured yet"
    for run, rate in {"base-0": 0.4, "base-1": 0.6, "prefix-0": 0.2}.items():
        (tmp_path / run).mkdir()
        row = {"success_rate": rate, "episodes": 10, "latency_ms": {"p50": 10 * rate, "p99": 9.0}}
        (tmp_path / run / "ways.json").write_text(json.dumps({"direct": row}))
    lines = planning.table(tmp_path).splitlines()
    assert lines[2].startswith("| direct | 50.0 [") and lines[2].endswith("| - | 4.0 | 2 |")
    assert lines[3] == "| prefix: direct | 20.0 [5.7, 51.0] | - | 2.0 | 1 |"  # Wilson
    assert {"table.md", "table.json", "planning.png"} <= {p.name for p in tmp_path.iterdir()}


def test_rows_are_compared_in_the_same_episodes_of_the_same_checkpoints(planning, tmp_path):
    def row(outcomes):
        rate = outcomes.count("1") / len(outcomes)
        return {"success_rate": rate, "episodes": 4, "outcomes": outcomes, "latency_ms": {"p50": 1}}

    ways = {
        "base-0": {planning.DIRECT: row("0011"), "frozen": row("0111"), "plan": row("0011")},
        "base-1": {planning.DIRECT: row("1111")},
        "prefix-0": {"direct": row("0000")},
    }
    for run, rows in ways.items():
        (tmp_path / run).mkdir()
        (tmp_path / run / "ways.json").write_text(json.dumps(rows))
    cells = [line.split("|") for line in planning.table(tmp_path).splitlines()[2:]]
    paired = {c[1].strip(): c[3].strip() for c in cells if len(c) > 3}
    assert paired[planning.DIRECT] == "-"
    assert paired["prefix: direct"] == "-50.0"  # of seed 0, as other runs are compared
    assert paired["plan"] == "0.0"
    half = 100 * 3.1824463 * 0.5 / 4**0.5  # t of 3 degrees of freedom, deviation of (0, 1, 0, 0)
    assert paired["frozen"] == f"25.0 [{25 - half:.1f}, {25 + half:.1f}]"


def test_policies_start_from_the_pretrained_world_model(planning, tmp_path, monkeypatch):
    """The model is trained once, without an action loss; Fast-WAM's action experts start fresh."""
    made = []
    monkeypatch.setattr(planning.study, "train", lambda *args: made.append(args))
    world = planning.study.pretrain(planning.CONFIG, "action_weight=0", tmp_path, 25, "--x=y")
    assert world == (f"--config.init_from.path={tmp_path}",)
    assert made.pop()[1:] == (
        "action_weight=0", "100", tmp_path, "--x=y", "--config.total_steps=25",
        "--config.eval.episodes=0",
    )  # fmt: skip
    video = planning.study.pretrain_video(planning.CONFIG, tmp_path, 25)
    assert video == (*world, "--config.init_from.fresh=('action/.*', 'blocks/action/.*')")
    assert "--config.objective.action_weight=0.0" in made.pop()
    assert planning.study.pretrain(planning.CONFIG, "", tmp_path, 0) == ()
    assert planning.study.pretrain_video(planning.CONFIG, tmp_path, 0) == () and not made


def test_choice_measures_error_and_spread_of_proposals(planning, tmp_path, monkeypatch):
    offsets = np.linspace(-0.7, 0.7, 8)

    def plan(objective, params, normalizers, observation, key):
        assert objective.planning.proposals == 8
        e = len(observation["proprio"])
        proposals = jnp.broadcast_to(offsets[None, :, None, None], (e, 8, 8, 4))
        scores = jnp.broadcast_to(offsets**2, (e, 8))
        return Plan(proposals[:, 0], scores, None, None, proposals)

    def load(run):
        config = configs.base_config()
        config.data.instruction_length, config.eval.tasks = 12, ("reach_red",)
        same = Normalizer(jnp.zeros(4), jnp.ones(4), jnp.ones(4))
        return trained.Policy(tiny.objective(), {}, {"actions": same}), config, 7

    monkeypatch.setattr(trained, "load", load)
    monkeypatch.setattr("wamjax.wam.cosmos_policy.planning.plan", plan)
    everything = planning.choice(tmp_path)
    assert everything.keys() == planning.ENDS.keys()
    found = everything["as it acts"]
    assert found["spread"] == pytest.approx(np.std(offsets), abs=1e-4)
    assert found["score"] == pytest.approx(np.mean(offsets**2), abs=1e-4)
    assert found["score_spread"] == pytest.approx(np.std(offsets**2), abs=1e-4)
    assert 0 < found["best"] < found["error"] < 2 and -1 <= found["agreement"] <= 1
    monkeypatch.delattr("wamjax.wam.cosmos_policy.planning.plan")  # measured results stay
    assert planning.choice(tmp_path) == everything


def test_judges_compares_values_with_outcomes_of_plans(planning, tmp_path, monkeypatch):
    """Both judge plans with one proposal; only plans made before the end count."""
    judged = []

    def load(run, mode=None, planner=None):
        judged.append((mode, planner))
        return trained.Policy(tiny.objective(), {}, {}, mode), configs.base_config(), 7

    def watch(policy, config, episodes):
        how = policy.objective.planning
        assert (how.proposals, how.futures, how.values, episodes) == (1, 1, 1, 10)
        value = np.array([[0.1, 0.9], [0.3, 0.7 if judged[-1][1] else 0.0]])
        open_ = np.array([[True, False], [True, True]])
        empty = np.zeros((2, 2, 1, 1, 3), np.uint8)
        achieved = np.array([[0.2, 0.0], [0.6, 1.0]])
        return foresight.Plans(value, achieved, open_, None, empty, None, empty)

    monkeypatch.setattr(trained, "load", load)
    monkeypatch.setattr(foresight, "watch", watch)
    found = planning.judges(tmp_path, tmp_path / "planner-0")
    assert judged == [("plan", None), ("plan", tmp_path / "planner-0")]
    assert [f["plans"] for f in found.values()] == [3, 3] and "bins" not in found["own values"]
    assert found["fine-tuned planner"]["correlation"] > 0.9 > found["own values"]["correlation"]
    assert found["fine-tuned planner"]["predicted"] == pytest.approx((0.1 + 0.3 + 0.7) / 3)
    assert planning.judges(tmp_path, tmp_path) == found and len(judged) == 2
