"""Cosmos Policy on the embedded world: what do planning and the parts of its training contribute?

    python experiments/planning_tabletop.py --workdir=runs/planning
    python experiments/planning_tabletop.py --workdir=runs/planning --kinds=base --seeds=0
    python experiments/planning_tabletop.py --workdir=runs/planning --table_only

Trains `configs/cosmos_policy_tabletop.py` unchanged and with one change each (no auxiliary losses,
noise without its uniform part, prefix visibility), all from one model of the world that is
trained first, and lets each act directly. The unchanged one is measured further: fewer and more
network calls, the other end of the noise levels, reused keys and values, and planning among
more and more proposals, judged by its own world model and value function and by those fine-tuned on
its rollouts.
The study also reports how different eight proposals are, whether scores know which is better, and
how well values predict the outcome of a plan, before and after fine-tuning. Writes table.md,
table.json and planning.png, and in each run the report of `wamjax.foresight`. Everything can be
resumed, between runs and within each: every row is stored as soon as it is measured.

With --arg=steps=700, on one CPU core: 18 minutes for the model of the world, 7 for a training and
its row, and 25 more if all ways of acting are measured in 96 episodes with --proposals=2,8.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import study
from absl import flags

from wamjax import cli

CONFIG = pathlib.Path(__file__).parent / "configs" / "cosmos_policy_tabletop.py"
KINDS = {  # change -> config argument
    "base": "",
    "no_auxiliary": "auxiliary=False",
    "log_normal": "uniform=0.0",
    "prefix": "visibility=prefix",
}
CALLS = (1, 2, 5, 10)
ENDS = {  # how proposals are sampled, for `choice`: to a mean, or down to a sample
    "as it acts": {},
    "to sigma 0.25, 10 calls": {"sigma_min": 0.25, "steps": 10},
}
DIRECT = "direct, 5 calls"  # as trained and published; the baseline of the others


def ways(kind: str) -> dict[str, dict]:
    """Returns row -> how to act: fields of `CosmosPolicy` and, under "plan", of `Planning`; "mode"
    and "planner" go to `trained.load`."""
    if kind == "prefix":  # exact where `frozen` is approximate
        return {"direct": {}, "frozen": {"mode": "frozen"}}
    if kind != "base":
        return {"direct": {}}
    rows = {f"direct, {n} calls": {"steps": n} for n in CALLS}
    rows["direct, to sigma 0.002"] = {"sigma_min": 0.002}
    rows["frozen"] = {"mode": "frozen"}
    for planner in (False, True):
        for n in map(int, flags.FLAGS.proposals):
            name = f"plan, {n} proposals, " + ("fine-tuned planner" if planner else "own values")
            rows[name] = {"mode": "plan", "planner": planner, "plan": {"proposals": n}}
    return rows


def measure(kind: str, run: pathlib.Path, tuned: pathlib.Path) -> None:
    """Measures every way of acting; `study.rows` reads the results."""
    from wamjax.runs import trained

    def ready(how: dict):
        planner = tuned if how.pop("planner", False) else None
        policy, config, step = trained.load(run, mode=how.pop("mode", None), planner=planner)
        return dataclasses.replace(policy, objective=acting(policy.objective, how)), config, step

    study.measure(run, ways(kind), ready)


def choice(run: pathlib.Path) -> dict[str, dict[str, float]]:
    """Measures what planning among eight can choose from, in the states that direct acting visits.

    Errors are those of the next action's motion against the expert's, averaged over dimensions.

    Returns:
      Each of `ENDS` -> "error" of a proposal, "best" of the best of eight, "spread" (standard
      deviation) among the eight, "score" and "score_spread" alike of their scores, "agreement":
      correlation of score and (negative) error among the eight, mean over plans.
    """
    from wamjax.envs import tabletop
    from wamjax.envs.tabletop.expert import intention
    from wamjax.runs import closed_loop, trained

    path = run / "choice.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in [n for n in ENDS if n not in found]:
        policy, config, _ = trained.load(run)
        objective = acting(policy.objective, ENDS[name] | {"plan": {"proposals": 8}})
        policy = dataclasses.replace(policy, objective=objective)
        names = list(np.resize(closed_loop.task_names(config), 48))
        recording = tabletop.rollout(
            jax.tree_util.Partial(closed_loop.seeing(_offer), policy),
            closed_loop.episode_keys(config, "evaluate", np.arange(48)),
            np.array([tabletop.task_id(name) for name in names], np.int32),
            tabletop.Shift.none(),
            closed_loop.told(config, policy, [tabletop.instruction(name) for name in names]),
            max_steps=16,
            execute=flags.FLAGS.execute,
        )
        motion, score = (np.asarray(x) for x in recording.extras)  # (plans, e, n, 3), (plans, e, n)
        at = jax.tree.map(
            lambda x: np.asarray(x)[:, : 16 : flags.FLAGS.execute].swapaxes(0, 1), recording.states
        )
        intended = np.asarray(jax.jit(jax.vmap(jax.vmap(intention)))(at))[:, :, None, :3]
        error = np.abs(np.clip(motion, -1, 1) - intended).mean(axis=-1).reshape(-1, 8)
        score = score.reshape(-1, 8)
        pairs = zip(score, error, strict=True)
        about = {
            "error": error.mean(),
            "best": error.min(axis=1).mean(),
            "spread": motion.std(axis=2).mean(),
            "score": score.mean(),
            "score_spread": score.std(axis=1).mean(),
            "agreement": np.mean([np.corrcoef(s, -e)[0, 1] for s, e in pairs if np.std(s) > 0]),
        }
        found[name] = {k: round(float(v), 4) for k, v in about.items()}
        path.write_text(json.dumps(found, indent=2) + "\n")
    return found


def judges(run: pathlib.Path, planner: pathlib.Path) -> dict[str, dict[str, float]]:
    """Measures how well values predict the outcome of a plan, before and after fine-tuning on
    rollouts.

    It uses one proposal, one future and one value, as direct acting does, and whole chunks.

    Returns:
      "own values" and "fine-tuned planner" -> `foresight.calibration` without its bins, and the
      means of "predicted" and "achieved" return.
    """
    from wamjax import foresight
    from wamjax.runs import trained

    path = run / "judges.json"
    if path.exists():
        return json.loads(path.read_text())
    found = {}
    for name, judge in (("own values", None), ("fine-tuned planner", planner)):
        policy, config, _ = trained.load(run, mode="plan", planner=judge)
        objective = acting(policy.objective, {"plan": {"proposals": 1}})
        policy = dataclasses.replace(policy, objective=objective)
        plans = foresight.watch(policy, config, flags.FLAGS.episodes)
        value, achieved = plans.value[plans.open], plans.achieved[plans.open]
        about = foresight.calibration(value, achieved)
        about |= {"predicted": float(value.mean()), "achieved": float(achieved.mean())}
        found[name] = {k: v for k, v in about.items() if k != "bins"}
    path.write_text(json.dumps(found, indent=2) + "\n")
    return found


def _offer(policy, observation, key):
    """Acts by the first proposal and returns the next motion and the scores of all."""
    from wamjax.wam.cosmos_policy.planning import plan

    decision = plan(policy.objective, policy.params, policy.normalizers, observation, key)
    actions = policy.normalizers["actions"].inverse(decision.proposals)
    return actions[:, 0], (actions[:, :, 0, :3], decision.scores)


def acting(objective, how: dict):
    """Returns the objective with other settings for sampling and planning."""
    future_steps, value_steps = map(int, flags.FLAGS.plan_calls)
    plan = dict(futures=1, values=1, future_steps=future_steps, value_steps=value_steps)
    planning = dataclasses.replace(objective.planning, **plan | how.pop("plan", {}))
    return dataclasses.replace(objective, planning=planning, **how)


def tune(run: pathlib.Path, seed: str) -> pathlib.Path:
    """Trains a planner: world model and values, fine-tuned on rollouts of the run's own policy."""
    out, rollouts = run.with_name(run.name.replace("base", "planner")), run / "rollouts"
    settings = flags.FLAGS
    if not rollouts.exists():
        collect = f"--workdir={run}", f"--out={rollouts}", f"--episodes={settings.rollouts}"
        subprocess.run([sys.executable, "-m", "wamjax.rollouts", *collect], check=True)
    arg = f"planner,recorded={rollouts}"
    options = f"--config.init_from.path={run}", f"--config.total_steps={settings.tuning}"
    study.train(CONFIG, arg, seed, out, *options, "--config.eval.episodes=0")
    return out


