"""The mixture of transformers of Fast-WAM: a video and an action expert sharing attention.

The network sees *groups* of slots (first frame, future frames, conditioning video, actions), each
owned by an expert and placed at fixed positions; which of them are present, given or predicted in a
call is the caller's choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from wamjax.models import attention
from wamjax.models.blocks import ExpertSpec, Stream
from wamjax.models.experts import ActionExpert, Time, VideoExpert
from wamjax.models.layers import Linear, unconstrained
from wamjax.models.rope import Rope, rope, video_rope
from wamjax.models.text import TokenEncoder
from wamjax.models.transformer import Cache, Transformer
from wamjax.models.visibility import Visibility

Groups = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class GroupSpec:
    """Where a group lives.

    Attributes:
      name: as in the visibility tables.
      expert: "video" or "action".
      positions: of its latent frames in time (video), or of its action steps.
    """

    name: str
    expert: str
    positions: tuple[int, ...]


class MixtureOfTransformers(nn.Module):
    """Video DiT and action DiT of equal depth and heads, joined by their self-attention.

    Attributes:
      groups: all groups that any program uses, in token order within their expert.
      latent: (h, w, c) of a latent frame.
      action_dim, context_width: sizes of the other inputs.
      constrain: says how activations are sharded, see `layers.unconstrained`.
      vocabulary: 0 when the batch carries text embeddings, else of the trainable token encoder.
      remat, unroll, residual, attention: see `Transformer`.
    """

    video_spec: ExpertSpec
    action_spec: ExpertSpec
    groups: tuple[GroupSpec, ...]
    layers: int
    heads: int
    head_dim: int
    latent: tuple[int, int, int]
    action_dim: int
    context_width: int
    instruction_length: int
    patch: int = 2
    freq_dim: int = 256
    vocabulary: int = 0
    remat: str = "none"
    unroll: int = 1
    residual: str = "compute"
    attention: Callable = attention.grouped
    constrain: Callable = unconstrained

    def setup(self):
        height, width, channels = self.latent
        if height % self.patch or width % self.patch:
            raise ValueError(f"latent {height}x{width} does not divide by patch {self.patch}")
        video = dict(channels=channels, outputs=channels, patch=self.patch)
        self.video = VideoExpert(self.video_spec, self.freq_dim, **video)
        self.action = ActionExpert(self.action_spec, self.freq_dim, action_dim=self.action_dim)
        self.proprio = Linear(self.context_width)
        if self.vocabulary:
            self.text = TokenEncoder(self.vocabulary, self.context_width, self.instruction_length)
        self.transformer = Transformer(
            (self.video_spec, self.action_spec),
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

    def contexts(self, instruction: Array, proprio: Array) -> dict[str, Array]:
        """Instruction (ids (b, s) or embeddings (b, s, c)) and state (b, p) to each expert's
        context (b, s + 1, d); the state is one more token and enters nowhere else."""
        text = self.text(instruction) if self.vocabulary else instruction
        state = self.proprio(proprio)[:, None]
        context = jnp.concatenate([text.astype(state.dtype), state], axis=1)
        experts = {"video": self.video.context(context), "action": self.action.context(context)}
        return {e: self.constrain(x, "batch", "tokens", "embed") for e, x in experts.items()}

    def times(self, levels: Groups) -> dict[str, Time]:
        """Noise levels (b | 1, m) of each group to its time conditioning."""
        return {g: getattr(self, self._group(g).expert).time(v) for g, v in levels.items()}

    def __call__(
        self,
        values: Groups,
        times: dict[str, Time],
        contexts: dict[str, Array],
        visibility: Visibility,
        cache: Cache | None = None,
        predict: tuple[str, ...] = (),
        emit: tuple[str, ...] | None = None,
    ) -> tuple[Groups, Cache]:
        """One evaluation.

        Args:
          values: present groups, (b, t, h, w, c) latents or (b, j, a) actions.
          times: conditioning of the same groups, from `times`.
          contexts, visibility, cache, emit: see `Transformer.__call__`.
          predict: groups whose velocity is wanted.

        Returns:
          (group -> velocity, shaped like its value; the emitted cache).
        """
        present = {e: [g for g in self._of(e) if g.name in values] for e in ("video", "action")}
        streams = {e: self._stream(e, gs, values, times) for e, gs in present.items() if gs}
        tokens, cache = self.transformer(streams, contexts, visibility, cache, emit)
        outputs: Groups = {}
        for expert, groups in present.items():
            start = 0
            for group in groups:
                length = dict(streams[expert].groups)[group.name]
                if group.name in predict:
                    part = tokens[expert][:, start : start + length]
                    outputs[group.name] = self._velocity(group, part, times[group.name])
                start += length
        return outputs, cache

    def initialise(self, values: Groups, levels: Groups, instruction, proprio, visibility):
        """Touches every parameter once; for ``init``."""
        contexts = self.contexts(instruction, proprio)
        return self(values, self.times(levels), contexts, visibility, predict=tuple(values))

    def _stream(self, expert: str, groups, values: Groups, times) -> Stream:
        embed = getattr(self, expert).embed
        tokens = [embed(values[g.name]) for g in groups]
        modulation = jnp.concatenate([times[g.name].modulation for g in groups], axis=1)
        return Stream(
            x=self.constrain(jnp.concatenate(tokens, axis=1), "batch", "tokens", "embed"),
            modulation=self.constrain(modulation, "batch", "slots", None, "embed"),
            rope=self._rope(expert, groups),
            groups=tuple((g.name, x.shape[1]) for g, x in zip(groups, tokens, strict=True)),
        )

    def _velocity(self, group: GroupSpec, tokens: Array, time: Time) -> Array:
        if group.expert == "action":
            return self.action.unembed(tokens)
        return self.video.unembed(tokens, time, (len(group.positions), *self._grid()))

    def _grid(self) -> tuple[int, int]:
        return self.latent[0] // self.patch, self.latent[1] // self.patch

    def _rope(self, expert: str, groups) -> Rope:
        if expert == "action":
            tables = [rope([g.positions], [self.head_dim]) for g in groups]
        else:
            tables = [video_rope(g.positions, *self._grid(), self.head_dim) for g in groups]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *tables)

    def _of(self, expert: str) -> list[GroupSpec]:
        return [g for g in self.groups if g.expert == expert]

    def _group(self, name: str) -> GroupSpec:
        return next(g for g in self.groups if g.name == name)
