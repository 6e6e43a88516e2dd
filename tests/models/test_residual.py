"""Tests the dtype of the residual stream against the published bfloat16 blocks, written in torch.

Wan's own code runs matrices in bfloat16 under autocast, and everything between them, including the
residual stream, in float32. Fast-WAM runs the same block in bfloat16 throughout.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.helpers import random_params
from test_configs import get, spec_of

from wamjax import config as configs
from wamjax import wam
from wamjax.models.blocks import WAN, ExpertSpec, Stream
from wamjax.models.transformer import Transformer
from wamjax.models.visibility import bidirectional
from wamjax.training.step import compute_cast

torch = pytest.importorskip("torch")
from torch.nn import functional as F  # noqa: E402

LAYERS, WIDTH, HEADS, HEAD_DIM, TOKENS, ROWS = 16, 48, 2, 24, 12, 5
SPEC = ExpertSpec("video", WIDTH, 2 * WIDTH, **WAN)


@functools.cache
def inputs():
    rng = np.random.default_rng(3)
    x, text = rng.standard_normal((2, TOKENS, WIDTH)), rng.standard_normal((2, ROWS, WIDTH))
    return x, 0.5 * rng.standard_normal((2, 1, 6, WIDTH)), text


@functools.cache
def params():
    x, e, text = (jnp.asarray(a, jnp.float32) for a in inputs())
    net = Transformer((SPEC,), LAYERS, HEADS, HEAD_DIM)
    stream = Stream(x, e, None, (("g", TOKENS),))
    shapes = jax.eval_shape(
        lambda: net.init(jax.random.key(0), {"video": stream}, {"video": text}, bidirectional("g"))
    )["params"]
    # Matrices are representable in bfloat16, so all use the same ones.
    rounded = compute_cast(random_params(shapes, 4), "bfloat16")
    return jax.tree.map(lambda w: np.asarray(w, np.float64), rounded)


def function(residual, dtype):
    """Returns all blocks, and their inputs."""
    x, e, text = inputs()
    net = Transformer((SPEC,), LAYERS, HEADS, HEAD_DIM, residual=residual)
    precise = jnp.promote_types(dtype, jnp.float32)
    weights = compute_cast(jax.tree.map(lambda w: jnp.asarray(w, precise), params()), dtype)
    stream = Stream(jnp.asarray(x, dtype), jnp.asarray(e, precise), None, (("g", TOKENS),))

    def apply(weights, x, text):
        streams, contexts = {"video": x}, {"video": text}
        return net.apply({"params": weights}, streams, contexts, bidirectional("g"))[0]["video"]

    return apply, (weights, stream, jnp.asarray(text, dtype))


def ours(residual, dtype):
    apply, arguments = function(residual, dtype)
    return jax.jit(apply)(*arguments)


def program(residual, dtype):
    apply, arguments = function(residual, dtype)
    return str(jax.make_jaxpr(apply)(*arguments))


def published(wan, low=torch.bfloat16):
    """Runs all blocks; with `wan`, everything but matrices is in float32, else nothing is."""
    x, e, text = (torch.from_numpy(a) for a in inputs())
    flat = {"/".join(p.key for p in k): torch.from_numpy(np.array(v))
            for k, v in jax.tree_util.tree_leaves_with_path(params())}  # fmt: skip
    high = torch.float32 if wan and low == torch.bfloat16 else low
    x, e, text = x.to(low), e.to(high), text.to(low)

    def linear(name, y):
        weight, bias = p[f"{name}/kernel"].T.to(low), p[f"{name}/bias"].to(low)
        return F.linear(y.to(low), weight, bias)

    def norm(y, weight=None, bias=None):
        if weight is not None:
            weight, bias = weight.to(high), bias.to(high)
        return F.layer_norm(y.to(high), (WIDTH,), weight, bias, 1e-6)

    def rms(name, y):
        wide = y.to(torch.promote_types(low, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return wide.to(low) * p[f"{name}/scale"].to(high)

    def attention(name, y, source):
        parts = rms(f"{name}/q_norm", linear(f"{name}/q", y)), rms(
            f"{name}/k_norm", linear(f"{name}/k", source)
        ), linear(f"{name}/v", source)  # fmt: skip
        q, k, v = (a.to(low).unflatten(-1, (HEADS, -1)).transpose(1, 2) for a in parts)
        y = F.scaled_dot_product_attention(q, k, v)
        return linear(f"{name}/o", y.transpose(1, 2).flatten(2))

    for i in range(LAYERS):
        p = {k.removeprefix("blocks/video/"): v[i] for k, v in flat.items()}
        rows = (p["modulation"].to(high) + e).unbind(2)
        y = norm(x) * (1 + rows[1]) + rows[0]
        x = x + attention("self_attn", y, y) * rows[2]
        y = norm(x, p["cross_norm/scale"], p["cross_norm/bias"])
        x = x + attention("cross_attn", y, text)
        y = norm(x) * (1 + rows[4]) + rows[3]
        y = F.gelu(linear("ffn/in", y), approximate="tanh")
        x = x + linear("ffn/out", y) * rows[5]
    assert x.dtype == high
    return x.double().numpy()


def distance(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_each_residual_dtype_matches_a_published_code():
    exact = published(wan=True, low=torch.float64)
    with jax.enable_x64(True):
        assert distance(ours("float32", jnp.float64), exact) < 1e-12  # the same blocks
    wan, fast_wam = published(wan=True), published(wan=False)
    float32, compute = ours("float32", jnp.bfloat16), ours("compute", jnp.bfloat16)
    assert float32.dtype == jnp.float32 and compute.dtype == jnp.bfloat16
    # The error of bfloat16 equals that of the public code: 0.4 % for Wan, 1.2 % for Fast-WAM.
    assert distance(float32, exact) < 1.25 * distance(wan, exact)
    assert distance(float32, wan) < 0.7 * distance(compute, wan)
    # It is not larger, since modulation is always in float32 here.
    assert 1.5 * distance(wan, exact) < distance(compute, exact) < distance(fast_wam, exact)


def test_in_float32_there_is_no_difference():
    one, two = (program(residual, jnp.float32) for residual in ("float32", "compute"))
    assert one == two and program("float32", jnp.bfloat16) != program("compute", jnp.bfloat16)
    with pytest.raises(ValueError, match="residual 'half' is not one of"):
        program("half", jnp.float32)


def test_published_settings():
    published = {"wan_t2v": "float32", "dit_imagenet": "float32", "fast_wam_libero": "compute",
                 "cosmos_policy_libero": "compute"}  # fmt: skip
    for name, want in published.items():
        config = get(name)
        assert config.precision.compute == "bfloat16" and config.model.residual == want, name
        objective = wam.build(config, spec_of(config))
        assert objective.network.residual == want, name
        channels = getattr(objective, "guidance_channels", 0)
        assert channels == config.objective.guidance_channels == 3 * (name == "dit_imagenet")
    config = configs.base_config()
    config.model.residual = "bfloat16"
    with pytest.raises(ValueError, match="config.model.residual = 'bfloat16'"):
        configs.validate(config)
