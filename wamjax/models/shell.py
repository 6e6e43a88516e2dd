"""What stands around the blocks: groups of slots to tokens, and tokens to what is predicted.

A network sees *groups* of slots (first frame, future frames, actions, ...), each owned by an expert
and placed at fixed positions. Which of them are present, given or predicted in a call is the
caller's choice. Networks differ in what conditions them and in their experts; see `dit.DiT` and
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
# The group of the video expert that begins as learned tokens, at the places of the frames that it
# stands for (RIFT, arXiv 2608.11521).
ANTICIPATION = "anticipation"


@dataclasses.dataclass(frozen=True)
class GroupSpec:
    """Where a group lives.

    Attributes:
      name: as in the visibility tables.
      expert: "video", "action" or "value".
      positions: of its latent frames in time (video), or of its steps.
    """

    name: str
    expert: str
    positions: tuple[int, ...]


class Conditions(NamedTuple):
    """What conditions a network beside noise levels, in the three ways it can.

    Attributes:
      vector: added to the time embedding: class and pooled text; None without.
      contexts: expert -> what its cross-attention reads.
      tokens: group -> values that are attended as tokens of their own.
    """

    vector: Float[Array, "b d"] | None
    contexts: Groups
    tokens: Groups


class Shell(nn.Module, kw_only=True):
    """A transformer over groups: encoders and heads of its experts around shared attention.

    A sub-class makes its experts in `setup`, calls `_blocks` at its end, and says what conditions
    it (`conditions`).

    Attributes:
      video_spec: of the expert for latent frames, `blocks.ExpertSpec`.
      groups: all groups that any use of the network has, in token order within their expert.
      latent: (h, w, c) of a latent frame.
      outputs: channels that come out; 0 = as many as come in.
      text_net: what a context goes through before cross-attention, see `experts.Conditioned`.
      freq_dim, time_scale: of the embedding of noise levels, see there.
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
        """Makes the transformer, whose parameters are those of the network."""
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

    # ---- what conditions ----

    def conditions(self, condition: Groups) -> Conditions:
        """Computes what conditions beside noise levels.

        Args:
          condition: what of a batch the network has a use for; further keys do not matter.
        """
        raise NotImplementedError

    def times(self, levels: Groups, vector: Float[Array, "b d"] | None = None) -> dict[str, Time]:
        """Noise levels (b | 1, m) of each group, with the vector, to its conditioning."""
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
        """Outputs at noise levels under a condition, nothing cached.

        Touches every parameter of the groups that are present, so ``init`` runs it too.

        Args:
          predict: groups whose output is wanted; all of `values` by default.
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
        """One evaluation.

        Args:
          values: present groups, (b, t, h, w, c) latents or (b, j, a) actions, and the tokens of
            `conditions`; none in a prefill of the context alone.
          times: conditioning of the same groups, from `times`.
          contexts: from `conditions`.
          visibility, cache, emit, valid: see `Transformer.__call__`; tokens that a network adds
            must be in the table.
          predict: groups whose output is wanted.

        Returns:
          (group -> output, shaped like its value but for the channels; the emitted cache).
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
        """The groups of a call, in token order."""
        return [g for g in self.groups if g.name in values]

    def _contexts(self, contexts: Groups, present, times: dict[str, Time]) -> Groups:
        """What cross-attention reads at this evaluation."""
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
        """Tokens of a network's own behind those of the groups, named."""
        del expert, groups, tokens, times
        return []

    def _output(self, group: GroupSpec, tokens: Array, time: Time) -> Array:
        grid = (len(group.positions), *self._grid())
        return getattr(self, group.expert).unembed(tokens, time, grid)

    def _rope(self, expert: str, groups: list[GroupSpec], length: int) -> Rope | None:
        """Rotary tables of the groups; further tokens are not rotated."""
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
        """(rows, columns) of tokens of a latent frame."""
        return self.latent[0] // self.patch, self.latent[1] // self.patch


def _padded(streams: dict[str, Stream], group: str, keys: Array) -> Array:
    """Which keys of a group exist, with those that its stream pads it by, which do not."""
    for stream in streams.values():
        if stream.padding and group in dict(stream.groups):
            return stream.padding.pad(keys, 1, False)
    return keys
