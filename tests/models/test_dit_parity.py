"""Tests parity with public DiTs: the original's semantics, diffusers' DiT and diffusers' SD3.

All parameters are random, since gates and final layers start at zero and would hide differences.
"""

import dataclasses
import math

import jax
import numpy as np
import pytest
from models import dit_names
from models.helpers import precision

from wamjax import tree
from wamjax.diffusion.ddpm import DDPM
from wamjax.diffusion.guidance import guide
from wamjax.models import blocks, dit
from wamjax.models.blocks import ExpertSpec
from wamjax.models.codec import CachedLatents
from wamjax.models.shell import GroupSpec
from wamjax.models.visibility import bidirectional
from wamjax.wam.slots import groups_of
from wamjax.wam.video.objective import Denoising
from wamjax.wam.video.schemes import SCHEMES, slots_of

torch = pytest.importorskip("torch")
from models import dit_oracle  # noqa: E402

SIDE, CHANNELS, HEADS, HEAD_DIM, LAYERS, CLASSES, BATCH = 8, 4, 3, 8, 3, 10, 4
WIDTH = HEADS * HEAD_DIM
FRAME = (GroupSpec("g", "video", (0,)),)
TEXT, LENGTH, POOLED, TABLE = 20, 5, 12, 12


def relative(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def draw(model, double):
    """Draws every parameter in place; weights keep the variance of their input."""
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        x = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        value.data = x * (math.prod(value.shape[1:]) ** -0.5 if value.ndim > 1 else 0.3)
    return model.to(torch.float64 if double else torch.float32).eval()


def inputs(double, channels=CHANNELS, batch=BATCH):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((batch, channels, SIDE, SIDE)).astype([np.float32, np.float64][double])
    return x, np.array([0, 3, 417, 999])[:batch], np.array([0, 9, CLASSES, 4])[:batch]


def network(**options):
    settings = dict(
        video_spec=dit.expert(WIDTH, 4 * WIDTH), groups=FRAME, latent=(SIDE, SIDE, CHANNELS),
        layers=LAYERS, heads=HEADS, head_dim=HEAD_DIM, outputs=2 * CHANNELS, classes=CLASSES,
        time_scale=1.0,
    )  # fmt: skip
    return dit.DiT(**settings | options)


def ours(net, params, x, level, condition):
    """Channels first in and out, as the references have them."""
    names = ["g"] + ["text"] * (net.text == "joint")
    values = {"g": x.transpose(0, 2, 3, 1)[:, None]}
    out = net.apply(
        {"params": params}, values, {"g": level[:, None].astype(x.dtype)}, condition,
        bidirectional(*names), method="evaluate",
    )  # fmt: skip
    return out["g"][:, 0].transpose(0, 3, 1, 2)


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
def test_original_dit_forward_gradients_and_guidance(double):
    model = draw(dit_oracle.DiT(SIDE, 2, CHANNELS, WIDTH, LAYERS, HEADS, CLASSES), double)
    net, (x, t, y) = network(), inputs(double)
    image = torch.from_numpy(x).requires_grad_()
    want = model(image, torch.from_numpy(t), torch.from_numpy(y))
    weight = np.random.default_rng(2).standard_normal(want.shape).astype(x.dtype)
    (want * torch.from_numpy(weight)).sum().backward()
    want_grads = dit_names.official({k: v.grad for k, v in model.named_parameters()}, LAYERS)
    params = dit_names.official(dict(model.named_parameters()), LAYERS)
    guided = model.forward_with_cfg(
        torch.from_numpy(x), torch.from_numpy(t[[1, 2, 1, 2]]),
        torch.tensor([3, 7, CLASSES, CLASSES]), 4.0,
    )  # fmt: skip
    tolerance = 1e-10 if double else 2e-5
    with precision(double):

        @jax.jit
        def run(params, x):
            out, pull = jax.vjp(lambda p, x: ours(net, p, x, t, {"label": y}), params, x)
            labels = {"label": np.array([3, 7, CLASSES, CLASSES])}
            pairs = ours(net, params, x[np.array([0, 1, 0, 1])], t[[1, 2, 1, 2]], labels)
            parts = jax.numpy.split(pairs.transpose(0, 2, 3, 1), 2)
            both = guide(*parts, 4.0, channels=3).transpose(0, 3, 1, 2)
            return out, *pull(weight), both, guide(*parts, 4.0, channels=CHANNELS)

        got, got_grads, got_image, both, eps = run(params, x)
    assert jax.tree.structure(params) == jax.tree.structure(got_grads)
    assert relative(got, want.detach()) < tolerance
    assert relative(got_image, image.grad) < tolerance
    for path, grad in tree.flatten(want_grads).items():
        # A key's bias shifts all logits of a query equally, so its gradient is zero.
        if path.endswith("self_attn/k/bias"):
            continue
        assert relative(tree.flatten(got_grads)[path], grad) < tolerance, path
    # The first half of the reference; its second half repeats the guided part.
    assert relative(both, guided[:2].detach()) < tolerance
    # Ours guides all channels of the noise, and leaves the variance.
    first = np.moveaxis(np.asarray(eps), -1, 1)
    np.testing.assert_array_equal(first[:, :3], both[:, :3])
    np.testing.assert_array_equal(first[:, CHANNELS:], both[:, CHANNELS:])
    assert relative(first[:, 3], both[:, 3]) > 0.1


def test_sampling_guides_the_channels_that_the_public_sampler_does():
    """Takes three guided DDIM steps with the public `forward_with_cfg`."""
    model = draw(dit_oracle.DiT(SIDE, 2, CHANNELS, WIDTH, LAYERS, HEADS, CLASSES), True)
    params = dit_names.official(dict(model.named_parameters()), LAYERS)
    process, scheme = DDPM(variance="learned"), SCHEMES["diffusion"]
    objective = Denoising(
        network(groups=groups_of(slots_of(scheme, 1))), CachedLatents(CHANNELS, 1, 1), process,
        scheme, 1, (SIDE, SIDE, 3), steps=3, solver="ddim", guidance=4.0, guidance_channels=3,
    )  # fmt: skip
    labels, rng = np.array([3, 7]), jax.random.key(5)
    with precision(True):
        got = jax.jit(objective.sample)(params, {"label": labels}, rng)
        everywhere = dataclasses.replace(objective, guidance_channels=0)
        other = jax.jit(everywhere.sample)(params, {"label": labels}, rng)
        stream = jax.random.split(jax.random.fold_in(rng, 0))[1]
        noise = jax.random.normal(jax.random.fold_in(stream, 0), got.shape)
    grid = process.schedule(3)
    alphas, sigmas = process.alpha_sigma(grid)
    x = torch.from_numpy(sigmas[0] * np.array(noise)[:, 0].transpose(0, 3, 1, 2))
    classes = torch.tensor([*labels, CLASSES, CLASSES])
    for i in range(3):
        times = torch.full((4,), grid[i], dtype=torch.float64)
        with torch.no_grad():
            out = model.forward_with_cfg(torch.cat([x, x]), times, classes, 4.0)
        eps = out[:2, :CHANNELS]
        x0 = (x - sigmas[i] * eps) / alphas[i]
        x = alphas[i + 1] * x0 + sigmas[i + 1] * eps
    assert relative(np.asarray(got)[:, 0].transpose(0, 3, 1, 2), x) < 1e-10
    assert relative(other, got) > 1e-2
    with pytest.raises(ValueError, match="guidance_channels = 5 must be between 1 and 4"):
        dataclasses.replace(objective, guidance_channels=5)


def test_our_initialisation_has_the_parameters_of_the_original():
    model = dit_oracle.DiT(SIDE, 2, CHANNELS, WIDTH, LAYERS, HEADS, CLASSES)
    shapes = jax.tree.map(np.shape, dit_names.official(dict(model.named_parameters()), LAYERS))
    net, (x, t, y) = network(), inputs(False)
    made = jax.eval_shape(
        lambda: net.init(
            jax.random.key(0), {"g": x.transpose(0, 2, 3, 1)[:, None]},
            {"g": t[:, None].astype(np.float32)}, {"label": y}, bidirectional("g"),
            method="evaluate",
        )
    )["params"]  # fmt: skip
    assert tree.flatten(jax.tree.map(np.shape, made)) == tree.flatten(shapes)


def precise_diffusers(monkeypatch, double):
    """diffusers computes the sinusoid in float32 whatever the model is in."""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    if double:

        def sinusoid(timesteps, dim, flip_sin_to_cos, downscale_freq_shift, scale):
            assert dim == 256 and flip_sin_to_cos and downscale_freq_shift == 0 and scale == 1
            return dit_oracle.sinusoid(timesteps, torch.float64)

        monkeypatch.setattr(embeddings, "get_timestep_embedding", sinusoid)
    return pytest.importorskip("diffusers")


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
def test_diffusers_dit_with_its_two_constants_undone(monkeypatch, double):
    diffusers = precise_diffusers(monkeypatch, double)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=CHANNELS,
        out_channels=2 * CHANNELS, num_layers=LAYERS, sample_size=SIDE, patch_size=2,
        num_embeds_ada_norm=CLASSES, attention_bias=True,
    )  # fmt: skip
    model = draw(model, double)
    shared = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(shared.state_dict())  # one embedder, in every block
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # diffusers: 1
        block.norm3.eps = 1e-6  # diffusers: 1e-5
    table = dit_oracle.positions(SIDE // 2, WIDTH)[None]
    assert relative(model.pos_embed.pos_embed, table) < 1e-6
    model.pos_embed.pos_embed = table.to(model.pos_embed.pos_embed.dtype)
    x, t, y = inputs(double)
    with torch.no_grad():
        want = model(torch.from_numpy(x), torch.from_numpy(t), torch.from_numpy(y)).sample
        shared.time_proj.downscale_freq_shift = 1
        params = dit_names.diffusers_dit(dict(model.named_parameters()), LAYERS)
    with precision(double):
        got = jax.jit(lambda p, x: ours(network(), p, x, t, {"label": y}))(params, x)
    assert relative(got, want) < (1e-10 if double else 2e-5)


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
def test_diffusers_sd3(monkeypatch, double):
    diffusers = precise_diffusers(monkeypatch, double)
    model = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=CHANNELS, num_layers=LAYERS,
        attention_head_dim=HEAD_DIM, num_attention_heads=HEADS, joint_attention_dim=TEXT,
        caption_projection_dim=WIDTH, pooled_projection_dim=POOLED, out_channels=CHANNELS,
        pos_embed_max_size=TABLE,
    )  # fmt: skip
    model = draw(model, double)
    # A table of 12 x 12 that spans 16 / 2 = 8 positions; ours takes its middle 4 x 4.
    table = dit_oracle.positions(TABLE, WIDTH, 8 / TABLE)[None]
    assert relative(model.pos_embed.pos_embed, table) < 1e-6
    model.pos_embed.pos_embed = table.to(model.pos_embed.pos_embed.dtype)
    x, _, _ = inputs(double)
    rng = np.random.default_rng(3)
    text = rng.standard_normal((BATCH, LENGTH, TEXT)).astype(x.dtype)
    pooled = rng.standard_normal((BATCH, POOLED)).astype(x.dtype)
    tau = np.array([0.0, 0.125, 0.5, 1.0])
    image = torch.from_numpy(x).requires_grad_()
    want = model(
        image, torch.from_numpy(text), torch.from_numpy(pooled),
        torch.from_numpy((1000 * tau).astype(x.dtype)),
    ).sample  # fmt: skip
    weight = rng.standard_normal(want.shape).astype(x.dtype)
    (want * torch.from_numpy(weight)).sum().backward()
    named = dict(model.named_parameters())
    silent = [k for k, v in named.items() if v.grad is None]
    assert silent == []
    want_grads = dit_names.diffusers_sd3({k: v.grad for k, v in named.items()}, LAYERS)
    params = dit_names.diffusers_sd3(named, LAYERS)
    net = network(
        video_spec=dit.expert(WIDTH, 4 * WIDTH, text="joint"), outputs=CHANNELS, classes=0,
        text="joint", text_spec=ExpertSpec("text", WIDTH, 4 * WIDTH, **blocks.MMDIT),
        context_width=TEXT, pooled_width=POOLED, position_table=(TABLE, 8), time_scale=1000.0,
    )  # fmt: skip
    tolerance = 1e-10 if double else 2e-5
    with precision(double):
        condition = {"context": text, "pooled": pooled}

        @jax.jit
        def run(params, x):
            out, pull = jax.vjp(lambda p, x: ours(net, p, x, tau, condition), params, x)
            return out, *pull(weight)

        got, got_grads, got_image = run(params, x)
    assert relative(got, want.detach()) < tolerance
    assert relative(got_image, image.grad) < tolerance
    for path, grad in tree.flatten(want_grads).items():
        # The output does not depend on keys' biases and the last query of the text.
        if np.linalg.norm(grad) > 1e-8 and not path.endswith("/k/bias"):
            assert relative(tree.flatten(got_grads)[path], grad) < tolerance, path


def test_position_tables():
    full = dit.sincos(4, 6, 8)
    np.testing.assert_array_equal(full, dit.sincos(4, 6, 8, (0, 0)))
    square = dit_oracle.positions(4, 8).numpy()
    np.testing.assert_allclose(dit.sincos(4, 4, 8), square, atol=1e-15)
    # SD3 medium at 1024 pixels: the middle 64 of 192 positions that span 0 to 64.
    middle = dit_oracle.positions(64, 16, 1 / 3, first=64).numpy()
    np.testing.assert_allclose(dit.sincos(64, 64, 16, (192, 64)), middle, atol=1e-12)
    with pytest.raises(ValueError, match="200x64 tokens do not fit a position table of 192x192"):
        dit.sincos(200, 64, 16, (192, 64))