def table(workdir: pathlib.Path) -> str:
    """Collects all rows so far; writes table.json, table.md and a picture; returns the table."""
    rows: dict[str, list[dict]] = {}
    for kind in KINDS:
        for path in sorted(workdir.glob(f"{kind}-*/ways.json")):
            for name, found in study.rows(path.parent).items():
                row = name if kind == "base" else f"{kind}: {name}"
                rows.setdefault(row, []).append(found | {"run": path.parent.name})
    if not rows:
        return "no run has been measured yet"
    lines = ["| training: acting | success % | against direct, points | latency p50 ms | seeds |",
             "|---|---|---|---|---|"]  # fmt: skip
    rates_of, latencies = {}, {}
    for name, found in rows.items():
        n = found[0]["episodes"]
        rates_of[name] = study.interval([f["success_rate"] for f in found], n)
        latencies[name] = min(f["latency_ms"]["p50"] for f in found)
        paired = against(found, rows.get(DIRECT, ())) if name != DIRECT else "-"
        cells = name, rates_of[name].percent(), paired, f"{latencies[name]:.1f}", str(len(found))
        lines.append("| " + " | ".join(cells) + " |")
    lines.append(f"\n{n} episodes a row and seed; 95 % intervals: t over seeds, Wilson of one; "
                 "differences: over episodes of the same checkpoints, else over seeds")  # fmt: skip
    for file, what in (("choice", "has to choose from"), ("judges", "against achieved returns")):
        for path in sorted(workdir.glob(f"base-*/{file}.json")):
            for name, found in json.loads(path.read_text()).items():
                lines.append(f"\n{path.parent.name}, {name}, {what}: {found}")
    text = "\n".join(lines)
    (workdir / "table.md").write_text(text + "\n")
    (workdir / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    colours = ["plan" in name for name in rates_of]
    study.bars(workdir / "planning.png", rates_of, latencies, colours)
    return text


def against(found: list[dict], direct: list[dict]) -> str:
    """Returns the difference to acting directly, and its interval.

    For the same checkpoints: over paired outcomes of the same episodes. For other ones: seed by
    seed.
    """
    from wamjax.viz.intervals import student_t

    pairs = [(a, b) for a in found for b in direct if a["run"] == b["run"]]
    if not pairs:
        rates = ({f["run"].rsplit("-")[-1]: f["success_rate"] for f in x} for x in (found, direct))
        return study.by_seed(*rates)
    ones = [np.array(list(x["outcomes"]), int) for pair in pairs for x in pair]
    differences = np.concatenate([a - b for a, b in zip(ones[::2], ones[1::2], strict=True)])
    if not differences.any():
        return "0.0"
    return student_t(differences).percent()


def define_flags() -> None:
    """Defines the flags; not on import, since the studies share flag names."""
    study.define_flags("runs/planning", KINDS, "kinds", "0,1,2")
    flags.DEFINE_integer("episodes", 192, "episodes for each row, over all tasks")
    flags.DEFINE_integer("execute", 4, "actions of each plan that are executed")
    flags.DEFINE_list("proposals", "2,4,8", "how many to plan among")
    flags.DEFINE_list("plan_calls", "2,2", "network calls for a future and for a value")
    flags.DEFINE_integer("pretraining", 2500, "steps of the model that all start from; 0 = none")
    flags.DEFINE_integer("rollouts", 300, "episodes of the policy that planners are trained on")
    flags.DEFINE_integer("tuning", 200, "training steps of a planner")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""

    def each(kind: str, seed: str, run: pathlib.Path) -> None:
        from wamjax import foresight

        world = run.parent / "pretrained"
        start = study.pretrain(CONFIG, "action_weight=0", world, flags.FLAGS.pretraining)
        study.train(CONFIG, KINDS[kind], seed, run, *start, "--config.eval.episodes=0")
        tuned = tune(run, seed) if kind == "base" and flags.FLAGS.proposals else run
        measure(kind, run, tuned)
        if kind == "base":
            choice(run)
        if tuned != run:
            judges(run, tuned)
        if not (run / "foresight.json").exists():
            foresight.run(run)

    study.run(argv, "kinds", each, table)


if __name__ == "__main__":
    cli.run(main, define_flags)
