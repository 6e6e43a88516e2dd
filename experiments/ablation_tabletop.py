"""The decisive ablation on the embedded world: what do co-training and imagining buy?

    python experiments/ablation_tabletop.py --workdir=runs/ablation
    python experiments/ablation_tabletop.py --workdir=runs/ablation --arg=labelled=64
    python experiments/ablation_tabletop.py --workdir=runs/ablation --table_only

Trains every variant on the same data and budget over several seeds, from one video model that was
trained first, as the published variants start from one; rolls each out in distribution and under
every shift of the world, and prints the article's table: success and latency for each variant, with
95 % t intervals over seeds, and the difference to `fast`, seed by seed. On one CPU core: 7 minutes
for the video model, 2 to 5 for a training of 800 steps, and 1 to 4 to measure it in 96 episodes.
The whole is resumable, between runs and within each.
"""

from __future__ import annotations

import json
import pathlib

import study
from absl import app, flags

VARIANTS = ("fast", "joint", "idm", "no_cotrain", "optional_idm")
CONFIG = pathlib.Path(__file__).parent / "configs" / "fast_wam_tabletop.py"


def measure(workdir: pathlib.Path) -> dict:
    """Success under every shift and latency, for each way the trained variant can act."""
    from wamjax import evaluate
    from wamjax.envs import tabletop
    from wamjax.wam.programs import MODES

    path = workdir / "shifts.json"
    if path.exists():
        return json.loads(path.read_text())
    result = {}
    policy, config, _ = evaluate.load(workdir)
    for mode in MODES[config.objective.variant]:
        policy, config, step = evaluate.load(workdir, mode=mode)
        config.eval.episodes, config.eval.execute = flags.FLAGS.episodes, flags.FLAGS.execute
        rates = {
            name: evaluate.roll_out(policy, config, shift)
            for name, shift in tabletop.SHIFTS.items()
        }
        latency = evaluate.latency(policy, config)
        result[mode] = {"step": step, "shifts": rates, "latency_ms": latency}
    path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def table(workdir: pathlib.Path) -> str:
    """Collects all finished runs; writes table.json, table.md and a picture; returns the table."""
    from wamjax.viz import plots

    rows: dict[str, dict[str, dict[str, float]]] = {}  # row -> shift -> seed -> success
    latencies: dict[str, list[float]] = {}
    for path in sorted(workdir.glob("*-[0-9]*/shifts.json")):
        variant, seed = path.parent.name.rsplit("-", 1)
        for mode, found in json.loads(path.read_text()).items():
            name = f"{variant} ({mode})" if variant == "optional_idm" else variant
            latencies.setdefault(name, []).append(found["latency_ms"]["p50"])
            for shift, rates in found["shifts"].items():
                rows.setdefault(name, {}).setdefault(shift, {})[seed] = rates["success_rate"]
                episodes = rates["episodes"]
    if not rows:
        return "no run has been measured yet"
    shifts = list(next(iter(rows.values())))
    head = "variant", "latency p50 ms", *shifts, "mean", "mean against fast"
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    overall = {
        name: {seed: sum(row[s][seed] for s in shifts) / len(shifts) for seed in row[shifts[0]]}
        for name, row in rows.items()
    }
    for name, row in rows.items():
        columns = [(row[s], episodes) for s in shifts]
        columns.append((overall[name], episodes * len(shifts)))
        cells = [study.interval(list(x.values()), n).percent() for x, n in columns]
        paired = study.by_seed(overall[name], overall.get("fast", {})) if name != "fast" else "-"
        lines.append(
            f"| {name} | {min(latencies[name]):.1f} | " + " | ".join([*cells, paired]) + " |"
        )
    seeds = {len(x) for row in rows.values() for x in row.values()}
    lines.append(f"\nsuccess in % of {episodes} episodes a cell and seed, mean over "
                 f"{sorted(seeds)} seeds with 95 % t interval; a single seed has the Wilson "
                 "interval of its episodes; differences in points, over seeds")  # fmt: skip
    text = "\n".join(lines)
    rates = {name: {s: list(x.values()) for s, x in row.items()} for name, row in rows.items()}
    (workdir / "table.md").write_text(text + "\n")
    (workdir / "table.json").write_text(json.dumps({"rows": rates, "latency": latencies}, indent=2))
    latency = {name: min(values) for name, values in latencies.items()}
    plots.ablation(rates, workdir / "ablation.png", latency)
    return text


def define_flags() -> None:
    """Not on import: the studies have flags of the same names."""
    study.define_flags("runs/ablation", VARIANTS, "variants", "0,1,2")
    flags.DEFINE_integer("episodes", 192, "episodes for each shift, over all tasks")
    flags.DEFINE_integer("execute", 4, "actions of each plan that are executed")
    flags.DEFINE_integer("pretraining", 2000, "steps of the video model all start from; 0 = none")


def main(argv: list[str]) -> None:
    """Entry point for absl."""

    def each(variant: str, seed: str, run: pathlib.Path) -> None:
        start = study.pretrain_video(CONFIG, run.with_name("video"), flags.FLAGS.pretraining)
        study.train(CONFIG, f"variant={variant}", seed, run, *start, "--config.eval.episodes=0")
        measure(run)

    study.run(argv, "variants", each, table)


if __name__ == "__main__":
    define_flags()
    app.run(main)
