"""Converts our parameters to the official (Wan, Fast-WAM) names and torch layouts, for oracles."""

import torch

NETWORKS = {
    "text_mlp/in": "text_embedding.0",
    "text_mlp/out": "text_embedding.2",
    "time_mlp/in": "time_embedding.0",
    "time_mlp/out": "time_embedding.2",
    "time_proj": "time_projection.1",
}
OTHERS = {
    "video": {"patch_embed": "patch_embedding", "head": "head.head"},
    "action": {"encoder": "action_encoder", "head": "head"},
}
BLOCK = {"cross_norm": "norm3", "ffn/in": "ffn.0", "ffn/out": "ffn.2"}
for attention in ("self_attn", "cross_attn"):
    BLOCK |= {f"{attention}/{x}": f"{attention}.{x}" for x in "qkvo"}
    BLOCK |= {f"{attention}/{x}_norm": f"{attention}.norm_{x}" for x in "qk"}


def tensor(x):
    return torch.from_numpy(x.copy())


def get(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return tree


def layer(target, name, leaves, index=...):
    """Converts one layer: kernels are transposed; scales and kernels are weights."""
    for leaf, value in leaves.items():
        value = value[index]
        if leaf == "kernel":
            value = value.T
        target[f"{name}.{'bias' if leaf == 'bias' else 'weight'}"] = tensor(value)


def official(params, layers, patch):
    """Returns {"video": {...}, "action": {...}, "proprio": {...}} for `TorchWam`."""
    out = {}
    for expert, others in OTHERS.items():
        target = out[expert] = {}
        for path, name in (NETWORKS | others).items():
            layer(target, name, get(params[expert], path))
        for i in range(layers):
            block = params["blocks"][expert]
            for path, name in BLOCK.items():
                layer(target, f"blocks.{i}.{name}", get(block, path), i)
            target[f"blocks.{i}.modulation"] = tensor(block["modulation"][i][None])
    weight = out["video"]["patch_embedding.weight"]
    out["video"]["patch_embedding.weight"] = weight.reshape(len(weight), -1, 1, patch, patch)
    out["video"]["head.modulation"] = tensor(params["video"]["head_table"][None])
    out["proprio"] = {
        "weight": tensor(params["proprio"]["kernel"].T),
        "bias": tensor(params["proprio"]["bias"]),
    }
    return out
