"""Converts names of public checkpoints to ours, for parameters and their gradients.

Every converter must read each entry of the state dict exactly once.
"""

from __future__ import annotations

import numpy as np


class Reader:
    """Reads a state dict and tracks the entries that are still unread."""

    def __init__(self, state):
        self.state = {k: np.asarray(v.detach()) for k, v in state.items()}

    def linear(self, name, swap=False):
        """Returns {"kernel", "bias"}; `swap` exchanges the halves (scale, shift)."""
        weight, bias = self.state.pop(f"{name}.weight"), self.state.pop(f"{name}.bias")
        if swap:
            weight, bias = (np.concatenate(np.split(x, 2)[::-1]) for x in (weight, bias))
        return {"kernel": weight.reshape(len(weight), -1).T, "bias": bias}

    def split(self, name, names="qkv"):
        weights = np.split(self.state.pop(f"{name}.weight"), len(names))
        biases = np.split(self.state.pop(f"{name}.bias"), len(names))
        return {
            n: {"kernel": w.T, "bias": b} for n, w, b in zip(names, weights, biases, strict=True)
        }

    def done(self):
        assert not self.state, f"unread: {sorted(self.state)}"


def stacked(blocks):
    """Stacks a list of equal nested dicts along a leading layer axis."""
    first = blocks[0]
    if isinstance(first, dict):
        return {k: stacked([b[k] for b in blocks]) for k in first}
    return np.stack(blocks)


def official(state, layers):
    """Converts facebookresearch/DiT, without the buffer ``pos_embed``."""
    r = Reader(state)
    blocks = [
        {
            "self_attn": r.split(f"blocks.{i}.attn.qkv") | {"o": r.linear(f"blocks.{i}.attn.proj")},
            "ffn": {"in": r.linear(f"blocks.{i}.mlp.fc1"), "out": r.linear(f"blocks.{i}.mlp.fc2")},
            "modulation": r.linear(f"blocks.{i}.adaLN_modulation.1"),
        }
        for i in range(layers)
    ]
    out = {
        "video": {
            "patch_embed": r.linear("x_embedder.proj"),
            "time_mlp": {"in": r.linear("t_embedder.mlp.0"), "out": r.linear("t_embedder.mlp.2")},
            "head_modulation": r.linear("final_layer.adaLN_modulation.1"),
            "head": r.linear("final_layer.linear"),
        },
        "labels": {"embedding": r.state.pop("y_embedder.embedding_table.weight")},
        "blocks": {"video": stacked(blocks)},
    }
    r.done()
    return out


def diffusers_dit(state, layers):
    """Converts diffusers' DiTTransformer2DModel, whose blocks hold copies of the embedders."""
    r, blocks = Reader(state), []
    for i in range(layers):
        name = f"transformer_blocks.{i}"
        blocks.append({
            "self_attn": {n: r.linear(f"{name}.attn1.to_{n}") for n in "qkv"}
            | {"o": r.linear(f"{name}.attn1.to_out.0")},
            "ffn": {"in": r.linear(f"{name}.ff.net.0.proj"), "out": r.linear(f"{name}.ff.net.2")},
            "modulation": r.linear(f"{name}.norm1.linear"),
        })  # fmt: skip
        time = [r.linear(f"{name}.norm1.emb.timestep_embedder.linear_{j}") for j in (1, 2)]
        labels = r.state.pop(f"{name}.norm1.emb.class_embedder.embedding_table.weight")
    out = {
        "video": {
            "patch_embed": r.linear("pos_embed.proj"),
            "time_mlp": {"in": time[0], "out": time[1]},
            "head_modulation": r.linear("proj_out_1"),
            "head": r.linear("proj_out_2"),
        },
        "labels": {"embedding": labels},
        "blocks": {"video": stacked(blocks)},
    }
    r.done()
    return out


def diffusers_sd3(state, layers):
    """Converts diffusers' SD3Transformer2DModel, without the buffer ``pos_embed.pos_embed``."""
    r, blocks = Reader(state), []
    embed = "time_text_embed"
    for i in range(layers):
        name, last = f"transformer_blocks.{i}", i == layers - 1
        image = {
            "self_attn": {n: r.linear(f"{name}.attn.to_{n}") for n in "qkv"}
            | {"o": r.linear(f"{name}.attn.to_out.0")},
            "ffn": {"in": r.linear(f"{name}.ff.net.0.proj"), "out": r.linear(f"{name}.ff.net.2")},
            "modulation": r.linear(f"{name}.norm1.linear"),
        }
        text = {
            "self_attn": {n: r.linear(f"{name}.attn.add_{n}_proj") for n in "qkv"},
            "modulation": r.linear(f"{name}.norm1_context.linear", swap=last),
        }
        if not last:
            feed = f"{name}.ff_context.net"
            text["self_attn"]["o"] = r.linear(f"{name}.attn.to_add_out")
            text["ffn"] = {"in": r.linear(f"{feed}.0.proj"), "out": r.linear(f"{feed}.2")}
        blocks.append({"video": image, "text": text})
    out = {
        "video": {
            "patch_embed": r.linear("pos_embed.proj"),
            "time_mlp": {
                name: r.linear(f"{embed}.timestep_embedder.linear_{j}")
                for j, name in ((1, "in"), (2, "out"))
            },
            "head_modulation": r.linear("norm_out.linear", swap=True),
            "head": r.linear("proj_out"),
        },
        "pooled_mlp": {
            name: r.linear(f"{embed}.text_embedder.linear_{j}")
            for j, name in ((1, "in"), (2, "out"))
        },
        "text_embed": r.linear("context_embedder"),
        "blocks": stacked(blocks[:-1]),
        "final_block": blocks[-1],
    }
    r.done()
    return out
