"""Searches for the fastest way to train a config on a slice, over meshes, batches and remat.

Every candidate is compiled as `wamjax.train` would compile it. Memory only grows with the batch and
with less recomputation, so candidates beyond one that does not fit are skipped. `front` returns the
candidates that no other beats in both throughput and memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from wamjax.models.transformer import REMAT_POLICIES
from wamjax.training.compile import LADDER

Report = dict[str, Any]


def define_flags() -> None:
    """Defines the flags of --search."""
    flags.DEFINE_bool("search", False, "try meshes, batch sizes and remat policies")
    flags.DEFINE_list("meshes", [], "for --search: data:fsdp, e.g. 4:16,64:1; all by default")
    flags.DEFINE_list("batches", [], "for --search: examples per device; as given, x 2, x 4")
    flags.DEFINE_list("remats", [], f"for --search: policies; {','.join(LADDER)} by default")


def run(
    config: ConfigDict, devices: list[jax.Device], values: Any, compile_for: Callable[..., Report]
) -> list[Report]:
    """Compiles the candidates and reports each one, including those that do not fit.

    Args:
      values: the flags.
      compile_for: see `aot.compile_for`.
    """
    policies = [p for p in REMAT_POLICIES if p in (values.remats or LADDER)]
    rungs = policies[::-1]  # in order of increasing memory
    given = max(config.data.batch_size // len(devices), 1)
    batches = sorted(int(n) for n in values.batches) or [given, 2 * given, 4 * given]
    reports, sides = [], _sides(values.topology)
    meshes = [tuple(map(int, m.split(":"))) for m in values.meshes] or list(_meshes(sides))
    for data, fsdp in meshes:
        too_much = len(rungs)  # index of the first policy known not to fit
        for batch in batches:
            for place, remat in enumerate(rungs[:too_much]):
                case = config.copy_and_resolve_references()
                case.mesh.update(data=data, fsdp=fsdp, tensor=1)
                case.data.batch_size = batch * len(devices)
                case.model.remat = remat
                try:
                    report = one(case, devices, values.topology, values.cache, compile_for)
                except ValueError as error:  # about the mesh
                    print(f"data {data} x fsdp {fsdp}: {str(error).splitlines()[0]}", flush=True)
                    too_much = 0
                    break
                reports.append(report)
                print(line(report), flush=True)
                if not report["memory"].get("fits", True):
                    too_much = place
                    break
    return reports


def one(
    case: ConfigDict, devices: list[jax.Device], topology: str, cache: str, compile_for: Callable
) -> Report:
    """Returns the report of one candidate, which may be that it does not fit."""
    try:
        return compile_for(case, devices, topology, cache)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
    return {"mesh": dict(case.mesh), "batch_size": case.data.batch_size,
            "remat": case.model.remat, "memory": {"fits": False}}  # fmt: skip


def fitting(
    config: ConfigDict, devices: list[jax.Device], topology: str, cache: str, compile_for: Callable
) -> Report:
    """Returns the report for the policy that ``model.remat="auto"`` selects in training."""
    for remat in LADDER:
        case = config.copy_and_resolve_references()
        case.model.remat = remat
        report = one(case, devices, topology, cache, compile_for)
        if report["memory"].get("fits", True):
            return report
    raise ValueError(f"no policy of {LADDER} fits")


def front(reports: list[Report]) -> list[Report]:
    """Returns the reports that fit and that no other beats in both examples per second and peak
    bytes, the fastest first."""
    fitting = [r for r in reports if r["memory"].get("fits", True)]
    out: list[Report] = []
    for report in sorted(fitting, key=lambda r: (-rate(r), r["memory"]["peak_bytes"])):
        if not out or report["memory"]["peak_bytes"] < out[-1]["memory"]["peak_bytes"]:
            out.append(report)
    return out


def rate(report: Report) -> float:
    """Returns the estimated examples per second."""
    return report["batch_size"] / report["estimate"]["seconds"]["step"]


def command(report: Report, config_file: str) -> str:
    """Returns the command line that trains what was compiled."""
    mesh = " ".join(f"--config.mesh.{axis}={n}" for axis, n in report["mesh"].items() if n > 1)
    return (
        f"python -m wamjax.train --config={config_file} --config.data.batch_size="
        f"{report['batch_size']} {mesh} --config.model.remat={report['remat']} --workdir=WORKDIR"
    )


def line(report: Report) -> str:
    """Formats a candidate as one line."""
    mesh = " x ".join(f"{a} {n}" for a, n in report["mesh"].items() if n > 1)
    head = f"{mesh:<18} batch {report['batch_size']:<6} remat {report['remat']:<12}"
    if not report["memory"].get("fits", True):
        return head + "does not fit"
    guess, mfu = report["estimate"]["seconds"], report["estimate"]["mfu"]
    return head + (
        f"{rate(report):10.0f} examples/s  step {guess['step'] * 1e3:7.1f} ms (exposed collectives "
        f"{guess['collectives_exposed'] * 1e3:.1f})  MFU {mfu['step']:.1%} "
        f"({mfu['compute_alone']:.1%} without collectives)  peak "
        f"{report['memory']['peak_bytes'] / 2**30:.2f} GiB"
    )


def text(reports: list[Report], config_file: str) -> str:
    """Formats the front as text, with the command of each."""
    best = front(reports)
    if not best:
        return "nothing fits"
    lines = [f"estimated, not measured; MFU of {best[0]['estimate']['denominator']}"]
    for report in best:
        lines += [line(report), f"    {command(report, config_file)}"]
    return "\n".join(lines)


def row(name: str, report: Report) -> str:
    """Formats a candidate as a row of the table in tpu/README.md."""
    guess, mfu = report["estimate"]["seconds"], report["estimate"]["mfu"]
    mesh = ", ".join(f"{a} {n}" for a, n in report["mesh"].items() if n > 1)
    cells = [
        name,
        f"{report['topology']}, {mesh}",
        f"{report['batch_size']:,} ({report['batch_size'] // report['devices']})",
        report["remat"],
        f"{sum(report['estimate']['cycles'].values()) / 1e6:.1f}",
        f"{guess['step'] * 1e3:.1f}",
        f"{guess['collectives_exposed'] * 1e3:.1f}",
        f"{mfu['step']:.1%} ({mfu['compute_alone']:.1%})",
        f"{report['memory']['peak_bytes'] / 2**30:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _sides(topology: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", topology.partition(":")[2])]


def _meshes(sides: list[int]) -> Iterator[tuple[int, int]]:
    """Yields (data, fsdp) with fsdp over none, one, two, ... dimensions of the torus.

    It does not span all dimensions, which would turn gathers into all-reduces, unless there is only
    one.
    """
    devices = math.prod(sides)
    for covered in range(max(len(sides), 2)):
        fsdp = math.prod(sides[:covered])
        yield devices // fsdp, fsdp
