"""How XLA compiles for the tests: fast compilation before fast programs."""


def flags(devices: int) -> str:
    """XLA_FLAGS for so many simulated devices.

    Optimisation level 0 cuts compile time by about two thirds. The older emitters of the CPU
    backend (--xla_cpu_use_fusion_emitters=false) would halve what is left, and are wrong: with
    jaxlib 0.10.2 the contrast of `cosmos_policy.augment` has pixels of other places.
    """
    return (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    )
