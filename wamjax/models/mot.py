"""Defines Fast-WAM's mixture of transformers: a video and an action expert with shared
attention."""

from __future__ import annotations

import jax.numpy as jnp

from wamjax.models.blocks import ExpertSpec
from wamjax.models.experts import ActionExpert
from wamjax.models.layers import Linear
from wamjax.models.shell import Conditions, Groups, Shell
from wamjax.models.text import TokenEncoder


class MixtureOfTransformers(Shell, kw_only=True):
    """Joins a video DiT and an action DiT of equal depth and heads by their self-attention.

    Both read the instruction by cross-attention, with the robot's state as one more token.

    Attributes:
      action_spec: spec of the action expert.
      value_spec: spec of a third expert, whose only token predicts the outcome of the actions that
        it sees; None if there is none.
      action_dim, context_width: sizes of the other inputs.
      vocabulary: number of token ids of the trainable token encoder; 0 if the batch holds text
        embeddings.
      instruction_length: tokens of the instruction.
    """

    action_spec: ExpertSpec
    action_dim: int
    context_width: int
    instruction_length: int
    vocabulary: int = 0
    value_spec: ExpertSpec | None = None

    def setup(self):
        super().setup()
        self.action = ActionExpert(self.action_spec, self.freq_dim, action_dim=self.action_dim)
        self.proprio = Linear(self.context_width)
        if self.vocabulary:
            self.text = TokenEncoder(self.vocabulary, self.context_width, self.instruction_length)
        judge = ()
        if self.value_spec:
            judge = (self.value_spec,)
            self.value = ActionExpert(self.value_spec, self.freq_dim, action_dim=1)
        self._blocks(self.video_spec, self.action_spec, *judge)

    def conditions(self, condition: Groups) -> Conditions:
        """Returns each expert's context, made of the instruction and the state.

        Args:
          condition: "instruction" ids (b, s) or "context" embeddings (b, s, c), and "proprio" (b,
            p), which becomes one more token and enters nowhere else.
        """
        state = self.proprio(condition["proprio"])[:, None]
        text = self.text(condition["instruction"]) if self.vocabulary else condition["context"]
        context = jnp.concatenate([text.astype(state.dtype), state], axis=1)
        contexts = {"video": self.video.context(context), "action": self.action.context(context)}
        if self.value_spec:
            contexts["value"] = self.value.context(context)
        contexts = {e: self.constrain(x, "batch", "tokens", "embed") for e, x in contexts.items()}
        return Conditions(None, contexts, {})
