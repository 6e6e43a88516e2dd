"""Compiles acting for a chip that need not be present, and estimates its time and memory.

    pip install 'wamjax[tpu]'
    python -m wamjax.bench act --config=fast_wam_libero --target=v5p --rows=direct:10
    python -m wamjax.bench act --config=fast_wam_libero:variant=joint --target=v6e
    python -m wamjax.bench act --config=cosmos_policy_libero --target=h100

The program is all of acting for one robot, from the observation to actions: all steps of the
solver, with parameters in bfloat16 and laid out by the objective's `prepare`, as a bundle acts.
Nothing is allocated and nothing runs. A row is MODE:STEPS: every mode of the config, with the
config's number of steps and with one; planning has 8 proposals. "codec" is the encoder of the
robot's pictures, "text" that of its instruction, which is computed once.

The report has the bytes of the weights, the bytes of weights read in one run, the bytes of the
cache (computed before the steps of the solver and read in each), the FLOPs, and the operations of
the optimised program: how many it contains, and how many run. The floor is the longer of reading
the weights at the memory's rate and of the FLOPs at the peak, both from the data sheet. The time is
the compiler's own estimate (`cycles`) at an assumed clock: ESTIMATED, NEVER MEASURED. A GPU has
only floors, a CPU neither. The published 6 B policy compiles in five minutes.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from wamjax import config as configs
from wamjax import flops, wam
from wamjax.bench import cycles, hlo, traffic
from wamjax.bench.targets import TARGETS, Target, device_of
from wamjax.config import did_you_mean
from wamjax.data import normalize, pipeline
from wamjax.data.spec import DataSpec
from wamjax.runs import trained
from wamjax.training import compile as compiling
from wamjax.training import state as states
from wamjax.training.step import compute_cast
from wamjax.wam.cosmos_policy.objective import CosmosPolicy
from wamjax.weights import families
from wamjax.weights.codecs import codec_of

DTYPE = "bfloat16"
PROPOSALS = 8
# For latents computed ahead of time: (channels, spatial, temporal) -> the codec's family; for text
# embeddings: width -> the encoder's family.
CODECS = {(48, 16, 4): "wan22_vae", (16, 8, 4): "wan21_vae"}
TEXTS = {4096: "umt5", 1024: "t5"}


class Program(NamedTuple):
    """Holds what a row compiles: ``function(params, *arguments)``, with abstract arguments."""

    function: Callable
    params: Any
    arguments: tuple[Any, ...]


def run(config: ConfigDict, target: str, rows: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the report.

    Args:
      config: config of a policy; must declare the sizes of its data (``data.declared``).
      target: one of `targets.TARGETS`.
      rows: names from `programs`; all by default.

    Raises:
      ValueError: the config is not of a policy, or has no such row.
      ImportError: there is no compiler for the target.
    """
    configs.validate(config)
    spec, chosen = pipeline.spec_of(config), TARGETS[target]
    objective = wam.build(config, spec)
    wam.check_kind(objective, config.objective.name, "--config", wanted="policy")
    known = programs(objective, config, spec)
    for row in rows:
        if row not in known:
            hint = did_you_mean(row, known)
            raise ValueError(f"--rows={row} must be one of {', '.join(known)}{hint}")
    device = device_of(chosen) if chosen.compiles else None
    return {
        "benchmark": "act",
        "objective": config.objective.name,
        "target": target,
        "device": device.device_kind if device else chosen.chip.name,
        "dtype": DTYPE,
        "rows": [{"row": row} | _row(known[row], chosen, device) for row in rows or known],
    }


def programs(
    objective: Any, config: ConfigDict, spec: DataSpec
) -> dict[str, Callable[[], Program]]:
    """Returns the rows of a policy: name -> function that makes its program."""
    out: dict[str, Callable[[], Program]] = {}
    for mode in objective.modes:
        if mode != "adaptive":  # it needs prices
            for steps in dict.fromkeys((config.objective.infer_steps, 1)):
                act = functools.partial(_act, objective, config, spec, mode, steps)
                out[f"{mode}:{steps}"] = act
    if _codec_family(config) or jax.eval_shape(lambda: objective.codec.init(jax.random.key(0))):
        out["codec"] = functools.partial(_codec, objective, config)
    if config.model.text.kind == "context" and config.model.context_width in TEXTS:
        family = TEXTS[config.model.context_width]
        out["text"] = functools.partial(_text, family, spec.instruction_length)
    return out


def _act(objective, config: ConfigDict, spec: DataSpec, mode: str, steps: int) -> Program:
    objective = dataclasses.replace(objective, steps=steps)
    if mode == "plan":
        planning = dataclasses.replace(objective.planning, proposals=PROPOSALS)
        objective = dataclasses.replace(objective, planning=planning)

    def params():
        stored = states.init_params(objective, config)
        return objective.prepare(compute_cast(stored, DTYPE))

    normalizers = _normalizers(spec, config.data.normalization)

    def act(params, observation, key):
        policy = trained.Policy(objective, params, normalizers, mode)
        return policy.act(observation, key)

    key = jax.eval_shape(lambda: jax.random.key(0))
    return Program(act, jax.eval_shape(params), (objective.observation_spec(1), key))


def _normalizers(spec: DataSpec, mode: str) -> dict[str, Any]:
    """Returns normalizers from made-up statistics, which cost the same as real ones."""
    rows = {"min": -1, "q01": -0.9, "mean": 0.1, "q99": 0.8, "max": 1, "std": 0.5}
    sizes = {"proprio": spec.proprio_dim, "actions": spec.action_dim}
    return normalize.normalizers(
        {key: {name: [x] * n for name, x in rows.items()} for key, n in sizes.items()}, mode
    )


