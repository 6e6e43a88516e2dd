"""Lists the config keys of networks, codecs and text; see `wamjax.config_keys`."""

from __future__ import annotations

from typing import Any

# (key, default, description).
TABLE: tuple[tuple[str, Any, str], ...] = (
    ("model.layers", 4, "transformer blocks"),
    ("model.heads", 4, "attention heads, the same for all experts"),
    ("model.head_dim", 32, "width of a head"),
    ("model.video.width", 128, "width of the video expert"),
    ("model.video.ffn", 512, "hidden units of the video expert's feed-forward network"),
    ("model.action.width", 64, "width of the action expert"),
    ("model.action.ffn", 256, "hidden units of the action expert's feed-forward network"),
    ("model.patch", 2, "latents along each side of a video token"),
    (
        "model.positions",
        "rope",
        "rope, sincos (added, for images), both, or learned (autoregressive)",
    ),
    (
        "model.position_table",
        (0, 0),
        "sincos: (side, base) of the table that positions are cropped from",
    ),
    ("model.conditioning", "adaln_zero", "how timestep and class enter: one of dit.CONDITIONING"),
    ("model.label", False, "condition the model on the class of an example"),
    ("model.attention", "auto", "kernel: auto, xla, cudnn, splash; or masked, the reference"),
    ("model.context_width", 64, "width of the instruction embeddings"),
    ("model.freq_dim", 256, "sinusoidal features of the noise level"),
    ("model.time_scale", 1.0, "factor on the noise level in these features (Cosmos Policy)"),
    ("model.modulation_rank", 256, "rank of the modulation (Cosmos Policy)"),
    ("model.rope_scale", (1.0, 1.0, 1.0), "stretch along (t, h, w), see rope.ntk_bases"),
    ("model.context_rows", 0, "text tokens in the cross-attention softmax; missing ones are zero"),
    (
        "model.remat",
        "none",
        "what to recompute: none, dots, projections, attention, full, offload; auto",
    ),
    ("model.pad_slots", "auto", "pad slots to whole tiles: auto (on TPUs), on, off"),
    ("model.unroll", 1, "layers unrolled in the scan over blocks"),
    (
        "model.residual",
        "compute",
        "dtype of the residual stream: compute (precision.compute) or float32",
    ),
    ("model.codec.kind", "pixel", "pixel, cosine, cached, palette, or trained: kl, fsq, vq"),
    ("model.codec.patch", 4, "pixel, cosine, palette: pixels along each side of a latent"),
    ("model.codec.codes", 512, "palette, vq: number of tokens; a palette is fitted by k-means"),
    ("model.codec.channels", 48, "cosine, cached, kl, vq: channels per latent"),
    ("model.codec.levels", (8, 5, 5, 5), "fsq: values of each channel of a latent"),
    ("model.codec.spatial", 16, "cached, kl, fsq, vq: pixels along each side of a latent"),
    ("model.codec.temporal", 4, "cached, kl, fsq, vq: frames per latent after the first"),
    ("model.codec.width", 32, "kl, fsq, vq: channels at the widest resolution, a multiple of 8"),
    ("model.codec.mean", (), "kl, fsq, vq: mean of the latents per channel, subtracted; () = 0"),
    ("model.codec.std", (), "kl, fsq, vq: std of the latents per channel, divided by; () = 1"),
    (
        "model.text.kind",
        "tokens",
        "tokens (trainable word embeddings) or context (precomputed embeddings)",
    ),
    ("model.text.route", "none", "none, pooled, cross, both or joint; autoregressive: prefix"),
    (
        "model.text.layers",
        0,
        "layers of a text encoder trained with the model; 0 = word embeddings only",
    ),
    ("model.text.pooled_width", 0, "width of pooled text in the data; 0 = average the embeddings"),
)

# Keys that every transformer reads, as patterns.
TRANSFORMER = (
    "model.layers",
    "model.heads",
    "model.head_dim",
    "model.video.*",
    "model.remat",
    "model.unroll",
    "model.residual",
    "model.attention",
)
# Keys that a transformer over slots reads.
SHELL = (*TRANSFORMER, "model.pad_slots")

_GRID = ("spatial", "temporal")
_TRAINED = (*_GRID, "width", "mean", "std")
# kind of codec -> the keys that it reads; published codecs read none.
_CODECS = {
    "pixel": ("patch",),
    "cosine": ("patch", "channels"),
    "palette": ("patch", "codes"),
    "cached": ("channels", *_GRID),
    "kl": ("channels", *_TRAINED),
    "fsq": ("levels", *_TRAINED),
    "vq": ("codes", "channels", *_TRAINED),
}


def codec(config) -> tuple[str, ...]:
    """Returns the keys that the codec of ``config.model.codec`` reads."""
    return tuple(f"model.codec.{key}" for key in ("kind", *_CODECS.get(config.kind, ())))


def text(config) -> tuple[str, ...]:
    """Returns the keys of ``config.model`` that matter if text conditions a model of pictures."""
    if config.route == "none":
        return ("model.text.route",)
    return ("model.text.*", "model.context_width")
