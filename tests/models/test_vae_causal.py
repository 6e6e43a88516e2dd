"""Tests causality, chunked clips, and layers of the autoencoders against oracles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.helpers import precision, random_params

from wamjax.models.vae import layers, streaming
from wamjax.models.vae.autoencoder import Autoencoder, Sizes

SIZES = {
    "causal": Sizes("causal", 3, 4, multipliers=(1, 2, 2), blocks=1, temporal=(True, True)),
    "residual": Sizes(
        "residual", 3, 4, multipliers=(1, 2, 2), blocks=1, temporal=(True, True), patch=2
    ),
    "image": Sizes(
        "image", 3, 4, multipliers=(1, 2, 2), blocks=1, temporal=(False, False), groups=2
    ),
}
VIDEO = "causal", "residual"


def draw(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape)


@functools.cache
def model(style):
    net = Autoencoder(SIZES[style], 6)
    abstract = jax.eval_shape(
        lambda: net.init(jax.random.key(0), jnp.zeros((1, 5, 16, 16, 3)), mutable=["params"])
    )
    return net, random_params(abstract["params"], dtype=np.float64)


@functools.cache
def function(style, method):
    net, _ = model(style)
    return jax.jit(lambda params, x: net.apply({"params": params}, x, method=method))


def run(style, method, x):
    return np.asarray(function(style, method)(model(style)[1], x))


@pytest.mark.parametrize("style", VIDEO)
def test_a_latent_depends_on_its_past_only(style):
    x = draw(1, 13, 8, 8, 3)
    with jax.enable_x64(True):
        before = run(style, "encode", x)
        for frame in (1, 5, 8):
            changed = x.copy()
            changed[:, frame:] += 0.1
            after = run(style, "encode", changed)
            own = 1 + (frame - 1) // 4  # latent 0 is frame 0, latent k frames 4k - 3 .. 4k
            np.testing.assert_array_equal(before[:, :own], after[:, :own])
            assert np.abs(before[:, own] - after[:, own]).max() > 1e-6
        changed = x.copy()
        changed[:, :1] += 0.1
        assert np.abs(before[:, -1] - run(style, "encode", changed)[:, -1]).max() > 1e-6
        alone = run(style, "encode", x[:, :1])
    np.testing.assert_allclose(before[:, :1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("style", VIDEO)
def test_a_frame_depends_on_past_latents_only(style):
    z = draw(1, 4, 2, 2, 3)
    with jax.enable_x64(True):
        before = run(style, "decode", z)
        changed = z.copy()
        changed[:, 2:] += 0.1
        after = run(style, "decode", changed)
        alone = run(style, "decode", z[:, :1])
    np.testing.assert_allclose(before[:, :1], alone, rtol=1e-12, atol=1e-12)
    assert before.shape[1] == 13
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(before[:, 5] - after[:, 5]).max() > 1e-6


def test_in_image_style_frames_do_not_interact():
    x = draw(2, 3, 8, 8, 3)
    with jax.enable_x64(True):
        clip = run("image", "encode", x)
        alone = run("image", "encode", x.reshape(6, 1, 8, 8, 3))
    np.testing.assert_allclose(clip, alone.reshape(clip.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frames", [0, 2, 8])
def test_frames_that_do_not_divide_are_an_error(frames):
    net, params = model("causal")
    with pytest.raises(ValueError, match=rf"{frames} frames.*4 k \+ 1 frames"):
        net.apply({"params": params}, draw(1, frames, 8, 8, 3), method="encode")
    with pytest.raises(ValueError, match="8x10 do not divide by 4"):
        net.apply({"params": params}, draw(1, 5, 8, 10, 3), method="encode")
    with pytest.raises(ValueError, match="5 frames.*4 k frames after the first"):
        net.apply({"params": params}, draw(1, 5, 8, 8, 3), False, method="encode")


@pytest.mark.parametrize("style", VIDEO)
def test_chunks_equal_the_whole_clip(style):
    """Tests the autoencoders; the remainder at the end of a clip is tested below and in
    test_codec."""
    net, params = model(style)
    x, z = draw(2, 9, 8, 8, 3), draw(2, 3, 1, 2, 3)
    with jax.enable_x64(True):
        for method, step, whole, size in (
            ("encode", streaming.encode_step, x, 4),
            ("decode", streaming.decode_step, z, 1),
        ):
            step = functools.partial(step, net)
            chunked = jax.jit(
                lambda p, x, s=step, n=size: streaming.over_chunks(functools.partial(s, p), x, n)
            )
            want = run(style, method, whole)
            np.testing.assert_allclose(chunked(params, whole), want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 7])
def test_every_entry_is_in_one_chunk(length):
    """Computes a running sum in chunks of two, also with a shorter last chunk."""

    def step(x, past):
        y = jnp.cumsum(x, axis=1) + (0 if past is None else past)
        return y, y[:, -1:]

    x = draw(2, length, 3).astype(np.float32)
    got = jax.jit(lambda x: streaming.over_chunks(step, x, 2))(x)
    np.testing.assert_allclose(got, np.cumsum(x, axis=1), rtol=1e-5, atol=1e-6)


def test_the_memory_of_a_chunked_pass_does_not_grow_with_the_clip():
    net = Autoencoder(Sizes("causal", 3, 4, multipliers=(1, 2), blocks=1, temporal=(True,)), 6)
    params = jax.eval_shape(
        lambda: net.init(jax.random.key(0), jnp.zeros((1, 3, 4, 4, 3)), mutable=["params"])
    )["params"]

    def scratch(function, frames):
        x = jax.ShapeDtypeStruct((1, frames, 32, 32, 3), jnp.float32)
        return jax.jit(function).lower(params, x).compile().memory_analysis().temp_size_in_bytes

    def chunked(params, x):
        return streaming.over_chunks(functools.partial(streaming.encode_step, net, params), x, 4)

    def whole(params, x):
        return net.apply({"params": params}, x, method="encode")

    assert scratch(chunked, 65) < 1.3 * scratch(chunked, 17)  # the latents themselves
    assert scratch(whole, 65) > 2 * scratch(whole, 17)


@pytest.mark.parametrize("past", [0, 2])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_a_sum_of_2d_convolutions_is_a_3d_convolution(frames, past):
    x, kernel = draw(2, past + frames, 5, 4, 3), draw(3, 3, 3, 3, 2, seed=1)
    with precision(True):
        want = jax.lax.conv_general_dilated(
            x, kernel, (1, 1, 1), [(2 - past, 0), (1, 1), (1, 1)],
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )  # fmt: skip
        got = layers.causal(jnp.asarray(x), jnp.asarray(kernel), past)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
