"""Defines diffusion transformers on pictures: DiT, text-to-image and text-to-video DiTs, MMDiT.

One network covers them all. They differ in the `blocks.ExpertSpec` of their experts and in three
choices made here: how time and class condition the network (`conditioning`, the four designs of
DiT, section 3.2), where text enters (`text`), and how positions are encoded (`positions`). An image
is a clip of one frame. Public files: facebookresearch/DiT ``models.py``, diffusers
``transformer_sd3.py``.

The caller chooses which frames are given, cached or denoised, see `shell`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wamjax.models.blocks import ExpertSpec
from wamjax.models.experts import Time
from wamjax.models.layers import Linear, Mlp, at_least_float32, small_normal
from wamjax.models.rope import Rope
from wamjax.models.shell import Conditions, Groups, GroupSpec, Shell
from wamjax.models.text import ContextEncoder, TokenEncoder

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
    """Returns the spec of a picture expert for one of DiT's conditioning designs and a route of
    text.

    With ``text="cross"`` or ``"both"`` it is the standard block of text-to-video models:
    self-attention, cross-attention and feed-forward, adaLN-Zero on all three.
    """
    for name, value, options in (
        ("conditioning", conditioning, CONDITIONING),
        ("text", text, TEXT),
    ):
        if value not in options:
            raise ValueError(f"{name} {value!r} is not one of {options}")
    adaptive = conditioning in ("adaln_zero", "adaln")
    cross = text in ("cross", "both")
    if cross and conditioning == "cross_attention":
        raise ValueError(
            f"text={text!r} needs conditioning='adaln_zero', 'adaln' or 'in_context', not "
            "'cross_attention': a block has one cross-attention, and the condition occupies it"
        )
    if text == "joint" and not adaptive:
        raise ValueError(
            "text='joint' needs conditioning='adaln_zero' or 'adaln', which modulate the blocks, "
            f"not {conditioning!r}"
        )
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
    """Returns DiT's fixed position table: half of the channels for the column, half for the row; in
    each half all sines come before all cosines.

    Args:
      table: (side, base) of a larger square table whose middle is used, as in SD3: `side` positions
        that span 0 to `base`. (0, 0): positions count from 0.
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
    """Returns the mean of the rows that are not padding (zero)."""
    real = jnp.any(context != 0, axis=-1, keepdims=True)
    return jnp.sum(context, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)


TEXT_GROUP = GroupSpec("text", "text", ())  # tokens of the second expert of `joint`


