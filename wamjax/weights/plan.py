"""Applies a key map: checks a source against it, and converts tensors in both directions."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from wamjax.weights import bounds, table
from wamjax.weights.beside import Check
from wamjax.weights.table import Piece, Table
from wamjax.weights.tensor import Tensor, Tensors

Slice = tuple[str, int | None]  # a parameter's path and layer


class Mismatch(ValueError):
    """A source does not match the key map and the sizes; the message names every offender."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds all correspondences of one layout of a family, at given sizes.

    Attributes:
      name: family and layout, for messages.
      pieces: the correspondences.
      ignore: regexes of unused keys that the file may have, each with its check, see `beside`.
      tied: key -> the key whose values it repeats; files may leave it out.
    """

    name: str
    pieces: tuple[Piece, ...]
    ignore: Mapping[str, Check] = dataclasses.field(default_factory=dict)
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def published(self) -> dict[str, tuple[int, ...]]:
        """Returns keys and shapes of a file in this layout, in natural order."""
        shapes = {k: p.published for p in self.pieces for k in (p.theirs, *p.copies)}
        return dict(sorted(shapes.items(), key=lambda item: _natural(item[0])))

    def overlap(self, keys: Iterable[str]) -> int:
        """Returns how many of `keys` belong to this layout."""
        return len(self.published.keys() & set(keys))

    def check(self, tensors: Tensors) -> None:
        """Raises `Mismatch` if the source cannot be used as it is; names the reasons."""
        expected = self.published
        problems = {
            "missing": [f"{k} {s}" for k, s in expected.items() if k not in tensors],
            "unknown": self._unused(tensors),
            "of another shape": [
                f"{k} is {tensors[k].shape}, expected {s}"
                for k, s in expected.items()
                if k in tensors and tensors[k].shape != s
            ],
            "not floating-point": [
                f"{k} is {tensors[k].dtype}"
                for k in expected
                if k in tensors and not jnp.issubdtype(tensors[k].dtype, jnp.floating)
            ],
        }
        if not any(problems.values()):
            problems = {
                "unequal copies": list(self._unequal(tensors)),
                "unused and not as expected": list(self._wrong_beside(tensors)),
            }
        if any(problems.values()):
            raise Mismatch(f"the source does not match {self.name}:" + _listed(problems))

    @property
    def params(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the parameters by path."""
        layers: dict[str, int] = {}
        for p in self.pieces:
            layers[p.ours] = layers.get(p.ours, 0) + (p.layer is not None)
        return {p.ours: (layers[p.ours],) * bool(layers[p.ours]) + p.shape for p in self.pieces}

    def check_ours(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises `Mismatch` if parameters cannot be exported; names the reasons."""
        expected = self.params
        problems = {
            "missing": [f"{k} {s}" for k, s in expected.items() if k not in shapes],
            "unknown": [f"{k} {s}" for k, s in shapes.items() if k not in expected],
            "of another shape": [
                f"{k} is {shapes[k]}, expected {s}"
                for k, s in expected.items()
                if k in shapes and shapes[k] != s
            ],
        }
        if any(problems.values()):
            raise Mismatch(f"the parameters do not match {self.name}:" + _listed(problems))

    def _may_be(self, key: str) -> bool:
        return key in self.tied or any(re.fullmatch(p, key) for p in self.ignore)

    def _wrong_beside(self, tensors: Tensors) -> Iterable[str]:
        for key in tensors:
            if key in self.published or key in self.tied:
                continue
            checks = (check for p, check in self.ignore.items() if re.fullmatch(p, key))
            if wrong := next(checks)(key, tensors):
                yield f"{key} {wrong}"

    def _unused(self, tensors: Tensors) -> list[str]:
        unused = [k for k in tensors if k not in self.published and not self._may_be(k)]
        missing = (
            self.published.keys() - tensors.keys() if len(unused) < 20 else ()
        )  # computing it is slow
        close = {k: difflib.get_close_matches(k, missing, 1, 0.85) for k in unused}
        meant = {k: f", did you mean {c[0]!r}?" if c else "" for k, c in close.items()}
        return [f"{k} {tensors[k].shape}{meant[k]}" for k in unused]

    def _unequal(self, tensors: Tensors) -> Iterable[str]:
        pairs = [(copy, p.theirs) for p in self.pieces for copy in p.copies]
        pairs += [(k, v) for k, v in self.tied.items() if k in tensors and v in self.published]
        for copy, first in pairs:
            a, b = tensors[copy].read(), tensors[first].read()
            if a.shape != b.shape or not np.array_equal(_bits(a), _bits(b)):
                yield f"{copy} differs from {first}"

    def to_ours(self, tensors: Tensors, dtype: Any = None) -> dict[Slice, Tensor]:
        """Returns every slice of every parameter, computed when it is read.

        Args:
          tensors: tensors that passed `check`.
          dtype: dtype of the result; that of the source if None. The layers of a parameter use
            their widest dtype.
        """
        widest: dict[str, np.dtype] = {}
        for p in self.pieces:
            own = tensors[p.theirs].dtype
            widest[p.ours] = jnp.promote_types(widest.get(p.ours, own), own)
        return {
            (p.ours, p.layer): _made(
                p.shape,
                np.dtype(dtype or widest[p.ours]),
                lambda p=p: p.to_ours(tensors[p.theirs].read()),
            )
            for p in self.pieces
        }

    def to_theirs(self, ours: Callable[[Slice], Tensor], dtype: Any = None) -> dict[str, Tensor]:
        """Returns every published tensor, computed when it is read; the layers of a parameter are
        consecutive.

        Args:
          ours: returns a slice of a parameter.
          dtype: dtype of the result; that of the parameters if None.
        """
        parts: dict[str, dict[int, Piece]] = {}
        for p in self.pieces:
            for key in (p.theirs, *p.copies):
                parts.setdefault(key, {})[p.part[0]] = p

        def make(pieces: dict[int, Piece]) -> Tensor:
            sources = [(p, ours((p.ours, p.layer))) for _, p in sorted(pieces.items())]

            def read() -> np.ndarray:
                values = [p.to_theirs(x.read()) for p, x in sources]
                return values[0] if len(values) == 1 else np.concatenate(values)

            own = dtype or sources[0][1].dtype
            return _made(sources[0][0].published, np.dtype(own), read)

        return {key: make(pieces) for key, pieces in parts.items()}


def make(
    name: str,
    rows: Table,
    abstract: Any,
    ignore: Mapping[str, Check] | None = None,
    tied: Mapping[str, str] | None = None,
) -> Plan:
    """Returns the plan of a table for parameters of these shapes.

    Raises:
      ValueError: the table is wrong: it does not cover a parameter exactly once, uses a key twice,
      or uses a tensor in part.
    """
    pieces = tuple(table.expand(rows, abstract))
    uses: dict[str, list[tuple[int, int]]] = {}
    for p in pieces:
        for key in (p.theirs, *p.copies):
            uses.setdefault(key, []).append(p.part)
    wrong = []
    for key, parts in uses.items():
        if sorted(parts) != [(j, parts[0][1]) for j in range(parts[0][1])]:
            wrong.append(f"{key}: parts {sorted(parts)}")
    if wrong:
        raise ValueError(f"the key map of {name} must use each tensor once and completely; correct "
                         "its rows of:\n  "
                         + "\n  ".join(wrong))  # fmt: skip
    return Plan(name, pieces, ignore or {}, tied or {})


def _made(shape: tuple[int, ...], dtype: np.dtype, read: Callable[[], np.ndarray]) -> Tensor:
    return Tensor(tuple(shape), dtype, lambda: read().astype(dtype, copy=False))


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def _natural(key: str) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 9."""
    return [(int(s), "") if s.isdigit() else (-1, s) for s in re.split(r"(\d+)", key)]


def _listed(problems: Mapping[str, list[str]]) -> str:
    """Lists the first of each kind in a line; keys that differ only in their first number become
    one."""
    parts = []
    for what, lines in problems.items():
        groups: dict[tuple[str, str], list[int]] = {}
        for line in lines:
            head, number, tail = (re.split(r"(\d+)", line, maxsplit=1) + ["", ""])[:3]
            in_key = number and " " not in head
            key = (head, tail) if in_key else (line, "")
            groups.setdefault(key, []).append(int(number) if in_key else -1)
        kinds = [f"{head}{_numbers(numbers)}{tail}" for (head, tail), numbers in groups.items()]
        if lines:
            parts.append(f"{what} ({len(lines)}): {bounds.few(kinds)}")
    if problems.get("of another shape"):
        parts.append("if the sizes are not the published ones, give them by --config, a JSON file "
                     'such as {"model.layers": 12}')  # fmt: skip
    return " " + "; ".join(parts)


def _numbers(numbers: list[int]) -> str:
    if numbers == [-1]:
        return ""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"
