"""Defines key maps of the autoencoders, in the language of `table`.

The published files count differently: by level and block, or all blocks and resamplers of a side
consecutively. Facts from the public files: Wan ``wan/modules/{vae,vae2_2}.py``, diffusers
``autoencoder_kl.py`` and ``autoencoder_kl_wan.py``, CompVis ``ldm/modules/diffusionmodules``.
"""

from __future__ import annotations

from collections.abc import Mapping

from wamjax.models.vae.autoencoder import Sizes
from wamjax.weights.table import Row, Table, linear, norm

# Parts of a residual block.
_WAN = dict(norm_1="residual.0", conv_1="residual.2", norm_2="residual.3", conv_2="residual.6",
            shortcut="shortcut")  # fmt: skip
_DIFFUSERS = dict(norm_1="norm1", conv_1="conv1", norm_2="norm2", conv_2="conv2",
                  shortcut="conv_shortcut")  # fmt: skip
_COMPVIS = _DIFFUSERS | dict(shortcut="nin_shortcut")


def _conv(theirs: str, ours: str) -> Table:
    """Maps a convolution in any number of dimensions."""
    layout = "o i ... -> ... i o"
    return Row(f"{theirs}.weight", f"{ours}/kernel", layout), linear(theirs, ours)[1]


def _pointwise(theirs: str, ours: str) -> Table:
    """Maps a convolution of 1 x 1 that is our Linear."""
    kernel, bias = linear(theirs, ours)
    return kernel._replace(layout="o i 1 1 -> i o"), bias


def _gamma(theirs: str, ours: str, layout: str = "c 1 1 1 -> c") -> Table:
    return (Row(f"{theirs}.gamma", f"{ours}/scale", layout),)


def _residual(theirs: str, ours: str, parts: Mapping[str, str], a_norm) -> Table:
    rows = []
    for part, name in parts.items():
        make = a_norm if part.startswith("norm") else _conv
        rows += make(f"{theirs}.{name}", f"{ours}/{part}")
    return tuple(rows)


def _resampler(theirs: str, ours: str) -> Table:
    return (
        *_conv(f"{theirs}.resample.1", f"{ours}/space"),
        *_conv(f"{theirs}.time_conv", f"{ours}/time"),
    )


def wan_official(sizes: Sizes) -> Table:
    """Returns the rows of Wan 2.1, which counts through a side, and of Wan 2.2, which counts by
    level."""
    rows = [*_conv("conv1", "quant"), *_conv("conv2", "post_quant")]
    for side, way, blocks in (
        ("encoder", "down", sizes.blocks),
        ("decoder", "up", sizes.blocks + 1),
    ):
        for level in range(len(sizes.multipliers)):
            for i in range(blocks + 1):
                flat = f"{side}.{way}samples.{level * (blocks + 1) + i}"
                deep = f"{side}.{way}samples.{level}.{way}samples.{i}"
                theirs = deep if sizes.style == "residual" else flat
                ours = f"{side}/{way}_{level}"
                if i < blocks:
                    rows += _residual(theirs, f"{ours}/res_{i}", _WAN, _gamma)
                else:
                    rows += _resampler(theirs, f"{ours}/{way}")
        mid = f"{side}.middle"
        rows += _wan_middle(side, (f"{mid}.0", f"{mid}.1", f"{mid}.2"), _WAN)
        rows += _conv(f"{side}.conv1", f"{side}/conv_in")
        rows += _gamma(f"{side}.head.0", f"{side}/norm_out")
        rows += _conv(f"{side}.head.2", f"{side}/conv_out")
    return tuple(rows)


def _wan_middle(side: str, theirs: tuple[str, str, str], parts) -> Table:
    first, attention, last = theirs
    ours = f"{side}/mid"
    return (
        *_residual(first, f"{ours}/res_0", parts, _gamma),
        *_gamma(f"{attention}.norm", f"{ours}/attn/norm", "c 1 1 -> c"),
        *_pointwise(f"{attention}.to_qkv[{{x}}/3]", f"{ours}/attn/{{x:q=0|k=1|v=2}}"),
        *_pointwise(f"{attention}.proj", f"{ours}/attn/o"),
        *_residual(last, f"{ours}/res_1", parts, _gamma),
    )


