"""Draws pictures and pages that explain a method or a run: paths, explore, run.

    python -m wamjax.viz paths --output=DIR
    python -m wamjax.viz explore --config=FILE[:ARG] --output=DIR [--measure]
    python -m wamjax.viz run --workdir=DIR [--output=FILE]

paths: noise-to-data trajectories of diffusion and flow in the plane, and the error of solvers by
network calls, as paths.png and paths.json. Takes about a minute on two cores.

explore: explore.html, one page for the browser that needs no network, drawn from the objects of a
config: a real example turning into noise, autoregression and diffusion step by step, the slots of
each use, attention token by token, and how the cache fills, with the FLOPs of each stage. --measure
adds the milliseconds on this machine. Data that the config collects is collected.

run: a run's report as one page that you can send to a colleague: losses, success rates with
intervals, videos, the first batch, visibility tables, what the config changes, versions. Written to
DIR/report.html unless --output is given.
"""

from __future__ import annotations

from absl import app, flags

from wamjax import cli

COMMANDS = ("paths", "explore", "run")


def define_flags() -> None:
    """Defines the flags; not on import, since several entry points share flag names."""
    flags.DEFINE_string("output", None, "folder to write to; for run: the file")
    flags.DEFINE_integer("seed", 0, "seed of the samples of paths")
    cli.define_config(text="to explore")
    flags.DEFINE_bool("measure", False, "explore: also time every stage")
    flags.DEFINE_string("workdir", None, "run to report on")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    if len(argv) != 2 or argv[1] not in COMMANDS:
        raise app.UsageError(f"name one picture of {', '.join(COMMANDS)}, not "
                             f"{' '.join(argv[1:])!r}")  # fmt: skip
    {"paths": _paths, "explore": _explore, "run": _run}[argv[1]](flags.FLAGS)


def _paths(asked) -> None:
    from wamjax.viz import paths

    _need(asked, "output")
    print(paths.text(paths.save(asked.output, seed=asked.seed)))
    print(f"wrote paths.png and paths.json to {asked.output}")


def _explore(asked) -> None:
    from wamjax.viz.explore import build

    _need(asked, "config", "output")
    print(f"wrote {build.write(asked.config, asked.output, asked.measure)}")


def _run(asked) -> None:
    from wamjax.viz import run_page

    _need(asked, "workdir")
    print(f"wrote {run_page.write(asked.workdir, asked.output)}")


def _need(asked, *names: str) -> None:
    for name in names:
        if getattr(asked, name) is None:
            raise app.UsageError(f"give --{name}")


if __name__ == "__main__":
    cli.run(main, define_flags, positional=True)
