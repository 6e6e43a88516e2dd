"""Parses the text of a compiled program into computations, operations and how often they run.

It is written for the TPU compiler's output (observed with libtpu 0.0.42), in which a loop's trip
count is the constant in its condition; other compilers state it at the loop.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')

# Operations that only name values, and take no time.
_NOTHING = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")


@dataclasses.dataclass(frozen=True)
class Op:
    """Describes an operation."""

    name: str
    result: str  # type, as text
    opcode: str
    rest: str  # operands and attributes


def parse(hlo: str) -> tuple[dict[str, list[Op]], str]:
    """Splits a program into the operations of each computation, and the name of its entry.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, list[Op]] = {}
    entry, current = None, []
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif op := _LINE.match(line):
            current.append(Op(*op.groups()))
    if entry is None:
        raise ValueError("no ENTRY computation: is this the text of a compiled program?")
    return computations, entry


def called(op: Op) -> list[str]:
    """Returns the names of the computations that an operation runs."""
    names = _CALLED.findall(op.rest)
    for branches in _BRANCHES.findall(op.rest):
        names += [n.strip(" %") for n in branches.split(",")]
    return names


def operations(hlo: str) -> Iterator[tuple[Op, int, bool]]:
    """Yields (operation, how often it runs, whether it is in a loop); a fusion is one operation.

    Raises:
      ValueError: as for `parse` and `trips`.
    """
    computations, entry = parse(hlo)

    def walk(name: str, times: int, looped: bool) -> Iterator[tuple[Op, int, bool]]:
        for op in computations[name]:
            if op.opcode == "while":
                again = trips(op, computations)
                for body in called(op):
                    yield from walk(body, times * again, True)
            elif op.opcode in ("call", "conditional"):
                for body in called(op):
                    yield from walk(body, times, looped)
            elif op.opcode not in _NOTHING:
                yield op, times, looped

    return walk(entry, 1, False)


def trips(op: Op, computations: dict[str, list[Op]]) -> int:
    """Returns how often a loop runs: the constant in ``counter < constant`` of its condition.

    Raises:
      ValueError: the condition has no such comparison.
    """
    if counted := _TRIPS.search(op.rest):
        return int(counted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", op.rest).group(1)
    ops = {o.name: o for o in computations[condition]}
    for compare in ops.values():
        if compare.opcode == "compare" and "direction=LT" in compare.rest:
            for operand in re.findall(r"%([\w.\-]+)", compare.rest.split(")")[0]):
                if operand in ops and ops[operand].opcode == "constant":
                    return int(ops[operand].rest.split(")")[0])
    raise ValueError(f"no trip count in the condition {condition!r} of loop {op.name!r}")
