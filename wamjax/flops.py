"""Counts floating-point operations of a function in its jaxpr.

The compiler's own `cost_analysis()["flops"]` counts the body of a loop once, which for a model
scanned over 30 layers is wrong by a factor of about 30. Here every contraction is counted where
it stands, times the trip counts around it, after dead code is removed: the number is what one run
executes on all devices together, rematerialised forwards included. Elementwise work is not counted.

One multiply-add is two operations. A convolution counts the taps that meet an input element, not
those in the padding or between dilated inputs; so the three convolutions of a forward and backward
pass cost exactly the same. Trace under the same mesh (`jax.set_mesh`) as the real step if the
function needs one.

`count` is of what is executed. `count_training` is of what training needs: the forward pass, and of
the backward pass what `jax.grad` by the trained parameters computes where nothing is
rematerialised.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Var
from jax.interpreters.partial_eval import dce_jaxpr

# Their results do not change with their operands, or are said not to.
_FLAT = {"stop_gradient", "floor", "ceil", "round", "sign"}


class UnknownTripCount(UserWarning):
    """A `while` loop whose number of iterations depends on data was counted as one iteration."""


def count(fn: Callable, *args, while_trip_count: int | None = None) -> int:
    """Returns FLOPs of one call ``fn(*args)``; see `count_by`."""
    return sum(count_by(fn, *args, while_trip_count=while_trip_count).values())


def count_by(fn: Callable, *args, while_trip_count: int | None = None) -> dict[str, int]:
    """Returns FLOPs of one call ``fn(*args)`` by primitive (``dot_general``,
    ``conv_general_dilated``), or ``kernel``: the work of a Pallas kernel on any platform, whatever
    computes it on this one.

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


def count_calls(fn: Callable, *args) -> tuple[int, dict[str, tuple[int, int]]]:
    """Returns `count` of a call ``fn(*args)``, and of each jitted function inside it.

    Returns:
      (FLOPs, name of the function -> (how often it runs, FLOPs of all its runs)). What is not used
      of its results is not counted; of a `cond` the most expensive branch is.
    """
    closed = jax.make_jaxpr(fn)(*args)
    live, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    runs, work = _calls(live)
    return _jaxpr(live, None).total(), {name: (n, work[name]) for name, n in runs.items()}


def count_training(fn: Callable, params: Any, *args) -> int:
    """Returns FLOPs of ``fn(params, *args)`` and its gradient by `params`, with nothing computed
    twice.

    The same as `count` of ``jax.value_and_grad(fn)`` if `fn` does not rematerialise: a contraction
    counts once, and once more for each operand that depends on `params`, if the result depends on
    it. So three times the forward pass where parameters and what goes through them are trained;
    twice where parameters are frozen, or take what comes from the data; once in an encoder that is
    frozen or whose gradient is stopped. Of a `jax.custom_vjp` the function is looked at, not what
    its derivative does; what cannot be looked into costs three times its forward pass.

    Args:
      fn: gives one number; otherwise as for `count`.
      params: any pytree, of arrays or `jax.ShapeDtypeStruct`s as `args`.
    """
    closed = jax.make_jaxpr(fn)(params, *args)
    live, used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    trained = len(jax.tree.leaves(params))
    active = [i < trained for i, is_used in enumerate(used) if is_used]
    backward, _ = _gradient(live, active, [True] * len(live.outvars))
    return _jaxpr(live, None).total() + backward.total()


def _jaxpr(jaxpr: Jaxpr, trips: int | None) -> Counter:
    total = Counter()
    for eqn in jaxpr.eqns:
        total.update(_equation(eqn, trips))
    return total


