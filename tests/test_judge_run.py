"""Runs all of docs/adaptive.md in miniature, from a policy to one with a judge and a gate."""

import adaptive_tabletop
import jax
import numpy as np
import pytest
from test_configs import get

import wamjax
from wamjax import export_policy, train
from wamjax.data import branches as store
from wamjax.runs import branches, evaluation, trained
from wamjax.training.checkpoint import find

pytestmark = pytest.mark.slow


def grow(run, out, states=16, **ladder):
    policy, config, step = trained.load(run)
    about = {"policy": store.fingerprint(run), "step": step, "mode": None}
    cohort = branches.Cohort(states=states, proposals=8, **ladder)
    statistics = find(run).statistics
    return branches.grow(policy, config, statistics, out, cohort, about, progress=False)


@pytest.mark.parametrize("variant, ladder", [
    ("fast", {}),
    ("ladder", dict(rungs=(1, 2, 3, 8), modes=("direct", "anticipate", "imagine:1", "direct"))),
])  # fmt: skip
def test_branches_a_judge_and_its_ways_to_act(tmp_path, variant, ladder):
    run, out, judged = tmp_path / "choice", tmp_path / "branches", tmp_path / "judge"
    assert train.run(get("choice_tabletop", f"debug,variant={variant}"), run)
    report = grow(run, out, **ladder)
    assert report["states"] == 16 and set(report["headroom"]) == {2, 4, 8}

    # A killed run resumes, with the same result.
    first = store.read(out)[2]
    (out / "part-00001.npz").unlink()
    grow(run, out, **ladder)
    again = store.read(out)[2]
    for key, x in first.items():
        np.testing.assert_array_equal(x, again[key])
    with pytest.raises(ValueError, match=r"other branches, which differ in \['parts', 'states'\]"):
        grow(run, out, states=24, **ladder)

    config = get("judge", f"run={run},branches={out},debug")
    config.eval.episodes = 9  # three of each task
    assert train.run(config, judged)
    policy, asked, _ = trained.load(judged)
    assert policy.objective.rung_modes == ladder.get("modes", ())
    rungs = list(ladder.get("rungs", (1, 4, 8)))
    assert np.isfinite(branches.values_of(policy, first)).all()

    # The policy did not change: it makes the same proposals.
    base, _, _ = trained.load(run)
    observation = trained.observe_example(base, 2)
    keys = jax.vmap(jax.random.key)(np.arange(2))
    np.testing.assert_array_equal(
        jax.jit(lambda p: p.act(observation, keys))(policy),
        jax.jit(lambda p: p.act(observation, keys))(base),
    )
    alone = ladder.get("modes", ())[1:3]
    for mode in (*alone, "plan:4", "adaptive:0"):
        result = evaluation.run(asked, judged, mode=mode)
        assert result["episodes"] == 9
    assert sum(result["rungs"]) == pytest.approx(1) and result["rung_proposals"] == rungs
    assert len(result["rung_ms"]) == len(rungs) and result["mean_ms"] > 0
    assert (judged / "eval_adaptive-0.json").exists()

    found = adaptive_tabletop.gates(policy, out, result["rung_ms"], orders=2)
    assert set(found["curves"]) >= {"fixed", "learned", "oracle", "spread", "random"}
    assert "| oracle |" in adaptive_tabletop.at_equal_effort(found) and found["reliability"]

    export_policy.from_run(judged, tmp_path / "bundle", progress=False)
    acting = wamjax.load_policy(tmp_path / "bundle", mode="adaptive:0.5")
    assert acting.mode == "adaptive:0.5" and acting.with_mode("plan:2").mode == "plan:2"
    seen = acting.example()
    dear, direct = acting.with_mode("adaptive:1e9")(seen, 0), acting.with_mode("direct")(seen, 0)
    np.testing.assert_allclose(dear, direct, atol=1e-5)
    hurried = acting.with_mode("adaptive:0:1e-6")
    np.testing.assert_allclose(hurried(seen, 0), direct, atol=1e-5)
    free = acting.with_mode("adaptive:0")
    hurried = free.plan(seen, 0, budget_ms=1e-6)
    np.testing.assert_allclose(hurried.actions, direct, atol=1e-5)
    assert hurried.rung == 0 and 0 <= free.plan(seen, 0).rung < len(rungs)
    assert acting.with_mode("direct").plan(seen, 0).rung is None
    assert len(free.rung_ms) == len(rungs)

    # These branches are refused for another policy.
    with pytest.raises(ValueError, match="another policy"):
        other = get("judge", f"run={judged},branches={out},debug")
        store.open_branches(other)
