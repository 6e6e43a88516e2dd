"""Sets how XLA compiles for the tests: fast compilation instead of fast programs."""


def flags(devices: int) -> str:
    """Returns XLA_FLAGS for a number of simulated devices.

    Optimisation level 0 cuts compile time by about two thirds. The older emitters of the CPU
    backend (--xla_cpu_use_fusion_emitters=false) would halve the rest, but are wrong: with jaxlib
    0.10.2 the contrast of `cosmos_policy.augment` mixes up pixels. Splitting a program into up to 32
    modules to compile them in parallel costs more than it gains: one module takes a tenth less time.
    """
    return (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
        "--xla_cpu_parallel_codegen_split_count=1"
    )
