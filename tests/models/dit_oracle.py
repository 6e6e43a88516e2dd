"""Reimplements DiT of facebookresearch/DiT, with its names in the state dict.

It follows the paper's description and the names and shapes of the published checkpoint, and
computes in the dtype of its parameters throughout, including the sinusoid.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Modulated(nn.Module):
    """Applies SiLU and a linear map to the condition, and splits shifts, scales and gates."""

    def __init__(self, width, chunks):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, chunks * width))
        self.chunks = chunks

    def rows(self, c):
        return [row[:, None] for row in self.adaLN_modulation(c).chunk(self.chunks, dim=1)]

    def norm(self, x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, l, d = x.shape
        q, k, v = self.qkv(x).view(b, l, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) * (d // self.heads) ** -0.5
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(b, l, d))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(Modulated):
    def __init__(self, width, heads):
        super().__init__(width, 6)
        self.attn, self.mlp = Attention(width, heads), Mlp(width, 4 * width)

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.rows(c)
        x = x + gate_a * self.attn(self.norm(x, shift_a, scale_a))
        return x + gate_m * self.mlp(self.norm(x, shift_m, scale_m))


class Final(Modulated):
    def __init__(self, width, outputs):
        super().__init__(width, 2)
        self.linear = nn.Linear(width, outputs)

    def forward(self, x, c):
        return self.linear(self.norm(x, *self.rows(c)))


class Embed(nn.Module):
    """Holds a module under a name of the checkpoint."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class DiT(nn.Module):
    def __init__(self, side, patch, channels, width, layers, heads, classes):
        super().__init__()
        self.side, self.patch, self.outputs = side, patch, 2 * channels
        self.x_embedder = Embed(proj=nn.Conv2d(channels, width, patch, patch))
        mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = Embed(mlp=mlp)
        self.y_embedder = Embed(embedding_table=nn.Embedding(classes + 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.final_layer = Final(width, self.outputs * patch**2)
        self.register_buffer("pos_embed", positions(side // patch, width)[None])

    def forward(self, x, t, y):
        c = self.t_embedder.mlp(sinusoid(t, x.dtype)) + self.y_embedder.embedding_table(y)
        h = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed.to(x.dtype)
        for block in self.blocks:
            h = block(h, c)
        n, p = self.side // self.patch, self.patch
        h = self.final_layer(h, c).view(len(x), n, n, p, p, self.outputs)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.outputs, self.side, self.side)

    def forward_with_cfg(self, x, t, y, scale):
        """Guides the first three channels only, as in the public file: the first half of `x` goes
        with both halves of `y`, of which the second is "no class"."""
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        guided, rest = out[:, :3], out[:, 3:]
        with_class, without = guided.chunk(2)
        made = without + scale * (with_class - without)
        return torch.cat([torch.cat([made, made]), rest], dim=1)


def sinusoid(t, dtype):
    rates = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angles = t.to(dtype)[:, None] * rates.to(dtype)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def positions(side, width, scale=1.0, first=0):
    """Returns (side^2, width): column, then row; for each the sines, then the cosines."""
    rates = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows = []
    for row in range(side):
        for column in range(side):
            parts = []
            for place in (column, row):
                angle = (place + first) * scale * rates
                parts += [angle.sin(), angle.cos()]
            rows.append(torch.cat(parts))
    return torch.stack(rows)
