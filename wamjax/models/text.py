"""Where instructions become context tokens.

Everything downstream sees one interface: context (b, s, width). Rows of padding are zero and are
attended without a mask, as in Wan and Fast-WAM: a zero row becomes the text network's bias
response, so cross-attention needs no mask at all.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wamjax.models.layers import small_normal


class TokenEncoder(nn.Module):
    """A small trainable stand-in for T5: word embedding plus position, padding rows zero.

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
                f"instruction has {instruction.shape[1]} tokens, the encoder {self.length}; set "
                "data.instruction_length to the encoder's length"
            )
        context = jnp.take(words, instruction, axis=0) + positions
        return jnp.where(instruction[..., None] > 0, context, 0)
