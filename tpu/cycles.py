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

import collectives

# Cycles a second, by the names of `hardware.CHIPS`: peak FLOP/s over the FLOPs of all matrix units
# in a cycle. For v6e and TPU7x that assumes two passes a cycle.
CLOCK = {"TPU v4": 1.05e9, "TPU v5e": 1.5e9, "TPU v5p": 1.75e9, "TPU v6e": 1.75e9, "TPU7x": 2.2e9}

# Part -> what the name of an operation contains, the first that matches. Names are those of the
# modules and of the einsums of attention.
PARTS = (
    ("codec", r"(?i)codec|vae|encoder/"),
    ("optimiser and cast", r"^jit\(train_step\)/(?!.*jvp\((?!\)))"),
    ("feed-forward", r"/ffn/"),
    ("attention", r"bn[lsk]+,|_read|/blocks/(?!.*/)"),
    ("projections", r"/(q|k|v|o)/|/[kqv]_norm|_split"),
    ("norm, modulation, residual", r"_enter|_leave|\.adapt|LayerNorm|_norm"),
    ("rotary embedding", r"\.project/"),
    ("layers of the scan", r"dynamic_|/while/"),
)
UNKNOWN = 2**62  # more than that stands for an operation without an estimate
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r'op_name="([^"]*)"')


def count(hlo: str) -> dict[str, int]:
    """Part of the program -> estimated cycles of one run, most first; see `PARTS`.

    Raises:
      ValueError: as of `collectives.count`.
    """
    computations, entry = collectives.parse(hlo)
    cycles: containers.Counter[str] = containers.Counter()

    def walk(name: str, times: int) -> None:
        for op in computations[name]:
            if op.opcode == "while":
                for called in collectives.called(op):
                    walk(called, times * collectives.trips(op, computations))
            elif op.opcode in ("call", "conditional"):
                for called in collectives.called(op):
                    walk(called, times)
            elif (estimate := _ESTIMATE.search(op.rest)) and int(estimate[1]) < UNKNOWN:
                cycles[_part(op.rest)] += times * int(estimate[1])

    walk(entry, 1)
    return dict(cycles.most_common())


def _part(rest: str) -> str:
    name = _NAME.search(rest)
    return next((part for part, words in PARTS if name and re.search(words, name[1])), "other")
