"""What a compiled TPU program is estimated to take on one device, read from its HLO text.

The compiler writes its own estimate beside every fusion, copy and reduction (``estimated_cycles``:
of the whole operation, by all cores of the device). Those are summed, loops as often as they run.
They do not include collectives, Pallas kernels and copies that run beside the rest. Nothing here
was measured on a chip: matmuls agree with the compiler's final schedule within a few per cent,
small elementwise operations may be off by several times. Good for comparing programs.
"""

from __future__ import annotations

import collections as containers
import re

from wamjax.bench.hlo import Op, operations
from wamjax.hardware import Chip

# Cycles a second, by the names of `hardware.CHIPS`: peak FLOP/s over the FLOPs of all matrix units
# in a cycle. For v6e and TPU7x that assumes two passes a cycle.
CLOCK = {"TPU v4": 1.05e9, "TPU v5e": 1.5e9, "TPU v5p": 1.75e9, "TPU v6e": 1.75e9, "TPU7x": 2.2e9}

# Part -> what the name of an operation contains, the first that matches. Names are those of the
# modules and of the einsums of attention.
PARTS = (
    ("codec", r"(?i)codec|vae"),
    ("optimiser and cast", r"^jit\(train_step\)/(?!.*jvp\((?!\)))"),
    ("feed-forward", r"/ffn/"),
    ("attention", r"bn[lsk]+,|_read|/blocks/(?!.*/)"),
    ("projections", r"/(q|k|v|o)/|/[kqv]_norm|_split"),
    ("norm, modulation, residual", r"_enter|_leave|\.adapt|LayerNorm|_norm"),
    ("rotary embedding", r"\.project/"),
    ("layers of the scan", r"dynamic_|/while/"),
)
# Pallas kernels have no estimate: their FLOPs at this part of the peak.
KERNELS = 0.6
UNKNOWN = 2**62  # more than that stands for an operation without an estimate
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r'op_name="([^"]*)"')


def count(hlo: str) -> dict[str, int]:
    """Part of the program -> estimated cycles of one run, most first; see `PARTS`.

    Raises:
      ValueError: as of `hlo.operations`.
    """
    cycles: containers.Counter[str] = containers.Counter()
    for op, times, _ in operations(hlo):
        cycles[_part(op.rest)] += times * of(op)
    return dict((+cycles).most_common())


def of(op: Op) -> int:
    """Estimated cycles of one run of an operation; 0 where the compiler says nothing."""
    estimate = _ESTIMATE.search(op.rest)
    return int(estimate[1]) if estimate and int(estimate[1]) < UNKNOWN else 0


def seconds(cycles: int, chip: Chip, kernels: float = 0) -> float:
    """What cycles on one device take, and FLOPs in Pallas kernels beside them."""
    return cycles / CLOCK[chip.name] + kernels / (KERNELS * chip.peak_flops)


def _part(rest: str) -> str:
    name = _NAME.search(rest)
    return next((part for part, words in PARTS if name and re.search(words, name[1])), "other")
