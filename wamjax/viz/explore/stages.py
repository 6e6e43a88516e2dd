"""What a program of a method really runs: every evaluation of its network, told by a trace.

Acting, imagining, sampling and the loss are traced with abstract arrays; whatever goes through the
blocks of the network is written down on the way: which groups are computed, which are read from the
cache, what is added to it. So a stage is what the program does, not what someone drew of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from wamjax import flops
from wamjax.models.transformer import Transformer
from wamjax.training import sharding
from wamjax.wam.objectives import bind

MARK = "wamjax_stage_"
ONE = {"data": 1, "fsdp": 1, "tensor": 1}  # a mesh of one device
TIMED = 10  # calls
TOKEN = "token"  # what a network predicts that has no groups of outputs


@dataclasses.dataclass(frozen=True)
class Stage:
    """One kind of evaluation of a network in a program.

    Attributes:
      table: name of the visibility table.
      rows: examples that go through it together; two for one under guidance.
      computed: group -> tokens that go through the blocks.
      cached: group -> tokens whose keys and values are read from the cache.
      emits: group -> tokens whose keys and values it adds to the cache.
      text: "computed", "cached" or "": what cross-attention reads.
      predicts: groups whose output is wanted.
      repeats: how often the program runs it.
      flops: of one run.
      cache_bytes: that it adds.
      milliseconds: of one run, where it was measured; NaN elsewhere.
    """

    table: str
    rows: int
    computed: dict[str, int]
    cached: dict[str, int]
    emits: dict[str, int]
    text: str
    predicts: tuple[str, ...]
    repeats: int
    flops: int
    cache_bytes: int
    milliseconds: float = float("nan")

    @property
    def name(self) -> str:
        """What it does, in few words."""
        if TOKEN in self.predicts and not self.emits:
            return f"predict the tokens of {' + '.join(self.computed)}"
        if TOKEN in self.predicts:
            return "the next token" if self.cached else f"prefill {' + '.join(self.emits)}"
        if self.predicts:
            return f"denoise {' + '.join(self.predicts)}"
        if self.emits:
            return f"prefill {' + '.join(self.emits)}"
        return "read the text" if self.text == "computed" else f"run {' + '.join(self.computed)}"


@dataclasses.dataclass(frozen=True)
class Program:
    """The stages of a program in the order of their first run.

    Attributes:
      flops: of all of it.
    """

    name: str
    stages: tuple[Stage, ...]
    flops: int

    @property
    def rest(self) -> int:
        """FLOPs outside of the network's evaluations: codec, embedding of text and state."""
        return self.flops - sum(s.repeats * s.flops for s in self.stages)


def record(
    name: str,
    objective: Any,
    program: Callable,
    params: Any,
    *args,
    measure: Any = None,
    costs: dict | None = None,
) -> Program:
    """Traces ``program(params, *args)``.

    Args:
      objective: of `program`; has a `network`.
      params, *args: `jax.ShapeDtypeStruct`s; nothing is computed.
      measure: parameters to time every stage with; None times nothing.
      costs: of the stages of other programs of the objective, which are not counted again.
    """
    costs = {} if costs is None else costs
    recorder = _Recorder(type(objective.network))

    def traced(*args):
        # Nothing here may come from a trace of before: the recorder would not see it.
        recorder.calls.clear()
        with nn.intercept_methods(recorder):
            return program(*args)

    with jax.set_mesh(sharding.make_mesh(ONE, jax.devices()[:1])):  # a loss wants one
        total, times = flops.count_calls(traced, params, *args)
    merged: dict[tuple, Stage] = {}
    for i, call in enumerate(recorder.calls):
        repeats = times.get(f"{MARK}{i}", 0)
        if not repeats:  # of a trace that was thrown away
            continue
        key = call.key()
        if key not in costs:
            costs[key] = call.cost(objective, params, measure)
        stage = dataclasses.replace(call.stage, flops=costs[key][0], milliseconds=costs[key][1])
        seen = merged.get(key)
        repeats += seen.repeats if seen else 0
        merged[key] = dataclasses.replace(stage, repeats=repeats)
    return Program(name, tuple(merged.values()), total)


