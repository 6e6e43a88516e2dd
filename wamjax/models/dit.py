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
from jaxtyping import Array, Float

from wamjax.models import attention
from wamjax.models.blocks import ExpertSpec, Stream
from wamjax.models.experts import Time, VideoExpert
from wamjax.models.layers import Linear, Mlp, at_least_float32, small_normal, unconstrained
from wamjax.models.mot import GroupSpec
from wamjax.models.rope import Rope, video_rope
from wamjax.models.text import ContextEncoder, TokenEncoder
from wamjax.models.transformer import Cache, Transformer
from wamjax.models.visibility import Visibility

Groups = dict[str, Array]

CONDITIONING = ("adaln_zero", "adaln", "cross_attention", "in_context")
TEXT = ("none", "pooled", "cross", "both", "joint")
POOLED = ("pooled", "both", "joint")
POSITIONS = ("sincos", "rope", "both")

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
    if text == "joint" and not adaptive:
        raise ValueError(f"text='joint' is modulated, conditioning={conditioning!r} modulates not")
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


def sincos(
    height: int, width: int, dim: int, table: tuple[int, int] = (0, 0)
) -> Float[np.ndarray, "l d"]:
    """DiT's fixed position table: half of the channels for the column, half for the row; of each
    half first all sines, then all cosines.

    Args:
      table: (side, base) of a larger square table of which the middle is taken, as in SD3: `side`
        positions that span 0 to `base`. (0, 0): positions count from 0.
    """
    side, base = table
    if side and max(height, width) > side:
        raise ValueError(f"{height}x{width} tokens do not fit a position table of {side}x{side}")
    axes = [
        ((side - size) // 2 + np.arange(size)) * (base / side) if side else np.arange(size)
        for size in (height, width)
    ]
    omega = 1.0 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    rows, columns = np.meshgrid(*axes, indexing="ij")
    angles = [np.outer(p.reshape(-1), omega) for p in (columns, rows)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)


def pool(context: Float[Array, "b s c"]) -> Float[Array, "b c"]:
    """Mean of the rows that are not padding (zero)."""
    real = jnp.any(context != 0, axis=-1, keepdims=True)
    return jnp.sum(context, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)


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
      context_width: of the text embeddings.
      vocabulary, instruction_length: of a trainable token encoder; 0 where embeddings are given.
      text_layers: of the encoder; 0 has words alone, which have not seen each other.
      pooled_width: of text that is pooled elsewhere (SD3); 0 takes the mean of the embeddings.
      text_net: what a context goes through before cross-attention, see `experts.Conditioned`.
      positions: "sincos" (added to the tokens; of one frame), "rope" (rotates queries and keys) or
        "both", which tells tokens where in their frame they are and not only how far apart.
      position_table: of `sincos`, see there.
      rope_scale: of "rope", along (time, height, width); see `rope.ntk_bases`.
      time_scale: see `experts.Conditioned`.
      remat, unroll, residual, attention, constrain: see `Transformer`.
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
    vocabulary: int = 0
    instruction_length: int = 0
    text_layers: int = 0
    text_net: str = "linear"
    positions: str = "sincos"
    position_table: tuple[int, int] = (0, 0)
    rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    freq_dim: int = 256
    time_scale: float = 1000.0
    remat: str = "none"
    unroll: int = 1
    residual: str = "compute"
    attention: Callable = attention.grouped
    constrain: Callable = unconstrained

    def setup(self):
        height, width, channels = self.latent
        if height % self.patch or width % self.patch:
            raise ValueError(f"latent {height}x{width} does not divide by patch {self.patch}")
        if (self.text == "joint") != (self.text_spec is not None):
            raise ValueError("text='joint' and a text_spec go together")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions {self.positions!r} is not one of {POSITIONS}")
        if self.positions == "sincos" and sum(len(g.positions) for g in self.groups) > 1:
            raise ValueError(
                "positions='sincos' do not tell frames apart; a clip wants 'rope' or 'both'"
            )
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
        if self.text in POOLED:
            width = self.video_spec.width
            self.pooled_mlp = Mlp(width, width, nn.silu, small_normal)
        if self.vocabulary:
            sizes = self.vocabulary, self.context_width, self.instruction_length
            self.tokens = (
                ContextEncoder(*sizes, self.text_layers, self.heads)
                if self.text_layers
                else TokenEncoder(*sizes)
            )
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
            residual=self.residual,
        )
        nn.share_scope(self, self.transformer)

    def conditions(
        self, condition: Groups
    ) -> tuple[Float[Array, "b d"] | None, Groups, Float[Array, "b s c"] | None]:
        """What conditions beside time, in the three ways it can.

        Args:
          condition: "label" (b,), "instruction" (b, s) ids or "context" (b, s, c) embeddings, whose
            rows of padding are zero, "pooled" (b, c); those that the model has a use for.

        Returns:
          (the vector beside time: class and pooled text, or None; contexts of the cross-attention;
          tokens of the text expert, or None).
        """
        parts = [self.labels(condition["label"])] if self.classes else []
        text = None
        if self.text != "none":
            text = (
                self.tokens(condition["instruction"]) if self.vocabulary else condition["context"]
            )
        if self.text in POOLED:
            parts.append(self.pooled_mlp(condition["pooled"] if self.pooled_width else pool(text)))
        vector = sum(parts[1:], parts[0]) if parts else None
        contexts = {}
        if self.text in ("cross", "both"):
            context = self.video.context(text)
            contexts["video"] = self.constrain(context, "batch", "tokens", "embed")
        return vector, contexts, text if self.text == "joint" else None

    def times(self, levels: Groups, vector: Float[Array, "b d"] | None = None) -> dict[str, Time]:
        """Noise levels (b | 1, m) of each group, with the vector, to its conditioning.

        The text of `joint` is conditioned as the first slot of the first group is.
        """
        adaptive = self.conditioning in ("adaln_zero", "adaln")
        one = self.video.time if adaptive else self._tokens
        times = {g: one(v, vector) for g, v in levels.items()}
        if self.text_spec is not None and times:
            times["text"] = jax.tree.map(lambda x: x[:, :1], next(iter(times.values())))
        return times

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

    def evaluate(
        self, values: Groups, levels: Groups, condition: Groups, visibility: Visibility
    ) -> Groups:
        """Outputs of all `values` at noise levels under a condition, nothing cached.

        Touches every parameter once, so ``init`` runs it too.
        """
        vector, contexts, text = self.conditions(condition)
        predict = tuple(values)
        if text is not None:
            values = values | {"text": text}
        times = self.times(levels, vector)
        return self(values, times, contexts, visibility, predict=predict)[0]

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
          contexts: from `conditions`.
          visibility, cache, emit, valid: see `Transformer.__call__`; groups "condition" and
            "text" must be in the table where they exist.
          predict: groups whose output is wanted.

        Returns:
          (group -> output, shaped like its value but for the channels; the emitted cache).
        """
        present = [g for g in self.groups if g.name in values]
        streams = {}
        if present:  # else a prefill of the context alone
            time = times[present[0].name]
            streams["video"] = self._video(present, values, times, time)
            if self.conditioning == "cross_attention":
                contexts = {"video": time.embedding}
        if self.text_spec is not None:
            text = self.text_embed(values["text"])
            groups = (("text", text.shape[1]),)
            streams["text"] = Stream(text, times["text"].modulation, None, groups)
        tokens, cache = self.transformer(streams, contexts, visibility, cache, emit, valid)
        outputs, start = {}, 0
        lengths = dict(streams["video"].groups) if present else {}
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
        if self.residual == "float32":
            x = at_least_float32(x)
        if self.positions == "rope":
            return x
        table = sincos(*self._grid(), self.video_spec.width, self.position_table)
        return x + jnp.asarray(np.tile(table, (latents.shape[1], 1)), x.dtype)

    def _rope(self, present, length: int) -> Rope | None:
        if self.positions == "sincos":
            return None
        scale = self.rope_scale
        tables = [video_rope(g.positions, *self._grid(), self.head_dim, scale) for g in present]
        cos, sin = (np.concatenate(parts) for parts in zip(*tables, strict=True))
        extra = length - len(cos)  # tokens of the condition are not rotated
        ones, zeros = np.ones((extra, cos.shape[1])), np.zeros((extra, cos.shape[1]))
        return np.concatenate([cos, ones]), np.concatenate([sin, zeros])

    def _grid(self) -> tuple[int, int]:
        return self.latent[0] // self.patch, self.latent[1] // self.patch
