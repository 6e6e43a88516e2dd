"""Lists chips to compile for that need not be present: TPUs of a slice of libtpu, or this CPU."""

from __future__ import annotations

import dataclasses
import os

import jax
from jax.experimental import topologies

from wamjax.hardware import CHIPS, Chip

# libtpu must not look for a TPU machine's metadata, nor refuse to be loaded by two processes.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Describes a chip to compile for.

    Attributes:
      chip: data sheet; None for a CPU.
      topology: smallest slice of these chips; '' if it is not a TPU.
      compiles: whether a program can be compiled for it without the chip.
    """

    chip: Chip | None
    topology: str = ""
    compiles: bool = True


TARGETS = {
    "v5p": Target(CHIPS["TPU v5"], "v5p:2x2x1"),
    "v6e": Target(CHIPS["TPU v6 lite"], "v6e:2x2"),
    "v5e": Target(CHIPS["TPU v5 lite"], "v5e:2x2"),
    "tpu7x": Target(CHIPS["TPU7x"], "tpu7x:2x2x1"),
    "h100": Target(CHIPS["H100"], compiles=False),
    "cpu": Target(None),
}


def devices_of(topology: str) -> list[jax.Device]:
    """Returns the devices of a slice that is not present; the runtime becomes the CPU."""
    jax.config.update("jax_platforms", "cpu")
    # Programs for absent devices are written to the cache, but cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def device_of(target: Target) -> jax.Device:
    """Returns one device of a target: of a slice that is not present, or this CPU.

    Raises:
      ImportError: libtpu is not installed.
    """
    if not target.topology:
        return jax.local_devices(backend="cpu")[0]
    try:
        return devices_of(target.topology)[0]
    except jax.errors.JaxRuntimeError as error:
        if "libtpu" not in str(error).lower():
            raise
        raise ImportError(f"no compiler for {target.topology}: pip install 'wamjax[tpu]'") from None
