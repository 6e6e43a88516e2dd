"""Pictures and pages that explain a method or a run: paths, explore, run.

    python -m wamjax.viz paths --output=DIR
    python -m wamjax.viz explore --config=FILE[:ARG] --output=DIR [--measure]
    python -m wamjax.viz run --workdir=DIR [--output=FILE]

paths: noise-to-data trajectories of diffusion and flow on a plane, and the error of solvers by
network calls, as paths.png and paths.json. About a minute on two cores.

explore: explore.html, one page for a browser that needs no network, from the objects of a config:
a real example on its way to noise, autoregression against diffusion step by step, the slots of each
use, who sees whom token by token, and how the cache fills, with the FLOPs of each stage; with
--measure also its milliseconds on this machine. Data that the config collects is collected.

run: the report of a run as one page that can be sent to a colleague: losses, success with
intervals, videos, the first batch, masks, what the config changes, versions. In DIR/report.html if
no --output is given.
"""

from __future__ import annotations

from absl import app, flags

from wamjax import cli

COMMANDS = ("paths", "explore", "run")


def define_flags() -> None:
    """Not on import: several entry points define flags of the same names."""
    flags.DEFINE_string("output", None, "folder to write to; of run: the file")
    flags.DEFINE_integer("seed", 0, "of the samples of paths")
    cli.define_config(text="to explore")
    flags.DEFINE_bool("measure", False, "explore: also time every stage")
    flags.DEFINE_string("workdir", None, "the run to report")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    if len(argv) != 2 or argv[1] not in COMMANDS:
        raise app.UsageError(f"which picture? There are {', '.join(COMMANDS)}, not "
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
