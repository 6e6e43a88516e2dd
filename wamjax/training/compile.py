"""Compiles the training step, for local devices or a slice elsewhere: flags and the cache.

Flags are passed as ``compiler_options`` of one compilation (TPU flags are strings), not through the
environment, so that a report can name them. The compiler rejects unknown names, so compiling any
program with them (`tests/tpu`, where libtpu is installed) checks the list. They were accepted and
had an effect with libtpu 0.0.42 on v5p, v5e and v6e; none was timed on hardware.
"""

from __future__ import annotations

import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from wamjax import hardware
from wamjax.console import say
from wamjax.training.step import Plan

# The policies that "auto" tries, the fastest first where all fit: keeping every array of a layer is
# estimated to be slower than to repeat the cheap ones, since the scan copies what it keeps.
LADDER = ("dots", "projections", "attention", "full", "offload")
VARIABLE = "JAX_COMPILATION_CACHE_DIR"


class Flag(NamedTuple):
    """Holds a flag, its value, and the reason for it."""

    name: str
    value: str
    reason: str


# FSDP gathers the weights of the next layer while this one computes. Only fused into the
# computation ("collective fusion") does that really overlap.
OVERLAP = (
    Flag("xla_enable_async_all_gather", "true", "gathers may overlap; off by default on v6e"),
    Flag("xla_tpu_enable_async_collective_fusion", "true", "run collectives inside matmul fusions"),
    Flag("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", "weights of FSDP"),
    Flag("xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter", "true", "its gradients"),
    Flag(
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "true",
        "let one gather span several fusions, since no single matmul is long enough",
    ),
    Flag(
        "xla_tpu_overlap_compute_collective_tc",
        "true",
        "the tensor core computes while the network moves data",
    ),
)

# Without these each gradient shard is copied into another layout before it is reduced.
LAYOUT = (
    Flag(
        "xla_tpu_use_minor_sharding_for_major_trivial_input",
        "true",
        "shard stacked weights (layers, in, out) along a minor dimension without a relayout",
    ),
    Flag(
        "xla_tpu_relayout_group_size_threshold_for_reduce_scatter",
        "1",
        "choose the layout that suits reduce-scatter also for small groups of devices",
    ),
    Flag(
        "xla_tpu_assign_all_reduce_scatter_layout",
        "true",
        "let layout assignment know about the fused all-reduce and scatter",
    ),
)

# Gradients are scattered while the layer before computes; without the memory the fusions that do it
# do not fit.
SCATTER = (
    Flag("xla_enable_async_reduce_scatter_fusion", "true", "gradients of FSDP may overlap"),
    Flag("xla_tpu_scoped_vmem_limit_kib", "32768", "of 64 MiB that v5p has; 16 are too few for it"),
)

# By the name of the chip in `hardware.CHIPS`. Every TPU has a list, so that none is forgotten.
FLAGS: dict[str, tuple[Flag, ...]] = {
    "TPU v5p": OVERLAP + LAYOUT + SCATTER,
    "TPU v5e": OVERLAP + LAYOUT,
    "TPU v6e": OVERLAP + LAYOUT,
    "TPU v4": (),  # not tried
    "TPU7x": (),  # not tried
}


class Program(NamedTuple):
    """Holds a compiled training step.

    Attributes:
      step: ``(state, batch, seed) -> (state, metrics)``, donating the state.
      options: compiler flags.
      memory: see `memory`; None if the backend does not report it.
      lower_seconds, compile_seconds: time to trace and lower the step, and to compile it.
    """

    step: Any
    options: dict[str, str]
    memory: dict[str, Any] | None
    lower_seconds: float
    compile_seconds: float


def lower(work: Plan, device: jax.Device) -> jax.stages.Lowered:
    """Traces a planned step and lowers it for devices like `device`, which need not be attached."""
    # The runtime for a slice elsewhere is the CPU, which is the wrong target to lower for.
    platforms = ("tpu",) if device.platform == "tpu" else None
    return work.step.trace(*work.arguments).lower(lowering_platforms=platforms)


def compile_step(
    work: Plan, device: jax.Device, flags: bool = True, lowered: jax.stages.Lowered | None = None
) -> Program:
    """Compiles a planned step for devices like `device`, which need not be attached.

    Args:
      flags: whether to use `FLAGS`.
      lowered: output of `lower`, if it was called before.

    Raises:
      ValueError: the compiler does not know one of the flags.
      jax.errors.JaxRuntimeError: ``RESOURCE_EXHAUSTED`` when a device's memory does not suffice.
    """
    chosen = options(device) if flags else {}
    begin = time.perf_counter()
    lowered = lowered or lower(work, device)
    middle = time.perf_counter()
    try:
        compiled, chosen = _compile(lowered, chosen)
    except jax.errors.JaxRuntimeError as error:
        if "compile option" not in str(error):
            raise
        raise ValueError(
            f"the compiler rejects a flag of {device.device_kind}: {str(error).splitlines()[0]}; "
            "set config.compile.flags = False, or mend wamjax.training.compile.FLAGS"
        ) from error
    end = time.perf_counter()
    return Program(compiled, chosen, memory(compiled, device), middle - begin, end - middle)


