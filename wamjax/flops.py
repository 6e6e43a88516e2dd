"""Floating-point operations of a function, counted in its jaxpr.

The compiler's own `cost_analysis()["flops"]` counts the body of a loop once, which for a model
scanned over 30 layers is wrong by a factor of about 30. Here every contraction is counted where
it stands, times the trip counts around it, after dead code is removed: the number is what one run
executes on all devices together, rematerialised forwards included. Elementwise work is not counted.

One multiply-add is two operations. A convolution counts the taps that meet an input element, not
those in the padding or between dilated inputs; so the three convolutions of a forward and backward
pass cost exactly the same. Trace under the same mesh (`jax.set_mesh`) as the real step if the
function needs one.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr


class UnknownTripCount(UserWarning):
    """A `while` loop whose number of iterations depends on data was counted as one iteration."""


def count(fn: Callable, *args, while_trip_count: int | None = None) -> int:
    """FLOPs of one call ``fn(*args)``; see `count_by`."""
    return sum(count_by(fn, *args, while_trip_count=while_trip_count).values())


def count_by(fn: Callable, *args, while_trip_count: int | None = None) -> dict[str, int]:
    """FLOPs of one call ``fn(*args)`` by primitive (``dot_general``, ``conv_general_dilated``).

    Args:
      fn: any traceable function, jitted or not. Bind static arguments with `functools.partial`.
      *args: arrays or `jax.ShapeDtypeStruct`s; nothing is allocated or run.
      while_trip_count: iterations assumed for each `while` loop whose count is not static. Without
        it such a loop counts once, with an `UnknownTripCount` warning.

    Of a `cond` the most expensive branch is counted.
    """
    closed = jax.make_jaxpr(fn)(*args)
    live, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return dict(_jaxpr(live, while_trip_count))


def _jaxpr(jaxpr: Jaxpr, trips: int | None) -> Counter:
    total = Counter()
    for eqn in jaxpr.eqns:
        total.update(_equation(eqn, trips))
    return total


def _equation(eqn, trips: int | None) -> Counter:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        return Counter({name: _dot(eqn)})
    if name == "conv_general_dilated":
        return Counter({name: _conv(eqn)})
    inner = [_jaxpr(j, trips) for j in _jaxprs_in(params)]
    if not any(inner):
        return Counter()
    if name == "cond":
        return max(inner, key=lambda c: c.total())
    return _times(sum(inner, Counter()), _repeats(name, params, trips))


def _repeats(name: str, params: dict, trips: int | None) -> int:
    """How often the jaxprs inside an equation run."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # the body is one device's share
        sizes = params["mesh"].shape
        return math.prod(sizes[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "while":
        if trips is None:
            warnings.warn(
                "a while loop with a data-dependent number of iterations was counted once; pass "
                "while_trip_count=..., or use lax.scan or static fori_loop bounds",
                UnknownTripCount,
                stacklevel=2,
            )
        return 1 if trips is None else trips
    return 1


def _jaxprs_in(params: dict) -> Iterator[Jaxpr]:
    """The jaxprs among an equation's parameters: jit, remat, custom_jvp, custom_vjp, scan, ..."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (ClosedJaxpr, Jaxpr)):  # one class from jax 0.12 on
                yield getattr(item, "jaxpr", item)


def _times(counts: Counter, n: int) -> Counter:
    return Counter({name: value * n for name, value in counts.items()})


def _dot(eqn) -> int:
    (contract, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[d] for d in contract)


def _conv(eqn) -> int:
    p = eqn.params
    lhs_spec, rhs_spec, out_spec = p["dimension_numbers"]
    lhs, rhs = (v.aval.shape for v in eqn.invars)
    out = eqn.outvars[0].aval.shape
    taps = 1
    for i, (low, _) in enumerate(p["padding"]):
        taps *= _taps(
            lhs[lhs_spec[2 + i]],
            rhs[rhs_spec[2 + i]],
            out[out_spec[2 + i]],
            p["window_strides"][i],
            low,
            p["lhs_dilation"][i],
            p["rhs_dilation"][i],
        )
    in_features = rhs[rhs_spec[1]]  # already per feature group
    return 2 * out[out_spec[0]] * out[out_spec[1]] * in_features * taps


def _taps(size, kernel, out, stride, low, lhs_dilation, rhs_dilation) -> int:
    """(output, kernel) positions along one dimension that meet an element of the input."""
    at = np.arange(out)[:, None] * stride + np.arange(kernel) * rhs_dilation - low
    return int(np.sum((at >= 0) & (at <= (size - 1) * lhs_dilation) & (at % lhs_dilation == 0)))
