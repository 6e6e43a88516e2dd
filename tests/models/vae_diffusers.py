"""Builds tiny diffusers autoencoders with random weights, and converts their names and layouts."""

from __future__ import annotations

import contextlib
import re

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from wamjax import tree
from wamjax.models.vae.autoencoder import Sizes

torch.set_num_threads(1)  # threads do not pay at these sizes

# Three levels compile faster than the published four. Together they have a level that halves the
# frames after one that does, and after one that does not.
TINY = {
    "image": Sizes(
        "image", 3, 8, multipliers=(1, 2, 4), blocks=1, temporal=(False, False), groups=4
    ),
    "causal": Sizes("causal", 4, 8, multipliers=(1, 2, 4), blocks=1, temporal=(True, True)),
    "residual": Sizes(
        "residual", 6, 8, decoder_width=12, multipliers=(1, 2, 2), blocks=1, patch=2,
        temporal=(False, True),
    ),
}  # fmt: skip


def oracle(style: str, double: bool):
    """Returns a diffusers autoencoder in evaluation mode, with random parameters."""
    s = TINY[style]
    if style == "image":
        levels = len(s.multipliers)
        model = AutoencoderKL(
            block_out_channels=[s.width * m for m in s.multipliers],
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            layers_per_block=s.blocks,
            latent_channels=s.channels,
            norm_num_groups=s.groups,
        )
    else:
        model = AutoencoderKLWan(
            base_dim=s.width,
            decoder_base_dim=s.decoder_width or None,
            z_dim=s.channels,
            dim_mult=list(s.multipliers),
            num_res_blocks=s.blocks,
            temperal_downsample=list(s.temporal),
            is_residual=style == "residual",
            in_channels=3 * s.patch**2,
            out_channels=3 * s.patch**2,
            patch_size=s.patch if s.patch > 1 else None,
        )
    rng = np.random.default_rng(3)
    for name, p in model.named_parameters():
        x = rng.standard_normal(p.shape)
        if p.squeeze().ndim > 1:
            x *= (1.5 / np.prod(p.shape[1:])) ** 0.5
        else:
            x = 0.3 * x + (not name.endswith("bias"))
        p.data = torch.as_tensor(x)
    model = model.eval().requires_grad_(False)
    return model.double() if double else model.float()


def params(style: str, state: dict) -> dict:
    """Converts a diffusers state dict to our parameters, using every source tensor."""
    flat = {}
    for name, value in state.items():
        path, x = rename(name, TINY[style].blocks), value.numpy()
        if path.endswith(("norm", "norm_1", "norm_2", "norm_out")):
            leaf = "bias" if name.endswith("bias") else "scale"
            flat[f"{path}/{leaf}"] = x.reshape(-1)
        elif name.endswith("bias"):
            flat |= split(path, "bias", x)
        elif "/attn/" in path:
            flat |= split(path, "kernel", x.reshape(x.shape[:2]).T)
        else:
            flat[f"{path}/kernel"] = np.moveaxis(x, (1, 0), (-2, -1))
    return tree.unflatten(flat)


def split(path: str, leaf: str, x: np.ndarray) -> dict[str, np.ndarray]:
    if not path.endswith("/qkv"):
        return {f"{path}/{leaf}": x}
    return {
        f"{path[:-3]}{name}/{leaf}": part
        for name, part in zip("qkv", np.split(x, 3, axis=-1), strict=True)
    }


def rename(name: str, blocks: int) -> str:
    """``decoder.up_blocks.0.upsamplers.0.time_conv.weight`` -> ``decoder/up_0/up/time``."""
    path = name.rsplit(".", 1)[0].replace(".", "/")
    flat = re.match(r"encoder/down_blocks/(\d+)/(?=norm|conv|resample|time)", path)
    if flat:  # Wan 2.1 counts blocks and resamplers of the encoder through
        level, i = divmod(int(flat[1]), blocks + 1)
        part = "down" if i == blocks else f"res_{i}"
        path = f"encoder/down_{level}/{part}/{path[flat.end() :]}"
    for pattern, to in (
        (r"(down|up)_blocks/(\d+)", r"\1_\2"),
        (r"mid_block", "mid"),
        (r"resnets/(\d+)", r"res_\1"),
        (r"attentions/0", "attn"),
        (r"(down|up)sampler(s/0)?", r"\1"),
        (r"(/(down|up))/conv$", r"\1/space"),
        (r"resample/1", "space"),
        (r"time_conv", "time"),
        (r"(norm|conv)(\d)", r"\1_\2"),
        (r"conv_shortcut", "shortcut"),
        (r"group_norm", "norm"),
        (r"conv_norm_out", "norm_out"),
        (r"to_(qkv|q|k|v)$", r"\1"),
        (r"(to_out/0|(?<=attn/)proj)$", "o"),
        (r"quant_conv", "quant"),
    ):
        path = re.sub(pattern, to, path)
    return path


@contextlib.contextmanager
def unclamped():
    """Runs diffusers' Wan decoder without its final clamp, which would hide differences."""
    before = torch.clamp
    torch.clamp = lambda x, **_: x
    try:
        yield
    finally:
        torch.clamp = before


def channels_first(x: np.ndarray):
    return torch.as_tensor(np.moveaxis(x, -1, 1).copy())


def channels_last(x) -> np.ndarray:
    return np.moveaxis(x.numpy(), 1, -1)