def _codec_family(config: ConfigDict) -> str | None:
    codec = config.model.codec
    if codec.kind != "cached":
        return None
    return CODECS.get((codec.channels, codec.spatial, codec.temporal))


def _codec(objective, config: ConfigDict) -> Program:
    """Returns the encoder on one observation of a robot."""
    family, frames, codec = _codec_family(config), 1, objective.codec
    if family:
        codec = codec_of({"family": family, "sizes": {}}, family)
        height, width = objective.picture
    else:
        height, width = objective.observation_spec(1)["video"].shape[2:4]
    if isinstance(objective, CosmosPolicy):  # slots of one camera's size, see `clips.encode`
        frames = 1 + codec.temporal * (objective.layout.conditional - 1)
        height, width = objective.views[0][1]
    params = jax.eval_shape(lambda: compute_cast(codec.init(jax.random.key(0)), DTYPE))
    video = jax.ShapeDtypeStruct((1, frames, height, width, 3), jnp.uint8)
    return Program(lambda params, video: codec.bind(params).encode(video), params, (video,))


def _text(family: str, length: int) -> Program:
    """Returns the text encoder on one instruction."""
    encode = families.functions(family)["encode"]
    params = families.family(family).params(families.sizes(family))
    params = jax.eval_shape(lambda p: compute_cast(p, DTYPE), params)
    ids, mask = (jax.ShapeDtypeStruct((1, length), kind) for kind in (jnp.int32, bool))
    return Program(encode, params, (ids, mask))


def _row(make: Callable[[], Program], target: Target, device: jax.Device | None) -> dict[str, Any]:
    """Returns the numbers of a program on a target."""
    # As when acting: one device, and code for that kind of chip.
    mesh = Mesh([device or jax.devices()[0]], ("data",))
    with jax.set_mesh(mesh):
        program, place = make(), NamedSharding(mesh, PartitionSpec())
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            (program.params, *program.arguments),
        )
        work = flops.count_by(program.function, *placed)
        moved = traffic.count(program.function, *placed)
        out = {
            "weights_bytes": moved.weights, "read_bytes": moved.read, "cache_bytes": moved.cache,
            "flops": sum(work.values()),
        }  # fmt: skip
        if target.chip:
            out["floor_seconds"] = {"weights": moved.read / target.chip.hbm_rate,
                                    "flops": out["flops"] / target.chip.peak_flops}  # fmt: skip
        if device:
            out |= _compiled(program.function, placed, target, device, work.get("kernel", 0))
    if "estimate" in out:
        floor = max(out["floor_seconds"].values())
        out["times_the_floor"] = out["estimate"]["seconds"] / floor
    return out


def _compiled(function, placed, target: Target, device: jax.Device, kernels: int) -> dict[str, Any]:
    """Compiles a program and returns what the compiler reports."""
    platforms = ("tpu",) if device.platform == "tpu" else None
    lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=platforms)
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"does_not_fit": str(error).splitlines()[0]}
    seconds = round(time.perf_counter() - begin, 1)
    text = compiled.as_text()
    ran = list(hlo.operations(text))
    out = {
        "operations": len(ran),
        "operations_run": sum(times for _, times, _ in ran),
        "memory": compiling.memory(compiled, device),
        "compile_seconds": seconds,
    }
    if not target.topology:
        return out
    total = sum(cycles.of(op) * times for op, times, _ in ran)
    looped = sum(cycles.of(op) * times for op, times, inside in ran if inside)
    guess = cycles.seconds(total, target.chip, kernels)
    estimate = {
        "clock_hz": cycles.CLOCK[target.chip.name],
        "cycles": total,
        "cycles_in_loops": looped,
        "parts": cycles.count(text),
        "seconds": guess,
    }
    return out | {"estimate": estimate}


def show(report: dict[str, Any]) -> None:
    """Prints the report as a table."""
    print(f"acting of {report['objective']} on one {report['device']}, {report['dtype']}; "
          "time is estimated by the compiler, not measured")  # fmt: skip
    print(f"{'row':<12}{'weights':>10}{'read':>10}{'cache':>10}{'GFLOP':>10}{'operations':>11}"
          f"{'run':>8}{'floor':>12}{'estimate':>12}{'x floor':>9}{'peak GiB':>10}")  # fmt: skip
    for row in report["rows"]:
        sizes = (row[key] / 1e9 for key in ("weights_bytes", "read_bytes", "cache_bytes"))
        floors = row.get("floor_seconds")
        cells = [
            f"{max(floors.values()) * 1e3:.2f} ms" if floors else "-",
            f"{row['estimate']['seconds'] * 1e3:.2f} ms" if "estimate" in row else "-",
            f"{row['times_the_floor']:.2f}" if "estimate" in row else "-",
            f"{row['memory']['peak_bytes'] / 2**30:.2f}" if row.get("memory") else "-",
        ]
        print(f"{row['row']:<12}" + "".join(f"{x:>7.2f} GB" for x in sizes)
              + f"{row['flops'] / 1e9:>10.0f}{row.get('operations', '-'):>11}"
              f"{row.get('operations_run', '-'):>8}{cells[0]:>12}{cells[1]:>12}{cells[2]:>9}"
              f"{cells[3]:>10}")  # fmt: skip
        if "does_not_fit" in row:
            print(f"  does not fit: {row['does_not_fit']}")
        if "estimate" in row:
            parts = row["estimate"]["parts"].items()
            print("  Mcycles: " + ", ".join(f"{part} {n / 1e6:.2f}" for part, n in parts)
                  + f"; in loops {row['estimate']['cycles_in_loops'] / 1e6:.2f} of "
                  f"{row['estimate']['cycles'] / 1e6:.2f}")  # fmt: skip
