"""Defines autoregressive video: a decoder-only transformer over the discrete tokens of a clip.

The sequence is a prefix (text, then one start token that carries the class) followed by the tokens
of the clip, frame by frame and row by row. It is the same `Transformer` under a causal table: there
is no second attention, and decoding uses the same cache as denoising. With ``blocks.GPT``, no norms
of q and k, and learned positions it is GPT-2 (transformers ``modeling_gpt2.py``).
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wamjax.models import attention
from wamjax.models.blocks import ExpertSpec, Stream
from wamjax.models.layers import LayerNorm, Linear, small_normal, unconstrained
from wamjax.models.rope import Rope, video_rope
from wamjax.models.text import TokenEncoder
from wamjax.models.transformer import Cache, Transformer
from wamjax.models.visibility import Visibility, table

# Everything sees the prefix, which sees only itself; a video token sees the ones before it.
CAUSAL = table("autoregressive", {"prefix": "prefix", "video": "prefix video"}, causal=("video",))
# One token against cached keys and values.
STEP = table("decoding", {"past": "past", "now": "past now"})
POSITIONS = ("rope", "learned")


class AutoregressiveTransformer(nn.Module):
    """Predicts each token of a clip from the prefix and the tokens before it.

    Attributes:
      spec: spec of the only expert, ``ExpertSpec("video", width, ffn, **blocks.GPT)``.
      codes: number of token ids.
      grid: (t, h, w) tokens of a clip.
      positions: "rope" rotates by (time, height, width) and leaves the prefix unrotated; "learned"
        adds a table with one row per token of a training clip.
      classes: number of class labels; 0 if there are none.
      vocabulary, instruction_length: token ids and length of a text prefix; 0 if there is none.
      remat, unroll, residual, attention, constrain: see `Transformer`.
    """

    spec: ExpertSpec
    codes: int
    grid: tuple[int, int, int]
    layers: int
    heads: int
    head_dim: int
    positions: str = "rope"
    classes: int = 0
    vocabulary: int = 0
    instruction_length: int = 0
    remat: str = "none"
    unroll: int = 1
    residual: str = "compute"
    attention: Callable = attention.grouped
    constrain: Callable = unconstrained

    @property
    def length(self) -> int:
        """Returns the number of tokens in a clip."""
        return int(np.prod(self.grid))

    @property
    def prefix_length(self) -> int:
        """Returns the number of tokens before the clip."""
        return 1 + (self.instruction_length if self.vocabulary else 0)

    def setup(self):
        if self.positions not in POSITIONS:
            raise ValueError(f"positions {self.positions!r} is not one of {POSITIONS}")
        width = self.spec.width

        def table(rows: int) -> nn.Embed:
            return nn.Embed(rows, width, embedding_init=small_normal)

        self.code_embed, self.start = table(self.codes), table(1)
        if self.positions == "learned":
            self.places = table(self.length)
        if self.classes:
            self.labels = table(self.classes)
        if self.vocabulary:
            self.text = TokenEncoder(self.vocabulary, width, self.instruction_length)
        self.head_norm = LayerNorm()
        self.head = Linear(self.codes, self.spec.bias)
        self.transformer = Transformer(
            (self.spec,),
            self.layers,
            self.heads,
            self.head_dim,
            self.remat,
            self.unroll,
            self.attention,
            self.constrain,
            residual=self.residual,
        )
        nn.share_scope(self, self.transformer)

    def prefix(self, condition: dict[str, Array], b: int) -> Float[Array, "b p d"]:
        """Returns the tokens before the clip.

        Args:
          condition: "label" (b,) and "instruction" (b, n) ids, if the model uses them. Padding (id
            0) becomes rows of zeros, which are attended like any other.
        """
        start = jnp.broadcast_to(self.start.embedding, (b, 1, self.spec.width))
        if self.classes:
            start = start + self.labels(condition["label"])[:, None]
        if not self.vocabulary:
            return start
        return jnp.concatenate([self.text(condition["instruction"]).astype(start.dtype), start], 1)

    def initialise(self, condition: dict[str, Array], ids: Int[Array, "b l"]):
        """Touches every parameter once; for ``init``."""
        return self.logits(self(self.prefix(condition, len(ids)), ids)[0])

    def __call__(
        self,
        prefix: Float[Array, "b p d"] | None,
        ids: Int[Array, "b l"],
        at: int | Array = 0,
        visibility: Visibility = CAUSAL,
        cache: Cache | None = None,
        emit: tuple[str, ...] | None = None,
        valid: dict[str, Array] | None = None,
    ) -> tuple[Float[Array, "b p+l d"], Cache]:
        """Runs all layers on the prefix, if given, and on tokens of the clip.

        Args:
          prefix: from `prefix`; None if it is in the cache.
          ids: tokens of the clip, starting with number `at`; may be empty.
          visibility: `CAUSAL` over groups "prefix" and "video", or `STEP`, where the tokens are
            "now".
          cache, emit, valid: see `Transformer.__call__`.

        Returns:
          (tokens after the last block, for `logits`; the emitted cache).
        """
        name = "now" if visibility is STEP else "video"
        x = self.code_embed(ids)
        if self.positions == "learned":
            x += self._rows(self.places.embedding, at, ids.shape[1])
        before = 0 if prefix is None else prefix.shape[1]
        if before:
            x = jnp.concatenate([prefix.astype(x.dtype), x], axis=1)
        groups = tuple((g, n) for g, n in (("prefix", before), (name, ids.shape[1])) if n)
        x = self.constrain(x, "batch", "tokens", "embed")
        stream = Stream(x, None, self._rope(before, at, ids.shape[1]), groups)
        streams = {self.spec.name: stream}
        tokens, cache = self.transformer(streams, {}, visibility, cache, emit, valid)
        return tokens[self.spec.name], cache

    def logits(self, tokens: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        """Returns the logits of the token that follows each of `tokens`, float32."""
        return self.head(self.head_norm(tokens)).astype(jnp.promote_types(tokens.dtype, "float32"))

    def _rope(self, before: int, at: int | Array, length: int) -> Rope | None:
        if self.positions != "rope":
            return None
        t, h, w = self.grid
        cos, sin = video_rope(range(t), h, w, self.head_dim)
        ones, zeros = np.ones((before, cos.shape[1])), np.zeros((before, cos.shape[1]))
        rows = [self._rows(part, at, length) for part in (cos, sin)]
        return tuple(jnp.concatenate([*pair]) for pair in zip((ones, zeros), rows, strict=True))

    def _rows(self, table: Array, at: int | Array, length: int) -> Array:
        """Returns rows `at` to `at + length` of a table with one row per token of the clip."""
        if not isinstance(at, int):
            return jax.lax.dynamic_slice_in_dim(jnp.asarray(table), at, length)
        if at + length > len(table):
            raise ValueError(f"tokens {at} to {at + length - 1} do not fit a clip of {len(table)} "
                             "tokens: sample fewer tokens")  # fmt: skip
        return table[at : at + length]
