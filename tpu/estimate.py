"""Estimates the time of a step of a compiled program, and its utilisation.

Compute is the compiler's own estimate of cycles (`cycles`), at an assumed clock. Communication is
modelled: the bytes that leave a device by the usual ring algorithms, over the links of the
dimensions of the torus that a group spans. Collectives that the compiler does not overlap are added
to compute; overlapped ones are hidden, unless they take longer than compute. None of this was
measured on hardware.
"""

from __future__ import annotations

import re
from typing import Any

import collectives

from wamjax.bench import cycles

# Bytes per second that one device sends along one dimension of the torus: 0.9 of the data sheet's
# links, in both directions together.
WIRE = {"TPU v4": 90e9, "TPU v5e": 90e9, "TPU v5p": 180e9, "TPU v6e": 200e9, "TPU7x": 180e9}


def of(
    hlo: str, chip: Any, topology: str, devices: int, model: int, kernels: int = 0
) -> dict[str, Any]:
    """Estimates one step.

    Args:
      hlo: text of the compiled program.
      chip: `wamjax.hardware.Chip`.
      topology: name in libtpu, with the sides of the torus: v5p:4x4x4.
      model: the model's own FLOPs per step.
      kernels: FLOPs per step in Pallas kernels.

    Returns:
      cycles by part; seconds; utilisation by `model` of the data sheet's peak of all devices, for
      compute alone and for the whole step.
    """
    parts = cycles.count(hlo)
    compute = cycles.seconds(sum(parts.values()), chip, kernels / devices)
    sides = [int(n) for n in re.findall(r"\d+", topology.partition(":")[2])]
    rate = WIRE[chip.name]
    exposed, hidden = 0.0, 0.0
    for traffic in collectives.count(hlo).values():
        for size, sent in traffic.sent.items():
            late = traffic.sent_async.get(size, 0)
            exposed += (sent - late) / (rate * dimensions(size, sides))
            hidden += late / (rate * dimensions(size, sides))
    step = max(compute + exposed, exposed + hidden)
    peak = devices * chip.peak_flops
    return {
        "clock_hz": cycles.CLOCK[chip.name],
        "cycles": parts,
        "seconds": {
            "compute": compute,
            "collectives_exposed": exposed,
            "collectives_overlapped": hidden,
            "step": step,
        },
        "mfu": {"compute_alone": model / compute / peak, "step": model / step / peak},
        "denominator": f"{devices} x {chip.peak_flops / 1e12:g} TFLOP/s ({chip.name}, bfloat16)",
    }


def dimensions(size: int, sides: list[int]) -> int:
    """Returns how many dimensions of the torus a group of devices spans, at least one."""
    spanned, covered = 0, 1
    for side in sides:
        if covered >= size:
            break
        spanned, covered = spanned + (side > 1), covered * side
    return max(spanned, 1)
