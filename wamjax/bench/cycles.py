"""Estimates the time of a compiled TPU program on one device from its HLO text.

The compiler attaches its own estimate to every fusion, copy and reduction (``estimated_cycles``:
for the whole operation, on all cores of the device). This module sums them, with loops as often as
they run. Not included are collectives, Pallas kernels and copies that overlap with other work.
Nothing here was measured on a chip: matmuls agree with the compiler's final schedule within a few
per cent, but small elementwise operations may be off by several times. Use it to compare programs.
"""

from __future__ import annotations

import collections as containers
import re

from wamjax.bench.hlo import Op, operations
from wamjax.hardware import Chip

# Cycles per second, by the names of `hardware.CHIPS`: peak FLOP/s over the FLOPs of all matrix
# units per cycle. For v6e and TPU7x that assumes two passes per cycle.
CLOCK = {"TPU v4": 1.05e9, "TPU v5e": 1.5e9, "TPU v5p": 1.75e9, "TPU v6e": 1.75e9, "TPU7x": 2.2e9}

# Part -> pattern of an operation's name; the first match counts. Names are those of the modules and
# of attention's einsums.
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
# Pallas kernels have no estimate, so their FLOPs are assumed to run at this share of the peak.
KERNELS = 0.6
UNKNOWN = 2**62  # from here on, the number means that there is no estimate
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r'op_name="([^"]*)"')


def count(hlo: str) -> dict[str, int]:
    """Returns part of the program -> estimated cycles of one run, largest first; see `PARTS`.

    Raises:
      ValueError: as for `hlo.operations`.
    """
    cycles: containers.Counter[str] = containers.Counter()
    for op, times, _ in operations(hlo):
        cycles[_part(op.rest)] += times * of(op)
    return dict((+cycles).most_common())


def of(op: Op) -> int:
    """Returns the estimated cycles of one run of an operation; 0 without an estimate."""
    estimate = _ESTIMATE.search(op.rest)
    return int(estimate[1]) if estimate and int(estimate[1]) < UNKNOWN else 0


def seconds(cycles: int, chip: Chip, kernels: float = 0) -> float:
    """Returns the seconds of cycles on one device plus FLOPs in Pallas kernels."""
    return cycles / CLOCK[chip.name] + kernels / (KERNELS * chip.peak_flops)


def _part(rest: str) -> str:
    name = _NAME.search(rest)
    return next((part for part, words in PARTS if name and re.search(words, name[1])), "other")
