"""Defines one expert's part of a transformer block by a few enumerated choices.

The choices cover the blocks of the published models, so their checkpoints load:

  WAN      Wan 2.1 / 2.2 (public file ``wan/modules/model.py``): modulation table plus a shared
           time projection, q and k normalised over the full width, un-gated cross-attention
           behind an affine norm
  DIT      DiT's adaLN-Zero block (``models.py`` of facebookresearch/DiT)
  MMDIT    Stable Diffusion 3: DiT's block, once for each of {image, text}
  COSMOS   Cosmos-Predict2: adaLN-LoRA on all three sub-layers, no biases, q and k normalised
           per head, rotary halves
  GPT      pre-norm decoder
  T5       encoder of T5 v1.0; v1.1 and umT5 differ in `mlp` and `position_bias`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from wamjax.models import attention
from wamjax.models.kernels import LANES
from wamjax.models.layers import (
    MLPS,
    LayerNorm,
    Linear,
    RMSNorm,
    by_slot,
    gated_add,
    modulate,
    on_tpu,
    unconstrained,
)
from wamjax.models.padding import TILE, Padding
from wamjax.models.rope import Rope, rotate

KeyValue = tuple[Array, Array]

WAN: dict[str, Any] = {}
DIT = dict(modulation="linear", cross="none", qk_norm="none")
MMDIT = DIT
COSMOS = dict(
    modulation="lora", cross="modulated", qk_norm="head", rotary="half", mlp="gelu", bias=False
)
GPT = dict(modulation="none", cross="none", qk_norm="head")
T5 = dict(
    modulation="none", cross="none", qk_norm="none", norm="rms", mlp="relu", bias=False,
    scaled=False,
)  # fmt: skip

CHOICES = {
    "modulation": ("table", "linear", "lora", "none"),
    "cross": ("plain", "modulated", "none"),
    "norm": ("layer", "rms"),
    "qk_norm": ("full", "head", "none"),
    "rotary": ("pairs", "half"),
    "mlp": tuple(MLPS),
}


@dataclasses.dataclass(frozen=True)
class ExpertSpec:
    """Describes the sizes and choices of one expert; heads and head dimension belong to the shared
    attention.

    Attributes:
      name: name of the expert.
      width: width of its tokens.
      ffn: hidden units of its feed-forward network.
      modulation: what scales and shifts the norms: "table" (a learned table plus the stream's
        projection), "linear" (a linear map of the stream's vector), "lora" (a low-rank map plus a
        shared term) or "none" (the norms are affine).
      gates: whether the modulation also gates each residual (adaLN-Zero rather than adaLN).
      cross: cross-attention to a context: "plain" behind an affine norm, "modulated" like the other
        sub-layers, or "none".
      norm: norm of the sub-layers that are not modulated.
      qk_norm: RMS norm of q and k over the "full" width, over each "head", or "none".
      rotary: which dimensions rotate together, neighbours ("pairs") or halves ("half").
      mlp: a key of `layers.MLPS`.
      bias: whether linear layers have a bias.
      scaled: whether attention logits are divided by sqrt(head_dim).
      position_bias: number of T5 buckets, with a separate bias table in every layer (umT5); 0 for
        none.
      lora_rank: rank of the "lora" modulation.
      context_rows: number of rows in the softmax of the cross-attention. Rows beyond those of the
        context are zero, and without a bias their keys and values are zero too, so they count
        without being computed. 0: as many as the context has.
    """

    name: str
    width: int
    ffn: int
    modulation: str = "table"
    gates: bool = True
    cross: str = "plain"
    norm: str = "layer"
    qk_norm: str = "full"
    rotary: str = "pairs"
    mlp: str = "gelu_tanh"
    bias: bool = True
    scaled: bool = True
    position_bias: int = 0
    lora_rank: int = 256
    context_rows: int = 0

    def __post_init__(self):
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(
                    f"expert {self.name!r}: {key} {getattr(self, key)!r} is not one of {choices}"
                )
        if self.context_rows and (self.bias or self.cross == "none"):
            raise ValueError(
                f"expert {self.name!r}: context_rows={self.context_rows} needs a cross-attention "
                f"without bias, not cross={self.cross!r} with bias={self.bias}: set context_rows=0"
            )
        if self.modulation == "none" and self.cross == "modulated":
            raise ValueError(f"expert {self.name!r}: cross='modulated' needs a modulation "
                             "other than 'none'; without one, set cross='plain'")  # fmt: skip

    @property
    def modulated(self) -> tuple[str, ...]:
        """Returns the modulated sub-layers, in the order of the modulation's chunks."""
        if self.modulation == "none":
            return ()
        return ("self", "cross", "ffn") if self.cross == "modulated" else ("self", "ffn")

    @property
    def chunks(self) -> int:
        """Returns the number of vectors in a modulation: shift and scale, plus the gate if there is
        one, for each sub-layer."""
        return (2 + self.gates) * len(self.modulated)


