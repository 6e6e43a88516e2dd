"""Tests published files in float64, for the structure, and the gradients of the networks.

It covers Wan, Cosmos, Fast-WAM and the autoencoders; DiT and SD3 are in models/test_dit_parity.py,
T5 in models/test_t5.py.
"""

import contextlib
import functools

import jax
import numpy as np
import pytest
from models.helpers import precision

from wamjax import tree, weights
from wamjax.models.visibility import table
from wamjax.weights import families, files, tensor

pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
from diffusers.models import embeddings  # noqa: E402
from models import vae_diffusers  # noqa: E402
from wam import torch_oracle  # noqa: E402
from weights import oracles, test_convert, test_families  # noqa: E402

RNG = np.random.default_rng(9)
LATENTS, TEXT = RNG.standard_normal((2, 3, 6, 8, 4)), RNG.standard_normal((2, 5, 12))
LEVELS = np.array([[0.0, 0.003, 0.003], [0.0, 0.25, 0.25]])
GIVEN = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


@contextlib.contextmanager
def exact(monkeypatch, double):
    """Removes diffusers' casts to float32, for a float64 reference."""
    if not double:
        yield torch.float32
        return
    to, arange, wide = torch.Tensor.to, torch.arange, {torch.float32: torch.float64}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "arange", lambda *a, dtype=None, **k: arange(
            *a, dtype=wide.get(dtype, dtype), **k
        ))  # fmt: skip
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch.Tensor, "to", lambda x, *a, **k: to(
            x, *[wide.get(y, y) if isinstance(y, torch.dtype) else y for y in a], **k
        ))  # fmt: skip
        patch.setattr(embeddings, "get_timestep_embedding", sinusoid)
        yield torch.float64


def sinusoid(timesteps, dim, flip_sin_to_cos, downscale_freq_shift, scale=1, **_):
    assert flip_sin_to_cos and downscale_freq_shift == 0 and scale == 1
    return torch_oracle.sinusoid(timesteps.double(), dim)


def wan21(model, x, text):
    return model(x, torch.as_tensor(1000 * LEVELS[:, 1], dtype=x.dtype), text).sample


def wan22(model, x, text):
    """A time for every token."""
    told = np.repeat(1000 * LEVELS, 3 * 4, axis=1)
    return model(x, torch.as_tensor(told, dtype=x.dtype), text).sample


def cosmos(model, x, text):
    told, given = (torch.as_tensor(a, dtype=x.dtype)[:, None, :, None, None]
                   for a in (LEVELS, GIVEN))  # fmt: skip
    padding = torch.zeros(1, 1, 6, 8, dtype=x.dtype)
    mask = given.expand(-1, 1, 3, 6, 8)
    return model(x, told, text, condition_mask=mask, padding_mask=padding).sample


FAMILIES = {  # the model, its call, our levels, our other inputs
    "wan21_t2v": (oracles.wan, wan21, LEVELS[:, 1:2], {}),
    "wan22_ti2v": (oracles.wan, wan22, LEVELS, {}),
    "cosmos_predict2": (oracles.cosmos, cosmos, LEVELS, {"given": GIVEN}),
}
CONFIGS = test_families.CONFIGS


def stored(path, tensors):
    files.write(path, {k: tensor.of(v.detach().numpy()) for k, v in tensors.items()})
    return path


