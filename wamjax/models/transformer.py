"""Defines one transformer with several experts.

Every group of tokens belongs to an expert with its own projections, norms, modulation and
feed-forward network; experts meet only in the attention. One expert is a DiT, a video DiT, a text
encoder or, with a causal table, a decoder; {video, action} is Fast-WAM's mixture of transformers,
{image, text} is MMDiT. A `blocks.ExpertSpec` describes the parts of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from wamjax.models import attention, blocks, kernels
from wamjax.models.blocks import ExpertBlock, ExpertSpec, KeyValue, Stream
from wamjax.models.layers import at_least_float32, unconstrained
from wamjax.models.visibility import Visibility

RESIDUALS = ("compute", "float32")
# What is saved of a block for the backward pass, from most memory to least: everything; outputs of
# all linear maps and of attention; those without the wide hidden layer of the feed-forward network;
# queries, keys, values and the output of attention; the input alone; the input in host memory.
# "auto" is one of these, chosen when a training step is compiled
# (`training.compile.compile_fitting`); elsewhere it saves everything.
_ATTENTION = ("qkv", kernels.RESULT)
_PROJECTIONS = (*_ATTENTION, "projected")
REMAT_POLICIES = {
    "auto": None,
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(*_PROJECTIONS, "hidden"),
    "projections": jax.checkpoint_policies.save_only_these_names(*_PROJECTIONS),
    "attention": jax.checkpoint_policies.save_only_these_names(*_ATTENTION),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(),
        names_which_can_be_offloaded=("input",),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@struct.dataclass
class Cache:
    """Holds keys and values that stay constant during denoising.

    The first axis of all arrays is the layer; without a scan they are lists with one array per
    layer.

    Attributes:
      tokens: group -> keys (after norm and rotary embedding) and values, (layers, b, n, l, k).
      context: expert -> keys and values of its cross-attention, (layers, b, n, s, k).
    """

    tokens: dict[str, KeyValue]
    context: dict[str, KeyValue]


class Block(nn.Module):
    """Runs the joint self-attention of all experts, then each expert's cross-attention and FFN."""

    experts: tuple[ExpertSpec, ...]
    heads: int
    head_dim: int
    attention: Callable
    constrain: Callable
    ends: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, tokens, layer_cache, streams, contexts, valid, visibility, emit):
        """Runs one layer of the scan.

        Args:
          tokens: carry, expert -> (b, l, d).
          layer_cache: this layer's slice of a `Cache`, or an empty one.
          streams, contexts, valid: see `Transformer.__call__` (tokens in `streams` are the inputs).
          visibility: static table.
          emit: static names of the groups whose keys and values to return; None outside a prefill.

        Returns:
          (tokens for the next layer, this layer's slice of the emitted cache).
        """
        tokens = checkpoint_name(tokens, "input")
        streams = {e: s.replace(x=tokens[e]) for e, s in streams.items()}
        layers = {
            spec.name: ExpertBlock(
                spec, self.heads, self.head_dim, self.constrain, spec.name in self.ends,
                kernel=attention.kernel_of(self.attention), name=spec.name,
            )
            for spec in self.experts
            if spec.name in streams or spec.name in contexts
        }  # fmt: skip
        q, k, v, bias = {}, {}, {}, {}
        adaptations = {name: layers[name].adapt(stream) for name, stream in streams.items()}
        for name, stream in streams.items():
            qkv = layers[name].project(stream, adaptations[name])
            for target, part in zip((q, k, v), qkv, strict=True):
                target.update(_split_groups(part, stream.groups))
            if stream.bias is not None:
                ((group, _),) = stream.groups  # a position bias applies to a single group
                bias[group] = layers[name].bias(stream)
        emitted = {
            g: (stream.without_padding(k[g]), stream.without_padding(v[g]))
            for stream in streams.values()
            for g, _ in stream.groups
            if g in (emit or ())
        }
        for stream in streams.values():
            valid = stream.existing() | valid
        for group, (keys, values) in layer_cache.tokens.items():
            k[group], v[group] = keys, values
        context = dict(layer_cache.context)
        for name, text in contexts.items():
            context[name] = layers[name].cross_attn.key_value(text)
        active = {name: stream for name, stream in streams.items() if name not in self.ends}
        q = {g: q[g] for stream in active.values() for g, _ in stream.groups}
        outputs = self.attention(q, k, v, visibility, valid, bias)
        tokens = {}
        for name, stream in active.items():
            parts = [outputs[g] for g, _ in stream.groups]
            part = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)
            tokens[name] = layers[name].finish(stream, adaptations[name], part, context.get(name))
        return tokens, Cache(emitted, {} if emit is None else {e: context[e] for e in contexts})