class DiT(Shell, kw_only=True):
    """Denoises pictures with a transformer.

    Attributes:
      video_spec: spec of the picture expert, from `expert` or a published block.
      groups: groups of frames; "condition" (`in_context`) and "text" (`joint`) are implied.
      outputs: 2 c for a learned variance.
      conditioning: how time and class enter; see `expert`.
      classes: number of class labels; label `classes` means "no class". 0 if there are none.
      text: where text embeddings enter: pooled into the vector that is added to time, by
        cross-attention, both, or as tokens of a second expert (`joint`, with pooled text as well).
      text_spec: spec of the text expert in `joint`; its output in the last block is not computed.
      context_width: width of the text embeddings.
      vocabulary, instruction_length: sizes of a trainable token encoder; 0 if the batch holds
        embeddings.
      text_layers: layers of that encoder; with 0, words do not attend to each other.
      pooled_width: width of text that was pooled elsewhere (SD3); 0 takes the mean of the
        embeddings.
      positions: "sincos" (added to the tokens of a single frame), "rope" (rotates queries and keys)
        or "both", which tells tokens their place in the frame, not only their distance.
      position_table: see `sincos`.
    """

    text_net: str = "linear"
    conditioning: str = "adaln_zero"
    classes: int = 0
    text: str = "none"
    text_spec: ExpertSpec | None = None
    context_width: int = 0
    pooled_width: int = 0
    vocabulary: int = 0
    instruction_length: int = 0
    text_layers: int = 0
    positions: str = "sincos"
    position_table: tuple[int, int] = (0, 0)

    def setup(self):
        if (self.text == "joint") != (self.text_spec is not None):
            verb = "needs a" if self.text == "joint" else "takes no"
            raise ValueError(f"text={self.text!r} {verb} text_spec: it goes with 'joint' only")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions {self.positions!r} is not one of {POSITIONS}")
        if self.positions == "sincos" and sum(len(g.positions) for g in self.groups) > 1:
            raise ValueError(
                "positions='sincos' is for single frames, because it does not encode the time: set "
                "positions to 'rope' or 'both' for clips"
            )
        super().setup()
        width = self.video_spec.width
        if self.classes:
            self.labels = nn.Embed(self.classes + 1, width, embedding_init=small_normal)
        if self.text in POOLED:
            self.pooled_mlp = Mlp(width, width, nn.silu, small_normal)
        if self.vocabulary:
            sizes = self.vocabulary, self.context_width, self.instruction_length
            self.tokens = (
                ContextEncoder(*sizes, self.text_layers, self.heads)
                if self.text_layers
                else TokenEncoder(*sizes)
            )
        if self.text_spec is None:
            self._blocks(self.video_spec)
        else:
            self.text_embed = Linear(self.text_spec.width)
            self._blocks(self.video_spec, self.text_spec, ends=(self.text_spec.name,))

    @property
    def own_tokens(self) -> tuple[str, ...]:
        """Returns the groups of tokens that the network adds to those of the frames."""
        return ("condition",) * (self.conditioning == "in_context") + ("text",) * (
            self.text == "joint"
        )

    def conditions(self, condition: Groups) -> Conditions:
        """Computes all conditioning except time.

        Args:
          condition: the entries that the model uses out of "label" (b,), "instruction" (b, s) ids
            or "context" (b, s, c) embeddings, whose padding rows are zero, and "pooled" (b, c).
        """
        parts = [self.labels(condition["label"])] if self.classes else []
        text = None
        if self.text != "none":
            text = (
                self.tokens(condition["instruction"]) if self.vocabulary else condition["context"]
            )
        if self.text in POOLED:
            parts.append(self.pooled_mlp(condition["pooled"] if self.pooled_width else pool(text)))
        contexts = {}
        if self.text in ("cross", "both"):
            context = self.video.context(text)
            contexts["video"] = self.constrain(context, "batch", "tokens", "embed")
        vector = sum(parts[1:], parts[0]) if parts else None
        return Conditions(vector, contexts, {"text": text} if self.text == "joint" else {})

    def times(self, levels: Groups, vector: Float[Array, "b d"] | None = None) -> dict[str, Time]:
        """Turns the noise levels (b | 1, m) of each group, and the vector, into its conditioning.

        The text of `joint` is conditioned like the first slot of the first group.
        """
        adaptive = self.conditioning in ("adaln_zero", "adaln")
        time_of = self.video.time if adaptive else self._sequence
        times = {g: time_of(v, vector) for g, v in levels.items()}
        if self.text_spec is not None and times:
            times["text"] = jax.tree.map(lambda x: x[:, :1], next(iter(times.values())))
        return times

    def _sequence(self, level: Array, vector: Array | None) -> Time:
        """Returns time and vector as a sequence of two instead of their sum."""
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

    def _present(self, values: Groups) -> list[GroupSpec]:
        return super()._present(values) + ([TEXT_GROUP] if "text" in values else [])

    def _contexts(self, contexts: Groups, present, times: dict[str, Time]) -> Groups:
        if self.conditioning == "cross_attention" and present:
            return {"video": times[present["video"][0].name].embedding}
        return contexts

    def _embed(self, group: GroupSpec, value: Array) -> Array:
        if group == TEXT_GROUP:
            return self.text_embed(value)
        x = super()._embed(group, value)
        if self.residual == "float32":
            x = at_least_float32(x)
        if self.positions == "rope":
            return x
        table = sincos(*self._grid(), self.video_spec.width, self.position_table)
        return x + jnp.asarray(np.tile(table, (value.shape[1], 1)), x.dtype)

    def _extra(self, expert: str, groups, tokens, times) -> list[tuple[str, Array]]:
        if self.conditioning != "in_context" or expert != "video":
            return []
        condition, (_, first) = times[groups[0].name].embedding, tokens[0]
        size = (len(first), *condition.shape[1:])
        return [("condition", jnp.broadcast_to(condition, size).astype(first.dtype))]

    def _rope(self, expert: str, groups: list[GroupSpec], length: int) -> Rope | None:
        if expert == "text" or self.positions == "sincos":
            return None
        return super()._rope(expert, groups, length)
