"""Diffusion transformers on pictures: DiT, text-to-image and -video DiTs, MMDiT.

One network spans them; what differs is said by the `blocks.ExpertSpec` of its experts and by three
choices here: how time and class condition it (`conditioning`, the four designs of DiT, section
3.2), where text enters (`text`), and how positions are told (`positions`). An image is a clip of
one frame. Public files: facebookresearch/DiT ``models.py``, diffusers ``transformer_sd3.py``.

The network sees groups of latent frames, like `mot.MixtureOfTransformers`, so frames that are
given, cached or denoised are the caller's choice.
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
from wamjax.models.experts import Time, VideoExpert
from wamjax.models.layers import Linear, Mlp, small_normal, unconstrained
from wamjax.models.mot import GroupSpec
from wamjax.models.rope import Rope, video_rope
from wamjax.models.transformer import Cache, Transformer
from wamjax.models.visibility import Visibility

Groups = dict[str, Array]

CONDITIONING = ("adaln_zero", "adaln", "cross_attention", "in_context")
TEXT = ("none", "pooled", "cross", "both", "joint")

# name -> (layers, width, heads): table 1 of the DiT paper.
SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


def expert(
    width: int, ffn: int, conditioning: str = "adaln_zero", text: str = "none", **choices
) -> ExpertSpec:
    """The spec of a picture expert under DiT's conditioning designs and the routes of text.

    With ``text="cross"`` or ``"both"`` the block is the canonical one of text-to-video models:
    self-attention, cross-attention and feed-forward, adaLN-Zero on all three.
    """
    for name, value, known in (("conditioning", conditioning, CONDITIONING), ("text", text, TEXT)):
        if value not in known:
            raise ValueError(f"{name} {value!r} is not one of {known}")
    adaptive = conditioning in ("adaln_zero", "adaln")
    cross = text in ("cross", "both")
    if cross and conditioning == "cross_attention":
        raise ValueError("conditioning='cross_attention' has no second cross-attention for text")
    if cross:
        route = "modulated" if adaptive else "plain"
    else:
        route = "plain" if conditioning == "cross_attention" else "none"
    defaults = dict(
        modulation="linear" if adaptive else "none",
        gates=conditioning == "adaln_zero",
        cross=route,
        qk_norm="none",
    )
    return ExpertSpec("video", width, ffn, **(defaults | choices))


def sincos(height: int, width: int, dim: int) -> Float[np.ndarray, "l d"]:
    """DiT's fixed position table: half of the channels for the column, half for the row; of each
    half first all sines, then all cosines."""
    omega = 1.0 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    angles = [np.outer(p.reshape(-1), omega) for p in (columns, rows)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)


class DiT(nn.Module):
    """A transformer that denoises pictures.

    Attributes:
      video_spec: of the picture expert, from `expert` or a published block.
      groups: all groups of frames that any program uses; of them "condition" (`in_context`) and
        "text" (`joint`) are implied.
      latent: (h, w, c) of a latent frame.
      outputs: channels that come out; 0 = as many as come in (2 c with learned variance).
      conditioning: how time and class enter; see `expert`.
      classes: of a class label; label `classes` means "no class". 0 without.
      text: where text embeddings enter: pooled into the vector beside time, by cross-attention,
        both, or as tokens of a second expert (`joint`, with pooled text as well).
      text_spec: of the text expert in `joint`; it ends before the last block's output.
      context_width, pooled_width: of the text embeddings; pooled_width 0 pools nothing.
      text_net: what a context goes through before cross-attention, see `experts.Conditioned`.
      positions: "sincos" (added to the tokens) or "rope".
      time_scale: see `experts.Conditioned`.
    """

    video_spec: ExpertSpec
    groups: tuple[GroupSpec, ...]
    latent: tuple[int, int, int]
    layers: int
    heads: int
    head_dim: int
    patch: int = 2
    outputs: int = 0
    conditioning: str = "adaln_zero"
    classes: int = 0
    text: str = "none"
    text_spec: ExpertSpec | None = None
    context_width: int = 0
    pooled_width: int = 0
    text_net: str = "linear"
    positions: str = "sincos"
    freq_dim: int = 256
    time_scale: float = 1000.0
    remat: str = "none"
    unroll: int = 1
    attention: Callable = attention.grouped
    constrain: Callable = unconstrained

    def setup(self):
        height, width, channels = self.latent
        if height % self.patch or width % self.patch:
            raise ValueError(f"latent {height}x{width} does not divide by patch {self.patch}")
        if (self.text == "joint") != (self.text_spec is not None):
            raise ValueError("text='joint' and a text_spec go together")
        self.video = VideoExpert(
            self.video_spec,
            self.freq_dim,
            text=self.text_net if self.text in ("cross", "both") else "none",
            time_scale=self.time_scale,
            channels=channels,
            outputs=self.outputs or channels,
            patch=self.patch,
        )
        if self.classes:
            self.labels = nn.Embed(
                self.classes + 1, self.video_spec.width, embedding_init=small_normal
            )
        if self.pooled_width:
            width = self.video_spec.width
            self.pooled_mlp = Mlp(width, width, nn.silu, small_normal)
        if self.text_spec is not None:
            self.text_embed = Linear(self.text_spec.width)
        specs = (self.video_spec,) if self.text_spec is None else (self.video_spec, self.text_spec)
        self.transformer = Transformer(
            specs,
            self.layers,
            self.heads,
            self.head_dim,
            self.remat,
            self.unroll,
            self.attention,
            self.constrain,
            ends=() if self.text_spec is None else (self.text_spec.name,),
        )
        nn.share_scope(self, self.transformer)

    def vector(
        self, label: Int[Array, " b"] | None = None, pooled: Float[Array, "b c"] | None = None
    ) -> Float[Array, "b d"] | None:
        """What conditions beside time, as one vector: the class, pooled text."""
        parts = [self.labels(label)] if self.classes else []
        if self.pooled_width:
            parts.append(self.pooled_mlp(pooled))
        return sum(parts[1:], parts[0]) if parts else None

    def contexts(self, context: Float[Array, "b s c"] | None = None) -> Groups:
        """Text embeddings for the cross-attention; empty where text enters otherwise."""
        if self.text not in ("cross", "both"):
            return {}
        return {"video": self.constrain(self.video.context(context), "batch", "tokens", "embed")}

    def times(self, levels: Groups, vector: Float[Array, "b d"] | None = None) -> dict[str, Time]:
        """Noise levels (b | 1, m) of each group, with the vector, to its conditioning."""
        if self.conditioning in ("adaln_zero", "adaln"):
            return {g: self.video.time(v, vector) for g, v in levels.items()}
        return {g: self._tokens(v, vector) for g, v in levels.items()}

    def _tokens(self, level: Array, vector: Array | None) -> Time:
        """Time and vector as a sequence of two, instead of their sum."""
        if level.shape[1] != 1:
            raise ValueError(
                f"conditioning {self.conditioning!r} takes one level for all frames, got "
                f"{level.shape[1]}"
            )
        time = self.video.time(level).embedding
        if vector is None:
            return Time(time, None)
        rows = max(len(time), len(vector))
        parts = [jnp.broadcast_to(x, (rows, 1, x.shape[-1])) for x in (time, vector[:, None])]
        return Time(jnp.concatenate(parts, axis=1), None)

    def initialise(self, values: Groups, levels: Groups, condition: dict[str, Array], visibility):
        """Touches every parameter once; for ``init``. `condition`: label, pooled, context."""
        vector = self.vector(condition.get("label"), condition.get("pooled"))
        contexts = self.contexts(condition.get("context"))
        times = self.times(levels, vector)
        return self(values, times, contexts, visibility, predict=tuple(g.name for g in self.groups))

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
          values: present groups, (b, t, h, w, c) latents; with `joint`, "text": (b, s, c).
          times: conditioning of the same groups, from `times`.
          contexts: from `contexts`.
          visibility, cache, emit, valid: see `Transformer.__call__`; groups "condition" and
            "text" must be in the table where they exist.
          predict: groups whose output is wanted.

        Returns:
          (group -> output, shaped like its value but for the channels; the emitted cache).
        """
        present = [g for g in self.groups if g.name in values]
        time = times[present[0].name]
        if self.conditioning == "cross_attention":
            contexts = {"video": time.embedding}
        streams = {"video": self._video(present, values, times, time)}
        if self.text_spec is not None:
            text = self.text_embed(values["text"])
            groups = (("text", text.shape[1]),)
            streams["text"] = Stream(text, times["text"].modulation, None, groups)
        tokens, cache = self.transformer(streams, contexts, visibility, cache, emit, valid)
        outputs, start = {}, 0
        lengths = dict(streams["video"].groups)
        for group in present:
            if group.name in predict:
                part = tokens["video"][:, start : start + lengths[group.name]]
                grid = (len(group.positions), *self._grid())
                outputs[group.name] = self.video.unembed(part, times[group.name], grid)
            start += lengths[group.name]
        return outputs, cache

    def _video(self, present, values: Groups, times, time: Time) -> Stream:
        tokens = [self._embed(values[g.name]) for g in present]
        groups = [(g.name, x.shape[1]) for g, x in zip(present, tokens, strict=True)]
        if self.conditioning == "in_context":
            condition = time.embedding
            size = (len(tokens[0]), *condition.shape[1:])
            tokens.append(jnp.broadcast_to(condition, size).astype(tokens[0].dtype))
            groups.append(("condition", condition.shape[1]))
        modulation = None
        if self.video_spec.modulation != "none":
            parts = [times[g.name].modulation for g in present]
            modulation = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)
            modulation = jax.tree.map(
                lambda x: self.constrain(x, "batch", "slots", *[None] * (x.ndim - 3), "embed"),
                modulation,
            )
        x = self.constrain(jnp.concatenate(tokens, axis=1), "batch", "tokens", "embed")
        return Stream(x, modulation, self._rope(present, x.shape[1]), tuple(groups))

    def _embed(self, latents: Array) -> Array:
        x = self.video.embed(latents)
        if self.positions == "rope":
            return x
        table = sincos(*self._grid(), self.video_spec.width)
        return x + jnp.asarray(np.tile(table, (latents.shape[1], 1)), x.dtype)

    def _rope(self, present, length: int) -> Rope | None:
        if self.positions != "rope":
            return None
        tables = [video_rope(g.positions, *self._grid(), self.head_dim) for g in present]
        cos, sin = (np.concatenate(parts) for parts in zip(*tables, strict=True))
        extra = length - len(cos)  # tokens of the condition are not rotated
        ones, zeros = np.ones((extra, cos.shape[1])), np.zeros((extra, cos.shape[1]))
        return np.concatenate([cos, ones]), np.concatenate([sin, zeros])

    def _grid(self) -> tuple[int, int]:
        return self.latent[0] // self.patch, self.latent[1] // self.patch