def _compile(lowered: jax.stages.Lowered, chosen: dict[str, str]):
    """Returns the program and its flags, without `SCATTER` if its fusions do not fit into VMEM."""
    try:
        return lowered.compile(compiler_options=chosen or None), chosen
    except jax.errors.JaxRuntimeError as error:
        rest = {k: v for k, v in chosen.items() if k not in {flag.name for flag in SCATTER}}
        if "space vmem" not in str(error) or rest == chosen:
            raise
    say("gradients are not scattered beside the computation: those fusions do not fit into VMEM")
    return lowered.compile(compiler_options=rest), rest


def compile_fitting(
    planned: Callable[[str], Plan], remat: str, device: jax.Device, flags: bool = True
) -> tuple[Plan, Program, str]:
    """Compiles a step that recomputes as little as memory allows.

    Args:
      planned: the step under a policy of `transformer.REMAT_POLICIES`.
      remat: the policy, or "auto": the first of `LADDER` whose program fits the memory according to
        the compiler; "none" on devices with unknown memory, such as CPUs.

    Returns:
      (the plan, its program, the policy).

    Raises:
      ValueError, jax.errors.JaxRuntimeError: see `compile_step`, if nothing fits.
    """
    automatic = LADDER if hardware.chip(device) else ("none",)
    rungs = automatic if remat == "auto" else (remat,)
    for rung in rungs:
        work = planned(rung)
        try:
            program = compile_step(work, device, flags)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or rung == rungs[-1]:
                raise
            continue
        if rung == rungs[-1] or (program.memory or {}).get("fits", True):
            return work, program, rung
    raise AssertionError("the last policy returns or raises")


def options(device: jax.Device) -> dict[str, str]:
    """Returns the flags of a device's chip as ``compiler_options``; none for other devices than
    TPUs.

    A TPU without a list is compiled for without flags, with a warning.
    """
    if device.platform != "tpu":
        return {}
    chip = hardware.chip(device)
    if chip is None or chip.name not in FLAGS:
        say(f"no compiler flags are known for {device.device_kind}: compile.FLAGS has "
            f"{sorted(FLAGS)}")  # fmt: skip
        return {}
    return {flag.name: flag.value for flag in FLAGS[chip.name]}


def memory(compiled, device: jax.Device) -> dict[str, Any] | None:
    """Returns bytes on one device. The peak is the compiler's own, not a sum of the other
    figures."""
    stats, chip = compiled.memory_analysis(), hardware.chip(device)
    if stats is None:
        return None
    sizes = {
        "peak_bytes": stats.peak_memory_in_bytes,
        "argument_bytes": stats.argument_size_in_bytes,
        "temp_bytes": stats.temp_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes,
        "alias_bytes": stats.alias_size_in_bytes,
    }
    if chip:
        sizes["hbm_bytes"] = chip.hbm_bytes
        sizes["fits"] = stats.peak_memory_in_bytes <= chip.hbm_bytes
    return sizes


def keep_programs(folder: str) -> str | None:
    """Makes JAX cache compiled programs, so that a resumed or similar run starts sooner.

    Call it before anything is compiled.

    Args:
      folder: ``config.compile.cache``: a folder or bucket, 'none', or '' for `default_folder`.

    Returns:
      the folder in use; None without a cache, also if the folder cannot be written to, which is
      reported.
    """
    folder = "" if folder == "none" else folder or default_folder()
    if folder and "://" not in folder:
        folder = str(pathlib.Path(folder).expanduser().absolute())
        try:
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            say(f"compiled programs are not kept: {error}; config.compile.cache or {VARIABLE} "
                "names another folder")  # fmt: skip
            folder = ""
    if (jax.config.jax_compilation_cache_dir or "") != folder:
        jax.config.update("jax_compilation_cache_dir", folder or None)
        compilation_cache.reset_cache()  # otherwise JAX keeps its first choice
    return folder or None


def default_folder() -> str:
    """Returns ``JAX_COMPILATION_CACHE_DIR`` if it is set, even to '' (no cache), else a folder in
    the user's cache."""
    if VARIABLE in os.environ:
        return os.environ[VARIABLE]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.join(cache, "wamjax", "compiled")