@struct.dataclass
class Stream:
    """Holds the tokens of one expert and their conditioning.

    Attributes:
      x: (b, l, d) tokens, one group after another; inside the blocks in the layout of `tokens`.
      modulation: one row per slot of l / m tokens: (b | 1, m, chunks, d) for a table; (b | 1, m, d)
        for a linear modulation; that and the shared (b | 1, m, chunks, d) for a lora; None without
        modulation.
      rope: cos and sin, each (l, k / 2); None without rotary embedding.
      groups: static (name, length) of each group, in token order.
      bias: position bias: (n, l, l) added to the logits of every layer (T5), or int (l, l) buckets
        for experts with a table in each layer (umT5).
      padding: static; padding of the slots in `x`, also in `rope` and in the lengths of `groups`.
        Padded slots stay a separate axis through all blocks.
    """

    x: Float[Array, "b *l d"]
    modulation: Any
    rope: Rope | None
    groups: tuple[tuple[str, int], ...] = struct.field(pytree_node=False)
    bias: Array | None = None
    padding: Padding | None = struct.field(pytree_node=False, default=None)

    def tokens(self) -> Float[Array, "b *l d"]:
        """Returns `x` in the layout of the blocks: (b, m, s, d) if slots are padded, see
        `layers.per_slot`."""
        return self.x if self.padding is None else by_slot(self.x, self.padding.size)

    def existing(self) -> dict[str, np.ndarray]:
        """Returns group -> which of its keys exist, (1, s), for groups with padding."""
        if self.padding is None or not self.padding.missing:
            return {}
        return {group: self.padding.keys(length) for group, length in self.groups}

    def without_padding(self, x: Array) -> Array:
        """Returns keys or values (b, n, s, k) of a group without padding, as they are cached."""
        return x if self.padding is None else self.padding.remove(x, axis=2)


class Adaptation(NamedTuple):
    """Holds the modulation of one sub-layer; each array is (b | 1, m, d)."""

    shift: Array
    scale: Array
    gate: Array | None


class Projections(nn.Module):
    """Projects to and from one attention (q, k, v, o), with the norm of q and k that `qk_norm`
    names.

    If the parameters went through `join`, q, k and v are one matmul.
    """

    width: int
    heads: int
    head_dim: int
    qk_norm: str = "full"
    bias: bool = True

    def setup(self):
        inner = self.heads * self.head_dim
        self.q, self.k, self.v = (Linear(inner, self.bias) for _ in range(3))
        self.qkv = Linear(3 * inner, self.bias)
        self.o = Linear(self.width, self.bias)
        if self.qk_norm != "none":
            self.q_norm, self.k_norm = RMSNorm(), RMSNorm()

    def query_key_value(self, x: Float[Array, "b *l d"]) -> tuple[Array, Array, Array]:
        if not self.has_variable("params", "qkv"):
            return self.query(x), *self.key_value(x)
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        q, k = self._norm_and_split("q_norm", q), self._norm_and_split("k_norm", k)
        return q, k, self._split(v)

    def query(self, x: Float[Array, "b *l d"]) -> Float[Array, "b n l k"]:
        return self._norm_and_split("q_norm", self._linear("q", x))

    def key_value(self, x: Float[Array, "b s d"]) -> KeyValue:
        keys, values = self._norm_and_split("k_norm", self._linear("k", x)), self._linear("v", x)
        if on_tpu():
            # Otherwise XLA makes the matmul produce heads and copies its weights to a new layout.
            values = jax.lax.optimization_barrier(values)
        return keys, self._split(values)

    def output(self, y: Float[Array, "b n l k"], slots: tuple[int, ...]) -> Float[Array, "b *l d"]:
        """Applies the output projection.

        Args:
          slots: lengths of the token axes, see `Stream.x`.
        """
        return self.o(heads_last(y).reshape(len(y), *slots, -1))

    def _linear(self, name: str, x: Array) -> Array:
        """Names the result for rematerialization before norm and rotation: those are cheap to
        repeat in a backward pass, which needs their inputs anyway."""
        return checkpoint_name(getattr(self, name)(x), "qkv")

    def _norm_and_split(self, norm: str, x: Array) -> Array:
        if self.qk_norm == "full":  # over all heads jointly
            x = getattr(self, norm)(x)
        x = self._split(x)
        return getattr(self, norm)(x) if self.qk_norm == "head" else x

    def _split(self, x: Array) -> Array:
        return heads_first(x.reshape(len(x), -1, x.shape[-1]), self.heads)


