"""Implements DiT in eager PyTorch as a baseline, with the public code's semantics and names.

It follows facebookresearch/DiT ``models.py``: adaLN-Zero, fused qkv, tanh GELU, norms with eps
1e-6. Torch is not a dependency; only ``python -m wamjax.bench dit`` and the parity tests import
this file.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from wamjax.models.dit import sincos


class TimestepEmbedder(nn.Module):
    """Embeds timesteps: 256 sinusoids, cosines first, and two layers."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        half = self.frequencies // 2
        rate = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
        angles = t.double()[:, None] * rate.to(t.device)[None]
        dtype = self.mlp[0].weight.dtype
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1).to(dtype))


class LabelEmbedder(nn.Module):
    """Embeds labels by a table with an extra row for "no class"."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, labels):
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Computes self-attention with one projection for q, k and v."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        b, l, d = x.shape
        qkv = self.qkv(x).reshape(b, l, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, l, d))


class MLP(nn.Module):
    """Applies linear, tanh GELU, linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x, shift, scale):
    """Applies adaLN's scale and shift."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Applies an adaLN-Zero block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn, self.mlp = Attention(width, heads), MLP(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Applies adaLN and the linear head."""

    def __init__(self, width: int, patch: int, outputs: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, patch * patch * outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PatchEmbed(nn.Module):
    """Embeds patches by a convolution whose stride is its kernel size."""

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class DiT(nn.Module):
    """Implements the model: ``forward(x (b, c, h, w), t (b,), y (b,)) -> (b, outputs, h, w)``."""

    def __init__(self, size, channels, patch, width, layers, heads, classes, outputs):
        super().__init__()
        self.patch, self.outputs, grid = patch, outputs, size // patch
        self.x_embedder = PatchEmbed(channels, width, patch)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(classes, width)
        table = torch.from_numpy(sincos(grid, grid, width))[None]
        self.pos_embed = nn.Parameter(table.float(), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.final_layer = FinalLayer(width, patch, outputs)

    def forward(self, x, t, y):
        grid = x.shape[-1] // self.patch
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)
        p, n = self.patch, self.outputs
        x = x.reshape(-1, grid, grid, p, p, n)
        return torch.einsum("bhwpqc->bchpwq", x).reshape(-1, n, grid * p, grid * p)
