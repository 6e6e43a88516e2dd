"""Defines key maps of the transformers, in the language of `table`.

Facts from the public files: facebookresearch/DiT ``models.py``; Wan ``wan/modules/{model,t5}.py``;
cosmos-predict2 ``minimal_v4_dit.py``; Fast-WAM ``{wan_video_dit,action_dit,mot}.py``; diffusers
``transformer_{wan,cosmos,sd3}.py`` and ``dit_transformer_2d.py``; transformers ``modeling_t5.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wamjax.weights.table import Row, Table, linear, norm

Sizes = Mapping[str, Any]
_PATCH = "o c p q -> (c p q) o"  # a convolution whose stride is its kernel, as our Linear
_HALVES = (1, 0)  # diffusers' continuous norms have scale before shift


def _patch(theirs: str, ours: str, side: int, layout: str = _PATCH) -> Table:
    sizes = (("p", side), ("q", side))
    return Row(f"{theirs}.weight", f"{ours}/kernel", layout, sizes), linear(theirs, ours)[1]


def dit_official(sizes: Sizes) -> Table:
    """Returns the rows of Meta's DiT; its position table is recomputed."""
    block = "blocks.{i}"
    return (
        *_patch("x_embedder.proj", "video/patch_embed", sizes["patch"]),
        *linear("t_embedder.mlp.0", "video/time_mlp/in"),
        *linear("t_embedder.mlp.2", "video/time_mlp/out"),
        Row("y_embedder.embedding_table.weight", "labels/embedding"),
        *linear(f"{block}.attn.qkv[{{x}}/3]", "blocks/video/self_attn/{x:q=0|k=1|v=2}"),
        *linear(f"{block}.attn.proj", "blocks/video/self_attn/o"),
        *linear(f"{block}.mlp.fc1", "blocks/video/ffn/in"),
        *linear(f"{block}.mlp.fc2", "blocks/video/ffn/out"),
        *linear(f"{block}.adaLN_modulation.1", "blocks/video/modulation"),
        *linear("final_layer.adaLN_modulation.1", "video/head_modulation"),
        *linear("final_layer.linear", "video/head"),
    )


def dit_diffusers(sizes: Sizes) -> Table:
    """Returns the rows of diffusers' DiT, in which every block has a copy of the embedders of time
    and class."""
    block = "transformer_blocks.{i}"
    embedders = f"{block}.norm1.emb"
    return (
        *_patch("pos_embed.proj", "video/patch_embed", sizes["patch"]),
        *linear(f"{embedders}.timestep_embedder.linear_1", "video/time_mlp/in"),
        *linear(f"{embedders}.timestep_embedder.linear_2", "video/time_mlp/out"),
        Row(f"{embedders}.class_embedder.embedding_table.weight", "labels/embedding"),
        *linear(f"{block}.attn1.to_{{x}}", "blocks/video/self_attn/{x:q|k|v}"),
        *linear(f"{block}.attn1.to_out.0", "blocks/video/self_attn/o"),
        *linear(f"{block}.ff.net.0.proj", "blocks/video/ffn/in"),
        *linear(f"{block}.ff.net.2", "blocks/video/ffn/out"),
        *linear(f"{block}.norm1.linear", "blocks/video/modulation"),
        *linear("proj_out_1", "video/head_modulation"),
        *linear("proj_out_2", "video/head"),
    )


def _wan_block(block: str, expert: str) -> Table:
    """Returns the rows of a Wan block and its conditioning under official names; Fast-WAM has two
    of them."""
    ours = f"blocks/{expert}"
    attention = "{a:self_attn|cross_attn}"
    stem = block.removesuffix("blocks.{i}")
    return (
        *linear(f"{block}.{{a}}.{{x}}", f"{ours}/{attention}/{{x:q|k|v|o}}"),
        *norm(f"{block}.{{a}}.norm_{{x}}", f"{ours}/{attention}/{{x:q_norm=q|k_norm=k}}"),
        *norm(f"{block}.norm3", f"{ours}/cross_norm"),
        *linear(f"{block}.ffn.{{x}}", f"{ours}/ffn/{{x:in=0|out=2}}"),
        Row(f"{block}.modulation", f"{ours}/modulation", "1 n d -> n d"),
        *linear(f"{stem}{{m}}_embedding.{{x}}", f"{expert}/{{m:text|time}}_mlp/{{x:in=0|out=2}}"),
        *linear(f"{stem}time_projection.1", f"{expert}/time_proj"),
    )