def heads_first(x: Float[Array, "b l d"], heads: int) -> Float[Array, "b n l k"]:
    """Moves heads before tokens, as attention reads them."""
    b, l, d = x.shape
    if _tiled(l, d // heads):
        x = x.reshape(b, l // TILE, TILE, heads, -1)
        return jnp.transpose(x, (0, 3, 1, 2, 4)).reshape(b, heads, l, -1)
    return jnp.swapaxes(x.reshape(b, l, heads, -1), 1, 2)


def heads_last(y: Float[Array, "b n l k"]) -> Float[Array, "b l d"]:
    """Reverses `heads_first`."""
    b, n, l, k = y.shape
    if _tiled(l, k):
        y = jnp.transpose(y.reshape(b, n, l // TILE, TILE, k), (0, 2, 3, 1, 4))
    else:
        y = jnp.swapaxes(y, 1, 2)
    return y.reshape(b, l, n * k)


def _tiled(tokens: int, head_dim: int) -> bool:
    """Returns whether heads are moved as the tiles in which a TPU keeps them, 8 tokens of one head.
    Without explicit tiles, XLA first builds tiles of 8 heads of one token, which costs an extra
    copy."""
    return on_tpu() and tokens % TILE == 0 and head_dim % LANES == 0


def join(attention: dict[str, Any]) -> dict[str, Any]:
    """Joins q, k and v of `Projections` into one matrix. With few rows the time goes into reading
    the weights, and three short reads take longer than one long read.

    A subset of the parameters, or parameters with adapters, are returned unchanged.
    """
    three = [attention.get(name, {}) for name in "qkv"]
    if any(set(part) not in ({"kernel"}, {"kernel", "bias"}) for part in three):
        return attention
    others = {name: part for name, part in attention.items() if name not in tuple("qkv")}
    return others | {"qkv": jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *three)}


class LowRank(nn.Module):
    """Computes Cosmos-Predict2's adaLN-LoRA: ``up(down(silu(x)))`` for each sub-layer, plus a
    shared term."""

    sublayers: tuple[str, ...]
    chunks: int  # of each sub-layer
    rank: int

    @nn.compact
    def __call__(self, modulation) -> list[Array]:
        x, shared = modulation
        width, rows = x.shape[-1], []
        for name in self.sublayers:
            down = Linear(self.rank, use_bias=False, name=f"{name}_down")(nn.silu(x))
            zeros = nn.initializers.zeros
            up = Linear(self.chunks * width, use_bias=False, kernel_init=zeros, name=f"{name}_up")(
                down
            )
            up = rearrange(up, "b m (c d) -> b m c d", d=width) + shared
            rows += [up[:, :, i] for i in range(self.chunks)]
        return rows


class ExpertBlock(nn.Module):
    """Computes one expert's part of a block; the attention between experts happens in `Block`.

    Attributes:
      last: whether this is the expert's last block and its output is not used: it only provides
        keys and values to the others (the text in an MMDiT's last block).
      kernel: kernel of the cross-attention, see `wamjax.models.kernels`.
    """

    spec: ExpertSpec
    heads: int
    head_dim: int
    constrain: Callable = unconstrained
    last: bool = False
    kernel: str = "xla"

    def setup(self):
        spec, width = self.spec, self.spec.width
        sizes = width, self.heads, self.head_dim, spec.qk_norm, spec.bias
        norm = LayerNorm if spec.norm == "layer" else RMSNorm
        self.self_attn = Projections(*sizes)
        if "self" not in spec.modulated:
            self.self_norm = norm()
        if spec.cross != "none":
            self.cross_attn = Projections(*sizes)
            if "cross" not in spec.modulated:
                self.cross_norm = norm()
        if "ffn" not in spec.modulated and not self.last:
            self.ffn_norm = norm()
        self.ffn = MLPS[spec.mlp](spec.ffn, width, bias=spec.bias)
        chunks = 2 if self.last else spec.chunks
        if spec.modulation == "table":
            init = nn.initializers.normal(width**-0.5)
            self.modulation = self.param("modulation", init, (chunks, width))
        elif spec.modulation == "linear":
            self.modulation = Linear(chunks * width, kernel_init=nn.initializers.zeros)
        elif spec.modulation == "lora":
            self.modulation = LowRank(spec.modulated, 2 + spec.gates, spec.lora_rank)
        if spec.position_bias:
            init = nn.initializers.normal(1.0)
            self.position_bias = self.param("position_bias", init, (spec.position_bias, self.heads))

    def adapt(self, stream: Stream) -> dict[str, Adaptation]:
        """Returns the modulation of each sub-layer, from the conditioning of the stream."""
        spec, conditioning = self.spec, stream.modulation
        if spec.modulation == "none":
            return {}
        if spec.modulation == "table":
            table = self.modulation + conditioning
            rows = [table[:, :, i] for i in range(spec.chunks)]
        elif spec.modulation == "linear":
            rows = jnp.split(
                self.modulation(nn.silu(conditioning)), 2 if self.last else spec.chunks, -1
            )
        else:
            rows = self.modulation(conditioning)
        if self.last:
            return {"self": Adaptation(rows[0], rows[1], None)}
        size = 2 + spec.gates
        parts = (rows[i : i + size] for i in range(0, len(rows), size))
        return {
            name: Adaptation(part[0], part[1], part[2] if spec.gates else None)
            for name, part in zip(spec.modulated, parts, strict=True)
        }

    def project(self, stream: Stream, adaptation) -> tuple[Array, Array, Array]:
        """Returns q, k, v of the self-attention, already rotated."""
        x = self._enter("self", stream.x, adaptation)
        q, k, v = self.self_attn.query_key_value(x)
        if not self.spec.scaled:
            q *= self.head_dim**0.5
        if stream.rope is None:
            return q, k, v
        style = self.spec.rotary
        return rotate(q, stream.rope, style), rotate(k, stream.rope, style), v

    def bias(self, stream: Stream) -> Float[Array, "n l l"] | None:
        """Returns the bias of this expert's attention logits."""
        if self.spec.position_bias:
            return jnp.moveaxis(jnp.take(self.position_bias, stream.bias, axis=0), -1, 0)
        return stream.bias

    def finish(self, stream: Stream, adaptation, attended: Array, context: KeyValue | None):
        """Computes everything after the attention: output projection, cross-attention,
        feed-forward."""
        slots = stream.x.shape[1:-1]
        x = self._leave("self", stream.x, self.self_attn.output(attended, slots), adaptation)
        if self.spec.cross != "none":
            query = self.cross_attn.query(self._enter("cross", x, adaptation))
            y = self.cross_attn.output(self._read(query, *context), slots)
            x = self._leave("cross", x, y, adaptation)
        return self._leave("ffn", x, self.ffn(self._enter("ffn", x, adaptation)), adaptation)

    def _read(self, query: Array, keys: Array, values: Array) -> Array:
        rows, length = self.spec.context_rows, keys.shape[2]
        if rows and length > rows:
            raise ValueError(f"the context has {length} tokens, more than model.context_rows = "
                             f"{rows}: shorten the text, or raise model.context_rows")  # fmt: skip
        zeros = rows - length if rows else 0
        return attention.attend(query, keys, values, zeros=zeros, kernel=self.kernel)

    def _enter(self, name: str, x: Array, adaptation) -> Array:
        if name in adaptation:
            return modulate(x, adaptation[name].shift, adaptation[name].scale)
        return getattr(self, f"{name}_norm")(x)

    def _leave(self, name: str, x: Array, y: Array, adaptation) -> Array:
        y = checkpoint_name(y, "projected")
        gate = adaptation[name].gate if name in adaptation else None
        y = (x + y).astype(x.dtype) if gate is None else gated_add(x, gate, y)
        return self.constrain(y, "batch", *("slots", "tokens")[4 - y.ndim :], "embed")
