"""Tests key sets and shapes of the published files at full size, without weights."""

import functools
import math

import pytest

from wamjax import weights
from wamjax.weights import families

COUNTS = {  # tensors and numbers, references.md section 2 and the specs of the two policies
    ("dit", "official"): (291, 674_834_720),  # beside the position table
    ("dit", "diffusers"): (538, 749_826_464),
    ("wan21_t2v", "official"): (825, 1_418_996_800),
    ("wan21_t2v", "diffusers"): (825, 1_418_996_800),
    ("wan22_ti2v", "official"): (825, 4_999_787_712),
    ("wan22_ti2v", "diffusers"): (825, 4_999_787_712),
    ("cosmos_predict2", "official"): (567, 1_956_413_440),
    ("cosmos_predict2", "diffusers"): (567, 1_956_413_440),
    ("cosmos_policy", "official"): (567, 1_956_413_440),
    ("cosmos_policy", "diffusers"): (567, 1_956_413_440),
    ("sd3", "diffusers"): (682, 2_028_328_000),  # beside the position table
    ("fast_wam", "released"): (825 + 824 + 2, 6_020_710_599),
    ("t5", "transformers"): (195, 4_864_791_552),  # without the tied copy
    ("t5_v1_1", "transformers"): (219, 4_762_310_656),
    ("umt5", "transformers"): (242, 5_680_910_336),
    ("umt5", "wan"): (242, 5_680_910_336),
    ("sd_vae", "diffusers"): (248, 83_653_863),
    ("sd_vae", "diffusers_old"): (248, 83_653_863),
    ("sd_vae", "official"): (248, 83_653_863),
    ("wan21_vae", "official"): (194, 126_892_531),
    ("wan21_vae", "diffusers"): (194, 126_892_531),
    ("wan22_vae", "official"): (196, 704_688_668),
    ("wan22_vae", "diffusers"): (196, 704_688_668),
}


@functools.cache
def published(family, layout):
    return families.plans(family, layout=layout)[layout].published


def test_every_layout_of_every_family_is_counted():
    assert set(COUNTS) == {(f, n) for f, kind in weights.FAMILIES.items() for n in kind.layouts}


@pytest.mark.parametrize("family, layout", COUNTS)
def test_tensors_and_numbers_are_the_published_ones(family, layout):
    shapes = published(family, layout)
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == COUNTS[family, layout]


def leaves(prefix, weight, bias=None):
    out = {f"{prefix}.weight": weight}
    return out | ({f"{prefix}.bias": weight[:1] if bias is None else bias} if bias != 0 else {})


def attention(prefix, names, width, inner, context=None):
    """Returns q, k, v and o of a Wan attention, with its norms."""
    out = {}
    for x in names:
        source = context if context and x in "kv" else width
        out |= leaves(f"{prefix}.{x}", (width, inner) if x == "o" else (inner, source))
    for x in "qk":
        out[f"{prefix}.norm_{x}.weight"] = (inner,)
    return out


def wan_expert(width, ffn, inner=None, layers=30, text=4096, freq=256):
    """Fast-WAM spec 1.5, and section 2 for the action expert, whose attention is wider than it."""
    inner = inner or width
    out = {
        **leaves("text_embedding.0", (width, text)), **leaves("text_embedding.2", (width, width)),
        **leaves("time_embedding.0", (width, freq)), **leaves("time_embedding.2", (width, width)),
        **leaves("time_projection.1", (6 * width, width)),
    }  # fmt: skip
    for i in range(layers):
        block = f"blocks.{i}"
        for name in ("self_attn", "cross_attn"):
            out |= attention(f"{block}.{name}", "qkvo", width, inner)
        out |= leaves(f"{block}.norm3", (width,))
        out |= leaves(f"{block}.ffn.0", (ffn, width)) | leaves(f"{block}.ffn.2", (width, ffn))
        out[f"{block}.modulation"] = (1, 6, width)
    return out


def wan(width, ffn, channels):
    return wan_expert(width, ffn) | {
        **leaves("patch_embedding", (width, channels, 1, 2, 2)),
        **leaves("head.head", (4 * channels, width)), "head.modulation": (1, 2, width),
    }  # fmt: skip


def fast_wam():
    action = wan_expert(1024, 4096, inner=3072)
    action |= leaves("action_encoder", (1024, 7)) | leaves("head", (7, 1024))
    return {
        **{f"mot/mixtures.video.{k}": s for k, s in wan(3072, 14336, 48).items()},
        **{f"mot/mixtures.action.{k}": s for k, s in action.items()},
        "proprio_encoder/weight": (4096, 8), "proprio_encoder/bias": (4096,),
    }  # fmt: skip


