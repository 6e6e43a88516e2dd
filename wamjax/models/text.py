"""Turns instructions into context tokens.

Everything downstream sees one interface: context (b, s, width). Padding rows are zero and are
attended without a mask, as in Wan and Fast-WAM: a zero row becomes the text network's bias
response, so cross-attention needs no mask.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wamjax.models import blocks
from wamjax.models.layers import small_normal
from wamjax.models.rope import rope
from wamjax.models.transformer import Transformer
from wamjax.models.visibility import bidirectional


class TokenEncoder(nn.Module):
    """Embeds words and positions, with padding rows zero: a small trainable replacement for T5.

    Attributes:
      vocabulary: number of token ids; id 0 is padding.
      width: width of the context.
      length: number of positions.
    """

    vocabulary: int
    width: int
    length: int

    @nn.compact
    def __call__(self, instruction: Int[Array, "b s"]) -> Float[Array, "b s c"]:
        init = nn.initializers.normal(1.0)
        words = self.param("embedding", init, (self.vocabulary, self.width))
        positions = self.param("positions", small_normal, (self.length, self.width))
        if instruction.shape[1] != self.length:
            raise ValueError(
                f"the instruction has {instruction.shape[1]} tokens, the text encoder takes "
                f"{self.length}: set config.data.instruction_length={self.length}"
            )
        context = jnp.take(words, instruction, axis=0) + positions
        return jnp.where(instruction[..., None] > 0, context, 0)


class ContextEncoder(nn.Module):
    """Encodes text with attention between its words, with padding rows zero; small and trainable.

    Attributes:
      vocabulary, width, length: see `TokenEncoder`, its first layer.
      layers, heads: of pre-norm blocks with rotary positions; padding is not attended.
    """

    vocabulary: int
    width: int
    length: int
    layers: int
    heads: int

    @nn.compact
    def __call__(self, instruction: Int[Array, "b s"]) -> Float[Array, "b s c"]:
        x = TokenEncoder(self.vocabulary, self.width, self.length, name="words")(instruction)
        head_dim = self.width // self.heads
        spec = blocks.ExpertSpec("text", self.width, 4 * self.width, **blocks.GPT)
        real = instruction > 0
        # A text without any word attends its padding: a softmax over nothing would be NaN.
        valid = real | ~jnp.any(real, axis=1, keepdims=True)
        turns = rope([np.arange(self.length)], [head_dim])
        stream = blocks.Stream(x, None, turns, (("words", self.length),))
        network = Transformer((spec,), self.layers, self.heads, head_dim, name="encoder")
        tokens, _ = network({"text": stream}, {}, bidirectional("words"), valid={"words": valid})
        return jnp.where(real[..., None], tokens["text"], 0)
