"""Builds tiny published models of diffusers and transformers with random weights.

Their official names follow from rules written from the public files, independently of the key maps
under test.
"""

from __future__ import annotations

import contextlib
import re
import types

import numpy as np
import torch

torch.set_num_threads(1)  # threads do not pay at these sizes


def randomise(model, seed=0):
    """Draws every parameter, so that nothing is compared at zero; sets evaluation mode."""
    rng = np.random.default_rng(seed)
    for name, p in model.named_parameters():
        x = rng.standard_normal(p.shape)
        if p.squeeze().ndim > 1 and "table" not in name:
            x *= np.prod(p.shape[1:]) ** -0.5
        else:
            x = 0.3 * x + (name.endswith("weight") and p.ndim == 1)
        p.data = torch.as_tensor(x, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def wan(layers=2, heads=2, head_dim=24, channels=4, text=12):
    from diffusers import WanTransformer3DModel

    return randomise(
        WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=head_dim, num_layers=layers, ffn_dim=40,
            in_channels=channels, out_channels=channels, text_dim=text, freq_dim=16,
        )
    )  # fmt: skip


def dit():
    """Returns diffusers' DiT without its two deviations from Meta's (references.md, section 4)."""
    from diffusers import DiTTransformer2DModel
    from diffusers.models.embeddings import Timesteps

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=7,
    )  # fmt: skip
    randomise(model)
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
        block.norm1.emb.time_proj = Timesteps(256, True, 0)  # 1
        block.norm3.eps = 1e-6  # 2
    return model


def sd3():
    from diffusers import SD3Transformer2DModel

    return randomise(
        SD3Transformer2DModel(
            num_attention_heads=2, attention_head_dim=24, num_layers=3, in_channels=4,
            out_channels=4, sample_size=8, patch_size=2, joint_attention_dim=12,
            caption_projection_dim=48, pooled_projection_dim=6, pos_embed_max_size=12,
        )
    )  # fmt: skip


def cosmos():
    """Returns diffusers' Cosmos with the official epsilon of its query and key norms."""
    import diffusers.models.transformers.transformer_cosmos as module

    # It uses torchvision only to resize the padding mask, which is zero.
    resize = types.SimpleNamespace(resize=lambda x, size, **_: x.new_zeros(*x.shape[:-2], *size))
    module.transforms = types.SimpleNamespace(
        functional=resize, InterpolationMode=types.SimpleNamespace(NEAREST=None)
    )
    model = module.CosmosTransformer3DModel(
        in_channels=5, out_channels=4, num_attention_heads=2, attention_head_dim=24, num_layers=2,
        mlp_ratio=2.0, text_embed_dim=12, adaln_lora_dim=6, max_size=(16, 16, 16),
        patch_size=(1, 2, 2), rope_scale=(1.0, 3.0, 3.0), concat_padding_mask=True,
        extra_pos_embed_type=None,
    )  # fmt: skip
    randomise(model)
    for block in model.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            attention.norm_q.eps = attention.norm_k.eps = 1e-6
    return model


def rename(state, *rules):
    """Applies all rules to every key."""
    out = {}
    for key, value in state.items():
        for pattern, to in rules:
            key = re.sub(pattern, to, key)
        assert key not in out
        out[key] = value.contiguous()
    return out


def wan_official(state):
    """Names of Wan-Video/Wan2.1 ``wan/modules/model.py``."""
    return rename(
        state,
        (r"^scale_shift_table$", "head.modulation"),
        (r"scale_shift_table", "modulation"),
        (r"condition_embedder\.(time|text)_embedder\.linear_1", r"\1_embedding.0"),
        (r"condition_embedder\.(time|text)_embedder\.linear_2", r"\1_embedding.2"),
        (r"condition_embedder\.time_proj", "time_projection.1"),
        (r"proj_out", "head.head"),
        (r"attn1", "self_attn"),
        (r"attn2", "cross_attn"),
        (r"to_out\.0", "o"),
        (r"\.to_([qkv])\.", r".\1."),
        (r"norm2", "norm3"),
        (r"ffn\.net\.0\.proj", "ffn.0"),
        (r"ffn\.net\.2", "ffn.2"),
    )


def cosmos_official(state):
    """Names of cosmos-predict2 ``minimal_v4_dit.py``."""
    sublayer = {"1": "self_attn", "2": "cross_attn", "3": "mlp"}
    return rename(
        state,
        (r"transformer_blocks", "blocks"),
        (r"norm([123])\.linear_", lambda m: f"adaln_modulation_{sublayer[m[1]]}."),
        (r"attn1", "self_attn"),
        (r"attn2", "cross_attn"),
        (r"to_out\.0", "output_proj"),
        (r"\.to_([qkv])\.", r".\1_proj."),
        (r"norm_([qk])\.", r"\1_norm."),
        (r"ff\.net\.0\.proj", "mlp.layer1"),
        (r"ff\.net\.2", "mlp.layer2"),
        (r"norm_out\.linear_", "final_layer.adaln_modulation."),
        (r"proj_out", "final_layer.linear"),
        (r"patch_embed\.proj", "x_embedder.proj.1"),
        (r"time_embed\.t_embedder", "t_embedder.1"),
        (r"time_embed\.norm", "t_embedding_norm"),
        (r"^", "net."),
    )


