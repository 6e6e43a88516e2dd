"""Compares Cosmos Policy with the variants of Fast-WAM: same tasks, demonstrations and FLOPs.

    python experiments/compare_tabletop.py --workdir=runs/compare
    python experiments/compare_tabletop.py --workdir=runs/compare --kinds=fast,joint --tflop=10
    python experiments/compare_tabletop.py --workdir=runs/compare --table_only

Trains the objective of `configs/cosmos_policy_tabletop.py` and every variant of
`configs/quickstart.py` on 1,500 demonstrations of three tasks, in batches of 16, each for as many
steps as --tflop of forward and backward passes allow, and lets each act in all its modes. As
published, each starts from a video model: --world_share of the budget goes into one model per
method, trained once without an action loss, from which all seeds and variants start. (Half of
Cosmos Policy's batch are episodes of a noisy expert, since its value function learns from failures.
It does not imitate them.) --shifts=lighting,colours adds these shifts. Writes table.md, table.json
and compare.png. Everything can be resumed, between runs and within each. At the default budget, on
one CPU core: 20 minutes for each of the two models, 5 for a policy and half a minute to five for
each way of acting.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import runpy

import jax
import study
from absl import flags

from wamjax import cli

CONFIGS = pathlib.Path(__file__).parent / "configs"
VARIANTS = "fast", "joint", "idm", "no_cotrain", "optional_idm"
KINDS = "cosmos_policy", *VARIANTS
BATCH = 16


def source(kind: str) -> tuple[pathlib.Path, str]:
    """Returns the config file of a kind and its argument."""
    if kind in VARIANTS:
        return CONFIGS / "quickstart.py", f"variant={kind}"
    return CONFIGS / "cosmos_policy_tabletop.py", ""


def ways(kind: str) -> dict[str, dict]:
    """Returns row -> mode and, for Cosmos Policy, the changed fields of `CosmosPolicy` and
    `Planning`."""
    if kind in VARIANTS:
        return study.modes(kind)
    plan = {"proposals": 4, "futures": 1, "values": 1, "future_steps": 2, "value_steps": 2}
    return {
        "cosmos_policy, 5 calls": {"mode": "direct", "steps": 5},
        "cosmos_policy, 1 call": {"mode": "direct", "steps": 1},
        "cosmos_policy, plan of 4": {"mode": "plan", "plan": plan},
    }


def steps(kind: str) -> tuple[int, int]:
    """Returns (training steps within the budget, FLOPs per step); collects the data if
    necessary."""
    from wamjax.data import pipeline
    from wamjax.training.sharding import make_mesh
    from wamjax.training.step import model_flops
    from wamjax.wam import build

    path, arg = source(kind)
    config = runpy.run_path(str(path))["get_config"](",".join(filter(None, [arg, flags.FLAGS.arg])))
    config.data.batch_size = BATCH
    objective = build(config, pipeline.spec_of(config))
    params = jax.eval_shape(objective.init, jax.random.key(0))
    with jax.set_mesh(make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])):
        each = model_flops(objective, config, params, objective.batch_spec(BATCH))
    return max(round(flags.FLAGS.tflop * 1e12 / each), 1), each


def measure(kind: str, run: pathlib.Path) -> None:
    """Measures every way of acting, without a shift and under the chosen shifts."""
    from wamjax.runs import trained

    def ready(how: dict):
        policy, config, step = trained.load(run, mode=how.pop("mode"))
        if plan := how.pop("plan", None):
            how["planning"] = dataclasses.replace(policy.objective.planning, **plan)
        objective = dataclasses.replace(policy.objective, **how)
        return dataclasses.replace(policy, objective=objective), config, step

    for shift in ("none", *flags.FLAGS.shifts):
        study.measure(run, ways(kind), ready, shift)


def table(workdir: pathlib.Path) -> str:
    """Collects all rows so far; writes table.json, table.md and a picture; returns the table."""
    from wamjax.envs import tabletop

    measured: dict[str, dict[str, list[dict]]] = {s: {} for s in tabletop.SHIFTS}
    for kind in KINDS:
        for run in sorted(workdir.glob(f"{kind}-[0-9]*")):
            for shift, rows in measured.items():
                for name, row in study.rows(run, shift).items():
                    rows.setdefault(name, []).append(row)
    baseline = measured.pop("none")
    if not baseline:
        return "no run has been measured yet"
    shifted = {shift: rows for shift, rows in measured.items() if rows}
    tasks = list(next(iter(baseline.values()))[0]["per_task"])
    head = "policy", "parameters", "steps", "success %", *tasks, *shifted, "latency p50 ms", "seeds"
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    rates, latencies = {}, {}
    for name, rows in baseline.items():
        rates[name] = study.interval([r["success_rate"] for r in rows], rows[0]["episodes"])
        latencies[name] = min(r["latency_ms"]["p50"] for r in rows)
        each = [[r["per_task"][t]["success_rate"] for r in rows] for t in tasks]
        each += [[r["success_rate"] for r in x.get(name, ())] for x in shifted.values()]
        cells = (
            name, f"{rows[0]['parameters'] / 1e6:.2f} M", str(rows[0]["steps"]),
            rates[name].percent(), *(f"{100 * sum(e) / len(e):.0f}" if e else "-" for e in each),
            f"{latencies[name]:.1f}", str(len(rows)),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines.append(f"\n{rows[0]['episodes']} episodes a row and seed, and under each shift; 95 % "
                 "intervals: t over seeds, Wilson of one")  # fmt: skip
    text = "\n".join(lines)
    (workdir / "table.md").write_text(text + "\n")
    (workdir / "table.json").write_text(json.dumps({"none": baseline} | shifted, indent=2) + "\n")
    colours = [name.startswith("cosmos") for name in rates]
    study.bars(workdir / "compare.png", rates, latencies, colours)
    return text


def define_flags() -> None:
    """Defines the flags; not on import, since the studies share flag names."""
    study.define_flags("runs/compare", KINDS, "kinds", "0,1,2")
    flags.DEFINE_float("tflop", 50.6, "FLOPs of a training, in 10^12")
    flags.DEFINE_float(
        "world_share", 25 / 32, "of the budget, for the video model that a policy starts from",
        lower_bound=0.01, upper_bound=0.99,
    )  # fmt: skip
    flags.DEFINE_integer("episodes", 192, "episodes for each row, over all tasks")
    flags.DEFINE_list("shifts", [], "also measured under these of tabletop.SHIFTS")
    flags.DEFINE_integer("execute", 4, "actions of each plan that are executed")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""

    def each(kind: str, seed: str, run: pathlib.Path) -> None:
        path, arg = source(kind)
        share, fixed = flags.FLAGS.world_share, (f"--config.data.batch_size={BATCH}",)
        if kind in VARIANTS:
            first = round(share * steps("fast")[0])
            start = study.pretrain_video(path, run.with_name("world-fast_wam"), first, *fixed)
        else:
            world, first = run.with_name("world-cosmos_policy"), round(share * steps(kind)[0])
            start = study.pretrain(path, "action_weight=0", world, first, *fixed)
        count = max(round((1 - share) * steps(kind)[0]), 1)
        fixed += "--config.eval.episodes=0", f"--config.total_steps={count}"
        study.train(path, arg, seed, run, *start, *fixed)
        measure(kind, run)

    study.run(argv, "kinds", each, table)


if __name__ == "__main__":
    cli.run(main, define_flags)
