"""One transformer, several experts.

Every group of tokens belongs to an expert with its own projections, norms, modulation and
feed-forward network; attention is the only place where experts meet. One expert is a video DiT,
{video, action} is Fast-WAM's mixture of transformers.

The block is Wan's (public file ``wan/modules/model.py``): modulation table plus shared time
projection, q and k normalised over the full width, un-gated affine-normed cross-attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from wamjax.models import attention
from wamjax.models.layers import (
    LayerNorm,
    Linear,
    Mlp,
    RMSNorm,
    gated_add,
    modulate,
    unconstrained,
)
from wamjax.models.rope import Rope, rotate
from wamjax.models.visibility import Visibility

KeyValue = tuple[Array, Array]

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("qkv", "attended"),
}


@dataclasses.dataclass(frozen=True)
class ExpertSpec:
    """Sizes of one expert; heads and head dimension belong to the shared attention."""

    name: str
    width: int
    ffn: int


@struct.dataclass
class Stream:
    """The tokens of one expert and what conditions them.

    Attributes:
      x: (b, l, d) tokens, the groups one after the other.
      modulation: (b | 1, m, 6, d) time projection, one row for each slot of l / m tokens.
      rope: cos and sin, each (l, k / 2).
      groups: static (name, length) of each group, in token order.
    """

    x: Float[Array, "b l d"]
    modulation: Float[Array, "b m 6 d"]
    rope: Rope
    groups: tuple[tuple[str, int], ...] = struct.field(pytree_node=False)


@struct.dataclass
class Cache:
    """Keys and values that stay constant during denoising.

    All arrays lead with the layer; without a scan they are lists with an array for each layer.

    Attributes:
      tokens: group -> keys (after norm and rotary embedding) and values, (layers, b, n, l, k).
      context: expert -> keys and values of its cross-attention, (layers, b, n, s, k).
    """

    tokens: dict[str, KeyValue]
    context: dict[str, KeyValue]


class Projections(nn.Module):
    """q, k, v, o of one attention; q and k are RMS-normalised over all heads jointly."""

    width: int
    heads: int
    head_dim: int

    def setup(self):
        inner = self.heads * self.head_dim
        self.q, self.k, self.v = Linear(inner), Linear(inner), Linear(inner)
        self.o = Linear(self.width)
        self.q_norm, self.k_norm = RMSNorm(), RMSNorm()

    def query(self, x: Float[Array, "b l d"]) -> Float[Array, "b n l k"]:
        return self._split(self.q_norm(self.q(x)))

    def key_value(self, x: Float[Array, "b s d"]) -> KeyValue:
        return self._split(self.k_norm(self.k(x))), self._split(self.v(x))

    def output(self, y: Float[Array, "b n l k"]) -> Float[Array, "b l d"]:
        return self.o(rearrange(y, "b n l k -> b l (n k)"))

    def _split(self, x: Array) -> Array:
        return rearrange(x, "b l (n k) -> b n l k", n=self.heads)


class ExpertBlock(nn.Module):
    """One expert's share of a block; the attention between experts happens in `Block`."""

    spec: ExpertSpec
    heads: int
    head_dim: int
    constrain: Callable = unconstrained

    def setup(self):
        width = self.spec.width
        self.self_attn = Projections(width, self.heads, self.head_dim)
        self.cross_attn = Projections(width, self.heads, self.head_dim)
        self.cross_norm = LayerNorm()
        self.ffn = Mlp(self.spec.ffn, width)
        self.modulation = self.param("modulation", nn.initializers.normal(width**-0.5), (6, width))

    def chunks(self, time: Float[Array, "b m 6 d"]) -> list[Array]:
        """shift, scale, gate of the attention, then of the feed-forward network; each (b, m, d)."""
        return [(self.modulation + time)[:, :, i] for i in range(6)]

    def project(self, stream: Stream) -> tuple[Array, Array, Array]:
        shift, scale = self.chunks(stream.modulation)[:2]
        x = modulate(stream.x, shift, scale)
        k, v = self.self_attn.key_value(x)
        return rotate(self.self_attn.query(x), stream.rope), rotate(k, stream.rope), v

    def finish(self, stream: Stream, attended: Array, context: KeyValue) -> Array:
        _, _, gate, ffn_shift, ffn_scale, ffn_gate = self.chunks(stream.modulation)
        x = self._add(stream.x, gate, self.self_attn.output(attended))
        query = self.cross_attn.query(self.cross_norm(x))
        x += self.cross_attn.output(attention.attend(query, *context)).astype(x.dtype)
        return self._add(x, ffn_gate, self.ffn(modulate(x, ffn_shift, ffn_scale)))

    def _add(self, x: Array, gate: Array, y: Array) -> Array:
        return self.constrain(gated_add(x, gate, y), "batch", "tokens", "embed")


