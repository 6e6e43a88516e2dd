"""Tests the published autoencoders against diffusers on random weights, and their full sizes.

This is in float32, for the numerics; weights/test_gradients.py compares outputs and gradients in
float64, for the structure.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax import tree
from wamjax.models.vae import published
from wamjax.models.vae.autoencoder import Autoencoder

pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
from models import vae_diffusers as theirs  # noqa: E402

STYLES = "image", "causal", "residual"
LATENTS = 3  # a single latent equals the first of several, see test_vae_causal
TOLERANCE = 5e-6


@functools.cache
def pair(style):
    model = theirs.oracle(style, False)
    return model, theirs.params(style, model.state_dict())


def network(style):
    sizes = theirs.TINY[style]
    return Autoencoder(sizes, 2 * sizes.channels)


def apply(style, params, method, x):
    return jax.jit(lambda p, x: network(style).apply({"params": p}, x, method=method))(params, x)


def draw(*shape):
    return np.random.default_rng(4).uniform(-1, 1, shape).astype(np.float32)


def relative(got, want):
    assert got.shape == want.shape and got.dtype == want.dtype
    return np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)


@pytest.mark.parametrize(
    "sizes, count",
    [
        (published.WAN_21, 126_892_531),
        (published.WAN_22, 704_688_668),
        (published.SD, 83_653_863),
    ],
)
def test_published_sizes_have_their_parameter_counts(sizes, count):
    net, pixels = Autoencoder(sizes, 2 * sizes.channels), jnp.zeros((1, 5, 32, 32, 3))
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), pixels, mutable=["params"]))
    assert set(params) == {"params"} and tree.count(params) == count


@pytest.mark.parametrize("style", STYLES)
def test_every_parameter_has_one_source(style):
    _, params = pair(style)
    pixels = jnp.zeros((1, 5, 32, 32, 3))
    want = jax.eval_shape(
        lambda: network(style).init(jax.random.key(0), pixels, mutable=["params"])
    )["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, want)


@pytest.mark.parametrize("style", STYLES)
def test_encoder_equals_diffusers(style):
    model, params = pair(style)
    frames = 1 + (LATENTS - 1) * theirs.TINY[style].time_stride
    x = draw(2, frames, 32, 16, 3)
    with torch.no_grad():
        if style == "image":  # every frame is an image
            images = theirs.channels_first(x.reshape(-1, *x.shape[2:]))
            want = theirs.channels_last(model.encode(images).latent_dist.parameters)
            want = want.reshape(*x.shape[:2], *want.shape[1:])
        else:
            want = model.encode(theirs.channels_first(x)).latent_dist.parameters
            want = theirs.channels_last(want)
    got = apply(style, params, "encode", x)
    assert relative(got, want) < TOLERANCE


@pytest.mark.parametrize("style", STYLES)
def test_decoder_equals_diffusers_before_the_clamp(style):
    model, params = pair(style)
    z = 2 * draw(2, LATENTS, 3, 1, theirs.TINY[style].channels)
    with torch.no_grad(), theirs.unclamped():
        if style == "image":
            images = theirs.channels_first(z.reshape(-1, *z.shape[2:]))
            want = theirs.channels_last(model.decode(images).sample)
            want = want.reshape(*z.shape[:2], *want.shape[1:])
        else:
            want = theirs.channels_last(model.decode(theirs.channels_first(z)).sample)
    got = apply(style, params, "decode", z)
    assert np.abs(want).max() > 1  # a clamp would change it
    assert relative(got, want) < TOLERANCE


def test_latent_statistics():
    model = theirs.AutoencoderKLWan  # its defaults are those of Wan 2.1
    defaults = model.__init__.__wrapped__.__defaults__
    assert list(published.WAN_21_MEAN) in defaults and list(published.WAN_21_STD) in defaults
    for sizes, mean, std in (
        (published.WAN_21, published.WAN_21_MEAN, published.WAN_21_STD),
        (published.WAN_22, published.WAN_22_MEAN, published.WAN_22_STD),
    ):
        assert len(mean) == len(std) == sizes.channels and min(std) > 0
