"""Tests the video experiments: every argument builds, Wan has the published sizes, and its
transformer equals diffusers'."""

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.helpers import precision
from test_configs import get, spec_of

from wamjax import config as configs
from wamjax import train, tree, wam
from wamjax.data.arrays import ArraySpec
from wamjax.models import blocks, dit
from wamjax.models.autoregressive import AutoregressiveTransformer
from wamjax.models.blocks import ExpertSpec
from wamjax.models.palette import Palette
from wamjax.training import metrics, sharding
from wamjax.training.sharding import Shape
from wamjax.wam.slots import groups_of
from wamjax.wam.video import builder as builders
from wamjax.wam.video.schemes import SCHEMES, slots_of, use_of

WAN = {"1.3b": 1_418_996_800, "5b": 4_999_787_712}


def clips(frames=8, size=32):
    """Returns the spec of the tabletop's clips, without making them."""
    shapes = {"video": (frames, size, size, 3), "label": ()}
    return ArraySpec(shapes, {"video": "uint8", "label": "int32"}, {"label": 8}, 1)


def check(config, objective):
    """Every parameter has a sharding rule, and the config survives saving."""
    configs.validate(config)
    mesh = Shape({"data": 1, "fsdp": config.mesh.fsdp, "tensor": 1})
    sharding.check_config(config, mesh)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    sharding.params_shardings(params, sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1}))
    assert configs.load(configs.to_json(config)).to_dict() == config.to_dict()
    return params


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_network_serves_every_scheme(scheme):
    config = get("video_tabletop", f"scheme={scheme},steps=11")
    objective = wam.build(config, clips())
    params = check(config, objective)
    assert tree.count(params) == 2_828_224 and config.total_steps == 11
    assert objective.scheme == SCHEMES[scheme]
    assert {k: s.shape for k, s in objective.batch_spec(3).items()} == {
        "video": (3, 8, 32, 32, 3), "label": (3,)
    }  # fmt: skip
    small = get("video_tabletop", f"scheme={scheme},debug")
    assert tree.count(check(small, wam.build(small, clips(4, 16)))) < 1e5


def test_tokens_use_the_palette_of_the_config(tmp_path):
    config = get("video_tokens", "debug")
    config.data.root = str(tmp_path)
    objective = wam.build(config, spec_of(config))
    check(config, objective)
    assert isinstance(objective.codec, Palette) and objective.network.codes <= 32
    assert objective.network.grid == (4, 4, 4) and objective.top_p == 0.9
    assert wam.build(config, spec_of(config)) == objective  # from the file
    assert len(list(tmp_path.glob("palette-*.npy"))) == 1
    full = get("video_tokens")
    with mock.patch.object(builders, "tokenizer", lambda _: Palette(4, codes=bytes(500 * 48))):
        objective = wam.build(full, clips())
    assert isinstance(objective.network, AutoregressiveTransformer)
    assert objective.network.length == 512
    check(full, objective)
    full.model.codec.kind = "pixel"
    with pytest.raises(ValueError, match="tokens need config.model.codec.kind='palette', 'fsq' or"):
        wam.build(full, clips())


@pytest.mark.parametrize("size", WAN)
def test_wan_has_exactly_the_published_parameters(size):
    config = get("wan_t2v", f"size={size}")
    objective = wam.build(config, spec_of(config))
    assert tree.count(check(config, objective)) == WAN[size]
    assert objective.network.text_net == "mlp" and objective.process.shift == 5.0
    for scheme in ("image_to_video", "forcing_causal"):
        config = get("wan_t2v", f"size={size},scheme={scheme}")
        objective = wam.build(config, spec_of(config))
        latents = {"1.3b": 21, "5b": 31}[size]
        assert len(objective.slots) == (2 if scheme == "image_to_video" else latents)
    with pytest.raises(ValueError, match="needs model.text.route='cross', not 'both'"):
        config.model.text.route = "both"
        wam.build(config, spec_of(config))
    with pytest.raises(ValueError, match=r"size '2b' is not one of \['1.3b', '5b'\]"):
        get("wan_t2v", "size=2b")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["video_tabletop", "video_tokens", "wan_t2v"])
def test_debug_trains_and_samples(name, tmp_path):
    config = get(name, "debug")
    config.data.root = str(tmp_path / "data")
    assert train.run(config, tmp_path / "run", devices=jax.devices()[:1])
    losses = [row["loss"] for row in metrics.read(tmp_path / "run")]
    assert len(losses) == 6 and np.all(np.isfinite(losses))
    assert (tmp_path / "run" / "media" / "samples.png").exists()


# ---- Wan against diffusers ----

FRAMES, GRID, CHANNELS, WORDS, TEXT = 3, (4, 6), 4, 5, 10
HEADS, HEAD_DIM, FFN, LAYERS = 2, 24, 40, 2


def network(freq_dim):
    return dit.DiT(
        video_spec=ExpertSpec("video", HEADS * HEAD_DIM, FFN, **blocks.WAN),
        groups=groups_of(slots_of(dataclasses.replace(SCHEMES["diffusion"], chunk=1), FRAMES)),
        latent=(*GRID, CHANNELS),
        layers=LAYERS,
        heads=HEADS,
        head_dim=HEAD_DIM,
        text="cross",
        text_net="mlp",
        context_width=TEXT,
        positions="rope",
        freq_dim=freq_dim,
    )


def float64(torch, double):
    """Removes diffusers' internal casts to float32, for a float64 reference."""
    if not double:
        return contextlib.nullcontext()
    return mock.patch.object(torch.Tensor, "float", torch.Tensor.double)