def wan_official(sizes: Sizes, stem: str = "") -> Table:
    """Returns the rows of Wan 2.1 and 2.2."""
    patch = "o c 1 p q -> (c p q) o"
    return (
        *_wan_block(f"{stem}blocks.{{i}}", "video"),
        *_patch(f"{stem}patch_embedding", "video/patch_embed", sizes["patch"], patch),
        *linear(f"{stem}head.head", "video/head"),
        Row(f"{stem}head.modulation", "video/head_table", "1 n d -> n d"),
    )


def wan_diffusers(sizes: Sizes) -> Table:
    """Returns the rows of Wan under diffusers' names; its norm2 is the official norm3."""
    block, attention = "blocks.{i}", "{a:self_attn=attn1|cross_attn=attn2}"
    embedder, ours = "condition_embedder", "blocks/video"
    patch = "o c 1 p q -> (c p q) o"
    return (
        *_patch("patch_embedding", "video/patch_embed", sizes["patch"], patch),
        *linear(f"{embedder}.{{m}}_embedder.linear_{{x}}",
                "video/{m:text|time}_mlp/{x:in=1|out=2}"),
        *linear(f"{embedder}.time_proj", "video/time_proj"),
        *linear(f"{block}.{{a}}.to_{{x}}", f"{ours}/{attention}/{{x:q|k|v|o=out.0}}"),
        *norm(f"{block}.{{a}}.norm_{{x}}", f"{ours}/{attention}/{{x:q_norm=q|k_norm=k}}"),
        *norm(f"{block}.norm2", f"{ours}/cross_norm"),
        *linear(f"{block}.ffn.net.{{x}}", f"{ours}/ffn/{{x:in=0.proj|out=2}}"),
        Row(f"{block}.scale_shift_table", f"{ours}/modulation", "1 n d -> n d"),
        *linear("proj_out", "video/head"),
        Row("scale_shift_table", "video/head_table", "1 n d -> n d"),
    )  # fmt: skip


def fast_wam(sizes: Sizes) -> Table:
    """Returns the rows of the released file: both experts in ``mot``, next to them the state's
    Linear."""
    stem = "mot/mixtures.action."
    return (
        *wan_official(sizes, "mot/mixtures.video."),
        *_wan_block(f"{stem}blocks.{{i}}", "action"),
        *linear(f"{stem}action_encoder", "action/encoder"),
        *linear(f"{stem}head", "action/head"),
        Row("proprio_encoder/weight", "proprio/kernel", "o i -> i o"),
        Row("proprio_encoder/bias", "proprio/bias"),
    )


def cosmos_official(sizes: Sizes) -> Table:
    """Returns the rows of Cosmos-Predict2, and of Cosmos Policy, which changes no layer."""
    del sizes
    block, ours = "net.blocks.{i}", "blocks/video"
    lora, attention = "{s:self=self_attn|cross=cross_attn|ffn=mlp}", "{a:self_attn|cross_attn}"
    return (
        *linear("net.x_embedder.proj.1", "video/patch_embed"),
        *linear("net.t_embedder.1.linear_{x}", "video/time_mlp/{x:in=1|out=2}"),
        *norm("net.t_embedding_norm", "video/time_norm"),
        *linear(f"{block}.{{a}}.{{x}}_proj", f"{ours}/{attention}/{{x:q|k|v|o=output}}"),
        *norm(f"{block}.{{a}}.{{x}}", f"{ours}/{attention}/{{x:q_norm|k_norm}}"),
        *linear(f"{block}.mlp.layer{{x}}", f"{ours}/ffn/{{x:in=1|out=2}}"),
        *linear(f"{block}.adaln_modulation_{{s}}.{{x}}",
                f"{ours}/modulation/{lora}_{{x:down=1|up=2}}"),
        *linear("net.final_layer.adaln_modulation.{x}", "video/head_{x:down=1|up=2}"),
        *linear("net.final_layer.linear", "video/head"),
    )  # fmt: skip


