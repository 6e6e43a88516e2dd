"""Measures speed, as ratios within one run, and lists the sizes of published models.

python -m wamjax.bench fast_wam --json
python -m wamjax.bench dit --sizes=S/2,B/2
python -m wamjax.bench weights --mesh=data=4,fsdp=16
python -m wamjax.bench act --config=fast_wam_libero --target=v5p
python -m wamjax.bench serve
python -m wamjax.bench video
"""

from __future__ import annotations

import json
import sys
from typing import Any

from absl import app, flags

from wamjax import cli
from wamjax.bench import act, conversion, dit, fast_wam, video, weights
from wamjax.bench.targets import TARGETS
from wamjax.wam.fast_wam.uses import MODES

BENCHMARKS = {"fast_wam": fast_wam, "dit": dit, "weights": weights, "video": video, "act": act}
NAMES = (*BENCHMARKS, "serve")  # the last needs an extra


def define_flags() -> None:
    """Defines the flags; not on import, since other entry points define flags of the same names."""
    flags.DEFINE_bool("json", False, "print json")
    flags.DEFINE_integer("repeats", 5, "timed training steps; twice as many action chunks")
    flags.DEFINE_list("variants", list(MODES), "fast_wam: variants to time")
    flags.DEFINE_integer("scale", 1, "fast_wam: multiply all widths")
    flags.DEFINE_integer("act_batch", 1, "fast_wam: observations per policy call")
    flags.DEFINE_list("sizes", list(dit.BATCHES), "dit: sizes to time")
    flags.DEFINE_string("mesh", "", "weights: mesh axes, e.g. data=4,fsdp=16")
    flags.DEFINE_list("family", [], "weights: families to show; all by default")
    flags.DEFINE_string("convert", None, "weights: family to convert at full size instead")
    flags.DEFINE_string("scratch", "", "weights: folder for the converted weights")
    cli.define_config(text="act: policy to compile")
    flags.DEFINE_enum("target", "v5p", list(TARGETS), "act: chip to compile for")
    flags.DEFINE_list("rows", [], "act: programs, e.g. direct:10 or codec; all by default")
    flags.DEFINE_list("clients", ["1", "4", "16", "64"], "serve: numbers of clients to measure")
    flags.DEFINE_float("seconds", 5.0, "serve: duration of each measurement", lower_bound=0.1)
    flags.DEFINE_float("policy_ms", 20.0, "serve: milliseconds of a policy call", lower_bound=0)
    flags.DEFINE_integer("max_batch", 16, "serve: maximum batch size", lower_bound=2)
    flags.DEFINE_string("bundle", "", "serve: measure this policy instead of a stand-in")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    asked, names = flags.FLAGS, argv[1:]
    if len(names) != 1 or names[0] not in NAMES:
        raise app.UsageError(f"name one benchmark of {sorted(NAMES)}, got {names}")
    for name in ("repeats", "scale", "act_batch"):
        if asked[name].value < 1:
            raise app.UsageError(f"--{name}={asked[name].value} must be at least 1")
    for given, known in ((asked.variants, MODES), (asked.sizes, dit.BATCHES)):
        if unknown := set(given) - set(known):
            raise app.UsageError(f"unknown {sorted(unknown)}; there are {sorted(known)}")
    report = _run(names[0], asked)
    if asked.json:
        json.dump(report, sys.stdout, indent=2)
        print()
    elif report["benchmark"] == "conversion":
        conversion.show(report)
    else:
        _module(names[0]).show(report)


def _module(name: str) -> Any:
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    try:
        from wamjax.bench import serve
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'wamjax[serve]'") from None
    return serve


def _run(name: str, asked: Any) -> dict[str, Any]:
    if name == "fast_wam":
        return fast_wam.run(asked.variants, asked.scale, asked.repeats, asked.act_batch)
    if name == "act":
        if asked.config is None:
            raise app.UsageError("--config is missing: name the policy that acts")
        return act.run(asked.config, asked.target, asked.rows)
    if name == "dit":
        return dit.run(asked.sizes, asked.repeats)
    if name == "serve":
        if not all(text.isdigit() and int(text) > 0 for text in asked.clients):
            raise app.UsageError(
                f"--clients={','.join(asked.clients)} must be positive whole numbers"
            )
        clients = [int(text) for text in asked.clients]
        return _module(name).run(
            clients, asked.seconds, asked.max_batch, asked.policy_ms, asked.bundle
        )
    if name == "video":
        return video.run(asked.repeats)
    try:
        if asked.convert:
            return conversion.run(asked.convert, asked.scratch)
        return weights.run(asked.family, weights.parse_mesh(asked.mesh))
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from error


if __name__ == "__main__":
    cli.run(main, define_flags, positional=True, huge_pages=True)