def dit_official(state):
    """Names and fused projections of facebookresearch/DiT ``models.py``."""
    out = {}
    for key, value in state.items():
        block = re.match(r"transformer_blocks\.(\d+)\.attn1\.to_q\.(.*)", key)
        if block:
            parts = [state[key.replace("to_q", f"to_{x}")] for x in "qkv"]
            out[f"blocks.{block[1]}.attn.qkv.{block[2]}"] = torch.cat(parts)
        elif not re.search(r"attn1\.to_[kv]|blocks\.[1-9]\d*\.norm1\.emb", key):
            out[key] = value
    return rename(
        out,
        (r"^transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
        (r"^transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
        (r"^transformer_blocks\.0\.norm1\.emb\.class_embedder", "y_embedder"),
        (r"transformer_blocks", "blocks"),
        (r"pos_embed\.proj", "x_embedder.proj"),
        (r"attn1\.to_out\.0", "attn.proj"),
        (r"ff\.net\.0\.proj", "mlp.fc1"),
        (r"ff\.net\.2", "mlp.fc2"),
        (r"norm1\.linear", "adaLN_modulation.1"),
        (r"proj_out_1", "final_layer.adaLN_modulation.1"),
        (r"proj_out_2", "final_layer.linear"),
    )


def umt5_wan(state):
    """Names of Wan-Video/Wan2.1 ``wan/modules/t5.py``."""
    state = {k: v for k, v in state.items() if k != "encoder.embed_tokens.weight"}
    return rename(
        state,
        (r"^shared", "token_embedding"),
        (r"encoder\.final_layer_norm", "norm"),
        (r"encoder\.block\.(\d+)\.layer\.", r"blocks.\1."),
        (r"0\.SelfAttention\.relative_attention_bias", "pos_embedding.embedding"),
        (r"\.0\.SelfAttention\.", ".attn."),
        (r"\.0\.layer_norm", ".norm1"),
        (r"\.1\.layer_norm", ".norm2"),
        (r"1\.DenseReluDense\.wi_0", "ffn.gate.0"),
        (r"1\.DenseReluDense\.wi_1", "ffn.fc1"),
        (r"1\.DenseReluDense\.wo", "ffn.fc2"),
    )


_WAN_VAE = (
    (r"norm1\.gamma", "residual.0.gamma"),
    (r"norm2\.gamma", "residual.3.gamma"),
    (r"(\d|sampler)\.conv1\.", r"\1.residual.2."),
    (r"conv2\.", "residual.6."),
    (r"conv_shortcut", "shortcut"),
    (r"mid_block\.resnets\.0", "middle.0"),
    (r"mid_block\.resnets\.1", "middle.2"),
    (r"mid_block\.attentions\.0", "middle.1"),
    (r"norm_out", "head.0"),
    (r"conv_out", "head.2"),
    (r"conv_in", "conv1"),
    (r"^quant_conv", "conv1"),
    (r"^post_quant_conv", "conv2"),
)


def wan21_vae_official(state, blocks):
    """Names of Wan-Video/Wan2.1 ``wan/modules/vae.py``."""

    def up(match):
        level, kind, i = int(match[1]), match[2], int(match[3])
        return f"upsamples.{level * (blocks + 2) + (i if kind == 'resnets' else blocks + 1)}"

    rules = ((r"up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)", up),
             (r"down_blocks\.(\d+)", r"downsamples.\1"))  # fmt: skip
    return rename(state, *_WAN_VAE, *rules)


def wan22_vae_official(state, blocks):
    """Names of Wan-Video/Wan2.2 ``wan/modules/vae2_2.py``."""
    rules = (
        (r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)", r"\1samples.\2.\1samples.\3"),
        (r"down_blocks\.(\d+)\.downsampler", rf"downsamples.\1.downsamples.{blocks}"),
        (r"up_blocks\.(\d+)\.upsampler", rf"upsamples.\1.upsamples.{blocks + 1}"),
    )
    return rename(state, *_WAN_VAE, *rules)


def sd_vae_official(state, levels):
    """Names of CompVis's ``ldm/modules/diffusionmodules/model.py``, in a Lightning file."""
    out = {}
    for key, value in state.items():
        if re.search(r"attentions\.0\.to_.*weight", key):
            value = value[:, :, None, None]
        out[key] = value
    flip = (r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}")
    return rename(
        out,
        flip,
        (r"down_blocks\.(\d+)", r"down.\1"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
        (r"resnets", "block"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"(down|up)samplers\.0", r"\1sample"),
        (r"conv_norm_out", "norm_out"),
        (r"^", "state_dict/"),
    )


def sd_vae_old(state):
    """Names of diffusers before 2023 in the attention."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return rename(state, (r"(?<=attentions\.0\.)(to_out\.0|to_[qkv])(?=\.)", lambda m: names[m[1]]))


@contextlib.contextmanager
def on_meta():
    """Builds models without allocating memory, for the published sizes."""
    with torch.device("meta"):
        yield
