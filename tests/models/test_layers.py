"""Tests layers and rotary embeddings against closed forms and complex numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax.models import layers
from wamjax.models.blocks import ExpertSpec, Projections
from wamjax.models.experts import Time, VideoExpert
from wamjax.models.rope import by_dimension, by_matmul, rope, rotate, split_axes, video_rope
from wamjax.models.text import TokenEncoder


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def test_split_of_the_head():
    assert split_axes(128) == (44, 42, 42)
    for dim in range(6, 130, 2):
        t, h, w = split_axes(dim)
        assert t + h + w == dim and h == w and t % 2 == h % 2 == 0 and 0 <= t - h <= 4


def test_rotation_is_a_complex_product_of_interleaved_pairs():
    frames, h, w, dim = (0, 3, 4), 2, 3, 12
    x = draw(2, 2, len(frames) * h * w, dim)
    with jax.enable_x64(True):
        got = np.asarray(rotate(jnp.asarray(x, jnp.float64), video_rope(frames, h, w, dim)))
    for token, (t, i, j) in enumerate(
        (t, i, j) for t in frames for i in range(h) for j in range(w)
    ):
        pair = 0
        for position, part in zip((t, i, j), split_axes(dim), strict=True):
            for m in range(part // 2):
                z = x[:, :, token, 2 * pair] + 1j * x[:, :, token, 2 * pair + 1].astype(
                    np.complex128
                )
                z = z * np.exp(1j * position * 10000.0 ** (-2 * m / part))
                np.testing.assert_allclose(got[:, :, token, 2 * pair], z.real, atol=1e-6)
                np.testing.assert_allclose(got[:, :, token, 2 * pair + 1], z.imag, atol=1e-6)
                pair += 1
        assert pair == dim // 2


def test_products_depend_on_relative_positions_only():
    q, k = draw(1, 1, 1, 12, seed=1), draw(1, 1, 1, 12, seed=2)

    def product(a, b):
        at = lambda x, p: rotate(x, rope([np.array([i]) for i in p], split_axes(12)))  # noqa: E731
        return float(jnp.sum(at(q, a) * at(k, b)))

    base = product((3, 1, 2), (5, 0, 4))
    assert abs(product((13, 8, 2), (15, 7, 4)) - base) < 1e-4
    for other in ((6, 0, 4), (5, 1, 4), (5, 0, 5)):  # every axis matters
        assert abs(product((3, 1, 2), other) - base) > 1e-3


def test_rotation_in_half_precision_rounds_only_the_result():
    x = jnp.asarray(draw(1, 2, 40, 16), jnp.bfloat16)
    table = rope([np.arange(900, 940)], [16])
    got, exact = rotate(x, table), rotate(x.astype(jnp.float32), table)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="even, got \\(3,\\)"):
        rope([np.arange(2)], [3])


@pytest.mark.parametrize("scale, top", [(1000.0, 1.0), (1.0, 1000.0), (1.0, 1.0)])
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (np.float32, 1.5e-7)])
def test_sinusoid(dtype, tolerance, scale, top):
    """In float32 it is as accurate as a rounded float64 result, which itself is up to 3e-8 off."""
    level = top * np.concatenate([[0.0, 0.001, 1.0], np.random.default_rng(0).random(997)])
    level = level.astype(dtype).reshape(2, 500)
    with jax.enable_x64(dtype == np.float64):
        got = np.asarray(jax.jit(lambda x: layers.sinusoid(x, 256, scale))(level))
    angle = scale * level[..., None].astype(np.float64) * 10000.0 ** (-np.arange(128) / 128)
    want = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    assert got.shape == (2, 500, 256) and got.dtype == dtype
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)
    rounded = np.sqrt(np.mean(np.square(want.astype(dtype) - want)))
    assert np.sqrt(np.mean(np.square(got - want))) <= 1.5 * rounded + 1e-13


def test_sinusoid_of_integers_negative_levels_and_its_derivative():
    rates = 10000.0 ** (-np.arange(8) / 8)
    for level in (np.array([-1, 0, 7, 999]), np.array([-0.25, 1e-30], np.float32)):
        angle = level[:, None] * rates
        want = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
        got = jax.jit(lambda x: layers.sinusoid(x, 16, 1.0))(level)
        np.testing.assert_allclose(got, want, rtol=0, atol=1.5e-7)
    level = np.float32(0.37)
    slope = jax.jit(jax.jacfwd(lambda x: layers.sinusoid(x, 16)))(level)
    angle, rates = 1000 * float(level) * rates, 1000 * rates
    want = np.concatenate([-np.sin(angle) * rates, np.cos(angle) * rates])
    np.testing.assert_allclose(slope, want, rtol=1e-6)


def test_modulation_by_slot_is_modulation_repeated_for_each_token():
    x, shift, scale, gate = draw(2, 12, 5), *draw(3, 2, 4, 5, seed=1)
    repeat = lambda v: np.repeat(v, 3, axis=1)  # noqa: E731
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    got = layers.modulate(x, shift, scale)
    np.testing.assert_allclose(got, normed * (1 + repeat(scale)) + repeat(shift), atol=1e-5)
    y = draw(2, 12, 5, seed=2)
    np.testing.assert_allclose(layers.gated_add(x, gate, y), x + repeat(gate) * y, atol=1e-6)
    apart, joined = layers.by_slot(x, 3), lambda y: y.reshape(x.shape)
    assert apart.shape == (2, 4, 3, 5)
    np.testing.assert_array_equal(joined(layers.modulate(apart, shift, scale)), got)
    residual = layers.gated_add(apart, gate, layers.by_slot(y, 3))
    np.testing.assert_array_equal(joined(residual), layers.gated_add(x, gate, y))
    shared = layers.modulate(x, shift[:1], scale[:1])  # one row for the whole batch
    want = layers.modulate(x, *(np.repeat(v[:1], 2, axis=0) for v in (shift, scale)))
    np.testing.assert_array_equal(shared, want)
    with pytest.raises(ValueError, match="12 tokens do not divide evenly into 5"):
        layers.modulate(x, draw(2, 5, 5), draw(2, 5, 5))


def test_norms():
    x = 3 * draw(4, 6) + 1
    scale, bias = draw(2, 6, seed=1)
    got = layers.RMSNorm().apply({"params": {"scale": scale}}, x)
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(got, want, rtol=1e-5)
    got = layers.LayerNorm().apply({"params": {"scale": scale, "bias": bias}}, x)
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(got, want * scale + bias, rtol=1e-4, atol=1e-5)


def test_qk_norm_is_over_all_heads_jointly_and_values_are_not_normed():
    net, x = Projections(width=6, heads=2, head_dim=4), draw(1, 3, 6)
    variables = net.init(jax.random.key(0), x, method="query")
    variables |= {"params": variables["params"] | net.init(
        jax.random.key(1), x, method="key_value")["params"]}  # fmt: skip
    kernel = np.array(variables["params"]["q"]["kernel"])
    kernel[:, :4] *= 100  # a loud first head
    variables["params"]["q"]["kernel"] = kernel
    q = net.apply(variables, x, method="query")
    assert q.shape == (1, 2, 3, 4)
    np.testing.assert_allclose(np.square(q).mean(axis=(1, 3)), 1, rtol=1e-4)
    assert np.abs(q[:, 1]).max() < 0.1  # normalising each head alone would undo this
    _, v = net.apply(variables, x, method="key_value")
    want = x @ np.array(variables["params"]["v"]["kernel"])
    np.testing.assert_allclose(v, want.reshape(1, 3, 2, 4).transpose(0, 2, 1, 3), atol=1e-5)


def test_linear_computes_in_the_dtype_of_its_kernel():
    params = {"kernel": jnp.asarray(draw(4, 3), jnp.bfloat16), "bias": draw(3)}
    assert layers.Linear(3).apply({"params": params}, draw(2, 4)).dtype == jnp.bfloat16


def test_patch_layout():
    """Channels are slowest at the input (Conv3d), fastest at the output (Wan's unpatchify)."""
    net = VideoExpert(ExpertSpec("video", 12, 4), 4, channels=3, outputs=3, patch=2)
    x = draw(1, 2, 4, 6, 3)
    kernel = np.eye(12, dtype=np.float32)
    linear = {"kernel": kernel, "bias": np.zeros(12, np.float32)}
    params = {"patch_embed": linear, "head": linear, "head_table": np.zeros((2, 12), np.float32)}
    tokens = np.asarray(net.apply({"params": params}, x, method="embed"))
    assert tokens.shape == (1, 12, 12)
    t, i, j = 1, 1, 2
    square = x[0, t, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]  # p q c
    np.testing.assert_array_equal(tokens[0, (t * 2 + i) * 3 + j], square.transpose(2, 0, 1).ravel())

    time = Time(np.zeros((1, 2, 12), np.float32), None)
    out = net.apply({"params": params}, tokens, time, (2, 2, 3), method="unembed")
    token = np.asarray(layers.layer_norm(tokens[0, (t * 2 + i) * 3 + j]))
    got = out[0, t, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
    np.testing.assert_allclose(got, token.reshape(2, 2, 3), atol=1e-6)


def test_padding_words_are_zero_rows():
    net = TokenEncoder(vocabulary=7, width=5, length=3)
    ids = np.array([[2, 6, 0]])
    variables = net.init(jax.random.key(0), ids)
    context = net.apply(variables, ids)
    assert not np.any(context[0, 2]) and np.any(context[0, 0]) and np.any(context[0, 1])
    with pytest.raises(ValueError, match="2 tokens, the text encoder takes 3"):
        net.apply(variables, ids[:, :2])


@pytest.mark.parametrize("style", ["pairs", "half"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotation_by_matmul_is_the_rotation_to_the_last_bit(style, dtype):
    x, dy = (jax.random.normal(jax.random.key(i), (2, 3, 10, 24)).astype(dtype) for i in (0, 1))
    table = rope([np.arange(10)], [24])
    whole = [by_dimension(style, part) for part in table]
    want, pull = jax.vjp(lambda x: rotate(x, table, style), x)
    got, pull_by_matmul = jax.vjp(lambda x: by_matmul(style, x, *whole), x)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(*(back(dy)[0] for back in (pull, pull_by_matmul)))