def wan_diffusers(sizes: Sizes) -> Table:
    """Returns the rows of diffusers' Wan files; only the encoder of Wan 2.1 counts through."""
    deep, rows = sizes.style == "residual", []
    rows += [*_conv("quant_conv", "quant"), *_conv("post_quant_conv", "post_quant")]
    for level in range(len(sizes.multipliers)):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        for i in range(sizes.blocks):
            flat = f"encoder.down_blocks.{level * (sizes.blocks + 1) + i}"
            theirs = f"{down}.resnets.{i}" if deep else flat
            rows += _residual(theirs, f"encoder/down_{level}/res_{i}", _DIFFUSERS, _gamma)
        flat = f"encoder.down_blocks.{level * (sizes.blocks + 1) + sizes.blocks}"
        rows += _resampler(f"{down}.downsampler" if deep else flat, f"encoder/down_{level}/down")
        rows += _residual(
            f"{up}.resnets.{{n}}", f"decoder/up_{level}/res_{{n}}", _DIFFUSERS, _gamma
        )
        rows += _resampler(f"{up}.upsampler{'' if deep else 's.0'}", f"decoder/up_{level}/up")
    for side in ("encoder", "decoder"):
        mid = f"{side}.mid_block"
        parts = (f"{mid}.resnets.0", f"{mid}.attentions.0", f"{mid}.resnets.1")
        rows += _wan_middle(side, parts, _DIFFUSERS)
        rows += _conv(f"{side}.conv_in", f"{side}/conv_in")
        rows += _gamma(f"{side}.norm_out", f"{side}/norm_out")
        rows += _conv(f"{side}.conv_out", f"{side}/conv_out")
    return tuple(rows)


def sd_diffusers(sizes: Sizes, old: bool = False) -> Table:
    """Returns the rows of Stable Diffusion; files from before 2023 have other names in the
    attention."""
    del sizes
    names = "q=query|k=key|v=value|o=proj_attn" if old else "q=to_q|k=to_k|v=to_v|o=to_out.0"
    rows = [*_conv("quant_conv", "quant"), *_conv("post_quant_conv", "post_quant")]
    for side, way in (("encoder", "down"), ("decoder", "up")):
        level = f"{side}.{way}_blocks.{{l}}"
        mid, ours = f"{side}.mid_block", f"{side}/mid"
        rows += _residual(
            f"{level}.resnets.{{n}}", f"{side}/{way}_{{l}}/res_{{n}}", _DIFFUSERS, norm
        )
        rows += _conv(f"{level}.{way}samplers.0.conv", f"{side}/{way}_{{l}}/{way}/space")
        rows += _residual(f"{mid}.resnets.{{n}}", f"{ours}/res_{{n}}", _DIFFUSERS, norm)
        rows += norm(f"{mid}.attentions.0.group_norm", f"{ours}/attn/norm")
        rows += linear(f"{mid}.attentions.0.{{x}}", f"{ours}/attn/{{x:{names}}}")
        rows += _conv(f"{side}.conv_{{x}}", f"{side}/conv_{{x:in|out}}")
        rows += norm(f"{side}.conv_norm_out", f"{side}/norm_out")
    return tuple(rows)


def sd_diffusers_old(sizes: Sizes) -> Table:
    """Returns `sd_diffusers` as in the file of ft-mse on the hub."""
    return sd_diffusers(sizes, old=True)


def sd_official(sizes: Sizes) -> Table:
    """Returns the rows of CompVis's files, a dict with ``state_dict``; the decoder's levels count
    from the end."""
    stem, last = "state_dict/", len(sizes.multipliers) - 1
    rows = [*_conv(f"{stem}quant_conv", "quant"), *_conv(f"{stem}post_quant_conv", "post_quant")]
    for side, way in (("encoder", "down"), ("decoder", "up")):
        for level in range(last + 1):
            theirs = f"{stem}{side}.{way}.{level if way == 'down' else last - level}"
            ours = f"{side}/{way}_{level}"
            rows += _residual(f"{theirs}.block.{{n}}", f"{ours}/res_{{n}}", _COMPVIS, norm)
            rows += _conv(f"{theirs}.{way}sample.conv", f"{ours}/{way}/space")
        mid, ours = f"{stem}{side}.mid", f"{side}/mid"
        rows += _residual(f"{mid}.block_{{n}}", f"{ours}/res_{{n:0=1|1=2}}", _COMPVIS, norm)
        rows += norm(f"{mid}.attn_1.norm", f"{ours}/attn/norm")
        rows += _pointwise(f"{mid}.attn_1.{{x}}", f"{ours}/attn/{{x:q|k|v|o=proj_out}}")
        rows += _conv(f"{stem}{side}.conv_{{x}}", f"{side}/conv_{{x:in|out}}")
        rows += norm(f"{stem}{side}.norm_out", f"{side}/norm_out")
    return tuple(rows)