class Block(nn.Module):
    """Joint self-attention of all experts, then each expert's cross-attention and FFN."""

    experts: tuple[ExpertSpec, ...]
    heads: int
    head_dim: int
    attention: Callable
    constrain: Callable

    @nn.compact
    def __call__(self, tokens, layer_cache, streams, contexts, visibility, emit):
        """One layer of the scan.

        Args:
          tokens: carry, expert -> (b, l, d).
          layer_cache: this layer's slice of a `Cache`, or an empty one.
          streams, contexts: see `Transformer.__call__` (tokens in `streams` are the inputs).
          visibility: static table.
          emit: static names of the groups whose keys and values are wanted; None outside a
            prefill.

        Returns:
          (tokens of the next layer, this layer's slice of the emitted cache).
        """
        streams = {e: s.replace(x=tokens[e]) for e, s in streams.items()}
        layers = {
            spec.name: ExpertBlock(spec, self.heads, self.head_dim, self.constrain, name=spec.name)
            for spec in self.experts
            if spec.name in streams or spec.name in contexts
        }
        q, k, v = {}, {}, {}
        for name, stream in streams.items():
            projected = checkpoint_name(layers[name].project(stream), "qkv")
            for target, whole in zip((q, k, v), projected, strict=True):
                target.update(_split_groups(whole, stream.groups))
        emitted = {g: (k[g], v[g]) for g in emit or ()}
        for group, (keys, values) in layer_cache.tokens.items():
            k[group], v[group] = keys, values
        context = dict(layer_cache.context)
        for name, text in contexts.items():
            context[name] = layers[name].cross_attn.key_value(text)
        attended = checkpoint_name(self.attention(q, k, v, visibility), "attended")
        tokens = {}
        for name, stream in streams.items():
            parts = [attended[g] for g, _ in stream.groups]
            whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)
            tokens[name] = layers[name].finish(stream, whole, context[name])
        return tokens, Cache(emitted, {} if emit is None else {e: context[e] for e in contexts})


class Transformer(nn.Module):
    """A stack of blocks, rematerialised by a named policy.

    Attributes:
      remat: a key of `REMAT_POLICIES`; what the backward pass keeps of each block.
      unroll: layers unrolled in the scan over stacked parameters; 0 means no scan at all, for
        parameters that went through `unstack`.
      attention: `attention.grouped`, or `attention.masked` for the reference path.
      constrain: says how activations are sharded, see `layers.unconstrained`.
    """

    experts: tuple[ExpertSpec, ...]
    layers: int
    heads: int
    head_dim: int
    remat: str = "none"
    unroll: int = 1
    attention: Callable = attention.grouped
    constrain: Callable = unconstrained

    @nn.compact
    def __call__(
        self,
        streams: dict[str, Stream],
        contexts: dict[str, Float[Array, "b s d"]],
        visibility: Visibility,
        cache: Cache | None = None,
        emit: tuple[str, ...] | None = None,
    ) -> tuple[dict[str, Array], Cache]:
        """Runs all layers.

        Args:
          streams: expert -> its tokens; experts without tokens are not computed.
          contexts: expert -> embedded context for cross-attention, for experts whose context keys
            and values are not in `cache` yet (with `emit`, also for experts without tokens).
          visibility: who sees whom, over at least the groups present.
          cache: keys and values of constant groups and contexts.
          emit: in a prefill, the groups whose keys and values to return (those of `contexts` are
            returned with them); None otherwise.

        Returns:
          (expert -> (b, l, d) tokens after the last block, the emitted cache).
        """
        tokens = {e: s.x for e, s in streams.items()}
        cache = cache or Cache({}, {})
        shared = streams, contexts, visibility, emit
        if self.unroll:
            return self._scanned()(tokens, cache, *shared)
        emitted = []
        for i in range(self.layers):
            block = self._block()(*self._sizes(), name=f"blocks_{i}")
            layer = jax.tree.map(lambda x, i=i: x[i], cache, is_leaf=_is_layers)
            tokens, new = block(tokens, layer, *shared)
            emitted.append(new)
        return tokens, jax.tree.map(lambda *layers: list(layers), *emitted)

    def _scanned(self) -> nn.Module:
        return nn.scan(
            self._block(),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.layers,
            unroll=min(self.unroll, self.layers),
        )(*self._sizes(), name="blocks")

    def _sizes(self):
        return self.experts, self.heads, self.head_dim, self.attention, self.constrain

    def _block(self) -> type[nn.Module]:
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat {self.remat!r} is not one of {sorted(REMAT_POLICIES)}")
        if self.remat == "none":
            return Block
        # Common subexpressions cannot meet across iterations of a scan, so the barrier that
        # prevents them would only cost.
        return nn.remat(
            Block,
            policy=REMAT_POLICIES[self.remat],
            prevent_cse=self.unroll != 1,
            static_argnums=(5, 6),
        )


def unstack(params: dict, layers: int) -> dict:
    """Parameters for ``unroll=0``: ``blocks`` (stacked) becomes ``blocks_0``, ``blocks_1``, ...

    Inside a sampling loop XLA slices stacked weights again at every step; sliced once outside,
    they stay where they are.
    """
    rest = {k: v for k, v in params.items() if k != "blocks"}
    split = {
        f"blocks_{i}": jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(layers)
    }
    return rest | split


def _is_layers(x) -> bool:
    return isinstance(x, list)


def _split_groups(x: Array, groups) -> dict[str, Array]:
    parts, start = {}, 0
    for name, length in groups:
        parts[name] = x[:, :, start : start + length]
        start += length
    if start != x.shape[2]:
        raise ValueError(f"groups {groups} hold {start} tokens, the stream has {x.shape[2]}")
    return parts
