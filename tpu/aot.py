"""Compiles a config's training step for a TPU slice, on a machine without a TPU, and reports.

    pip install 'wamjax[tpu]'
    python tpu/aot.py --config=experiments/configs/fast_wam_libero.py --topology=v5p:4x4x4 \
        --mesh=data=4,fsdp=16 --out=report.json

Nothing is allocated and nothing runs: the compiler gets the shapes and shardings that
`wamjax.train` would use. The report says what fits and what is communicated, and estimates the step
time (`estimate`); the estimate has not been checked on hardware. The published 6 B model takes
about five minutes on two cores.

    python tpu/aot.py --config=experiments/configs/dit_imagenet.py --topology=v5p:4x4x4 --search \
        --out=report.json

tries meshes, batch sizes and remat policies, and prints the fastest candidate and those that
need less memory, with their training commands (`search`). Programs compiled before are read from
--cache.

Meshes: one axis must not span all dimensions of the torus, or gathers turn into all-reduces. Use
fsdp=16 on v5p:4x4x4 (two of three dimensions) and on v5e:16x16 or v6e:16x16 (one of two).

Exit status: 0 if it compiles and fits; 1 if it does not fit the memory or the mesh.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import sys
import time
from typing import Any

import collectives
import estimate
import jax
import search
from absl import app, flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from wamjax import cli, flops, hardware, tree, wam
from wamjax import config as configs
from wamjax.bench.targets import devices_of
from wamjax.data import pipeline
from wamjax.training import optim, sharding
from wamjax.training.compile import compile_step, lower
from wamjax.training.compile import options as compile_options
from wamjax.training.step import model_flops, plan

Report = dict[str, Any]

VERSIONS = {
    p.metadata["Name"]: p.version
    for p in importlib.metadata.distributions()
    if p.metadata["Name"] in ("jax", "jaxlib", "libtpu")
}


def compile_for(
    config: ConfigDict, devices: list[jax.Device], topology: str, cache: str = ""
) -> Report:
    """Compiles ``config``'s training step for a slice and describes the result.

    Args:
      config: resolved; ``config.mesh`` must fit the slice, ``data.batch_size`` the mesh.
      devices: devices of the slice, see `devices_of`.
      topology: name of the slice.
      cache: folder to keep and reuse reports in, by program; '' for none.

    Raises:
      ValueError: the mesh does not fit, or the compiler rejects a flag.
      jax.errors.JaxRuntimeError: ``RESOURCE_EXHAUSTED`` if a device's memory does not suffice.
    """
    configs.validate(config)
    wam.check_training(config)
    mesh = _mesh(config, devices)
    objective = wam.build(config, pipeline.spec_of(config))
    with jax.set_mesh(mesh):
        work = plan(objective, optim.make(config), config, mesh)
        begin = time.perf_counter()
        lowered = lower(work, devices[0])
        lower_seconds = time.perf_counter() - begin
        place = cache and pathlib.Path(cache) / f"{_hash(lowered, config, devices)}.json"
        if place and place.exists():
            return json.loads(place.read_text())
        program = compile_step(work, devices[0], config.compile.flags, lowered)
        model = model_flops(objective, config, work.state.params, work.batch)
        executed = flops.count_by(work.step, *work.arguments)
    hlo = program.step.as_text()
    report = {
        "topology": topology,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "batch_size": config.data.batch_size,
        "remat": config.model.remat,
        "versions": VERSIONS,
        "compiler_options": program.options,
        "parameters": tree.count_by_expert(work.state.params),
        "flops": {
            "step": sum(executed.values()),
            "step_per_device": sum(executed.values()) // len(devices),
            "kernels": executed.get("kernel", 0),
            "model": model,
            "model_per_sample": model // config.data.batch_size,
        },
        "memory": program.memory,
        "collectives": {
            kind: dataclasses.asdict(traffic) for kind, traffic in collectives.count(hlo).items()
        },
        "estimate": estimate.of(
            hlo,
            hardware.chip(devices[0]),
            topology,
            len(devices),
            model,
            executed.get("kernel", 0),
        ),
        "seconds": {
            "trace_and_lower": round(lower_seconds, 1),
            "compile": round(program.compile_seconds, 1),
        },
    }
    if place:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(report))
    return report


def _hash(lowered: Any, config: ConfigDict, devices: list[jax.Device]) -> str:
    """Hashes what determines a report: the program, the flags, the devices, the compiler."""
    options = compile_options(devices[0]) if config.compile.flags else {}
    parts = [lowered.as_text(), sorted(options.items()), VERSIONS, devices[0].device_kind]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _mesh(config: ConfigDict, devices: list[jax.Device]) -> Mesh:
    try:
        mesh = sharding.make_mesh(config.mesh, devices)
    except NotImplementedError as error:
        raise ValueError(
            f"mesh {dict(config.mesh)} cannot be laid out on this slice: each axis must be a "
            "product of whole dimensions of the torus; try another --mesh"
        ) from error
    sharding.check_config(config, mesh)
    return mesh


def text(report: Report) -> str:
    """Formats the report as text."""
    memory, work = report["memory"], report["flops"]
    mesh = " x ".join(f"{a}={n}" for a, n in report["mesh"].items())
    lines = [
        f"{report['topology']}: {report['devices']} x {report['device_kind']}, mesh {mesh}, "
        f"batch {report['batch_size']}",
        "parameters   " + "  ".join(f"{k} {n:,}" for k, n in report["parameters"].items()),
        f"flops        {work['step']:.4g} a step, {work['step_per_device']:.4g} a device; "
        f"{work['step'] / work['model']:.3f} x the model's own {work['model']:.4g}",
        f"memory       peak {_gib(memory['peak_bytes'])} a device"
        + (f" of {_gib(memory['hbm_bytes'])}" if "hbm_bytes" in memory else "")
        + f"; arguments {_gib(memory['argument_bytes'])}, temporary {_gib(memory['temp_bytes'])}",
    ]
    for kind, traffic in sorted(report["collectives"].items()):
        overlapped = traffic["async_bytes"] / max(traffic["bytes"], 1)
        lines.append(
            f"{kind:<20} {traffic['count']:>6} moving {_gib(traffic['bytes'])} per device "
            f"and step, {overlapped:.0%} overlapped"
        )
    guess, mfu = report["estimate"]["seconds"], report["estimate"]["mfu"]
    lines += [
        "cycles       "
        + "  ".join(f"{part} {n / 1e6:.1f} M" for part, n in report["estimate"]["cycles"].items()),
        f"estimated    {guess['step'] * 1e3:.1f} ms a step: compute {guess['compute'] * 1e3:.1f}, "
        f"exposed collectives {guess['collectives_exposed'] * 1e3:.1f} and overlapped "
        f"{guess['collectives_overlapped'] * 1e3:.1f}",
        f"utilisation  {mfu['step']:.1%} of {report['estimate']['denominator']}, "
        f"{mfu['compute_alone']:.1%} without collectives; estimated, not measured",
    ]
    seconds, versions = report["seconds"], report["versions"]
    lines.append(
        f"seconds      {seconds['trace_and_lower']} to trace and lower, "
        f"{seconds['compile']} to compile"
    )
    lines.append("versions     " + "  ".join(f"{k} {v}" for k, v in versions.items()))
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


def _set_mesh(config: ConfigDict, given: str) -> None:
    """Writes ``data=4,fsdp=16`` into the config; axes that are not named have size 1."""
    sizes = configs.parse_arg(given, data=1, fsdp=1, tensor=1)
    config.mesh.update(sizes)


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    values = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; did you forget a '--'?")
    config = values.config
    if values.mesh:
        _set_mesh(config, values.mesh)
    devices = devices_of(values.topology)
    if values.batch_per_device:
        config.data.batch_size = values.batch_per_device * len(devices) // config.mesh.tensor
    if values.remat:
        config.model.remat = values.remat
    config.compile.flags = values.flags and config.compile.flags
    try:
        if values.search:
            reports = search.run(config, devices, values, compile_for)
            report = {"search": reports}
        else:
            args = config, devices, values.topology, values.cache
            automatic = config.model.remat == "auto"
            report = search.fitting(*args, compile_for) if automatic else compile_for(*args)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        sys.exit(f"does not compile: {str(error).splitlines()[0]}")
    config_file = config_flags.get_config_filename(values["config"])
    print(search.text(reports, config_file) if values.search else text(report))
    if values.out:
        path = pathlib.Path(values.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
    if not values.search and not report["memory"].get("fits", True):
        sys.exit("does not fit")


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_string("topology", "v5p:4x4x4", "slice to compile for, as libtpu names it")
    flags.DEFINE_string("mesh", "", "mesh axes, e.g. data=4,fsdp=16; config.mesh by default")
    flags.DEFINE_string("remat", "", "remat policy; config.model.remat by default")
    flags.DEFINE_bool("flags", True, "use the compiler flags of wamjax.training.compile")
    flags.DEFINE_integer("batch_per_device", 0, "examples; 0 = by config.data.batch_size")
    flags.DEFINE_string("out", "", "also write the report as json")
    flags.DEFINE_string("cache", "", "folder to keep and reuse reports in")
    search.define_flags()
    flags.mark_flag_as_required("config")
    app.run(main)
