"""Pictures that explain a method and need no run.

    python -m wamjax.viz paths --output=DIR

paths: noise-to-data trajectories of diffusion and flow on a plane, and the error of solvers by
network calls, as paths.png and paths.json. About a minute on two cores.
"""

from __future__ import annotations

from absl import app, flags

from wamjax import cli
from wamjax.viz import paths


def define_flags() -> None:
    """Not on import: several entry points define flags of the same names."""
    flags.DEFINE_string("output", None, "folder to write to")
    flags.DEFINE_integer("seed", 0, "of the samples")
    flags.mark_flag_as_required("output")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    if argv[1:] != ["paths"]:
        raise app.UsageError(f"which picture? There is 'paths', not {' '.join(argv[1:])!r}")
    values = flags.FLAGS
    print(paths.text(paths.save(values.output, seed=values.seed)))
    print(f"wrote paths.png and paths.json to {values.output}")


if __name__ == "__main__":
    cli.run(main, define_flags, positional=True)
