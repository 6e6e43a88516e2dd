"""Surrounds the blocks: turns groups of slots into tokens, and tokens into predictions.

A network sees *groups* of slots (first frame, future frames, actions, ...), each owned by an expert
and placed at fixed positions. The caller chooses which groups are present, given or predicted in a
call. Networks differ in their conditioning and in their experts; see `dit.DiT` and
`mot.MixtureOfTransformers`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wamjax.models import attention, padding
from wamjax.models.blocks import ExpertSpec, Stream
from wamjax.models.experts import Time, VideoExpert
from wamjax.models.layers import unconstrained
from wamjax.models.rope import Rope, rope, video_rope
from wamjax.models.transformer import Cache, Transformer
from wamjax.models.visibility import Visibility

Groups = dict[str, Array]
# The group of the video expert that starts as learned tokens, at the positions of the frames that
# it represents (RIFT, arXiv 2608.11521).
ANTICIPATION = "anticipation"


@dataclasses.dataclass(frozen=True)
class GroupSpec:
    """Names a group, its expert and its positions.

    Attributes:
      name: as in the visibility tables.
      expert: "video", "action" or "value".
      positions: times of its latent frames (video), or positions of its steps.
    """

    name: str
    expert: str
    positions: tuple[int, ...]


class Conditions(NamedTuple):
    """Holds all conditioning except noise levels, by the three ways in which it enters.

    Attributes:
      vector: added to the time embedding: class and pooled text; None if there is neither.
      contexts: expert -> what its cross-attention reads.
      tokens: group -> values that are attended as separate tokens.
    """

    vector: Float[Array, "b d"] | None
    contexts: Groups
    tokens: Groups


class Shell(nn.Module, kw_only=True):
    """Runs a transformer over groups: encoders and heads of its experts around shared attention.

    A sub-class creates its experts in `setup`, calls `_blocks` at the end of it, and implements
    `conditions`.

    Attributes:
      video_spec: spec of the expert for latent frames, `blocks.ExpertSpec`.
      groups: all groups that any use of the network has, in token order within their expert.
      latent: (h, w, c) of a latent frame.
      outputs: number of output channels; 0 = the number of input channels.
      text_net: network that a context passes before cross-attention, see `experts.Conditioned`.
      freq_dim, time_scale: embedding of noise levels, see `experts.Conditioned`.
      rope_scale: along (time, height, width); see `rope.ntk_bases`.
      remat, unroll, residual, attention, constrain: see `Transformer`.
      pad_slots: whether slots are padded to whole tiles, see `padding.choose`.
    """

    video_spec: ExpertSpec
    groups: tuple[GroupSpec, ...]
    latent: tuple[int, int, int]
    layers: int
    heads: int
    head_dim: int
    patch: int = 2
    outputs: int = 0
    text_net: str = "mlp"
    freq_dim: int = 256
    time_scale: float = 1000.0
    rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    remat: str = "none"
    unroll: int = 1
    residual: str = "compute"
    attention: Callable = attention.grouped
    constrain: Callable = unconstrained
    pad_slots: str = "auto"

    def setup(self):
        height, width, channels = self.latent
        if height % self.patch or width % self.patch:
            raise ValueError(f"latent {height}x{width} does not divide by patch {self.patch}")
        rows, columns = self._grid()
        frames = [len(g.positions) for g in self.groups if g.name == ANTICIPATION]
        self.video = VideoExpert(
            self.video_spec,
            self.freq_dim,
            text=self.text_net,
            time_scale=self.time_scale,
            channels=channels,
            outputs=self.outputs or channels,
            patch=self.patch,
            learned=sum(frames) * rows * columns,
        )

    def _blocks(self, *specs: ExpertSpec, ends: tuple[str, ...] = ()):
        """Creates the transformer and shares this module's parameter scope with it."""
        self.transformer = Transformer(
            specs,
            self.layers,
            self.heads,
            self.head_dim,
            self.remat,
            self.unroll,
            self.attention,
            self.constrain,
            ends=ends,
            residual=self.residual,
        )
        nn.share_scope(self, self.transformer)

    # ---- conditioning ----

    def conditions(self, condition: Groups) -> Conditions:
        """Computes all conditioning except noise levels.

        Args:
          condition: the entries of a batch that the network uses; other keys are ignored.
        """
        raise NotImplementedError

    def times(self, levels: Groups, vector: Float[Array, "b d"] | None = None) -> dict[str, Time]:
        """Turns the noise levels (b | 1, m) of each group, and the vector, into its
        conditioning."""
        experts = {g.name: g.expert for g in self.groups}
        return {g: getattr(self, experts[g]).time(v, vector) for g, v in levels.items()}

    # ---- evaluations ----

    def evaluate(
        self,
        values: Groups,
        levels: Groups,
        condition: Groups,
        visibility: Visibility,
        predict: tuple[str, ...] = (),
    ) -> Groups:
        """Returns outputs at given noise levels and conditions, without a cache.

        Uses every parameter of the groups that are present, so ``init`` runs it too.

        Args:
          predict: groups whose output is needed; all of `values` by default.
        """
        vector, contexts, tokens = self.conditions(condition)
        times = self.times(levels, vector)
        predict = predict or tuple(values)
        return self(values | tokens, times, contexts, visibility, predict=predict)[0]

    def __call__(
        self,
        values: Groups,
        times: dict[str, Time],
        contexts: Groups,
        visibility: Visibility,
        cache: Cache | None = None,
        predict: tuple[str, ...] = (),
        emit: tuple[str, ...] | None = None,
        valid: Groups | None = None,
    ) -> tuple[Groups, Cache]:
        """Runs one evaluation.

        Args:
          values: present groups, (b, t, h, w, c) latents or (b, j, a) actions, and the tokens of
            `conditions`; empty in a prefill of the context alone.
          times: conditioning of the same groups, from `times`.
          contexts: from `conditions`.
          visibility, cache, emit, valid: see `Transformer.__call__`; the table must contain tokens
            that a network adds.
          predict: groups whose output is needed.

        Returns:
          (group -> output, shaped like its value except for the channels; the emitted cache).
        """
        present: dict[str, list[GroupSpec]] = {}
        for group in self._present(values):
            present.setdefault(group.expert, []).append(group)
        streams = {e: self._stream(e, gs, values, times) for e, gs in present.items()}
        contexts = self._contexts(contexts, present, times)
        valid = {g: _padded(streams, g, keys) for g, keys in (valid or {}).items()}
        tokens, cache = self.transformer(streams, contexts, visibility, cache, emit, valid)
        outputs: Groups = {}
        for expert, groups in present.items():
            start, lengths = 0, dict(streams[expert].groups)
            for group in groups:
                length = lengths[group.name]
                if group.name in predict:
                    part = tokens[expert][:, start : start + length]
                    if slots := streams[expert].padding:
                        part = slots.remove(part)
                    outputs[group.name] = self._output(group, part, times[group.name])
                start += length
        return outputs, cache

    # ---- parts ----

    def _present(self, values: Groups) -> list[GroupSpec]:
        """Returns the groups of a call, in token order."""
        return [g for g in self.groups if g.name in values]

    def _contexts(self, contexts: Groups, present, times: dict[str, Time]) -> Groups:
        """Returns what cross-attention reads in this evaluation."""
        del present, times
        return contexts

    def _stream(self, expert: str, groups: list[GroupSpec], values: Groups, times) -> Stream:
        tokens = [(g.name, self._embed(g, values[g.name])) for g in groups]
        tokens += self._extra(expert, groups, tokens, times)
        x = jnp.concatenate([x for _, x in tokens], axis=1)
        modulation = jax.tree.map(
            lambda *rows: self._constrained(jnp.concatenate(rows, axis=1)),
            *(times[g.name].modulation for g in groups),
        )
        table = self._rope(expert, groups, x.shape[1])
        lengths = {name: x.shape[1] for name, x in tokens}
        rows = [m.shape[1] for m in jax.tree.leaves(modulation)]
        slots = padding.choose(self.pad_slots, [*lengths.values()], rows[0]) if rows else None
        if slots:
            x = slots.pad(x)
            table = table and (slots.pad(table[0], 0, 1), slots.pad(table[1], 0))
            lengths = {g: n // slots.slot * slots.size for g, n in lengths.items()}
        return Stream(
            x=self.constrain(x, "batch", "tokens", "embed"),
            modulation=modulation,
            rope=table,
            groups=tuple(lengths.items()),
            padding=slots,
        )

    def _constrained(self, rows: Array) -> Array:
        return self.constrain(rows, "batch", "slots", *[None] * (rows.ndim - 3), "embed")

    def _embed(self, group: GroupSpec, value: Array) -> Array:
        tokens = getattr(self, group.expert).embed(value)
        return tokens + self.video.anticipation if group.name == ANTICIPATION else tokens

    def _extra(self, expert: str, groups, tokens, times) -> list[tuple[str, Array]]:
        """Returns the network's additional tokens by name; they follow those of the groups."""
        del expert, groups, tokens, times
        return []

    def _output(self, group: GroupSpec, tokens: Array, time: Time) -> Array:
        grid = (len(group.positions), *self._grid())
        return getattr(self, group.expert).unembed(tokens, time, grid)

    def _rope(self, expert: str, groups: list[GroupSpec], length: int) -> Rope | None:
        """Returns rotary tables of the groups; additional tokens are not rotated."""
        if expert in ("action", "value"):
            tables = [rope([g.positions], [self.head_dim]) for g in groups]
        else:
            grid = self._grid()
            tables = [
                video_rope(g.positions, *grid, self.head_dim, self.rope_scale) for g in groups
            ]
        cos, sin = (np.concatenate(parts) for parts in zip(*tables, strict=True))
        extra = (length - len(cos), cos.shape[1])
        return np.concatenate([cos, np.ones(extra)]), np.concatenate([sin, np.zeros(extra)])

    def _grid(self) -> tuple[int, int]:
        """Returns (rows, columns) of tokens in a latent frame."""
        return self.latent[0] // self.patch, self.latent[1] // self.patch


def _padded(streams: dict[str, Stream], group: str, keys: Array) -> Array:
    """Returns which keys of a group exist, including the padding that its stream adds, which does
    not."""
    for stream in streams.values():
        if stream.padding and group in dict(stream.groups):
            return stream.padding.pad(keys, 1, False)
    return keys
