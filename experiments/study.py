"""What the studies of this folder share: trainings in processes of their own, one table at the end.

A study trains one config in several kinds over several seeds, each in ``WORKDIR/KIND-SEED``,
measures every run when it is done, and prints the table of all runs so far. It can be stopped at
any point and started again.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterable

from absl import app, flags


def define_flags(workdir: str, kinds: Iterable[str], name: str, seeds: str = "0") -> None:
    """The flags of every study; not on import, since studies may be imported together.

    Args:
      workdir: default folder.
      kinds, name: what is compared, and the flag that selects some of it.
      seeds: default ones.
    """
    flags.DEFINE_string("workdir", workdir, "folder of all runs and of the table")
    flags.DEFINE_list(name, list(kinds), f"{name} to train")
    flags.DEFINE_list("seeds", seeds, "training seeds")
    flags.DEFINE_string("arg", "", "further config arguments: steps=N, debug, ...")
    flags.DEFINE_bool("table_only", False, "print what has been measured so far")


def train(config: pathlib.Path, kind: str, seed: str, run: pathlib.Path, *options: str) -> None:
    """One training; a run that is done returns at once.

    Args:
      kind: config argument that says what is compared, as ``variant=idm``.
      options: further flags of `wamjax.train`.
    """
    arg = ",".join(filter(None, [kind, flags.FLAGS.arg]))
    fixed = f"--config={config}:{arg}", f"--config.seed={seed}", f"--workdir={run}"
    subprocess.run([sys.executable, "-m", "wamjax.train", *fixed, *options], check=True)


def run(
    argv: list[str],
    name: str,
    each: Callable[[str, str, pathlib.Path], None],
    table: Callable[[pathlib.Path], str],
) -> None:
    """The whole study.

    Args:
      name: of the flag with the kinds.
      each: trains and measures ``(kind, seed, folder of the run)``.
      table: what has been measured so far, as text.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; did you forget a '--'?")
    asked = flags.FLAGS
    workdir = pathlib.Path(asked.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    # Seeds outside, kinds inside: an interrupted study has complete comparisons.
    for seed in asked.seeds if not asked.table_only else ():
        for kind in asked[name].value:
            each(kind, seed, workdir / f"{kind}-{seed}")
            print(table(workdir), flush=True)
    print(table(workdir))


def interval(rates: list[float], episodes: int):
    """A success rate and its 95 % interval: t over seeds, Wilson's over the episodes of one."""
    from wamjax.viz import intervals

    if len(rates) > 1:
        return intervals.student_t(rates)
    return intervals.wilson(round(rates[0] * episodes), episodes)


def bars(path: pathlib.Path, rates: dict, latencies: dict[str, float], colours: list[int]) -> None:
    """A bar for every row, with its interval (`interval`) and the latency of a plan in ms."""
    from wamjax.viz import figures

    made = figures.figure(8, 1.2 + 0.3 * len(rates))
    axes = made.add_subplot()
    for y, (name, rate) in enumerate(rates.items()):
        arms = [[rate.mean - max(rate.low, 0)], [min(rate.high, 1) - rate.mean]]
        colour = figures.COLORS[colours[y]]
        axes.barh(y, rate.mean, color=colour, alpha=0.85, height=0.65)
        axes.errorbar(rate.mean, y, xerr=arms, color="#222222", capsize=3, lw=1)
        axes.text(1.01, y, f"{latencies[name]:.0f} ms", va="center", fontsize=8)
    axes.set_yticks(range(len(rates)), list(rates))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="success rate (95 % interval), latency of one plan")
    axes.xaxis.set_major_formatter("{x:.0%}")
    figures.plain(axes)
    figures.write(made, path)