def _calls(jaxpr: Jaxpr) -> tuple[Counter, Counter]:
    """Returns how often jitted functions run, by name, and their FLOPs."""
    runs, work = Counter(), Counter()
    for eqn in jaxpr.eqns:
        name, inner = eqn.primitive.name, list(_jaxprs_in(eqn.params))
        if name == "cond":
            inner = [max(inner, key=lambda j: _jaxpr(j, None).total())]
        for part in inner:
            for total, more in zip((runs, work), _calls(part), strict=True):
                total.update(_times(more, repeats(name, eqn.params, None)))
        if name in ("jit", "pjit"):
            runs[eqn.params["name"]] += 1
            work[eqn.params["name"]] += sum(_jaxpr(j, None).total() for j in inner)
    return runs, work


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
        most = max(inner, key=lambda c: c.total())
        by_kernel = any(_has_kernel(getattr(j, "jaxpr", j)) for j in params["branches"])
        return Counter(kernel=most.total()) if by_kernel else most
    return _times(sum(inner, Counter()), repeats(name, params, trips))


def repeats(name: str, params: dict, trips: int | None) -> int:
    """Returns how often the jaxprs inside an equation run.

    Args:
      name, params: of the equation's primitive.
      trips: of a loop whose length is not static.
    """
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # the body is one device's share
        sizes = params["mesh"].shape
        axes = params.get("newly_manual_axes", params.get("manual_axes"))  # before jax 0.10.2
        return math.prod(sizes[axis] for axis in axes)
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
    """Returns the jaxprs among an equation's parameters: jit, remat, custom_jvp, custom_vjp, scan,
    ..."""
    for key, value in params.items():
        items = value if isinstance(value, (tuple, list)) else (value,)
        # One class from jax 0.12 on.
        jaxprs = [getattr(x, "jaxpr", x) for x in items if isinstance(x, (ClosedJaxpr, Jaxpr))]
        if key == "branches":
            # Of a choice of kernels by platform, that of plain operations: others pad, and count
            # what they do not see.
            jaxprs = [j for j in jaxprs if not _has_kernel(j)] or jaxprs
        yield from jaxprs


def _has_kernel(jaxpr: Jaxpr) -> bool:
    return any(
        eqn.primitive.name == "pallas_call" or any(map(_has_kernel, _jaxprs_in(eqn.params)))
        for eqn in jaxpr.eqns
    )


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
    """Returns the number of (output, kernel) positions along one dimension that meet an input
    element."""
    at = np.arange(out)[:, None] * stride + np.arange(kernel) * rhs_dilation - low
    return int(np.sum((at >= 0) & (at <= (size - 1) * lhs_dilation) & (at % lhs_dilation == 0)))


def _gradient(
    jaxpr: Jaxpr, active: Sequence[bool], wanted: Sequence[bool]
) -> tuple[Counter, list[bool]]:
    """Returns FLOPs of the backward pass alone.

    Args:
      active: which inputs depend on trained parameters.
      wanted: which outputs the result depends on.

    Returns:
      the FLOPs, and which inputs get a gradient.
    """
    depends = _depending(jaxpr, active)
    ends = zip(jaxpr.outvars, wanted, strict=True)
    need = {v for v, is_wanted in ends if is_wanted and isinstance(v, Var) and v in depends}
    total = Counter()
    for eqn in reversed(jaxpr.eqns):
        out = [v in need for v in eqn.outvars]
        if any(out):
            cost, asks = _equation_gradient(eqn, _flags(eqn.invars, depends), out)
            total.update(cost)
            need.update(v for v, is_asked in zip(eqn.invars, asks, strict=True) if is_asked)
    return total, _flags(jaxpr.invars, need)


def _equation_gradient(
    eqn, active: list[bool], wanted: list[bool]
) -> tuple[Counter, list[bool]]:
    """Returns `_gradient` of one equation."""
    name = eqn.primitive.name
    if name in ("dot_general", "conv_general_dilated"):
        return _times(_equation(eqn, None), sum(active)), active
    if name == "scan":
        return _scan_gradient(eqn, active, wanted)
    if bodies := bodies_of(eqn):
        first = len(active) - len(bodies[0].invars)  # after the index of a branch
        costs, asks = zip(*(_gradient(j, active[first:], wanted) for j in bodies), strict=True)
        cost = _times(max(costs, key=lambda c: c.total()), repeats(name, eqn.params, None))
        return cost, [False] * first + [any(flags) for flags in zip(*asks, strict=True)]
    return _times(_equation(eqn, None), 2), active


