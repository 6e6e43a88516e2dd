"""Tests Cosmos Policy's network: published sizes, and parity with the public implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.helpers import precision, random_params

from wamjax import flops
from wamjax.models import blocks
from wamjax.models.attention import attend
from wamjax.models.blocks import ExpertSpec
from wamjax.models.dit import DiT
from wamjax.models.rope import ntk_bases, rotate, split_axes, video_rope
from wamjax.models.shell import GroupSpec
from wamjax.models.visibility import bidirectional
from wamjax.tree import count, flatten

B, T, H, W = 2, 3, 4, 6
TINY = dict(layers=2, heads=2, head_dim=24, width=48, ffn=192, text=10, channels=4, rank=4)
FULL = dict(layers=28, heads=16, head_dim=128, width=2048, ffn=8192, text=1024, channels=16,
            rank=256)  # fmt: skip


def network(slots, latent, layers, heads, head_dim, width, ffn, text, channels, rank, rows=0):
    spec = ExpertSpec("video", width, ffn, **blocks.COSMOS, lora_rank=rank, context_rows=rows)
    return DiT(
        video_spec=spec,
        groups=(GroupSpec("all", "video", tuple(range(slots))),),
        latent=(*latent, channels + 2),  # and the masks of condition and padding
        layers=layers,
        heads=heads,
        head_dim=head_dim,
        outputs=channels,
        text="cross",
        text_net="none",
        context_width=text,
        positions="rope",
        rope_scale=(1.0, 3.0, 3.0),
        freq_dim=width,
        time_scale=1.0,
    )


TABLE = bidirectional("all")


def abstract(net, slots, rows):
    """Returns the shapes of the parameters, and of the inputs of a forward pass of one sample."""
    h, w, c = net.latent
    values = {"all": jax.ShapeDtypeStruct((1, slots, h, w, c), jnp.float32)}
    levels = {"all": jax.ShapeDtypeStruct((1, slots), jnp.float32)}
    text = {"context": jax.ShapeDtypeStruct((1, rows, net.context_width), jnp.float32)}
    table = TABLE
    init = functools.partial(net.init, method="evaluate", visibility=table)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(init, key, values, levels, text)["params"]
    return params, values, levels, text


def test_the_published_network_has_exactly_the_published_parameters_and_tensors():
    params, *_ = abstract(network(9, (28, 28), **FULL), 9, 4)
    assert count(params) == 1_956_413_440
    assert count(params["blocks"]) == 28 * 69_206_528
    # A tensor of ours below blocks/ stacks one of every layer of theirs.
    tensors = {p: x.shape for p, x in flatten(params).items()}
    assert sum(28 if p.startswith("blocks/") else 1 for p in tensors) == 567
    kernels = {
        "video/patch_embed/kernel": (72, 2048),
        "video/time_mlp/in/kernel": (2048, 2048),
        "video/time_mlp/out/kernel": (2048, 6144),
        "video/time_norm/scale": (2048,),
        "video/head_down/kernel": (2048, 256),
        "video/head_up/kernel": (256, 4096),
        "video/head/kernel": (2048, 64),
        "blocks/video/cross_attn/k/kernel": (28, 1024, 2048),
        "blocks/video/cross_attn/v/kernel": (28, 1024, 2048),
        "blocks/video/ffn/in/kernel": (28, 2048, 8192),
        "blocks/video/ffn/out/kernel": (28, 8192, 2048),
        **{f"blocks/video/self_attn/{p}/kernel": (28, 2048, 2048) for p in "qkvo"},
        **{f"blocks/video/cross_attn/{p}/kernel": (28, 2048, 2048) for p in "qo"},
        **{f"blocks/video/{a}_attn/{n}_norm/scale": (28, 128)
           for a in ("self", "cross") for n in "qk"},
        **{f"blocks/video/modulation/{s}_down/kernel": (28, 2048, 256)
           for s in ("self", "cross", "ffn")},
        **{f"blocks/video/modulation/{s}_up/kernel": (28, 256, 6144)
           for s in ("self", "cross", "ffn")},
    }  # fmt: skip
    assert tensors == kernels


@pytest.mark.parametrize("slots, tera", [(9, 6.85), (11, 8.53)])
def test_flops_of_a_forward_pass_and_what_zero_rows_save(slots, tera):
    counts = {}
    for rows, given in ((0, 512), (512, 512), (512, 32)):
        net = network(slots, (28, 28), **FULL, rows=rows)
        params, *inputs = abstract(net, slots, given)

        def forward(params, values, levels, text, net=net):
            return net.apply({"params": params}, values, levels, text, TABLE, method="evaluate")

        counts[rows, given] = flops.count(forward, params, *inputs) / 1e12
    assert round(counts[0, 512], 2) == tera
    assert counts[512, 512] == counts[0, 512]
    assert 0.95 < counts[512, 32] / counts[0, 512] < 0.96


def test_rope_split_and_bases():
    assert [d // 2 for d in split_axes(128)] == [22, 21, 21]
    bases = ntk_bases(split_axes(128), (1, 3, 3))
    np.testing.assert_allclose(bases, [10000, 31694.02, 31694.02], atol=5e-3)
    cos, sin = video_rope((0, 1, 8), 14, 14, 128, (1, 3, 3))
    angles = np.arctan2(sin, cos).reshape(3, 14, 14, 64)
    np.testing.assert_allclose(angles[2, 5, 3, 21], 8 * 10000 ** (-42 / 44))  # lowest of time
    np.testing.assert_allclose(angles[0, 5, 3, 22 + 4], 5 * 31694.02 ** (-8 / 42), rtol=1e-6)
    np.testing.assert_allclose(angles[0, 5, 3, 43 + 7], 3 * 31694.02 ** (-14 / 42), rtol=1e-6)
    # Halves rotate together: dimension i with i + 64.
    x = jnp.zeros((1, 1, 588, 128)).at[..., 22 + 4].set(1.0)
    y = np.asarray(rotate(x, (cos, sin), "half")).reshape(3, 14, 14, 128)
    assert set(np.flatnonzero(np.abs(y).max(axis=(0, 1, 2)))) == {26, 26 + 64}


def test_zero_rows_count_in_the_softmax_without_being_computed():
    """Section 1.2, step 7: keys and values of padding are zero, each adds exp(0)."""
    rng = np.random.default_rng(0)
    with precision(True):
        q, k, v = (rng.standard_normal((2, 3, n, 8)) * 3 for n in (5, 4, 4))
        q, k, v = map(jnp.asarray, (q, k, v))

        def padded(q, k, v, zeros=508):
            pad = ((0, 0), (0, 0), (0, zeros), (0, 0))
            return attend(q, jnp.pad(k, pad), jnp.pad(v, pad))

        def closed(q, k, v):
            return attend(q, k, v, zeros=508)

        np.testing.assert_allclose(closed(q, k, v), padded(q, k, v), atol=1e-14)
        assert np.abs(closed(q, k, v) - attend(q, k, v)).max() > 0.1
        want, got = (
            jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), (0, 1, 2))(q, k, v)  # noqa: B023
            for f in (padded, closed)
        )
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-13)
        # All logits far below those of the padding, or far above: nothing overflows.
        for scale in (-1e4, 1e4):
            far = closed(q, scale * q[:, :, :4], v)
            np.testing.assert_allclose(far, padded(q, scale * q[:, :, :4], v), atol=1e-12)
            assert np.all(np.isfinite(far))
        # Combined with a mask.
        mask = jnp.asarray(rng.random((2, 5, 4)) < 0.7)
        widened = jnp.concatenate([mask, jnp.ones((2, 5, 508), bool)], axis=2)
        pad = ((0, 0), (0, 0), (0, 508), (0, 0))
        want = attend(q, jnp.pad(k, pad), jnp.pad(v, pad), widened)
        np.testing.assert_allclose(attend(q, k, v, mask, zeros=508), want, atol=1e-14)


def inputs(seed=0, rows=5):
    rng = np.random.default_rng(seed)
    c = TINY["channels"]
    return {
        "latents": rng.standard_normal((B, T, H, W, c)),
        "mask": rng.integers(0, 2, (B, T)).astype(float),
        "levels": rng.uniform(0, 1, (B, T)),
        "context": rng.standard_normal((B, rows, TINY["text"])),
    }


def ours(params, x, rows=0):
    net = network(T, (H, W), **TINY, rows=rows)
    mask = np.broadcast_to(x["mask"][:, :, None, None, None], (*x["latents"].shape[:-1], 1))
    values = {"all": np.concatenate([x["latents"], mask, np.zeros_like(mask)], axis=-1)}
    rest = {"all": jnp.asarray(x["levels"])}, {"context": jnp.asarray(x["context"])}, TABLE
    run = jax.jit(lambda p: net.apply({"params": p}, values, *rest, method="evaluate")["all"])
    return run(params)


def test_a_trimmed_context_equals_the_padded_one():
    net = network(T, (H, W), **TINY)
    with precision(True):
        params = random_params(abstract(net, T, 5)[0], 3, np.float64)
        x = inputs()
        padded = dict(x, context=np.pad(x["context"], ((0, 0), (0, 507), (0, 0))))
        want, got = ours(params, padded), ours(params, x, rows=512)
        np.testing.assert_allclose(got, want, atol=1e-12)
        assert np.abs(ours(params, x) - want).max() > 1e-2
        with pytest.raises(ValueError, match="5 tokens, more than model.context_rows = 4"):
            ours(params, x, rows=4)
    with pytest.raises(ValueError, match="needs a cross-attention without bias"):
        ExpertSpec("e", 8, 8, context_rows=512)


NAMES = {  # ours -> theirs (diffusers)
    "video/patch_embed/kernel": "patch_embed.proj.weight",
    "video/time_mlp/in/kernel": "time_embed.t_embedder.linear_1.weight",
    "video/time_mlp/out/kernel": "time_embed.t_embedder.linear_2.weight",
    "video/time_norm/scale": "time_embed.norm.weight",
    "video/head_down/kernel": "norm_out.linear_1.weight",
    "video/head_up/kernel": "norm_out.linear_2.weight",
    "video/head/kernel": "proj_out.weight",
    "ffn/in/kernel": "ff.net.0.proj.weight",
    "ffn/out/kernel": "ff.net.2.weight",
}
for _a, _n in (("self_attn", "attn1"), ("cross_attn", "attn2")):
    NAMES |= {f"{_a}/{p}/kernel": f"{_n}.to_{p}.weight" for p in "qkv"}
    NAMES |= {f"{_a}/o/kernel": f"{_n}.to_out.0.weight"}
    NAMES |= {f"{_a}/{p}_norm/scale": f"{_n}.norm_{p}.weight" for p in "qk"}
for _i, _s in enumerate(("self", "cross", "ffn")):
    for _j, _d in enumerate(("down", "up")):
        NAMES[f"modulation/{_s}_{_d}/kernel"] = f"norm{_i + 1}.linear_{_j + 1}.weight"


def state_dict(params):
    """Converts our parameters to their names; each must be used."""
    torch = pytest.importorskip("torch")
    out = {}
    for path, x in flatten(params).items():
        name, layers = path.removeprefix("blocks/video/"), path.startswith("blocks/")
        parts = x if layers else x[None]
        for i, part in enumerate(parts):
            key = f"transformer_blocks.{i}.{NAMES[name]}" if layers else NAMES[name]
            out[key] = torch.from_numpy(np.array(part.T if part.ndim == 2 else part))
    return out


def reference(params, dtype):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.CosmosTransformer3DModel(
        in_channels=TINY["channels"] + 2, out_channels=TINY["channels"],
        num_attention_heads=TINY["heads"], attention_head_dim=TINY["head_dim"],
        num_layers=TINY["layers"], mlp_ratio=4.0, text_embed_dim=TINY["text"],
        adaln_lora_dim=TINY["rank"], max_size=(8, 16, 16), patch_size=(1, 2, 2),
        rope_scale=(1.0, 3.0, 3.0), extra_pos_embed_type=None,
        concat_padding_mask=False,  # we do it, since their resizing of the mask needs torchvision
    ).to(dtype)  # fmt: skip
    model.load_state_dict(state_dict(params), strict=True)
    for block in model.transformer_blocks:  # 1e-5 there, 1e-6 in NVIDIA's code
        for norm in (
            block.attn1.norm_q,
            block.attn1.norm_k,
            block.attn2.norm_q,
            block.attn2.norm_k,
        ):
            norm.eps = 1e-6
    return torch, model.eval()


def theirs(torch, model, x, dtype):
    def tensor(x):
        return torch.from_numpy(np.array(x)).to(dtype)

    latents = tensor(x["latents"]).permute(0, 4, 1, 2, 3)
    mask = tensor(x["mask"])[:, None, :, None, None].expand(B, 1, T, H, W)
    with torch.no_grad():
        out = model(
            torch.cat([latents, mask, torch.zeros_like(mask)], dim=1),
            tensor(x["levels"])[:, None, :, None, None],
            tensor(x["context"]),
            fps=None,
            return_dict=False,
        )[0]
    return out.permute(0, 2, 3, 4, 1).numpy()


def test_tables_and_timestep_features_equal_the_public_ones():
    """Tested separately, because theirs are always computed in float32."""
    torch, model = reference(random_params(abstract(network(T, (H, W), **TINY), T, 5)[0]), None)
    hidden = torch.zeros(B, 6, T, H, W)
    got = video_rope(range(T), H // 2, W // 2, TINY["head_dim"], (1, 3, 3))
    for mine, other in zip(got, model.rope(hidden, fps=None), strict=True):
        np.testing.assert_allclose(np.tile(mine, 2), other, atol=2e-6)


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
def test_parity_with_diffusers(double):
    dtype = np.float64 if double else np.float32
    net = network(T, (H, W), **TINY)
    with precision(double):
        params = random_params(abstract(net, T, 5)[0], 5, dtype)
        torch = pytest.importorskip("torch")
        kind = torch.float64 if double else torch.float32
        _, model = reference(params, kind)
        x = jax.tree.map(lambda a: a.astype(dtype), inputs())
        if double:
            _in_double(torch, model)
        want = theirs(torch, model, x, kind)
        got = np.asarray(ours(params, x))
    scale = np.sqrt(np.mean(want**2))
    assert scale > 0.1
    # In float64, the remaining error is from their q and k, normalised and rotated in float32.
    np.testing.assert_allclose(got / scale, want / scale, rtol=0, atol=5e-7 if double else 3e-5)


def _in_double(torch, model):
    """Replaces their tables and timestep features by float64 ones; their equality is tested
    above."""
    cos, sin = video_rope(range(T), H // 2, W // 2, TINY["head_dim"], (1, 3, 3))
    tables = tuple(torch.from_numpy(np.tile(x, 2)) for x in (cos, sin))
    model.rope.forward = lambda hidden, fps=None: tables
    half = TINY["width"] // 2

    def features(t):
        angles = t[:, None].double() * 10000.0 ** (-torch.arange(half).double() / half)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    model.time_embed.time_proj.forward = features


def test_patches_go_in_channel_first_and_come_out_channel_last():
    """Section 1.2: the two orders differ, and a loader must respect it."""
    net = network(1, (2, 2), **TINY)
    params = random_params(abstract(net, 1, 5)[0], 0)
    params["video"]["patch_embed"]["kernel"] = np.eye(24, TINY["width"], dtype=np.float32)
    params["video"]["head"]["kernel"] = np.zeros((TINY["width"], 16), np.float32)
    x = np.arange(24.0).reshape(1, 1, 2, 2, 6)  # (h, w, c)

    def run(module):
        tokens = module.video.embed(x)
        time = module.video.time(jnp.zeros((1, 1)))
        shape = jax.eval_shape(lambda: module.video.unembed(tokens, time, (1, 1, 1)))
        return tokens, shape

    @jax.jit
    def evaluate(params):
        return net.apply(
            {"params": params},
            {"all": x}, {"all": jnp.zeros((1, 1))}, {"context": jnp.zeros((1, 5, 10))}, TABLE,
            method="evaluate",
        )["all"]  # fmt: skip

    tokens, shape = net.apply({"params": params}, method=run)
    np.testing.assert_array_equal(tokens[0, 0, :24], x[0, 0].transpose(2, 0, 1).reshape(-1))
    assert shape.shape == (1, 1, 2, 2, 4)
    # Head features are (p, q, c): a kernel that passes feature i on gives pixel i // c.
    for i in (0, 5, 14):
        kernel = np.zeros((TINY["width"], 16), np.float32)
        kernel[:, i] = 1.0
        changed = params | {"video": params["video"] | {"head": {"kernel": kernel}}}
        out = evaluate(changed)
        assert set(np.flatnonzero(np.asarray(out).reshape(-1))) == {i}


def test_rotary_positions_alone_cannot_tell_the_tokens_of_an_even_frame_apart():
    """This is why the miniature, trained from scratch, adds absolute positions: equal tokens have
    equal values, so attention returns the same for all, whatever its weights. (With several frames
    the edges leak a little.)"""
    net = network(1, (H, W), **TINY)
    params = random_params(abstract(net, 1, 5)[0], 0)
    x = inputs()
    latents = np.ones((1, 1, H, W, TINY["channels"] + 2), np.float32)

    def spread(positions):
        run = jax.jit(lambda p: net.clone(positions=positions).apply(
            {"params": p}, {"all": latents}, {"all": np.full((1, 1), 0.5, np.float32)},
            {"context": x["context"][:1].astype(np.float32)}, TABLE, method="evaluate",
        )["all"])  # fmt: skip
        out = run(params)
        patches = np.asarray(out).reshape(1, 1, H // 2, 2, W // 2, 2, -1)
        return np.std(patches, axis=(2, 4)).max() / np.std(out)

    assert spread("rope") < 1e-5
    assert spread("both") > 1e-2