def cosmos_diffusers(sizes: Sizes) -> Table:
    """Returns the same under diffusers' names."""
    del sizes
    block, ours = "transformer_blocks.{i}", "blocks/video"
    attention = "{a:self_attn=attn1|cross_attn=attn2}"
    return (
        *linear("patch_embed.proj", "video/patch_embed"),
        *linear("time_embed.t_embedder.linear_{x}", "video/time_mlp/{x:in=1|out=2}"),
        *norm("time_embed.norm", "video/time_norm"),
        *linear(f"{block}.{{a}}.to_{{x}}", f"{ours}/{attention}/{{x:q|k|v|o=out.0}}"),
        *norm(f"{block}.{{a}}.norm_{{x}}", f"{ours}/{attention}/{{x:q_norm=q|k_norm=k}}"),
        *linear(f"{block}.ff.net.{{x}}", f"{ours}/ffn/{{x:in=0.proj|out=2}}"),
        *linear(f"{block}.norm{{s}}.linear_{{x}}",
                f"{ours}/modulation/{{s:self=1|cross=2|ffn=3}}_{{x:down=1|up=2}}"),
        *linear("norm_out.linear_{x}", "video/head_{x:down=1|up=2}"),
        *linear("proj_out", "video/head"),
    )  # fmt: skip


def sd3_diffusers(sizes: Sizes) -> Table:
    """Returns the rows of Stable Diffusion 3; the text of the last block ends with a continuous
    norm."""
    block = "transformer_blocks.{i}"
    return (
        *_patch("pos_embed.proj", "video/patch_embed", sizes["patch"]),
        *linear("time_text_embed.timestep_embedder.linear_{x}", "video/time_mlp/{x:in=1|out=2}"),
        *linear("time_text_embed.text_embedder.linear_{x}", "pooled_mlp/{x:in=1|out=2}"),
        *linear("context_embedder", "text_embed"),
        *linear(f"{block}.norm1.linear", "blocks/video/modulation"),
        *linear(f"{block}.norm1_context.linear", "blocks/text/modulation"),
        *linear(f"{block}.norm1_context.linear", "final_block/text/modulation", _HALVES),
        *linear(f"{block}.attn.to_{{x}}", "blocks/video/self_attn/{x:q|k|v|o=out.0}"),
        *linear(f"{block}.attn.add_{{x}}_proj", "blocks/text/self_attn/{x:q|k|v}"),
        *linear(f"{block}.attn.to_add_out", "blocks/text/self_attn/o"),
        *linear(f"{block}.ff{{e}}.net.0.proj", "blocks/{e:video=|text=_context}/ffn/in"),
        *linear(f"{block}.ff{{e}}.net.2", "blocks/{e:video=|text=_context}/ffn/out"),
        *linear("norm_out.linear", "video/head_modulation", _HALVES),
        *linear("proj_out", "video/head"),
    )


def t5_transformers(sizes: Sizes) -> Table:
    """Returns the rows of T5 v1.0, v1.1 and umT5, which has a table of positions in every layer."""
    block = "encoder.block.{i}.layer"
    gated = sizes["mlp"] != "relu"
    positions = "SelfAttention.relative_attention_bias.weight"
    return (
        Row("shared.weight", "embedding"),
        *norm(f"{block}.0.layer_norm", "blocks/text/self_norm"),
        *linear(f"{block}.0.SelfAttention.{{x}}", "blocks/text/self_attn/{x:q|k|v|o}"),
        Row(f"{block}.0.{positions}", "blocks/text/position_bias"),
        Row(f"encoder.block.0.layer.0.{positions}", "position_bias"),
        *norm(f"{block}.1.layer_norm", "blocks/text/ffn_norm"),
        *linear(f"{block}.1.DenseReluDense.wi{'_1' if gated else ''}", "blocks/text/ffn/in"),
        *linear(f"{block}.1.DenseReluDense.wi_0", "blocks/text/ffn/gate"),
        *linear(f"{block}.1.DenseReluDense.wo", "blocks/text/ffn/out"),
        *norm("encoder.final_layer_norm", "final_norm"),
    )


def t5_wan(sizes: Sizes) -> Table:
    """Returns the rows of Wan's own file of umT5."""
    del sizes
    block = "blocks.{i}"
    return (
        Row("token_embedding.weight", "embedding"),
        *norm(f"{block}.norm1", "blocks/text/self_norm"),
        *linear(f"{block}.attn.{{x}}", "blocks/text/self_attn/{x:q|k|v|o}"),
        Row(f"{block}.pos_embedding.embedding.weight", "blocks/text/position_bias"),
        *norm(f"{block}.norm2", "blocks/text/ffn_norm"),
        *linear(f"{block}.ffn.{{x}}", "blocks/text/ffn/{x:gate=gate.0|in=fc1|out=fc2}"),
        *norm("norm", "final_norm"),
    )