def cosmos():
    """Cosmos Policy spec 1.4."""
    d, out = 2048, {}
    out["x_embedder.proj.1"], out["t_embedding_norm"] = (d, 72), (d,)
    out["t_embedder.1.linear_1"], out["t_embedder.1.linear_2"] = (d, d), (3 * d, d)
    out["final_layer.adaln_modulation.1"] = (256, d)
    out["final_layer.adaln_modulation.2"] = (2 * d, 256)
    out["final_layer.linear"] = (64, d)
    for i in range(28):
        for name, context in (("self_attn", d), ("cross_attn", 1024)):
            for x in ("q", "k", "v", "output"):
                size = (d, context if x in "kv" else d)
                out[f"blocks.{i}.{name}.{x}_proj"] = size
            out |= {f"blocks.{i}.{name}.{x}_norm": (128,) for x in "qk"}
        for name in ("self_attn", "cross_attn", "mlp"):
            out[f"blocks.{i}.adaln_modulation_{name}.1"] = (256, d)
            out[f"blocks.{i}.adaln_modulation_{name}.2"] = (3 * d, 256)
        out[f"blocks.{i}.mlp.layer1"], out[f"blocks.{i}.mlp.layer2"] = (4 * d, d), (d, 4 * d)
    return {f"net.{k}.weight": s for k, s in out.items()}


def dit():
    """references.md 2.1."""
    d = 1152
    out = {
        **leaves("x_embedder.proj", (d, 4, 2, 2)), "y_embedder.embedding_table.weight": (1001, d),
        **leaves("t_embedder.mlp.0", (d, 256)), **leaves("t_embedder.mlp.2", (d, d)),
        **leaves("final_layer.linear", (32, d)),
        **leaves("final_layer.adaLN_modulation.1", (2 * d, d)),
    }  # fmt: skip
    for i in range(28):
        for name, shape in {
            "attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d),
            "mlp.fc2": (d, 4 * d), "adaLN_modulation.1": (6 * d, d),
        }.items():  # fmt: skip
            out |= leaves(f"blocks.{i}.{name}", shape)
    return out


def umt5():
    """references.md 2.2."""
    d, inner, ffn = 4096, 4096, 10240
    out = {"token_embedding": (256384, d), "norm": (d,)}
    for i in range(24):
        block = f"blocks.{i}"
        out |= {f"{block}.attn.{x}": (inner, d) for x in "qkv"}
        out |= {
            f"{block}.attn.o": (d, inner), f"{block}.pos_embedding.embedding": (32, 64),
            f"{block}.norm1": (d,), f"{block}.norm2": (d,), f"{block}.ffn.gate.0": (ffn, d),
            f"{block}.ffn.fc1": (ffn, d), f"{block}.ffn.fc2": (d, ffn),
        }  # fmt: skip
    return {f"{k}.weight": s for k, s in out.items()}


OFFICIAL = {
    ("dit", "official"): dit,
    ("wan21_t2v", "official"): lambda: wan(1536, 8960, 16),
    ("wan22_ti2v", "official"): lambda: wan(3072, 14336, 48),
    ("cosmos_predict2", "official"): cosmos,
    ("cosmos_policy", "official"): cosmos,
    ("fast_wam", "released"): fast_wam,
    ("umt5", "wan"): umt5,
}


@pytest.mark.parametrize("family, layout", OFFICIAL)
def test_official_keys_and_shapes(family, layout):
    assert published(family, layout) == OFFICIAL[family, layout]()


def original(family):
    """Returns the model of diffusers or transformers at its published size, without memory."""
    import diffusers

    wan = dict(num_layers=30, text_dim=4096, freq_dim=256)
    if family == "dit":
        return diffusers.DiTTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8,
            num_layers=28, sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
        )  # fmt: skip
    if family == "wan21_t2v":
        return diffusers.WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, **wan)
    if family == "wan22_ti2v":
        return diffusers.WanTransformer3DModel(
            num_attention_heads=24, ffn_dim=14336, in_channels=48, out_channels=48, **wan
        )
    if family == "cosmos_predict2":
        return diffusers.CosmosTransformer3DModel(
            in_channels=17, out_channels=16, num_attention_heads=16, attention_head_dim=128,
            num_layers=28, mlp_ratio=4.0, text_embed_dim=1024, adaln_lora_dim=256,
            patch_size=(1, 2, 2), concat_padding_mask=True, extra_pos_embed_type=None,
        )  # fmt: skip
    if family == "sd3":
        return diffusers.SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, joint_attention_dim=4096,
            caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=192,
        )  # fmt: skip
    if family == "sd_vae":
        return diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    if family == "wan21_vae":
        return diffusers.AutoencoderKLWan()
    return diffusers.AutoencoderKLWan(
        base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, in_channels=12,
        out_channels=12, patch_size=2, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
    )  # fmt: skip


@pytest.mark.parametrize("family", [f for f, layout in COUNTS if layout == "diffusers"])
def test_keys_and_shapes_of_diffusers(family):
    pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    if family == "cosmos_policy":
        assert published(family, "diffusers") == published("cosmos_predict2", "diffusers")
        return
    with torch.device("meta"):
        state = original(family).state_dict()
    want = {k: tuple(v.shape) for k, v in state.items() if k != "pos_embed.pos_embed"}
    assert published(family, "diffusers") == want


@pytest.mark.parametrize("family, name", [("t5", "T5_11B"), ("t5_v1_1", "T5_V1_1_XXL"),
                                          ("umt5", "UMT5_XXL")])  # fmt: skip
def test_keys_and_shapes_of_transformers(family, name):
    pytest.importorskip("transformers")
    from models import test_t5

    with test_t5.torch.device("meta"):
        state = test_t5.oracle(test_t5.PUBLISHED[name]).state_dict()
    want = {k: tuple(v.shape) for k, v in state.items() if k != "encoder.embed_tokens.weight"}
    assert published(family, "transformers") == want
