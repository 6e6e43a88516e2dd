"""Shares code among the studies of this folder: trainings in separate processes, one table at the
end.

A study trains one config in several kinds over several seeds, each in ``WORKDIR/KIND-SEED``,
measures every run when it is done, and prints the table of all runs so far. It can be stopped at
any point and started again.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterable

from absl import flags


def define_flags(workdir: str, kinds: Iterable[str], name: str, seeds: str = "0") -> None:
    """Defines the flags of every study; not on import, since studies may be imported together.

    Args:
      workdir: default folder.
      kinds, name: the compared kinds, and the flag that selects some of them.
      seeds: default seeds.
    """
    flags.DEFINE_string("workdir", workdir, "folder of all runs and of the table")
    flags.DEFINE_list(name, list(kinds), f"{name} to train")
    flags.DEFINE_list("seeds", seeds, "training seeds")
    flags.DEFINE_string("arg", "", "further config arguments: steps=N, debug, ...")
    flags.DEFINE_bool("table_only", False, "print what has been measured so far")


def train(config: pathlib.Path, kind: str, seed: str, run: pathlib.Path, *options: str) -> None:
    """Runs one training; a finished run returns at once.

    Args:
      kind: config argument that selects the kind, e.g. ``variant=idm``.
      options: further flags of `wamjax.train`.
    """
    arg = ",".join(filter(None, [kind, flags.FLAGS.arg]))
    fixed = f"--config={config}:{arg}", f"--config.seed={seed}", f"--workdir={run}"
    subprocess.run([sys.executable, "-m", "wamjax.train", *fixed, *options], check=True)


def pretrain(
    config: pathlib.Path, kind: str, run: pathlib.Path, steps: int, *options: str
) -> tuple[str, ...]:
    """Trains a model of the world, without an action loss, that policies start from.

    The published policies start from a video model, too.

    Args:
      kind, options: see `train`.
      steps: training steps; 0 for policies that start from scratch.

    Returns:
      The options of `train` with which a policy starts from it.
    """
    if not steps:
        return ()
    # A separate seed, so that policies of seed 0 do not see the batches of their start again.
    train(config, kind, "100", run, *options, f"--config.total_steps={steps}",
          "--config.eval.episodes=0")  # fmt: skip
    return (f"--config.init_from.path={run}",)


def pretrain_video(
    config: pathlib.Path, run: pathlib.Path, steps: int, *options: str
) -> tuple[str, ...]:
    """Runs `pretrain` for the variants of Fast-WAM: their video expert. Action experts start
    fresh."""
    start = pretrain(
        config, "variant=fast", run, steps, "--config.objective.action_weight=0.0", *options
    )
    fresh = ("action/.*", "blocks/action/.*")
    return (*start, f"--config.init_from.fresh={fresh}") if start else ()


def run(
    argv: list[str],
    name: str,
    each: Callable[[str, str, pathlib.Path], None],
    table: Callable[[pathlib.Path], str],
) -> None:
    """Runs the whole study.

    Args:
      name: name of the flag with the kinds.
      each: trains and measures ``(kind, seed, folder of the run)``.
      table: returns the measurements so far, as text.
    """
    options = flags.FLAGS
    workdir = pathlib.Path(options.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    # Seeds in the outer loop, so that an interrupted study has complete comparisons.
    for seed in options.seeds if not options.table_only else ():
        for kind in options[name].value:
            each(kind, seed, workdir / f"{kind}-{seed}")
            print(table(workdir), flush=True)
    print(table(workdir))


def modes(variant: str) -> dict[str, dict]:
    """Returns row -> mode for every way in which a variant of Fast-WAM can act; for `measure`."""
    from wamjax.wam.fast_wam.uses import MODES

    several = len(MODES[variant]) > 1
    return {f"{variant}, {m}" if several else variant: {"mode": m} for m in MODES[variant]}


def _rows_file(run: pathlib.Path, shift: str) -> pathlib.Path:
    return run / ("ways.json" if shift == "none" else f"ways-{shift}.json")


def rows(run: pathlib.Path, shift: str = "none") -> dict[str, dict]:
    """Returns the measurements of a run so far."""
    path = _rows_file(run, shift)
    return json.loads(path.read_text()) if path.exists() else {}


def measure(
    run: pathlib.Path,
    ways: dict[str, dict],
    ready: Callable,
    shift: str = "none",
    latency: bool = True,
) -> None:
    """Rolls out every way in which a trained policy can act; `rows` reads the results.

    A row holds the result of `runs.closed_loop.roll_out`, the number of parameters, the training
    step and, in the world without a shift, the latency. Existing rows stay, unless the run was
    trained further; each is written as soon as it is measured.

    Args:
      ways: row -> how to act, in `ready`'s format; "execute" overrides the flag.
      ready: how to act (a copy) -> (policy, config, step), as from `runs.trained.load`.
      shift: name of a shift of the world.
      latency: whether to measure the latency.
    """
    from wamjax import tree
    from wamjax.envs.world import open_world, shift_of
    from wamjax.runs import closed_loop, trained

    saved = (run / "checkpoints").glob("[0-9]*")
    newest = max((int(p.name) for p in saved if p.name.isdigit()), default=None)
    done = rows(run, shift)
    if newest is not None:
        done = {name: row for name, row in done.items() if row["steps"] == newest}
    for name in [n for n in ways if n not in done]:
        policy, config, step = ready(dict(ways[name]))
        config.eval.episodes = flags.FLAGS.episodes
        config.eval.execute = ways[name].get("execute", flags.FLAGS.execute)
        world = open_world(config.eval.env)
        found = closed_loop.roll_out(policy, config, shift_of(world, shift), world)
        found |= {"parameters": tree.count(policy.params), "steps": step}
        if latency and shift == "none":
            found["latency_ms"] = trained.latency(policy, config, calls=20)
        done[name] = found
        _rows_file(run, shift).write_text(json.dumps(done, indent=2) + "\n")


def interval(rates: list[float], episodes: int):
    """Returns a success rate and its 95 % interval: t over seeds, or Wilson's over the episodes of
    one seed."""
    from wamjax.viz import intervals

    if len(rates) > 1:
        return intervals.student_t(rates)
    return intervals.wilson(round(rates[0] * episodes), episodes)


def by_seed(rates: dict[str, float], base: dict[str, float]) -> str:
    """Returns the difference of success rates in points, over the seeds of both, with its 95 %
    interval.

    Returns "-" without a common seed; with one common seed there is no interval.
    """
    from wamjax.viz import intervals

    differences = [rates[seed] - base[seed] for seed in rates if seed in base]
    if len(differences) > 1:
        return intervals.student_t(differences).percent()
    return f"{100 * differences[0]:.1f}" if differences else "-"


def bars(path: pathlib.Path, rates: dict, latencies: dict[str, float], colours: list[int]) -> None:
    """Draws one bar per row, with its interval (`interval`) and the latency of a plan in ms."""
    from wamjax.viz import figures

    figure = figures.figure(8, 1.2 + 0.3 * len(rates))
    axes = figure.add_subplot()
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
    figures.write(figure, path)
