"""How XLA compiles for the tests: fast compilation before fast programs."""

import importlib.metadata

# The jaxlib without the choice of emitters; it ends at the flag as at one that it does not know.
NO_EMITTERS = (0, 11)


def flags(devices: int) -> str:
    """XLA_FLAGS for so many simulated devices; they change no semantics.

    Optimisation level 0 cuts compile time by about two thirds, and the older emitters of the CPU
    backend, which lower a fusion to LLVM without MLIR, cut what is left by more than half.
    """
    names = [
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_backend_optimization_level=0",
    ]
    version = importlib.metadata.version("jaxlib").split(".")
    if tuple(map(int, version[:2])) < NO_EMITTERS:
        names.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(names)