def reference(torch, freq_dim):
    """Returns diffusers' transformer with random parameters."""
    import diffusers

    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT,
        freq_dim=freq_dim,
        ffn_dim=FFN,
        num_layers=LAYERS,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        rope_max_seq_len=32,
    ).double()
    for name, parameter in model.named_parameters():
        drawn = torch.randn_like(parameter)
        if parameter.ndim > 1 and not name.endswith("scale_shift_table"):
            drawn /= parameter[0].numel() ** 0.5
        ones = "norm" in name and name.endswith("weight")
        parameter.data = 1 + 0.3 * drawn if ones else drawn if parameter.ndim > 1 else 0.3 * drawn
    return model.eval()


def translated(state):
    """Returns its parameters under our names (references: section 2.1)."""
    state = dict(state)

    def linear(name):
        return {"kernel": state.pop(f"{name}.weight").T, "bias": state.pop(f"{name}.bias")}

    def attention(name):
        parts = {n: linear(f"{name}.to_{n}") for n in "qkv"} | {"o": linear(f"{name}.to_out.0")}
        return parts | {f"{n}_norm": {"scale": state.pop(f"{name}.norm_{n}.weight")} for n in "qk"}

    layers = []
    for i in range(LAYERS):
        block = f"blocks.{i}"
        norm = {n: state.pop(f"{block}.norm2.{t}") for n, t in
                (("scale", "weight"), ("bias", "bias"))}  # fmt: skip
        layers.append({
            "self_attn": attention(f"{block}.attn1"),
            "cross_attn": attention(f"{block}.attn2"),
            "cross_norm": norm,
            "ffn": {"in": linear(f"{block}.ffn.net.0.proj"), "out": linear(f"{block}.ffn.net.2")},
            "modulation": state.pop(f"{block}.scale_shift_table")[0],
        })  # fmt: skip
    patch = state.pop("patch_embedding.weight")
    video = {
        "patch_embed": {"kernel": patch.reshape(len(patch), -1).T,
                        "bias": state.pop("patch_embedding.bias")},
        "time_proj": linear("condition_embedder.time_proj"),
        "head": linear("proj_out"),
        "head_table": state.pop("scale_shift_table")[0],
    }  # fmt: skip
    for ours, theirs in (("time_mlp", "time_embedder"), ("text_mlp", "text_embedder")):
        name = f"condition_embedder.{theirs}.linear_"
        video[ours] = {"in": linear(f"{name}1"), "out": linear(f"{name}2")}
    assert not state, f"not translated: {sorted(state)}"
    return {"video": video, "blocks": {"video": jax.tree.map(lambda *x: np.stack(x), *layers)}}


CASES = {
    # In float32 the two sinusoids of a large timestep differ by 3e-5 (diffusers multiplies in
    # float32 by float32 frequencies); with two features the one frequency is 1, exactly.
    "float64, one time": (True, 2, [[731.0], [12.0]]),
    "float64, a time for each frame": (True, 2, [[0.0, 500.0, 999.0], [3.0, 250.0, 0.0]]),
    "float32, small times": (False, 16, [[3.0], [1.0]]),
    "float32, a time for each frame": (False, 16, [[0.0, 500.0, 999.0], [3.0, 250.0, 0.0]]),
}


@pytest.mark.parametrize("case", CASES)
def test_wan_computes_what_diffusers_computes(case):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    double, freq_dim, times = CASES[case]
    rng = np.random.default_rng(1)
    dtype = np.float64 if double else np.float32
    latents = rng.standard_normal((2, FRAMES, *GRID, CHANNELS)).astype(dtype)
    text = rng.standard_normal((2, WORDS, TEXT)).astype(dtype)
    text[:, -2:] = 0  # padding
    with float64(torch, double), torch.no_grad():
        model = reference(torch, freq_dim)
        params = translated({k: v.numpy().astype(dtype) for k, v in model.state_dict().items()})
        model = model if double else model.float()
        tokens = GRID[0] * GRID[1] // 4
        told = torch.tensor(times, dtype=torch.float64 if double else torch.float32)
        told = told[:, 0] if len(times[0]) == 1 else told.repeat_interleave(tokens, dim=1)
        video = torch.tensor(latents).movedim(-1, 1)
        want = model(video, told, torch.tensor(text), return_dict=False)[0].movedim(1, -1).numpy()
    with precision(double):
        net = network(freq_dim)
        levels = np.broadcast_to(np.asarray(times, dtype) / 1000, (2, FRAMES))
        groups = {f"g{i}": jnp.asarray(latents[:, i : i + 1]) for i in range(FRAMES)}
        level = {f"g{i}": jnp.asarray(levels[:, i : i + 1]) for i in range(FRAMES)}
        table = use_of(SCHEMES["diffusion"], net).table
        run = functools.partial(net.apply, method="evaluate")
        out = jax.jit(run, static_argnums=4)(
            {"params": params}, groups, level, {"context": jnp.asarray(text)}, table
        )
        got = np.concatenate([out[f"g{i}"] for i in range(FRAMES)], axis=1)
    assert got.shape == want.shape and got.dtype == want.dtype == dtype
    relative = np.linalg.norm(got - want) / np.linalg.norm(want)
    largest = np.abs(got - want).max() / np.sqrt(np.mean(np.square(want)))
    small = max(max(row) for row in times) <= 3
    tight, loose = (1e-12, 1e-11) if double else (5e-6, 2e-5) if small else (2e-5, 1e-4)
    assert relative < tight and largest < loose, (relative, largest)
