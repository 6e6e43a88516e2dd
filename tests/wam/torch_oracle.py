"""Implements Fast-WAM's network in plain torch from the spec (sections 1 to 3), in float64.

It is independent of `wamjax.models`: official parameter names, one masked attention over the whole
sequence, time embeddings for every token, complex rotary embeddings, a Conv3d patch embedding.
"""

import torch
import torch.nn.functional as F

EPS = 1e-6


def linear(p, name, x):
    return F.linear(x, p[name + ".weight"], p[name + ".bias"])


def rms_norm(p, name, x):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS) * p[name + ".weight"]


def layer_norm(x, weight=None, bias=None):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def sinusoid(t, dim):
    """t in [0, 1000]."""
    half = dim // 2
    angle = t[..., None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def phases(positions, dim):
    """Complex rotations (tokens, dim / 2)."""
    frequency = 1.0 / 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.outer(positions.double(), frequency)
    return torch.polar(torch.ones_like(angle), angle)


def video_phases(t, h, w, head_dim):
    """Splits the head: time gets what height and width leave, 44 / 42 / 42 of 128."""
    side = 2 * (head_dim // 6)
    grid = [(i, j, k) for i in range(t) for j in range(h) for k in range(w)]
    columns = torch.tensor(grid).T
    dims = (head_dim - 2 * side, side, side)
    return torch.cat([phases(c, d) for c, d in zip(columns, dims, strict=True)], dim=-1)


def rotate(x, phase):
    """x (b, l, n, k), interleaved pairs."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * phase[None, :, None]).flatten(-2)


def heads_of(x, heads):
    return x.unflatten(-1, (heads, -1))


def sdpa(q, k, v, mask=None):
    """(b, l, n, k) each."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def cross_attention(p, name, x, context, heads):
    q = rms_norm(p, name + ".norm_q", linear(p, name + ".q", x))
    k = rms_norm(p, name + ".norm_k", linear(p, name + ".k", context))
    v = linear(p, name + ".v", context)
    return linear(p, name + ".o", sdpa(*(heads_of(y, heads) for y in (q, k, v))))


class Expert:
    """Implements an expert: text, time, blocks; `p` has official names."""

    def __init__(self, p, heads, freq_dim):
        self.p, self.heads, self.freq_dim = p, heads, freq_dim

    def text(self, context):
        x = F.gelu(linear(self.p, "text_embedding.0", context), approximate="tanh")
        return linear(self.p, "text_embedding.2", x)

    def time(self, t):
        """t (b, tokens) in [0, 1000] -> embedding (b, tokens, d), modulation (b, tokens, 6, d)."""
        x = linear(self.p, "time_embedding.0", sinusoid(t, self.freq_dim))
        embedding = linear(self.p, "time_embedding.2", F.silu(x))
        projected = linear(self.p, "time_projection.1", F.silu(embedding))
        return embedding, projected.unflatten(-1, (6, -1))

    def modulation(self, i, t6):
        return (self.p[f"blocks.{i}.modulation"][:, None] + t6).unbind(dim=2)

    def qkv(self, i, x, t6, phase):
        p, name = self.p, f"blocks.{i}.self_attn"
        shift, scale = self.modulation(i, t6)[:2]
        a = layer_norm(x) * (1 + scale) + shift
        q = rms_norm(p, name + ".norm_q", linear(p, name + ".q", a))
        k = rms_norm(p, name + ".norm_k", linear(p, name + ".k", a))
        v = heads_of(linear(p, name + ".v", a), self.heads)
        return rotate(heads_of(q, self.heads), phase), rotate(heads_of(k, self.heads), phase), v

    def finish(self, i, x, t6, attended, context):
        p, name = self.p, f"blocks.{i}"
        _, _, gate, shift, scale, ffn_gate = self.modulation(i, t6)
        x = x + gate * linear(p, name + ".self_attn.o", attended)
        normed = layer_norm(x, p[name + ".norm3.weight"], p[name + ".norm3.bias"])
        x = x + cross_attention(p, name + ".cross_attn", normed, context, self.heads)
        y = layer_norm(x) * (1 + scale) + shift
        y = linear(p, name + ".ffn.2", F.gelu(linear(p, name + ".ffn.0", y), approximate="tanh"))
        return x + ffn_gate * y


class TorchWam:
    """Implements the network; `params` is {"video": {...}, "action": {...}, "proprio": {"weight",
    "bias"}} of tensors."""

    def __init__(self, params, layers, heads, head_dim, freq_dim):
        self.video = Expert(params["video"], heads, freq_dim)
        self.action = Expert(params["action"], heads, freq_dim)
        self.proprio, self.layers, self.head_dim = params["proprio"], layers, head_dim

    def __call__(self, videos, video_levels, actions, action_level, text, state, mask):
        """Returns the velocities of videos and actions.

        Args:
          videos: clips (b, c, t, h, w), one after the other in the sequence, each with its own
            positions from 0 (imagine-then-act has two).
          video_levels: for each clip, (b, t) levels in [0, 1] of its latent frames.
          actions, action_level: (b, j, a) and (b,), or (b, j) if steps have their own levels.
          text, state: (b, s, c) and (b, p).
          mask: bool (tokens, tokens), True attends.
        """
        p = self.video.p
        context = torch.cat([text, F.linear(state, **self.proprio)[:, None]], dim=1)
        contexts = [self.video.text(context), self.action.text(context)]

        kernel, bias = p["patch_embedding.weight"], p["patch_embedding.bias"]
        patched = [F.conv3d(v, kernel, bias, stride=kernel.shape[2:]) for v in videos]
        grids = [x.shape[2:] for x in patched]
        x = torch.cat([x.flatten(2).transpose(1, 2) for x in patched], dim=1)
        levels = [
            level.repeat_interleave(h * w, dim=1)
            for level, (_, h, w) in zip(video_levels, grids, strict=True)
        ]
        embedding, t6 = self.video.time(1000 * torch.cat(levels, dim=1))
        phase = torch.cat([video_phases(*g, self.head_dim) for g in grids])

        a = linear(self.action.p, "action_encoder", actions)
        chunk = actions.shape[1]
        if action_level.ndim == 1:
            action_level = action_level[:, None].expand(-1, chunk)
        _, a6 = self.action.time(1000 * action_level)
        a_phase = phases(torch.arange(chunk), self.head_dim)

        split = x.shape[1]
        for i in range(self.layers):
            video, action = self.video.qkv(i, x, t6, phase), self.action.qkv(i, a, a6, a_phase)
            joint = [torch.cat(pair, dim=1) for pair in zip(video, action, strict=True)]
            y = sdpa(*joint, mask)
            x = self.video.finish(i, x, t6, y[:, :split], contexts[0])
            a = self.action.finish(i, a, a6, y[:, split:], contexts[1])
        return self.unpatchify(x, embedding, grids, p), linear(self.action.p, "head", a)

    def unpatchify(self, x, embedding, grids, p):
        shift, scale = (p["head.modulation"][:, None] + embedding[:, :, None]).unbind(dim=2)
        x = linear(p, "head.head", layer_norm(x) * (1 + scale) + shift)
        _, _, pt, ph, pw = p["patch_embedding.weight"].shape
        clips, start = [], 0
        for t, h, w in grids:
            clip = x[:, start : start + t * h * w]
            start += t * h * w
            clip = clip.reshape(len(x), t, h, w, pt, ph, pw, -1)
            clip = torch.einsum("bfhwpqrc->bcfphqwr", clip)
            clips.append(clip.reshape(len(x), clip.shape[1], t * pt, h * ph, w * pw))
        return clips
