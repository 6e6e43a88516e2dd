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
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind in one run of the program, on one device.

    Attributes:
      count: how many run, loops counted as often as they run.
      bytes: of their results.
      async_bytes: those of the bytes that overlap with computation.
      sent, sent_async: size of the groups -> bytes that a device sends, by the ring algorithms;
        all, and those that overlap. Without collectives whose groups are not in the text.
    """

    count: int = 0
    bytes: int = 0
    async_bytes: int = 0
    sent: dict[int, int] = dataclasses.field(default_factory=dict)
    sent_async: dict[int, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation: its name, the type of its result, what it is, its operands and attributes."""

    name: str
    result: str  # type, as text
    opcode: str
    rest: str  # operands and attributes


def count(hlo: str) -> dict[str, Traffic]:
    """Collectives of the program by kind; see `Traffic`.

    Raises:
      ValueError: the text has no entry computation, or a loop whose trip count is not found.
    """
    computations, entry = parse(hlo)
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
                    size = _group(op, computations)
                    _add(out[kind], times, _nbytes(op.result), is_async)
                    _send(out[kind], kind, size, times * _nbytes(op.result), is_async)
                continue
            again = trips(op, computations) if op.opcode == "while" else 1
            for callee in called(op):
                walk(callee, times * again)

    walk(entry, 1)
    return dict(out)


def _add(traffic: Traffic, times: int, size: int, is_async: bool) -> None:
    traffic.count += times
    traffic.bytes += times * size
    traffic.async_bytes += times * size * is_async


def _send(traffic: Traffic, kind: str, size: int, result: int, is_async: bool) -> None:
    """Counts what a device sends for a result of so many bytes in groups of `size` devices."""
    if size < 2:
        return
    others = (size - 1) / size
    factors = {"all-reduce": 2 * others, "reduce-scatter": size - 1, "collective-permute": 1}
    sent = round(result * factors.get(kind, others))
    traffic.sent[size] = traffic.sent.get(size, 0) + sent
    if is_async:
        traffic.sent_async[size] = traffic.sent_async.get(size, 0) + sent


def _group(op: Op, computations: dict[str, list[Op]]) -> int:
    """Devices that an operation, or what it calls, joins; 0 where the text does not say."""
    texts = [op.rest] + [inner.rest for name in called(op) for inner in computations[name]]
    for text in texts:
        if listed := _LISTED.search(text):
            return listed.group(1).count(",") + 1
        if iota := _IOTA.search(text):
            return int(iota.group(1))
        if mesh := _MESH.search(text):
            sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", mesh.group(1))}
            return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", mesh.group(2)))
    return 0


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
    """Names of the computations that an operation runs."""
    names = _CALLED.findall(op.rest)
    for branches in _BRANCHES.findall(op.rest):
        names += [n.strip(" %") for n in branches.split(",")]
    return names


def trips(op: Op, computations: dict[str, list[Op]]) -> int:
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
