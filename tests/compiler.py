"""How XLA compiles for the tests: fast compilation before fast programs."""


def flags(devices: int) -> str:
    """XLA_FLAGS for so many simulated devices; they change no semantics.

    Optimisation level 0 cuts compile time by about two thirds. So do, of what is left, the emitters
    of the CPU backend that lower each fusion to LLVM directly, where the newer ones go by MLIR.
    """
    return (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
        "--xla_cpu_use_fusion_emitters=false"
    )
