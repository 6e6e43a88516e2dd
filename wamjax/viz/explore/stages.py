"""Records every evaluation of a network in a program, from a trace.

Acting, imagining, sampling and the loss are traced with abstract arrays. Each evaluation is
recorded: which groups are computed, which are read from the cache, and which are added to it. So
the stages show what the program runs, not what its documentation says.
"""

from __future__ import annotations

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
TIMED = 10  # calls per measurement
_ARRAY = object()
TOKEN = "token"  # prediction of a network without groups of outputs


@dataclasses.dataclass(frozen=True)
class Stage:
    """Describes one kind of evaluation of a network in a program.

    Attributes:
      table: name of the visibility table.
      rows: size of the batch; guidance doubles it.
      computed: group -> tokens that go through the blocks.
      cached: group -> tokens whose keys and values are read from the cache.
      emits: group -> tokens whose keys and values are added to the cache.
      text: keys and values of the text in cross-attention: "computed", "cached" or "" for none.
      predicts: groups whose output is used.
      repeats: how often the program runs it.
      flops: FLOPs of one run, without unused results.
      cache_bytes: bytes added to the cache.
      milliseconds: time of one run; NaN if not measured.
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
        """Returns what the stage does, in a few words."""
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
    """Holds the stages of a program in the order of their first run.

    Attributes:
      flops: FLOPs of the whole program.
      rest: FLOPs outside the network's evaluations, such as the codec and the text embedding.
    """

    name: str
    stages: tuple[Stage, ...]
    flops: int
    rest: int


def record(
    name: str,
    objective: Any,
    program: Callable,
    params: Any,
    *args,
    measure: Any = None,
) -> Program:
    """Records the stages of ``program(params, *args)``.

    Args:
      objective: the program's objective; has a `network`.
      params, *args: `jax.ShapeDtypeStruct`s; nothing is computed.
      measure: parameters with which to time every stage; None = do not time.
    """
    recorder = _Recorder(objective.network)

    def traced(*args):
        with nn.intercept_methods(recorder):
            return program(*args)

    with jax.set_mesh(sharding.make_mesh(ONE, jax.devices()[:1])):  # a loss needs one
        total, counts = flops.count_calls(traced, params, *args)
    merged: dict[tuple, tuple[_Call, int, int]] = {}
    for i, call in enumerate(recorder.calls):
        repeats, work = counts.get(f"{MARK}{i}", (0, 0))  # absent if its trace was discarded
        if repeats:
            first, before, done = merged.get(call.key(), (call, 0, 0))
            merged[call.key()] = first, before + repeats, done + work
    stages = []
    for call, repeats, work in merged.values():
        timed = float("nan") if measure is None else call.milliseconds(measure)
        stages.append(dataclasses.replace(
            call.stage, repeats=repeats, flops=work // repeats, milliseconds=timed
        ))  # fmt: skip
    rest = total - sum(work for _, _, work in merged.values())
    return Program(name, tuple(stages), total, rest)


class _Call:
    """Holds one evaluation of a network, to describe it and to run it again.

    Args:
      network: the unbound module.
      args, kwargs: arguments of its ``__call__``; arrays become inputs, all others stay constant.
    """

    def __init__(self, network: nn.Module, args, kwargs):
        leaves, self._tree = jax.tree.flatten((args, kwargs))
        self._static = [_ARRAY if _is_array(x) else x for x in leaves]
        arrays = [x for x in leaves if _is_array(x)]
        self._shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
        self._network = network
        self.stage: Stage | None = None

    def program(self, name: str) -> Callable:
        """Returns a jitted function of parameters and arrays, with this name in a jaxpr."""

        def evaluate(params, arrays):
            rest = iter(arrays)
            leaves = [next(rest) if x is _ARRAY else x for x in self._static]
            args, kwargs = self._tree.unflatten(leaves)
            return bind(self._network, params)("__call__", *args, **kwargs)

        evaluate.__name__ = name
        return jax.jit(evaluate)

    def key(self) -> tuple:
        """Returns a key that is equal for evaluations that do the same."""
        return str(self._tree), tuple(map(repr, self._static)), str(self._shapes), str(self.stage)

    def milliseconds(self, params) -> float:
        """Returns the median time of `TIMED` calls on zeros."""
        program = self.program("timed")
        arrays = [jnp.zeros(x.shape, x.dtype) for x in self._shapes]
        jax.block_until_ready(program(params, arrays))
        out = []
        for _ in range(TIMED):
            start = time.perf_counter()
            jax.block_until_ready(program(params, arrays))
            out.append(1e3 * (time.perf_counter() - start))
        return float(np.median(out))


class _Recorder:
    """Wraps every evaluation of a network in a function of its own, and records what it does.

    The function has a name in the jaxpr. This tells how often loops run it, and which of its
    results are used. See `nn.intercept_methods`.
    """

    def __init__(self, network: nn.Module):
        self._network, self.calls, self._open = network, [], None

    def __call__(self, method, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__":
            return method(*args, **kwargs)
        if self._open is None and type(module) is type(self._network):
            return self._evaluate(module.variables["params"], args, kwargs)
        if self._open and isinstance(module, Transformer) and not self._open.stage:
            self._open.stage = _stage(*args)
        return method(*args, **kwargs)

    def _evaluate(self, params, args, kwargs):
        call = self._open = _Call(self._network, args, kwargs)
        arrays = [x for x in jax.tree.leaves((args, kwargs)) if _is_array(x)]
        outputs, cache = call.program(f"{MARK}{len(self.calls)}")(params, arrays)
        self._open = None
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
        predicts: tuple[str, ...] = (TOKEN,)
        if isinstance(outputs, dict):
            predicts = tuple(g for g in call.stage.computed if g in outputs)
        call.stage = dataclasses.replace(call.stage, predicts=predicts, cache_bytes=size)
        self.calls.append(call)
        return outputs, cache


def _stage(streams, contexts, visibility, cache=None, emit=None, valid=None) -> Stage:
    """Returns the stage that arguments of `Transformer.__call__` describe."""
    del valid
    computed = {g: n for stream in streams.values() for g, n in stream.groups}
    stored = {} if cache is None else cache.tokens
    cached = {g: _tokens(stored[g]) for g in visibility.groups if g in stored}
    text = "computed" if contexts else "cached" if cache and cache.context else ""
    rows = jax.tree.leaves((streams, contexts))[0].shape[0]
    emits = {g: computed[g] for g in emit or ()}
    return Stage(visibility.name, rows, computed, cached, emits, text, (), 0, 0, 0)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def _tokens(keys_and_values) -> int:
    """Returns the tokens of a group in a cache: (layers, b, n, l, k), or a list of layers."""
    return jax.tree.leaves(keys_and_values)[0].shape[-2]
