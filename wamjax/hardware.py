"""Reports machine limits: peak rates and memory of known chips, the measured rate of others.

A utilization means nothing without its denominator, so `denominator` returns the number together
with its name.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Chip:
    """Holds the data sheet of one JAX device of a kind.

    Attributes:
      name: usual name.
      peak_flops: dense bfloat16 FLOP/s of one device (a TPU7x chip is two devices).
      hbm_bytes: memory of one device.
      hbm_rate: bytes a second that it reads of its memory.
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    hbm_rate: float


_GIB = 1024**3

# Matched against `device.device_kind`, first hit wins: longer names stand before their prefixes.
CHIPS: dict[str, Chip] = {
    "TPU7x": Chip("TPU7x", 1153.5e12, 96 * _GIB, 3690e9),
    "TPU v6 lite": Chip("TPU v6e", 918e12, 32 * _GIB, 1640e9),
    "TPU v5 lite": Chip("TPU v5e", 197e12, 16 * _GIB, 819e9),
    "TPU v5": Chip("TPU v5p", 459e12, 95 * _GIB, 2765e9),
    "TPU v4": Chip("TPU v4", 275e12, 32 * _GIB, 1228e9),
    "B200": Chip("NVIDIA B200", 2250e12, 180 * _GIB, 8000e9),
    "H200": Chip("NVIDIA H200", 989e12, 141 * _GIB, 4800e9),
    "H100": Chip("NVIDIA H100", 989e12, 80 * _GIB, 3350e9),
    "A100": Chip("NVIDIA A100", 312e12, 40 * _GIB, 1555e9),
}


def chip(device: jax.Device | None = None) -> Chip | None:
    """Returns the data sheet of `device` (default: the first one), or None for an unknown kind."""
    kind = (device or jax.devices()[0]).device_kind
    return next((c for key, c in CHIPS.items() if key in kind), None)


def measure_matmul_rate(dtype=jnp.float32, n: int = 1024, seconds: float = 0.5) -> float:
    """Measures FLOP/s of a jitted (n, n) @ (n, n) in `dtype` on the default device; returns the
    best repeat.

    The best, not the mean: other work on the machine can only slow a repeat down, and too small a
    denominator would inflate every utilization computed with it. Takes `seconds` after compiling.
    """
    device = jax.local_devices()[0]
    # Drawn by NumPy: by JAX it would be one more program to compile, at the start of every run.
    normal = np.random.default_rng(0).standard_normal((n, n), np.float32)
    a = jax.device_put(normal.astype(dtype), device)
    # Scaled so that repeated application neither grows nor dies away (denormals are slow).
    matmul = jax.jit(lambda x: (x @ a) * (n**-0.5)).lower(a).compile()
    x = jax.block_until_ready(matmul(a))
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        x = jax.block_until_ready(matmul(x))
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


@functools.cache
def _measured(dtype: jnp.dtype, seconds: float) -> float:
    return measure_matmul_rate(dtype, seconds=seconds)


def denominator(dtype=jnp.float32, seconds: float = 0.5) -> tuple[float, str]:
    """Returns the peak FLOP/s of one device of this machine, and a name to print next to a
    utilization.

    Known chips: the data-sheet bfloat16 peak, whatever the dtype (the usual meaning of MFU).
    Anything else, so every CPU: the matmul rate measured here in `dtype`, once in a process.
    """
    sheet = chip()
    if sheet:
        return sheet.peak_flops, f"{sheet.name} bfloat16 peak {sheet.peak_flops / 1e12:.4g} TFLOP/s"
    rate = _measured(jnp.dtype(dtype), seconds)
    device = jax.devices()[0]
    name = f"{jnp.dtype(dtype).name} matmul rate measured on this {device.platform}"
    return rate, f"{name}, {rate / 1e9:.4g} GFLOP/s"


def restart_with_huge_pages() -> None:
    """Restarts this Python process once, so that glibc backs large buffers with huge pages.

    XLA's CPU backend takes its temporaries from malloc anew at every step. With pages of 4 kB a
    small training step spent a third of its CPU time in page faults; glibc can ask for huge pages,
    but only if told so before the process starts. Does nothing where that does not apply: another
    platform, an accelerator, a user's own setting, or a second call. It starts JAX's backend, so
    it must not come before `jax.distributed.initialize`.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ or jax.default_backend() != "cpu":
        return
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