def _scan_gradient(
    eqn, active: list[bool], wanted: list[bool]
) -> tuple[Counter, list[bool]]:
    body, (consts, carry) = body_of(eqn), scan_sizes(eqn)
    inside, _ = _scan_activity(eqn, active)
    while True:  # what one step wants of the carry, the step before it has to deliver
        cost, asks = _gradient(body, inside, wanted)
        asked = asks[consts : consts + carry]
        more = [a or w for a, w in zip(asked, wanted[:carry], strict=True)] + wanted[carry:]
        if more == wanted:
            return _times(cost, eqn.params["length"]), asks
        wanted = more


def _depending(jaxpr: Jaxpr, active: Sequence[bool]) -> set[Var]:
    """Returns the variables that depend differentiably on the active inputs."""
    depending = {v for v, is_active in zip(jaxpr.invars, active, strict=True) if is_active}
    for eqn in jaxpr.eqns:
        out = _activity(eqn, _flags(eqn.invars, depending))
        depending.update(v for v, is_active in zip(eqn.outvars, out, strict=True) if is_active)
    return depending


def _activity(eqn, active: list[bool]) -> list[bool]:
    """Returns which results of an equation depend on its active operands; see `_depending`."""
    name = eqn.primitive.name
    # A `while` loop has no backward pass: where it is differentiated, nothing goes through it.
    if not any(active) or name in _FLAT or name == "while":
        return [False] * len(eqn.outvars)
    out = [True] * len(eqn.outvars)
    if name == "scan":
        _, out = _scan_activity(eqn, active)
    elif bodies := bodies_of(eqn):
        first = len(active) - len(bodies[0].invars)
        outs = (_flags(j.outvars, _depending(j, active[first:])) for j in bodies)
        out = [any(flags) for flags in zip(*outs, strict=True)]
    continuous = (jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars)
    return [a and c for a, c in zip(out, continuous, strict=True)]


def _scan_activity(eqn, active: list[bool]) -> tuple[list[bool], list[bool]]:
    """Returns which inputs of a loop's body are active in some step, and which of its outputs."""
    body, (consts, carry) = body_of(eqn), scan_sizes(eqn)
    while True:
        out = _flags(body.outvars, _depending(body, active))
        before = active[consts : consts + carry]
        after = [a or b for a, b in zip(before, out[:carry], strict=True)]
        if after == before:
            return active, out
        active = [*active[:consts], *after, *active[consts + carry :]]


def scan_sizes(eqn) -> tuple[int, int]:
    """How many constants a loop has, and how much it carries: what has another rank outside than in
    the body is stacked. The parameters say it too, in another way from jax 0.12 on."""
    body = body_of(eqn)

    def same(outside, inside) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)

    carry = same(eqn.outvars, body.outvars)
    return same(eqn.invars, body.invars) - carry, carry


def body_of(eqn) -> Jaxpr:
    """What one step of a loop computes."""
    return next(_jaxprs_in({"jaxpr": eqn.params["jaxpr"]}))


def bodies_of(eqn) -> list[Jaxpr]:
    """Returns the functions that an equation calls on its operands; for a `cond` all branches."""
    operands = len(eqn.invars) - (eqn.primitive.name == "cond")
    size = operands, len(eqn.outvars)
    return [j for j in _jaxprs_in(eqn.params) if (len(j.invars), len(j.outvars)) == size]


def _flags(variables: Sequence[Any], which: set[Var]) -> list[bool]:
    return [isinstance(v, Var) and v in which for v in variables]
