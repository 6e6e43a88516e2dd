"""Defines the text encoders of T5 v1.0, T5 v1.1 and umT5: one expert of the `Transformer`.

    network = T5Encoder(**UMT5_XXL)
    context = embed(params, network, ids, mask, jnp.bfloat16, length=512)

They have ReLU or gated GELU, no biases, RMS norms, and unscaled attention logits with a learned
bias per distance. T5 shares the table of that bias between its layers; umT5 has one per layer.
Public files: transformers ``modeling_t5.py`` and ``modeling_umt5.py``, Wan's ``wan/modules/t5.py``.
`tokenizer` produces the ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from wamjax.models import attention, blocks
from wamjax.models.layers import RMSNorm, at_least_float32, unconstrained
from wamjax.models.transformer import Transformer
from wamjax.models.visibility import bidirectional

# The encoders of Cosmos-Predict2, of SD3, and of Wan and Fast-WAM.
T5_11B: dict[str, Any] = dict(
    vocabulary=32128, width=1024, ffn=65536, layers=24, heads=128, head_dim=128
)
T5_V1_1_XXL: dict[str, Any] = dict(
    vocabulary=32128, width=4096, ffn=10240, layers=24, heads=64, head_dim=64, mlp="gated_gelu"
)
UMT5_XXL: dict[str, Any] = T5_V1_1_XXL | dict(vocabulary=256384, shared_bias=False)


class T5Encoder(nn.Module):
    """Turns token ids into contextual embeddings.

    Attributes:
      vocabulary: rows of the embedding; often more than the tokenizer has ids.
      width, ffn, layers, heads, head_dim: d_model, d_ff, num_layers, num_heads, d_kv of the
        published configs; heads x head_dim may differ from the width.
      mlp: "relu" (v1.0) or "gated_gelu" (v1.1, umT5).
      shared_bias: one table of position biases for all layers (T5), or one per layer (umT5).
      buckets, max_distance: see `position_buckets`.
      remat, unroll, attention, constrain: see `Transformer`.
    """

    vocabulary: int
    width: int
    ffn: int
    layers: int
    heads: int
    head_dim: int
    mlp: str = "relu"
    shared_bias: bool = True
    buckets: int = 32
    max_distance: int = 128
    remat: str = "none"
    unroll: int = 1
    attention: Callable = attention.grouped
    constrain: Callable = unconstrained

    def setup(self):
        buckets = 0 if self.shared_bias else self.buckets
        choices = blocks.T5 | dict(mlp=self.mlp, position_bias=buckets)
        self.transformer = Transformer(
            (blocks.ExpertSpec("text", self.width, self.ffn, **choices),),
            self.layers,
            self.heads,
            self.head_dim,
            self.remat,
            self.unroll,
            self.attention,
            self.constrain,
        )
        nn.share_scope(self, self.transformer)
        init = nn.initializers.normal
        self.embedding = self.param("embedding", init(1.0), (self.vocabulary, self.width))
        if self.shared_bias:
            size = self.buckets, self.heads
            self.position_bias = self.param("position_bias", init(self.width**-0.5), size)
        self.final_norm = RMSNorm()

    def __call__(self, ids: Int[Array, "b s"], mask: Bool[Array, "b s"]) -> Float[Array, "b s d"]:
        """Encodes a batch of texts.

        Args:
          ids: tokens; an id outside the vocabulary gives NaN.
          mask: True where there is a token. Padding is not attended, so it does not change the rows
            of tokens; its own rows have no meaning.

        Returns:
          The last layer's tokens after the final norm, in the dtype of the parameters.
        """
        x = jnp.take(self.embedding, ids, axis=0)
        x = self.constrain(x, "batch", "tokens", "embed")
        bias = jnp.asarray(position_buckets(ids.shape[1], self.buckets, self.max_distance))
        if self.shared_bias:
            bias = jnp.moveaxis(jnp.take(self.position_bias, bias, axis=0), -1, 0)
        mask = jnp.asarray(mask, bool)
        # A text without any token attends its padding: a softmax over nothing would be NaN, and
        # stay NaN in gradients after its rows are zeroed.
        valid = mask | ~jnp.any(mask, axis=1, keepdims=True)
        stream = blocks.Stream(x, None, None, (("tokens", ids.shape[1]),), bias)
        tokens, _ = self.transformer(
            {"text": stream}, {}, bidirectional("tokens"), valid={"tokens": valid}
        )
        return self.final_norm(tokens["text"])


def position_buckets(
    length: int, buckets: int = 32, max_distance: int = 128
) -> Int[np.ndarray, "l l"]:
    """Returns which bias a query (row) adds to its logit with a key (column).

    The first half of the buckets is for keys at or before the query, the second half for keys after
    it. The first half of each of these counts single steps; the other buckets grow geometrically
    towards an end at `max_distance`, and the last one includes all larger distances.

    Source: ``_relative_position_bucket`` of the public files, in integers.
    """
    half = buckets // 2
    single = half // 2
    growth = np.arange(half - single) / (half - single)
    # Rounded, because a bucket that starts at an integer must not start one later.
    edges = np.ceil(np.round(single * (max_distance / single) ** growth, 6))
    starts = np.concatenate([np.arange(single), edges])
    offset = np.arange(length)[None] - np.arange(length)[:, None]
    bucket = np.searchsorted(starts, np.abs(offset), side="right") - 1
    return (bucket + half * (offset > 0)).astype(np.int32)


def embed(
    params: dict,
    network: T5Encoder,
    ids: Int[Array, "b s"],
    mask: Bool[Array, "b s"],
    dtype: DTypeLike | None = None,
    length: int | None = None,
) -> Float[Array, "b r d"]:
    """Returns the context of a video model: embeddings of the tokens, then rows of zeros.

    Wan, Fast-WAM and Cosmos-Predict2 attend to all rows without a mask: 512, 128 and 512 rows.
    There may be fewer ids than rows: padding does not change any token, so short texts cost less.

    Args:
      params: parameters of the network, which computes in their dtype.
      ids, mask: see `T5Encoder.__call__`.
      dtype: dtype of the result; that of the parameters if None.
      length: r, rows of the result; s if None.

    Raises:
      ValueError: `length` would cut tokens.
    """
    padding = 0 if length is None else length - ids.shape[1]
    if padding < 0:
        raise ValueError(f"{ids.shape[1]} token ids do not fit a context of length {length}: cut "
                         "them, or raise the length")  # fmt: skip
    context = network.apply({"params": params}, ids, mask)
    context = jnp.where(jnp.asarray(mask, bool)[..., None], context, 0)
    context = context.astype(dtype or context.dtype)
    return jnp.pad(context, ((0, 0), (0, padding), (0, 0)))


def pool(context: Float[Array, "b s d"], mask: Bool[Array, "b s"]) -> Float[Array, "b d"]:
    """Returns the mean over tokens, to condition by one vector; zeros for a text without tokens."""
    weights = jnp.asarray(mask, bool)[..., None]
    total = jnp.sum(jnp.where(weights, at_least_float32(context), 0), axis=1)
    return (total / jnp.maximum(jnp.sum(weights, axis=1), 1)).astype(context.dtype)
