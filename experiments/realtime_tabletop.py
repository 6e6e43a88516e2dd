"""Acting while the policy computes: which way of joining chunks tolerates a delay?

    python experiments/realtime_tabletop.py --workdir=runs/realtime
    python experiments/realtime_tabletop.py --workdir=runs/realtime --seeds=0 --delays=0,3,6
    python experiments/realtime_tabletop.py --workdir=runs/realtime --table_only

Trains `configs/realtime_tabletop.py` with and without given first actions and lets both reach for
and pick up a block on a turning table, with a delay of 0 to 6 control steps between an observation
and its plan. The ways of joining are: standing still meanwhile, switching, blending and ensembling
plans, and planning on from the actions executed meanwhile, for which only one of the two was
trained. The next observation is made once the last plan has arrived, but at the earliest two steps
after the last observation. The delay is counted in steps, so the machine does not matter. Writes
table.md and table.json: success and mean jerk (`wamjax.envs.joins.jerk`), and how often the same
actions succeed in another scene. Can be resumed, between runs and rows.

On two CPU cores: 1 to 2 s for a training step, and half a minute for a cell of the table. For one
core, a quarter of that:

    python experiments/realtime_tabletop.py --workdir=runs/realtime --kinds=prefix \\
        --arg=variant=no_cotrain,small --episodes=300
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import study
from absl import flags

from wamjax import cli
from wamjax.envs.joins import WAYS
from wamjax.viz import intervals

CONFIG = pathlib.Path(__file__).parent / "configs" / "realtime_tabletop.py"
KINDS = {"prefix": "prefix=6", "plain": "prefix=0"}  # kind -> config argument
MIXES = ("blend", "ensemble")  # without a delay the other ways are identical


def ways() -> dict[str, dict]:
    """Returns "WAY, DELAY" -> how to act, for `study.measure`."""
    mixes = [way for way in flags.FLAGS.joins if way in MIXES]
    return {
        f"{way}, {delay}": dict(join=way, delay=delay, execute=max(flags.FLAGS.execute, delay))
        for delay in map(int, flags.FLAGS.delays)
        for way in (flags.FLAGS.joins if delay else ["sync", *mixes])
    }


def measure(run: pathlib.Path) -> None:
    """Measures every way of joining under every delay."""
    from wamjax.runs import trained

    def ready(how: dict):
        policy, config, step = trained.load(run)
        config.eval.join, config.eval.delay = how["join"], how["delay"]
        # The blind replay is measured only once.
        config.eval.blind = (how["join"], how["delay"]) == ("sync", 0)
        config.eval.batch_size = flags.FLAGS.episodes
        if how["join"] == "prefix" and not policy.prefix_max:
            objective = dataclasses.replace(policy.objective, prefix_max=how["delay"])
            policy = dataclasses.replace(policy, objective=objective)
        return policy, config, step

    study.measure(run, ways(), ready, latency=False)


def table(workdir: pathlib.Path) -> str:
    """Collects all cells so far; writes table.json and table.md; returns the table."""
    cells: dict[tuple[str, str], dict[int, list[dict]]] = {}  # (kind, way) -> delay -> seeds
    for kind in KINDS:
        for path in sorted(workdir.glob(f"{kind}-[0-9]*")):
            rows = study.rows(path)
            alike = {name.split(", ")[0] for name in rows} - {*MIXES}
            for name, found in rows.items():
                way, delay = name.split(", ")
                for row in sorted(alike) if name == "sync, 0" else [way]:
                    cells.setdefault((kind, row), {}).setdefault(int(delay), []).append(found)
    if not cells:
        return "no run has been measured yet"
    delays = sorted({delay for row in cells.values() for delay in row})
    lines = []
    for what, title in (("success_rate", "success %"), ("jerk", "mean jerk")):
        heads = "trained", "joined by", *[f"{title}, delay {d}" for d in delays]
        lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for (kind, way), row in cells.items():
            values = [_cell(row[d], what) if d in row else "" for d in delays]
            lines.append("| " + " | ".join([kind, way, *values]) + " |")
        lines.append("")
    some = next(iter(next(iter(cells.values())).values()))
    seeds = max(len(found) for row in cells.values() for found in row.values())
    episodes, steps = some[0]["episodes"], some[0]["steps"]
    lines.append(f"{episodes} episodes a cell and seed, {seeds} seed(s), {steps} training steps; "
                 "95 % intervals: t over seeds, Wilson of one")  # fmt: skip
    for kind in KINDS:
        found = cells.get((kind, "sync"), {}).get(0, ())
        if blind := [row["blind_success_rate"] for row in found if "blind_success_rate" in row]:
            lines.append(f"{kind}: the same actions in another scene, without a delay, "
                         f"{study.interval(blind, episodes).percent()} %")  # fmt: skip
    text = "\n".join(lines)
    (workdir / "table.md").write_text(text + "\n")
    rows = {f"{kind}: {way}": row for (kind, way), row in cells.items()}
    (workdir / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    return text


def _cell(found: list[dict], what: str) -> str:
    values = [row[what] for row in found]
    if what == "success_rate":
        return study.interval(values, found[0]["episodes"]).percent()
    if len(values) == 1:
        return f"{values[0]:.3f}"
    mean = intervals.student_t(values)
    return f"{mean.mean:.3f} [{mean.low:.3f}, {mean.high:.3f}]"


def define_flags() -> None:
    """Defines the flags; not on import, since the studies share flag names."""
    study.define_flags("runs/realtime", KINDS, "kinds", "0,1,2")
    flags.DEFINE_integer("episodes", 256, "episodes for each cell, over both tasks")
    flags.DEFINE_integer("execute", 2, "control steps between observations; never fewer than the "
                         "delay, so that one plan is made at a time", lower_bound=1)  # fmt: skip
    flags.DEFINE_list("joins", list(WAYS), "ways to join chunks")
    flags.DEFINE_list("delays", "0,1,2,3,4,5,6", "control steps from an observation to its plan")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""

    def each(kind: str, seed: str, run: pathlib.Path) -> None:
        study.train(CONFIG, KINDS[kind], seed, run, "--config.eval.episodes=0")
        measure(run)

    study.run(argv, "kinds", each, table)


if __name__ == "__main__":
    cli.run(main, define_flags)
