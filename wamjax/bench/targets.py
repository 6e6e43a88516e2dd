"""Chips to compile for that need not be here: TPUs of a slice that libtpu knows, or this CPU."""

from __future__ import annotations

import dataclasses
import os

import jax
from jax.experimental import topologies

from wamjax.hardware import CHIPS, Chip

# libtpu should not look for the machine that it is not on, nor refuse to be loaded by two
# processes.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A chip to compile for.

    Attributes:
      chip: its data sheet; None for a CPU.
      topology: the smallest slice that has it; '' where it is no TPU.
      compiles: whether there is a compiler for it without the chip.
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
    """The devices of a slice that does not exist here; the runtime becomes the CPU."""
    jax.config.update("jax_platforms", "cpu")
    # Programs for devices that are not here are written to the cache, but cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def device_of(target: Target) -> jax.Device:
    """One device of a target: of a slice that is not here, or the CPU that is.

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