@dataclasses.dataclass
class _Call:
    """One evaluation: its stage, and the arguments that it had, arrays as their shapes."""

    arguments: Any
    stage: Stage | None = None

    def key(self) -> tuple:
        """Equal for evaluations that cost and show the same."""
        leaves, tree = jax.tree.flatten(self.arguments)
        shapes = tuple((x.shape, str(x.dtype)) if _is_array(x) else x for x in leaves)
        return str(tree), shapes, repr(self.stage)

    def cost(self, objective, params, measure) -> tuple[int, float]:
        leaves, tree = jax.tree.flatten(self.arguments)
        arrays = [x for x in leaves if _is_array(x)]

        def evaluate(params, arrays):
            rest = iter(arrays)
            args, kwargs = tree.unflatten([next(rest) if _is_array(x) else x for x in leaves])
            return bind(objective.network, params)("__call__", *args, **kwargs)

        operations = flops.count(evaluate, params, arrays)
        if measure is None:
            return operations, float("nan")
        return operations, _milliseconds(jax.jit(evaluate), measure, arrays)


class _Recorder:
    """Sees the methods of modules as they run, see `nn.intercept_methods`."""

    def __init__(self, network: type):
        self.network, self.calls, self._open = network, [], []

    def __call__(self, method, args, kwargs, context):
        if context.method_name != "__call__":
            return method(*args, **kwargs)
        if type(context.module) is self.network:
            return self._evaluation(method, args, kwargs)
        if isinstance(context.module, Transformer) and self._open and not self._open[-1].stage:
            return self._blocks(method, *args, **kwargs)
        return method(*args, **kwargs)

    @contextlib.contextmanager
    def _opened(self, call: _Call):
        self._open.append(call)
        yield
        self._open.pop()

    def _evaluation(self, method, args, kwargs):
        shapes = jax.tree.map(lambda x: _shape(x) if _is_array(x) else x, (args, kwargs))
        call = _Call(shapes)
        self.calls.append(call)
        with self._opened(call):
            outputs, cache = method(*args, **kwargs)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
        predicts = tuple(outputs) if isinstance(outputs, dict) else (TOKEN,)
        call.stage = dataclasses.replace(call.stage, predicts=predicts, cache_bytes=size)
        return outputs, cache

    def _blocks(self, method, streams, contexts, visibility, cache=None, emit=None, valid=None):
        call, number = self._open[-1], len(self.calls) - 1
        computed = {g: n for s in streams.values() for g, n in s.groups}
        cached = {} if cache is None else {g: _tokens(x) for g, x in cache.tokens.items()}
        text = "computed" if contexts else "cached" if cache and cache.context else ""
        first = jax.tree.leaves((streams, contexts))[0]
        call.stage = Stage(
            visibility.name, first.shape[0], computed, cached,
            {g: computed[g] for g in emit or ()}, text, (), 0, 0, 0,
        )  # fmt: skip
        if streams:
            name, stream = next(iter(streams.items()))
            streams = streams | {name: stream.replace(x=_marked(number, stream.x))}
        else:
            name, value = next(iter(contexts.items()))
            contexts = contexts | {name: _marked(number, value)}
        return method(streams, contexts, visibility, cache, emit, valid)


def _marked(number: int, x):
    """`x` through a function of a name that is found in the jaxpr: how often it runs is told there,
    where loops have their counts."""

    def same(x):
        return x

    same.__name__ = f"{MARK}{number}"
    return jax.jit(same)(x)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _shape(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _tokens(keys_and_values) -> int:
    """Of a group of a cache: (layers, b, n, l, k), or a list of layers."""
    return jax.tree.leaves(keys_and_values)[0].shape[-2]


def _milliseconds(program: Callable, params, shapes) -> float:
    """The median of some calls on zeros."""
    arrays = [jnp.zeros(x.shape, x.dtype) for x in shapes]
    jax.block_until_ready(program(params, arrays))
    out = []
    for _ in range(TIMED):
        start = time.perf_counter()
        jax.block_until_ready(program(params, arrays))
        out.append(1e3 * (time.perf_counter() - start))
    return float(np.median(out))