class Transformer(nn.Module):
    """Stacks blocks, rematerialised by a named policy.

    Attributes:
      remat: a key of `REMAT_POLICIES`; what is saved of each block for the backward pass.
      unroll: layers unrolled in the scan over stacked parameters; 0 means no scan, for parameters
        that went through `unstack`.
      attention: from `attention.named`: a kernel, or `masked` for the reference path.
      constrain: sets the sharding of activations, see `layers.unconstrained`.
      residual: dtype of the residual stream: that of the computation ("compute": Fast-WAM,
        Cosmos-Predict2), or at least "float32" (Wan), so that the sum over many blocks does not
        round away what each of them adds.
      ends: experts that end in the last block, where only their keys and values are used (the text
        of MMDiT); that block is then separate from the stack, as ``final_block``.
    """

    experts: tuple[ExpertSpec, ...]
    layers: int
    heads: int
    head_dim: int
    remat: str = "none"
    unroll: int = 1
    attention: Callable = attention.grouped
    constrain: Callable = unconstrained
    ends: tuple[str, ...] = ()
    residual: str = "compute"

    @nn.compact
    def __call__(
        self,
        streams: dict[str, Stream],
        contexts: dict[str, Float[Array, "b s d"]],
        visibility: Visibility,
        cache: Cache | None = None,
        emit: tuple[str, ...] | None = None,
        valid: dict[str, Bool[Array, "b s"]] | None = None,
    ) -> tuple[dict[str, Array], Cache]:
        """Runs all layers.

        Args:
          streams: expert -> its tokens; experts without tokens are not computed.
          contexts: expert -> embedded context for cross-attention, for experts whose context keys
            and values are not in `cache` yet (with `emit`, also for experts without tokens).
          visibility: the table of who sees whom, with at least the groups present.
          cache: keys and values of constant groups and contexts.
          emit: in a prefill, the groups whose keys and values to return (those of `contexts` are
            returned with them); None otherwise.
          valid: group -> which of its keys exist, (b | 1, s); for padding and for caches that are
            still being filled. In groups not listed all keys exist.

        Returns:
          (expert -> (b, l, d) tokens after the last block, the emitted cache).
        """
        if self.residual not in RESIDUALS:
            raise ValueError(f"residual {self.residual!r} is not one of {RESIDUALS}")
        tokens = {e: s.tokens() for e, s in streams.items()}
        if self.residual == "float32":
            tokens = {e: at_least_float32(x) for e, x in tokens.items()}
        cache = cache or Cache({}, {})
        arguments = streams, contexts, valid or {}, visibility, emit
        scan_layers = self.layers - bool(self.ends)
        if self.unroll:
            final = jax.tree.map(lambda x: x[-1], cache) if self.ends else cache
            cache = jax.tree.map(lambda x: x[:scan_layers], cache) if self.ends else cache
            tokens, emitted = self._scanned(scan_layers)(tokens, cache, *arguments)
            if not self.ends:
                return _joined(tokens), emitted
            tokens, last = self._final()(tokens, final, *arguments)
            emitted = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), emitted, last)
            return _joined(tokens), emitted
        emitted = []
        for i in range(self.layers):
            layer = jax.tree.map(lambda x, i=i: x[i], cache, is_leaf=_is_layers)
            name = f"blocks_{i}"
            block = self._final() if i == scan_layers else self._block()(*self._sizes(), name=name)
            tokens, new = block(tokens, layer, *arguments)
            emitted.append(new)
        return _joined(tokens), jax.tree.map(lambda *layers: list(layers), *emitted)

    def _scanned(self, layers: int) -> nn.Module:
        return nn.scan(
            self._block(),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, *[nn.broadcast] * 5),
            length=layers,
            unroll=min(self.unroll, layers),
        )(*self._sizes(), name="blocks")

    def _final(self) -> nn.Module:
        return self._block()(*self._sizes(), self.ends, name="final_block")

    def _sizes(self):
        return self.experts, self.heads, self.head_dim, self.attention, self.constrain

    def _block(self) -> type[nn.Module]:
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat {self.remat!r} is not one of {sorted(REMAT_POLICIES)}")
        if REMAT_POLICIES[self.remat] is None:
            return Block
        # Common subexpressions cannot be merged across iterations of a scan, so the barrier that
        # prevents this would only cost time.
        return nn.remat(
            Block,
            policy=REMAT_POLICIES[self.remat],
            prevent_cse=self.unroll != 1,
            static_argnums=(6, 7),
        )


def unstack(params: dict, layers: int) -> dict:
    """Converts parameters for ``unroll=0``: ``blocks`` (stacked) becomes ``blocks_0``,
    ``blocks_1``, ...

    Inside a sampling loop XLA slices stacked weights again at every step; sliced once outside, they
    stay in place. A subtree of the parameters gives the same subtree of the result.
    """
    others = {k: v for k, v in params.items() if k != "blocks"}
    leaves, structure = jax.tree.flatten(params.get("blocks", {}))
    split = zip(*(_layers(x, layers) for x in leaves), strict=True)
    return others | {f"blocks_{i}": structure.unflatten(part) for i, part in enumerate(split)}


def join(params: dict, experts: tuple[str, ...]) -> dict:
    """Joins q, k and v of the self-attention of the given experts, in parameters that went through
    `unstack`; see `blocks.join`."""

    def block(parts: dict) -> dict:
        return {
            name: part | {"self_attn": blocks.join(part["self_attn"])}
            if name in experts and "self_attn" in part
            else part
            for name, part in parts.items()
        }

    return {k: block(x) if k.startswith("blocks_") else x for k, x in params.items()}


@functools.partial(jax.jit, static_argnums=1)  # one program for all arrays of a shape
def _layers(x: Array, count: int) -> list[Array]:
    return [x[i] for i in range(count)]


def _joined(tokens: dict[str, Array]) -> dict[str, Float[Array, "b l d"]]:
    return {e: x.reshape(len(x), -1, x.shape[-1]) for e, x in tokens.items()}


def _is_layers(x) -> bool:
    return isinstance(x, list)


def _split_groups(x: Array, groups) -> dict[str, Array]:
    parts, start = {}, 0
    for name, length in groups:
        parts[name] = x[:, :, start : start + length]
        start += length
    if start != x.shape[2]:
        raise ValueError(f"groups {groups} have {start} tokens in all, but the stream has "
                             f"{x.shape[2]}")  # fmt: skip
    return parts
