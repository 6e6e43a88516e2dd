"""Counts what a compiled TPU program sends between devices, from its HLO text.

It is written for the TPU compiler's output (observed with libtpu 0.0.42), where
- an asynchronous collective is a custom call ``AsyncCollectiveStart`` on a collective that is then
  repeated, with the same channel, in the fusions that overlap it: only the start is counted;
- a reduce-scatter is a fusion that calls a computation named ``all-reduce-scatter``.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re

from wamjax.bench.hlo import Op, called, parse, trips

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "send")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")


@dataclasses.dataclass
class Traffic:
    """Counts collectives of one kind in one run of the program, on one device.

    Attributes:
      count: how many run, including repetitions in loops.
      bytes: bytes of their results.
      async_bytes: the part of them that overlaps with computation.
      sent, sent_async: size of the groups -> bytes that a device sends by the ring algorithms, all
        and overlapped. Collectives whose groups are not in the text are missing.
    """

    count: int = 0
    bytes: int = 0
    async_bytes: int = 0
    sent: dict[int, int] = dataclasses.field(default_factory=dict)
    sent_async: dict[int, int] = dataclasses.field(default_factory=dict)


def count(hlo: str) -> dict[str, Traffic]:
    """Counts the collectives of a program by kind.

    Raises:
      ValueError: the text has no entry computation, or a loop without a trip count.
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
        # A collective in progress or ending here, which was counted at its start.
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
    """Counts the bytes that a device sends for a result of `result` bytes in groups of `size`."""
    if size < 2:
        return
    others = (size - 1) / size
    factors = {"all-reduce": 2 * others, "reduce-scatter": size - 1, "collective-permute": 1}
    sent = round(result * factors.get(kind, others))
    traffic.sent[size] = traffic.sent.get(size, 0) + sent
    if is_async:
        traffic.sent_async[size] = traffic.sent_async.get(size, 0) + sent


def _group(op: Op, computations: dict[str, list[Op]]) -> int:
    """Returns the group size of an operation, or of what it calls; 0 if it is not in the text."""
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


def _nbytes(result: str) -> int:
    total = 0
    for kind, bits, dims in _ARRAY.findall(result):
        size = math.prod(int(d) for d in dims.split(",") if d)
        total += size * (8 if kind == "pred" else int(bits)) // 8
    return total
