"""Counts the bytes that a program must read: of its parameters, and of values cached for a loop.

They are counted in the jaxpr: each use of a parameter reads it, as often as the loops around it
run. This is a lower bound if arrays are larger than the on-chip memory, like the weights of a large
model; those of a small model may stay there from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Jaxpr, Var
from jax.interpreters.partial_eval import dce_jaxpr

from wamjax.flops import bodies_of, body_of, repeats, scan_sizes

# These return a view of an array, which is read only when the view is used.
_VIEWS = {
    "broadcast_in_dim", "convert_element_type", "copy", "optimization_barrier", "reshape", "slice",
    "squeeze", "transpose",
}  # fmt: skip
_ROWS = {"gather", "dynamic_slice"}  # read as much as they return


class Traffic(NamedTuple):
    """Holds the bytes of one run.

    Attributes:
      weights: bytes of all parameters that are read, each counted once.
      read: bytes of parameters, counted as often as they are read.
      cache: bytes computed before a loop and read in each of its steps, without parameters; of the
        loop with the most.
    """

    weights: int
    read: int
    cache: int


def count(fn: Callable, params: Any, *args) -> Traffic:
    """Counts the traffic of ``fn(params, *args)``; arrays may be abstract."""
    closed = jax.make_jaxpr(fn)(params, *args)
    live, used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    leaves = jax.tree.leaves(params)
    kept = iter(live.invars)
    places = [next(kept) if flag else None for flag in used][: len(leaves)]
    sizes = {v: x.dtype.itemsize for v, x in zip(places, leaves, strict=True) if v is not None}
    weights = sum(_elements(v) * item for v, item in sizes.items())
    return Traffic(weights, _read(live, sizes), _cache(live, sizes))


def _read(jaxpr: Jaxpr, sizes: Mapping[Var, int]) -> int:
    """Returns the bytes read of some variables; `sizes` holds the bytes per element of each."""
    sizes, total = dict(sizes), 0
    for eqn in jaxpr.eqns:
        inputs = [sizes.get(v) if isinstance(v, Var) else None for v in eqn.invars]
        if not any(inputs):
            continue
        name = eqn.primitive.name
        if name in _VIEWS:
            sizes |= {out: item for out, item in zip(eqn.outvars, inputs, strict=False) if item}
        elif name in _ROWS:
            total += _elements(eqn.outvars[0]) * inputs[0] if inputs[0] else 0
        elif name == "scan":
            inner, (consts, carry) = body_of(eqn), scan_sizes(eqn)
            every, slices = inputs[: consts + carry], inputs[consts + carry :]
            length = eqn.params["length"]
            total += length * _read(inner, _named(inner, [*every, *[None] * len(slices)]))
            total += length * _read(inner, _named(inner, [*[None] * len(every), *slices]))
        elif inside := bodies_of(eqn):
            first = len(inputs) - len(inside[0].invars)  # after the index of a branch
            times = repeats(name, eqn.params, None)
            total += times * max(_read(j, _named(j, inputs[first:])) for j in inside)
        else:
            pairs = zip(eqn.invars, inputs, strict=True)
            total += sum(_elements(v) * item for v, item in pairs if item)
    return total


def _cache(jaxpr: Jaxpr, sizes: Mapping[Var, int]) -> int:
    """Returns the bytes that a loop reads again in every step, without parameters; the maximum over
    loops."""
    sizes, most = dict(sizes), 0
    for eqn in jaxpr.eqns:
        inputs = [sizes.get(v) if isinstance(v, Var) else 0 for v in eqn.invars]
        name = eqn.primitive.name
        if name in _VIEWS:
            sizes |= {out: item for out, item in zip(eqn.outvars, inputs, strict=False) if item}
        elif name == "scan":
            fixed = zip(eqn.invars[: scan_sizes(eqn)[0]], inputs, strict=False)
            shared = {v for v, item in fixed if item is None}
            most = max(most, sum(_elements(v) * v.aval.dtype.itemsize for v in shared))
        elif inside := bodies_of(eqn):
            first = len(inputs) - len(inside[0].invars)
            most = max(most, *(_cache(j, _named(j, inputs[first:])) for j in inside))
    return most


def _named(jaxpr: Jaxpr, items: list[int | None]) -> dict[Var, int]:
    return {v: item for v, item in zip(jaxpr.invars, items, strict=True) if item}


def _elements(variable: Any) -> int:
    return int(np.prod(variable.aval.shape, dtype=np.int64))
