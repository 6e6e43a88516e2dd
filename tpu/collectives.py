"""What a compiled TPU program sends between devices, read from its HLO text.

Written for the TPU compiler's output (observed with libtpu 0.0.42), where
- an asynchronous collective is a custom call ``AsyncCollectiveStart`` on a collective that is then
  repeated, with the same channel, in the fusions that overlap it: only the start is counted;
- a reduce-scatter is a fusion that calls a computation named ``all-reduce-scatter``;
- a loop's trip count is the constant in its condition.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "send")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind in one run of the program, on one device.

    Attributes:
      count: how many run, loops counted as often as they run.
      bytes: of their results.
      async_bytes: those of the bytes that overlap with computation.
    """

    count: int = 0
    bytes: int = 0
    async_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class _Op:
    name: str
    result: str  # type, as text
    opcode: str
    rest: str  # operands and attributes


def count(hlo: str) -> dict[str, Traffic]:
    """Collectives of the program by kind; see `Traffic`.

    Raises:
      ValueError: the text has no entry computation, or a loop whose trip count is not found.
    """
    computations, entry = _parse(hlo)
    started = {
        re.match(r"%?([\w.\-]+)", op.rest).group(1)
        for ops in computations.values()
        for op in ops
        if 'custom_call_target="AsyncCollectiveStart"' in op.rest
    }
    out: dict[str, Traffic] = collections.defaultdict(Traffic)

    def walk(name: str, times: int) -> None:
        ops = computations[name]
        # A collective that is under way here, or ends here, but started elsewhere.
        overlapped = name.startswith("async_collective_fusion") or any(
            'custom_call_target="AsyncCollectiveDone"' in op.rest for op in ops
        )
        for op in ops:
            kind = "reduce-scatter" if "calls=%all-reduce-scatter" in op.rest else op.opcode
            if kind in KINDS:
                is_async = op.name in started
                if is_async or not overlapped:
                    _add(out[kind], times, _nbytes(op.result), is_async)
                continue
            again = _trips(op, computations) if op.opcode == "while" else 1
            for called in _called(op):
                walk(called, times * again)

    walk(entry, 1)
    return dict(out)


def _add(traffic: Traffic, times: int, size: int, is_async: bool) -> None:
    traffic.count += times
    traffic.bytes += times * size
    traffic.async_bytes += times * size * is_async


def _parse(hlo: str) -> tuple[dict[str, list[_Op]], str]:
    computations: dict[str, list[_Op]] = {}
    entry, current = None, []
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif op := _LINE.match(line):
            current.append(_Op(*op.groups()))
    if entry is None:
        raise ValueError("no ENTRY computation: is this the text of a compiled program?")
    return computations, entry


def _called(op: _Op) -> list[str]:
    names = _CALLED.findall(op.rest)
    for branches in _BRANCHES.findall(op.rest):
        names += [n.strip(" %") for n in branches.split(",")]
    return names


def _trips(op: _Op, computations: dict[str, list[_Op]]) -> int:
    """The bound in ``counter < constant`` of a loop's condition."""
    condition = re.search(r"condition=%?([\w.\-]+)", op.rest).group(1)
    ops = {o.name: o for o in computations[condition]}
    for compare in ops.values():
        if compare.opcode == "compare" and "direction=LT" in compare.rest:
            for operand in re.findall(r"%([\w.\-]+)", compare.rest.split(")")[0]):
                if operand in ops and ops[operand].opcode == "constant":
                    return int(ops[operand].rest.split(")")[0])
    raise ValueError(f"no trip count in the condition {condition!r} of loop {op.name!r}")


def _nbytes(result: str) -> int:
    total = 0
    for kind, bits, dims in _ARRAY.findall(result):
        size = math.prod(int(d) for d in dims.split(",") if d)
        total += size * (8 if kind == "pred" else int(bits)) // 8
    return total
