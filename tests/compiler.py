"""Sets how XLA compiles for the tests, fast compilation instead of fast programs, and how often
Python collects garbage."""

import gc


def flags(devices: int) -> str:
    """Returns XLA_FLAGS for a number of simulated devices.

    Optimisation level 0 cuts compile time by about two thirds. The older emitters of the CPU
    backend (--xla_cpu_use_fusion_emitters=false) would halve the rest, but are wrong: with jaxlib
    0.10.2 the contrast of `cosmos_policy.augment` mixes up pixels. By default XLA splits a program
    into up to 32 modules, to compile them in parallel; one module takes a tenth less of its time.
    """
    return (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
        "--xla_cpu_parallel_codegen_split_count=1"
    )


def collect_rarely():
    """Keeps what exists out of garbage collection, and collects later objects rarely.

    Imported objects live as long as the process. Tracing creates many objects, and few are in
    cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
