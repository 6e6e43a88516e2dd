"""What does video alone teach? Three tasks that are seen in videos, and whose actions never are.

    python experiments/video_only_tabletop.py --workdir=runs/video-only --arg=small
    python experiments/video_only_tabletop.py --workdir=runs/video-only --table_only

Trains variants of Fast-WAM from nothing on actions of five tasks and videos of eight, and measures
success on both groups of tasks. The instructions of the other three recombine words of the five, so
a policy may do them without having seen them: `no_cotrain` has seen no videos, and `fast, five`
those of the five tasks only. What exceeds them is what the videos of the three tasks taught.

Kinds: `no_cotrain`, `fast, five`, `fast`, `joint`, `idm`, `optional_idm` (measured acting directly
and imagining). Writes table.md. Everything can be resumed, between runs and within each.
"""

from __future__ import annotations

import json
import pathlib

import study
from absl import flags

from wamjax import cli

CONFIG = pathlib.Path(__file__).parent / "configs" / "recombined_tabletop.py"
KINDS = {
    "no_cotrain": "variant=no_cotrain,videos=0",
    "fast, five": "variant=fast,known",
    "fast": "variant=fast",
    "joint": "variant=joint",
    "idm": "variant=idm",
    "optional_idm": "variant=optional_idm",
}


def measure(kind: str, run: pathlib.Path) -> None:
    """Measures every way in which a trained kind can act, on all eight tasks."""
    from wamjax.envs.tabletop.tasks import LABELLED, VIDEO_ONLY
    from wamjax.runs import trained

    def ready(how):
        policy, config, step = trained.load(run, **how)
        config.eval.tasks, config.eval.blind = (*LABELLED, *VIDEO_ONLY), False
        return policy, config, step

    study.measure(run, study.modes(kind.partition(",")[0]), ready)


def table(workdir: pathlib.Path) -> str:
    """Collects all rows so far, writes table.md, and returns the table."""
    from wamjax.envs.tabletop.tasks import LABELLED, VIDEO_ONLY

    groups = {"tasks with actions": LABELLED, "video only": VIDEO_ONLY}
    columns = groups | {task: (task,) for task in VIDEO_ONLY}
    rates: dict[str, dict[str, dict[str, float]]] = {}  # row -> column -> seed -> success
    episodes = 0
    for kind in KINDS:
        for run in sorted(workdir.glob(f"{_folder(kind)}-[0-9]*")):
            for way, row in study.rows(run).items():
                name = kind + way[len(kind.partition(",")[0]) :]
                episodes, seed = row["episodes"], run.name.rsplit("-", 1)[1]
                for column, tasks in columns.items():
                    each = [row["per_task"][task]["success_rate"] for task in tasks]
                    cell = rates.setdefault(name, {}).setdefault(column, {})
                    cell[seed] = sum(each) / len(each)
    if not rates:
        return "no run has been measured yet"
    against = [f"video only against {base}" for base in ("no_cotrain", "fast, five")]
    head = "policy", *columns, *against
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    of_each = episodes // len(groups["tasks with actions"] + groups["video only"])
    for name, row in rates.items():
        cells = [
            study.interval(list(row[column].values()), of_each * len(tasks)).percent()
            for column, tasks in columns.items()
        ]
        paired = [
            "-" if name == base else study.by_seed(
                row["video only"], rates.get(base, {}).get("video only", {})
            )
            for base in ("no_cotrain", "fast, five")
        ]  # fmt: skip
        lines.append("| " + " | ".join([name, *cells, *paired]) + " |")
    seeds = {len(row["video only"]) for row in rates.values()}
    lines.append(f"\nsuccess in %, {of_each} episodes a task and seed, mean over {sorted(seeds)} "
                 "seeds with 95 % t interval; a single seed has the Wilson interval of its "
                 "episodes; differences in points, over seeds")  # fmt: skip
    text = "\n".join(lines)
    (workdir / "table.md").write_text(text + "\n")
    (workdir / "table.json").write_text(json.dumps(rates, indent=2) + "\n")
    return text


def _folder(kind: str) -> str:
    return kind.replace(", ", "_")


def define_flags() -> None:
    """Defines the flags; not on import, since the studies share flag names."""
    study.define_flags("runs/video-only", map(_folder, KINDS), "kinds", "0,1,2")
    flags.DEFINE_integer("episodes", 1600, "episodes, over all eight tasks")
    flags.DEFINE_integer("execute", 4, "actions of each plan that are executed")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    names = {_folder(kind): kind for kind in KINDS}

    def each(folder: str, seed: str, run: pathlib.Path) -> None:
        kind = names[folder]
        study.train(CONFIG, KINDS[kind], seed, run, "--config.eval.episodes=0")
        measure(kind, run)

    study.run(argv, "kinds", each, table)


if __name__ == "__main__":
    cli.run(main, define_flags)
