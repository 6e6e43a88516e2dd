"""The decisive ablation on the embedded world: what do co-training and imagining buy?

    python experiments/ablation_tabletop.py --workdir=runs/ablation
    python experiments/ablation_tabletop.py --workdir=runs/ablation --arg=labelled=64
    python experiments/ablation_tabletop.py --workdir=runs/ablation --table_only

Trains every variant on the same data and budget over several seeds, rolls each out in distribution
and under every shift of the world, and prints the article's table: success and latency for each
variant, with 95 % t intervals over seeds. At the default budget of 600 steps a training takes
two to five minutes on two quiet cores. The whole is resumable, between runs and within each.
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
        config.eval.episodes = flags.FLAGS.episodes
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

    rows: dict[str, dict[str, list[float]]] = {}
    latencies: dict[str, list[float]] = {}
    for path in sorted(workdir.glob("*/shifts.json")):
        variant = path.parent.name.rsplit("-", 1)[0]
        for mode, found in json.loads(path.read_text()).items():
            name = f"{variant} ({mode})" if variant == "optional_idm" else variant
            latencies.setdefault(name, []).append(found["latency_ms"]["p50"])
            for shift, rates in found["shifts"].items():
                rows.setdefault(name, {}).setdefault(shift, []).append(rates["success_rate"])
                episodes = rates["episodes"]
    if not rows:
        return "no run has been measured yet"
    shifts = list(next(iter(rows.values())))
    lines = ["| variant | latency p50 ms | " + " | ".join(shifts) + " |",
             "|---|---|" + "---|" * len(shifts)]  # fmt: skip
    for name, row in rows.items():
        cells = [study.interval(row[s], episodes).percent() for s in shifts]
        lines.append(f"| {name} | {min(latencies[name]):.1f} | " + " | ".join(cells) + " |")
    seeds = {len(v) for row in rows.values() for v in row.values()}
    lines.append(f"\nsuccess in %, mean over {sorted(seeds)} seeds with 95 % t interval; "
                 "a single seed has the Wilson interval of its episodes")  # fmt: skip
    text = "\n".join(lines)
    (workdir / "table.md").write_text(text + "\n")
    (workdir / "table.json").write_text(json.dumps({"rows": rows, "latency": latencies}, indent=2))
    latency = {name: min(values) for name, values in latencies.items()}
    plots.ablation(rows, workdir / "ablation.png", latency)
    return text


def define_flags() -> None:
    """Not on import: the studies have flags of the same names."""
    study.define_flags("runs/ablation", VARIANTS, "variants", "0,1,2")
    flags.DEFINE_integer("episodes", 192, "episodes for each shift, over all tasks")


def main(argv: list[str]) -> None:
    """Entry point for absl."""

    def each(variant: str, seed: str, run: pathlib.Path) -> None:
        study.train(CONFIG, f"variant={variant}", seed, run, "--config.eval.episodes=0")
        measure(run)

    study.run(argv, "variants", each, table)


if __name__ == "__main__":
    define_flags()
    app.run(main)
