"""Speed, as ratios measured in one run.

python -m wamjax.bench fast_wam --json
python -m wamjax.bench dit --sizes=S/2,B/2
"""

from __future__ import annotations

import json
import sys

from absl import app, flags

from wamjax import hardware
from wamjax.bench import dit, fast_wam
from wamjax.metrics import quiet
from wamjax.wam.programs import MODES

BENCHMARKS = {"fast_wam": fast_wam, "dit": dit}


def define_flags() -> None:
    """Not on import: several entry points define flags of the same names."""
    flags.DEFINE_bool("json", False, "print json")
    flags.DEFINE_integer("repeats", 5, "timed training steps; twice as many action chunks")
    flags.DEFINE_list("variants", list(MODES), "fast_wam: variants to time")
    flags.DEFINE_integer("scale", 1, "fast_wam: multiplies all widths")
    flags.DEFINE_integer("act_batch", 1, "fast_wam: observations acted on in one call")
    flags.DEFINE_list("sizes", list(dit.BATCHES), "dit: sizes to time")


def main(argv: list[str]) -> None:
    """Entry point for absl."""
    quiet()
    asked, names = flags.FLAGS, argv[1:]
    if len(names) != 1 or names[0] not in BENCHMARKS:
        raise app.UsageError(f"name one benchmark of {sorted(BENCHMARKS)}, got {names}")
    for given, known in ((asked.variants, MODES), (asked.sizes, dit.BATCHES)):
        if unknown := set(given) - set(known):
            raise app.UsageError(f"unknown {sorted(unknown)}; there are {sorted(known)}")
    if names[0] == "fast_wam":
        report = fast_wam.run(asked.variants, asked.scale, asked.repeats, asked.act_batch)
    else:
        report = dit.run(asked.sizes, asked.repeats)
    if asked.json:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        BENCHMARKS[names[0]].show(report)


if __name__ == "__main__":
    hardware.restart_with_huge_pages()
    define_flags()
    app.run(main)
