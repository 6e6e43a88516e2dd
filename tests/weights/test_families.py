"""Tests published files at tiny sizes against diffusers and transformers, and round trips."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax import tree, weights
from wamjax.weights import api, files, tensor
from wamjax.weights.families import named

pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
from models import test_t5, vae_diffusers  # noqa: E402
from models.dit_oracle import positions  # noqa: E402
from weights import oracles  # noqa: E402

BATCH = 2
RNG = np.random.default_rng(5)
WAN = named(layers=2, width=48, heads=2, ffn=40, channels=4, context_width=12, freq_dim=16)
CONFIGS = {
    "dit": named(layers=2, width=48, heads=2, ffn=192, classes=7),
    "wan21_t2v": WAN,
    "wan22_ti2v": WAN,
    "cosmos_predict2": named(
        layers=2, width=48, heads=2, ffn=96, channels=4, context_width=12, lora_rank=6
    ),
    "sd3": named(
        layers=3, width=48, heads=2, ffn=192, channels=4, context_width=12, pooled_width=6,
        position_table=[12, 4],
    ),
}  # fmt: skip
CONFIGS["cosmos_policy"] = CONFIGS["cosmos_predict2"]
TEXTS = {"t5": "t5", "t5_v1_1": "t5 v1.1", "umt5": "umt5"}
VAES = {"sd_vae": "image", "wan21_vae": "causal", "wan22_vae": "residual"}
CONFIGS |= {f: {k: v for k, v in test_t5.TINY[n].items()} for f, n in TEXTS.items()}
CONFIGS |= {
    f: {k: getattr(vae_diffusers.TINY[s], k) for k in weights.FAMILIES[f].sizes}
    for f, s in VAES.items()
}


@functools.cache
def model(family):
    if family in VAES:
        return vae_diffusers.oracle(VAES[family], False)
    if family in TEXTS:
        return oracles.randomise(test_t5.oracle(test_t5.TINY[TEXTS[family]]))
    names = {"wan21_t2v": "wan", "wan22_ti2v": "wan", "cosmos_predict2": "cosmos",
             "cosmos_policy": "cosmos"}  # fmt: skip
    return getattr(oracles, names.get(family, family))()


@functools.cache
def state(family, layout):
    """Returns a state dict in a published layout, with other contents of such a file."""
    own = {k: v.contiguous() for k, v in model(family).state_dict().items()}
    sizes = vae_diffusers.TINY.get(VAES.get(family))
    if family.startswith("cosmos") and layout == "official":
        own = oracles.cosmos_official(own)
        return own | {
            "net.pos_embedder.seq": torch.arange(8), "net.accum_video_sample_counter": own_zero(),
            "net.blocks.0.self_attn.q_norm._extra_state": torch.zeros(3, dtype=torch.uint8),
        }  # fmt: skip
    if family == "dit" and layout == "official":
        return oracles.dit_official(own) | {"pos_embed": positions(4, 48)[None].float()}
    if layout == "official" and family.startswith("wan2"):
        if family.endswith("vae"):
            return getattr(oracles, f"{family}_official")(own, sizes.blocks)
        return oracles.wan_official(own)
    if family == "sd_vae" and layout == "official":
        return oracles.sd_vae_official(own, len(sizes.multipliers))
    if layout == "diffusers_old":
        return oracles.sd_vae_old(own)
    return oracles.umt5_wan(own) if layout == "wan" else own


def own_zero():
    return torch.zeros(())


def save(family, layout, path):
    """Writes files as published: safetensors in the hub's layouts, torch files of the originals."""
    tensors = state(family, layout)
    if layout in ("diffusers", "transformers"):
        plain = {k: tensor.of(v.numpy()) for k, v in tensors.items()}
        size = sum(x.nbytes for x in plain.values())
        files.write(path, plain, limit=size // 2)  # shards
        return path
    torch.save(files.nested(tensors), path.with_suffix(".pth"))
    return path.with_suffix(".pth")


CASES = [(f, layout) for f in CONFIGS for layout in weights.FAMILIES[f].layouts]


def draw(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@functools.cache
def reference(family):
    """Returns our inputs and the original's output."""
    net = model(family)
    first = vae_diffusers.channels_first
    grid = (1, 8, 8) if family in ("dit", "sd3") else (3, 6, 8)
    latents = draw(BATCH, *grid, 4)
    x, text = first(latents), draw(BATCH, 5, 12)
    if family == "dit":
        t, label = np.array([3, 999]), np.array([2, 7])  # 7: no class
        y = net(x[:, :, 0], torch.as_tensor(t), torch.as_tensor(label)).sample[:, :, None]
        return (latents, t[:, None].astype(np.float32), {"label": label}), last(y)
    if family == "sd3":
        t, pooled = np.array([3.0, 250.0], np.float32), draw(BATCH, 6)
        y = net(x[:, :, 0], torch.as_tensor(text), torch.as_tensor(pooled), torch.as_tensor(t))
        condition = {"context": text, "pooled": pooled}
        return (latents, t[:, None] / 1000, condition), last(y.sample[:, :, None])
    if family.startswith("cosmos"):
        t, given = (
            np.array([[0.0, 0.9, 0.9], [0.4] * 3], np.float32),
            np.array([[1, 0, 0], [0] * 3]),
        )
        mask = torch.as_tensor(given, dtype=torch.float32)[:, None, :, None, None]
        y = net(
            x, torch.as_tensor(t)[:, None, :, None, None], torch.as_tensor(text),
            condition_mask=mask.expand(-1, 1, 3, 6, 8), padding_mask=torch.zeros(1, 1, 6, 8),
        ).sample  # fmt: skip
        return (latents, t, {"context": text, "given": given}), last(y)
    if family == "wan21_t2v":
        t = np.array([[3.0], [250.0]], np.float32)
        told = torch.as_tensor(t[:, 0])
    else:  # a time for every token
        t = np.array([[0.0, 3.0, 3.0], [0.0, 250.0, 250.0]], np.float32)
        told = torch.as_tensor(np.repeat(t, 3 * 4, axis=1))
    y = net(x, told, torch.as_tensor(text)).sample
    return (latents, t / 1000, {"context": text}), last(y)


def last(x):
    return np.moveaxis(x.numpy(), 1, -1)


def load(tmp_path, family, layout):
    path = save(family, layout, tmp_path / "model")
    (tmp_path / "sizes.json").write_text(json.dumps(CONFIGS[family]))
    return weights.load(family, path, tmp_path / "sizes.json")


@functools.cache
def compiled(family):
    return jax.jit(weights.functions(family, CONFIGS[family])["denoise"])


@pytest.mark.parametrize("family, layout", [c for c in CASES if c[0] not in TEXTS | VAES])
def test_a_published_file_computes_what_the_original_does(tmp_path, family, layout):
    params = load(tmp_path, family, layout)
    inputs, want = reference(family)
    got = np.asarray(compiled(family)(params, *inputs))
    assert got.shape == want.shape and np.std(want) > 0.1
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < (2e-5 if family == "dit" else 5e-6), error
    assert np.abs(got - want).max() < 1e-4 * np.sqrt(np.mean(want**2))


@pytest.mark.parametrize("family, layout", [c for c in CASES if c[0] in TEXTS | VAES])
def test_a_published_file_gives_the_parameters_whose_outputs_are_compared_elsewhere(
    tmp_path, family, layout
):
    """models/test_t5.py and models/test_vae_parity.py compare them, with independent key maps."""
    params = load(tmp_path, family, layout)
    if family in VAES:
        want = vae_diffusers.params(VAES[family], model(family).state_dict())
        got = params
    else:
        want, got = model(family).state_dict(), test_t5.published(jax.tree.map(np.asarray, params))
        want = {k: v.numpy() for k, v in want.items() if k != "encoder.embed_tokens.weight"}
    want, got = tree.flatten(want), tree.flatten(got)
    assert want.keys() == got.keys()
    assert all(np.array_equal(want[k], got[k]) for k in want)


@pytest.mark.parametrize("family", TEXTS | VAES)
def test_functions_take_parameters_and_inputs(family):
    params = weights.families.family(family).params(weights.families.sizes(family, CONFIGS[family]))
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    run = weights.functions(family, CONFIGS[family])
    if family in TEXTS:
        ids = jax.ShapeDtypeStruct((2, 6), jnp.int32)
        y = jax.eval_shape(run["encode"], params, ids, jax.ShapeDtypeStruct((2, 6), bool))
        assert y.shape == (2, 6, test_t5.SIZES["width"])
        return
    sizes = vae_diffusers.TINY[VAES[family]]
    frames, side = 1 + sizes.time_stride, sizes.space_stride
    h = jax.eval_shape(run["encode"], params, shape((2, frames, side, side, 3)))
    t = 2 if sizes.time_stride > 1 else frames
    assert h.shape == (2, t, 1, 1, 2 * sizes.channels)
    x = jax.eval_shape(run["decode"], params, shape((2, t, 1, 1, sizes.channels)))
    assert x.shape == (2, frames, side, side, 3)


@pytest.mark.parametrize("family, layout", CASES)
def test_round_trips_are_bit_identical(tmp_path, family, layout):
    """Converts file, parameters, file, parameters; both files have the same keys and bits."""
    path, config = save(family, layout, tmp_path / "model"), CONFIGS[family]
    dtype = {"dit": jnp.bfloat16}.get(family)
    params = weights.load(family, path, config, dtype=dtype)
    again = tmp_path / "again.safetensors" if layout == "diffusers" else tmp_path / "again.pt"
    weights.export(family, params, again, config, layout=layout, dtype="float32")
    got, original = files.read(again).tensors, state(family, layout)
    plan = weights.api.families.plans(family, config, layout)[layout]
    assert got.keys() == plan.published.keys() == {k for k in original if k in plan.published}
    if dtype is None:
        for key, x in got.items():
            assert np.array_equal(x.read(), original[key].numpy()), key
    back = weights.load(family, again, config, dtype=dtype)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for (path, x), y in zip(tree.flatten(back).items(), jax.tree.leaves(params), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y), path


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_the_container_does_not_matter(tmp_path, layout):
    """It may be one safetensors file, shards with an index, or a torch file, by name or folder."""
    own = {k: tensor.of(v.numpy()) for k, v in state("wan22_ti2v", layout).items()}
    size = sum(x.nbytes for x in own.values())
    paths = [tmp_path / name for name in ("one.safetensors", "shards", "folder", "x.pth")]
    files.write(paths[0], own)
    files.write(paths[1], own, limit=size // 3)
    files.write(paths[2], own)
    files.write(paths[3], own)
    assert len(list(paths[1].glob("*.safetensors"))) > 2
    paths.append(next(paths[1].glob("*.index.json")))
    loaded = [weights.load("wan22_ti2v", path, CONFIGS["wan22_ti2v"]) for path in paths]
    for other in loaded[1:]:
        assert jax.tree.all(jax.tree.map(np.array_equal, loaded[0], other))


def test_a_file_of_another_family_or_size_is_refused(tmp_path):
    path = save("wan21_t2v", "official", tmp_path / "model")
    with pytest.raises(weights.Mismatch, match="does not hold dit: its keys .* layouts official"):
        weights.load("dit", path, CONFIGS["dit"])
    with pytest.raises(weights.Mismatch, match="the number of heads: give --config"):
        weights.load("wan21_t2v", path)
    for config, text in (
        ({"model.layer": 2}, "size of wan21_t2v 'model.layer', did you mean 'model.layers'"),
        ({"layers": 2, "ffn": 9}, "'layers' to 'model.layers', 'ffn' to 'model.video.ffn'"),
        (WAN | {"model.video.width": 96}, r"is \(48,\), expected \(96,\)"),
        (WAN | {"model.layers": 4}, r"blocks.\{2-3\}.cross_attn.k.bias \(48,\)"),
    ):
        with pytest.raises(ValueError, match=text):
            weights.load("wan21_t2v", path, config)
    with pytest.raises(ValueError, match="no family 'wan22', did you mean"):
        weights.load("wan22", path)
    with pytest.raises(ValueError, match="no layout of dit 'offical', did you mean 'official'"):
        weights.load("dit", path, layout="offical")


def test_tensors_that_a_family_ignores_are_only_those_listed(tmp_path):
    own = {k: tensor.of(v.numpy()) for k, v in state("cosmos_predict2", "official").items()}
    own["net.accumulated"] = tensor.of(np.zeros(1))
    files.write(tmp_path / "x.pt", own)
    with pytest.raises(weights.Mismatch, match=r"unknown \(1\): net.accumulated \(1,\)$"):
        weights.load("cosmos_predict2", tmp_path / "x.pt", CONFIGS["cosmos_predict2"])


# Errors in unused tensors: family, layout, what the file has instead.
ALTERED = {
    "a position": ("dit", "official", {"pos_embed": lambda x: x + 1e-3 * (x == x.max())},
                   "pos_embed differs by up to 0.001 from the table that the network computes"),
    "another scale": ("dit", "official", {"pos_embed": lambda x: positions(4, 48, 0.5)[None]},
                      "pos_embed differs by up to"),
    "nan": ("dit", "official", {"pos_embed": lambda x: x * np.nan}, "differs by up to nan"),
    "no square": ("dit", "official", {"pos_embed": lambda x: x[:, :15]},
                  r"shape \(1, 15, 48\): it must be \(1, side\^2, 48\)"),
    "sd3": ("sd3", "diffusers", {"pos_embed.pos_embed": lambda x: x.flip(1)}, "pos_embed differs"),
    "seq": ("cosmos_policy", "official", {"net.pos_embedder.seq": lambda x: 2 * x},
            "seq differs by up to 1 from"),
    "exponents": ("cosmos_policy", "official",
                  {"net.pos_embedder.dim_spatial_range": lambda _: torch.arange(4) / 9},
                  "dim_spatial_range differs"),
    "counter": ("cosmos_policy", "official",
                {"net.accum_image_sample_counter": lambda _: torch.zeros(3)}, "expected one"),
    "state": ("cosmos_policy", "official",
              {"net.blocks.0.self_attn.q_norm._extra_state": lambda x: x.float()},
              "_extra_state is float32"),
    "average": ("cosmos_policy", "official", {"net_ema.more": lambda _: torch.zeros(3)},
                r"net_ema.more has shape \(3,\), expected that of a weight below 'net.'"),
    "old average": ("sd_vae", "official", {"state_dict/model_ema.more": lambda _: torch.zeros(3)},
                    "model_ema.more has .* of a weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", ALTERED)
def test_unused_tensors_must_have_their_expected_values(case):
    family, layout, changes, said = ALTERED[case]
    own = state(family, layout)
    own = own | {k: change(own.get(k)) for k, change in changes.items()}
    with pytest.raises(weights.Mismatch, match=said):
        api.fit(family, {k: tensor.of(v.numpy()) for k, v in own.items()}, CONFIGS[family])


def test_unused_tensors_may_be_present():
    """In half precision a table is as accurate as its dtype; averages mirror their parameters."""
    own = state("dit", "official")
    own = own | {"pos_embed": own["pos_embed"].half()}
    checked("dit", own)
    own = state("cosmos_policy", "official")
    more = {f"net_ema.{k.removeprefix('net.')}": v for k, v in own.items() if "accum" not in k}
    more["net.pos_embedder.dim_spatial_range"] = torch.arange(0, 8, 2) / 8
    more["net.pos_embedder.dim_temporal_range"] = torch.arange(0, 8, 2) / 8
    checked("cosmos_policy", own | more)
    own = state("sd_vae", "official")
    key = "state_dict/encoder.conv_in.weight"
    more = {"state_dict/model_ema.encoderconv_inweight": own[key],
            "state_dict/model_ema.decay": own_zero()}  # fmt: skip
    checked("sd_vae", own | more)


def checked(family, tensors):
    layout, _ = api.fit(family, {k: tensor.of(v.numpy()) for k, v in tensors.items()},
                        CONFIGS[family])  # fmt: skip
    assert layout == "official"


def test_a_whole_t5_loads_as_its_encoder(tmp_path):
    """The hub's files also hold the decoder, and sometimes the tied copy of the embedding."""
    own = state("t5", "transformers")
    more = {
        "decoder.block.0.layer.0.layer_norm.weight": torch.ones(3),
        "lm_head.weight": own_zero(),
    }
    torch.save(own | more, tmp_path / "pytorch_model.bin")
    params = weights.load("t5", tmp_path, CONFIGS["t5"])
    np.testing.assert_array_equal(params["embedding"], own["shared.weight"])


def test_loading_into_a_mesh_builds_every_share_where_it_lives(tmp_path):
    from wamjax.training import sharding

    path = save("wan22_ti2v", "diffusers", tmp_path / "model")
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    want = weights.load("wan22_ti2v", path, CONFIGS["wan22_ti2v"])
    places = sharding.params_shardings(want, mesh)
    got = weights.load("wan22_ti2v", path, CONFIGS["wan22_ti2v"], shardings=places)
    for (path, x), y in zip(tree.flatten(got).items(), jax.tree.leaves(want), strict=True):
        assert x.sharding == tree.flatten(places)[path] and np.array_equal(x, y), path
    assert got["blocks"]["video"]["ffn"]["in"]["kernel"].addressable_shards[0].data.shape == (
        2, 12, 20
    )  # fmt: skip