def relative(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def assert_gradients(got, want, tolerance):
    """Compares gradients of all that the output depends on, which is nearly everything."""
    got, want, idle = tree.flatten(got), tree.flatten(want), []
    assert got.keys() == want.keys()
    for path, x in want.items():
        if np.linalg.norm(x) < 1e-3:  # only rounding errors
            idle.append(path)
            assert np.linalg.norm(got[path]) < 1e-3, path
        else:
            assert relative(got[path], x) < tolerance, path
    return idle


# In float32 the outputs of all of them are compared in test_families.py.
CASES = [("wan21_t2v", True), ("wan22_ti2v", True), ("wan22_ti2v", False),
         ("cosmos_predict2", True), ("cosmos_predict2", False)]  # fmt: skip


@pytest.mark.parametrize("family, double", CASES)
def test_outputs_and_gradients_equal_diffusers(tmp_path, monkeypatch, family, double):
    make, call, levels, more = FAMILIES[family]
    first = vae_diffusers.channels_first
    with exact(monkeypatch, double) as kind:
        model = make().to(kind).requires_grad_(True)
        latents = first(LATENTS).to(kind).requires_grad_()
        text = torch.as_tensor(TEXT, dtype=kind).requires_grad_()
        y = call(model, latents, text)
        weight = np.random.default_rng(1).standard_normal(y.shape)
        (y * torch.as_tensor(weight, dtype=kind)).sum().backward()
    assert y.dtype == kind and y.std() > 0.1
    grads = {k: p.grad for k, p in model.named_parameters()}
    weight = np.moveaxis(weight, 1, -1)
    with precision(double):
        cast = lambda x: np.asarray(x, np.float64 if double else np.float32)  # noqa: E731
        config, layout = CONFIGS[family], "diffusers"
        path = stored(tmp_path / "model.safetensors", dict(model.named_parameters()))
        params = weights.load(family, path, config, layout=layout)
        want = weights.load(family, stored(tmp_path / "grads.safetensors", grads), config,
                            layout=layout)  # fmt: skip
        run = weights.functions(family, config)["denoise"]
        more = {k: cast(v) for k, v in more.items()}

        @jax.jit
        def ours(params, latents, text):
            def value(params, latents, text):
                return run(params, latents, cast(levels), {"context": text, **more})

            out, pull = jax.vjp(value, params, latents, text)
            return out, *pull(cast(weight))

        got, of_params, of_latents, of_text = ours(params, cast(LATENTS), cast(TEXT))
    assert got.dtype == (np.float64 if double else np.float32)
    tolerance = 1e-10 if double else 5e-6
    assert relative(got, np.moveaxis(y.detach().numpy(), 1, -1)) < tolerance
    tolerance = 1e-9 if double else 5 * tolerance
    assert relative(of_latents, np.moveaxis(latents.grad.numpy(), 1, -1)) < tolerance
    assert relative(of_text, text.grad) < tolerance
    assert assert_gradients(of_params, want, tolerance) == []


SEES = {"first": "first", "future": "first future", "action": "first action"}


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
def test_the_released_fast_wam_equals_the_torch_oracle(tmp_path, double):
    """The tests' torch code runs the file as read by torch; compares values and gradients."""
    config = test_convert.FAST_WAM | {"model.freq_dim": 16}
    kind = [torch.float32, torch.float64][double]
    shapes = families.plans("fast_wam", config)["released"].published
    rng = np.random.default_rng(0)
    flat = {
        k: torch.as_tensor(rng.standard_normal(s) * (np.prod(s[1:]) ** -0.5 if len(s) > 1 else 0.3)
                           + (".norm" in k and k.endswith("weight"))).to(kind)
        for k, s in shapes.items()
    }  # fmt: skip
    extra = {"step": 21_700, "torch_dtype": "torch.bfloat16"}
    torch.save(files.nested({**flat, **extra}), tmp_path / "released.pt")
    read = torch.load(tmp_path / "released.pt", weights_only=True)
    leaves = {k: v.double().requires_grad_() for k, v in read["mot"].items()}
    state = {k: v.double().requires_grad_() for k, v in read["proprio_encoder"].items()}
    parts = {
        e: {k.removeprefix(f"mixtures.{e}."): v for k, v in leaves.items() if f"mixtures.{e}." in k}
        for e in ("video", "action")
    }
    oracle = torch_oracle.TorchWam(parts | {"proprio": state}, 2, 2, config["model.head_dim"], 16)
    draw = lambda *s: rng.standard_normal(s)  # noqa: E731
    x = {"first": draw(2, 1, 4, 4, 3), "future": draw(2, 2, 4, 4, 3), "action": draw(2, 3, 5)}
    context, proprio, weigh = draw(2, 4, 10), draw(2, 4), draw(2, 3, 5)
    level = {
        "first": np.zeros((2, 1)), "future": np.full((2, 2), 0.2), "action": np.full((2, 1), 0.7)
    }  # fmt: skip
    tokens = {"first": 4, "future": 8, "action": 3}
    mask = torch.cat([
        torch.cat([torch.full((n, m), k in SEES[q].split()) for k, m in tokens.items()], 1)
        for q, n in tokens.items()
    ])  # fmt: skip
    as_torch = lambda a: torch.as_tensor(np.asarray(a))  # noqa: E731
    clip = as_torch(np.moveaxis(np.concatenate([x["first"], x["future"]], 1), -1, 1))
    told = as_torch(np.concatenate([level["first"], level["future"]], 1))
    clips, action = oracle([clip], [told], as_torch(x["action"]), as_torch(level["action"][:, 0]),
                           as_torch(context), as_torch(proprio), mask)  # fmt: skip
    ((action * as_torch(weigh)).sum() + clips[0][:, :, 1:].square().sum()).backward()
    grads = {f"mot/{k}": v.grad for k, v in leaves.items()}
    grads |= {f"proprio_encoder/{k}": v.grad for k, v in state.items()}
    with precision(double):
        cast = lambda a: np.asarray(a, np.float64 if double else np.float32)  # noqa: E731
        params = weights.load("fast_wam", tmp_path / "released.pt", config)
        want = weights.load("fast_wam", stored(tmp_path / "g.safetensors", grads), config)
        run = weights.functions("fast_wam", config)["velocities"]
        inputs = jax.tree.map(cast, (x, level, context, proprio))

        @jax.jit
        @functools.partial(jax.grad, has_aux=True)
        def gradients(params):
            out = run(params, *inputs, table("fast", SEES))
            return (out["action"] * cast(weigh)).sum() + (out["future"] ** 2).sum(), out

        of_params, got = gradients(params)
    tolerance = 1e-10 if double else 5e-6
    assert relative(got["action"], action.detach()) < tolerance
    future = np.moveaxis(clips[0].detach().numpy(), 1, -1)[:, 1:]
    assert relative(got["future"], future) < tolerance
    idle = assert_gradients(of_params, want, 1e-9 if double else 1e-4)
    assert idle == []


@pytest.mark.parametrize("family", test_families.VAES)
def test_gradients_of_the_autoencoders_equal_diffusers(tmp_path, monkeypatch, family):
    """Compares encoder and decoder, with outputs; test_vae_parity has the outputs in float32."""
    style, layout = test_families.VAES[family], "diffusers"
    sizes = vae_diffusers.TINY[style]
    # A single latent equals the first of several; with pictures, every frame is one.
    frames = 1 + (2 * sizes.time_stride if style != "image" else 0)
    rng = np.random.default_rng(2)
    x = rng.uniform(-1, 1, (1, frames, 8 * sizes.patch, 8, 3))
    z = rng.standard_normal((1, *sizes.latent_shape(*x.shape[1:4])))

    def theirs(a, kind):
        a = torch.as_tensor(np.moveaxis(a, -1, 1).copy(), dtype=kind)
        return a[:, :, 0] if style == "image" else a

    with exact(monkeypatch, True) as kind:
        model = vae_diffusers.oracle(style, True).requires_grad_(True)
        h = model.encode(theirs(x, kind)).latent_dist.parameters
        with vae_diffusers.unclamped():
            y = model.decode(theirs(z, kind)).sample
        # Cubes, so that the gradient is not that of a linear map.
        ((h**3).sum() + (y**3).sum()).backward()
    grads = {k: p.grad for k, p in model.named_parameters()}
    with precision(True):
        config = CONFIGS[family]
        path = stored(tmp_path / "model.safetensors", dict(model.named_parameters()))
        params = weights.load(family, path, config, layout=layout)
        want = weights.load(family, stored(tmp_path / "grads.safetensors", grads), config,
                            layout=layout)  # fmt: skip
        run = weights.functions(family, config)

        @jax.jit
        @functools.partial(jax.grad, has_aux=True)
        def gradients(params):
            a, b = run["encode"](params, x), run["decode"](params, z)
            return (a**3).sum() + (b**3).sum(), (a, b)

        got, outputs = gradients(params)
    assert y.detach().abs().max() > 1  # a clamp would change it
    for ours, original in zip(outputs, (h, y), strict=True):
        original = original[:, :, None] if style == "image" else original
        assert ours.dtype == np.float64
        assert relative(ours, np.moveaxis(original.detach().numpy(), 1, -1)) < 1e-12
    idle = assert_gradients(got, want, 1e-9)
    # A key's bias shifts all logits of a query equally.
    assert idle == ["decoder/mid/attn/k/bias", "encoder/mid/attn/k/bias"]
