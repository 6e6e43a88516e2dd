"""Tests codecs: the interface, those without parameters, and autoencoders bound to parameters."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.helpers import random_params
from scipy.fft import dctn

from wamjax.envs import tabletop
from wamjax.models import codec as codecs
from wamjax.models.vae import published
from wamjax.models.vae.autoencoder import Sizes
from wamjax.models.vae.bottleneck import CodeBook, FiniteScalar, Gaussian
from wamjax.models.vae.vae_codec import VAECodec

TINY = Sizes("causal", 3, 4, multipliers=(1, 2), blocks=1, temporal=(True,))
BOTTLENECKS = Gaussian(3), FiniteScalar((8, 5, 5)), CodeBook(7, 3)


def video(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def bound(bottleneck=BOTTLENECKS[0], **fields):
    codec = VAECodec(TINY, bottleneck, **fields)
    params = random_params(jax.eval_shape(codec.init, jax.random.key(0)))
    return codec.bind(params)


# A bound codec is a pytree, so it passes through jit as an argument.
encode = jax.jit(lambda codec, x: codec.encode(x))
decode = jax.jit(lambda codec, z: codec.decode(z))


@functools.partial(jax.jit, static_argnums=0)
def there_and_back(codec, x):
    latents = codec.encode(x)
    return latents, codec.decode(latents)


def test_the_pixel_codec_inverts_and_binds_nothing():
    codec = codecs.PixelCodec(4)
    x = video(2, 3, 8, 12)
    latents, back = there_and_back(codec, x)
    assert latents.shape[1:] == codec.shape(3, 8, 12) == (3, 2, 3, 48)
    np.testing.assert_array_equal(back, x)
    assert codec.init(jax.random.key(0)) == {} and codec.bind({}) is codec
    with pytest.raises(ValueError, match="no parameters.*kernel"):
        codec.bind({"kernel": 1})
    with pytest.raises(ValueError, match="8x10 do not divide by patch 4"):
        codec.shape(1, 8, 10)
    with pytest.raises(TypeError, match="uint8.*float32"):
        codec.encode(x.astype(np.float32))


def test_the_cosine_codec_is_the_cosine_transform_cut_to_low_frequencies():
    x = video(2, 3, 8, 16)
    every, back = there_and_back(codecs.CosineCodec(8, 192), x)
    assert np.abs(np.int32(back) - x).max() <= 1  # of rounding
    latents = np.asarray(there_and_back(codecs.CosineCodec(8, 3), x)[0])
    assert latents.shape[1:] == codecs.CosineCodec(8, 3).shape(3, 8, 16) == (3, 1, 2, 3)
    np.testing.assert_allclose(latents, every[..., :3], atol=1e-5)  # the first ones
    # The first is the grey level, and the next are grey waves, as in scipy.
    unit = x[0, 0].astype(np.float64) / 127.5 - 1
    grey = dctn(unit[:, :8].sum(-1) / np.sqrt(3), norm="ortho") / 8
    want = grey[0, 0], grey[0, 1] / 0.3, grey[1, 0] / 0.3
    np.testing.assert_allclose(latents[0, 0, 0, 0], want, atol=1e-4)
    for channels in (0, 193):
        with pytest.raises(ValueError, match=f"channels = {channels} .*between 1 and 192"):
            codecs.CosineCodec(8, channels)


def test_the_cosine_codec_keeps_what_rendered_scenes_are_made_of():
    keys = jax.random.split(jax.random.key(0), 16)

    def scene(key, task):
        state = tabletop.reset(key, task, tabletop.Shift.none())
        return tabletop.composite(tabletop.observe(state, tabletop.Shift.none())["images"])

    x = np.asarray(jax.jit(jax.vmap(scene))(keys, jnp.arange(16) % 8)[:, None])
    errors = []
    for channels in (8, 24, 48):
        codec = codecs.CosineCodec(8, channels)
        latents, back = jax.tree.map(np.asarray, there_and_back(codec, x))
        error = np.square(np.float32(back) - np.float32(x)).mean()
        errors.append(-10 * np.log10(error / 255**2))
        assert 0.3 < latents.std((0, 1, 2, 3)).min() and latents.std((0, 1, 2, 3)).max() < 2
    assert errors[0] > 20 and errors[1] > errors[0] + 3 and errors[2] > errors[1] + 3


@pytest.mark.parametrize("kind", ["sd", "wan2.1", "wan2.2"])
def test_published_codecs(kind):
    codec = codecs.build(types.SimpleNamespace(kind=kind))
    temporal, spatial = {"sd": (1, 8), "wan2.1": (4, 8), "wan2.2": (4, 16)}[kind]
    cached = codecs.CachedLatents(codec.sizes.channels, spatial, temporal)
    shape = codec.shape(9, 224, 448)
    assert shape == cached.shape(9, 224, 448)
    params = jax.eval_shape(codec.init, jax.random.key(0))
    clip = jax.ShapeDtypeStruct((1, 9, 224, 448, 3), jnp.uint8)
    latents = jax.eval_shape(lambda p, x: codec.bind(p).encode(x), params, clip)
    assert latents.shape == (1, *shape) and latents.dtype == jnp.float32
    back = jax.eval_shape(lambda p, z: codec.bind(p).decode(z), params, latents)
    assert back == clip


def test_latents_leave_normalised_and_return():
    raw = bound()
    x = video(2, 3, 4, 8)
    mean, std = (0.5, -1.0, 2.0), (2.0, 0.5, 1.5)
    codec = raw.replace(mean=mean, std=std)
    z = np.asarray(encode(raw, x))
    np.testing.assert_allclose(encode(codec, x), (z - mean) / std, rtol=1e-4, atol=1e-5)
    a, b = (np.asarray(decode(*args), int) for args in ((raw, z), (codec, encode(codec, x))))
    assert np.abs(a - b).max() <= 1  # rounding may change a byte by one
    own = codec.standardised(x)  # whatever it was before
    z = np.asarray(encode(own, x))
    np.testing.assert_allclose(z.mean(axis=(0, 1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(z.std(axis=(0, 1, 2, 3)), 1, rtol=1e-4)


def test_encoding_is_the_mode_and_sampling_spreads_around_it():
    codec = bound()
    x = video(1, 3, 4, 4)
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = jax.jit(jax.vmap(lambda key: codec.sample(x, key)))(keys)
    pixels = x / np.float32(127.5) - 1
    h = jax.jit(lambda p: codec.network.apply({"params": p}, pixels, method="encode"))(codec.params)
    h, draws = np.asarray(h), np.asarray(draws)
    mean, std = h[..., :3], np.exp(0.5 * h[..., 3:])
    np.testing.assert_allclose(encode(codec, x), mean, rtol=1e-4, atol=1e-5)
    error = (draws.mean(axis=0) - mean) / std
    assert np.abs(error).max() < 5 / 4000**0.5
    np.testing.assert_allclose(draws.std(axis=0), std, rtol=0.1)


def test_chunks_change_nothing():
    codec = bound()
    x = video(1, 7, 4, 8)
    z = encode(codec, x)
    assert z.shape == (1, *codec.shape(7, 4, 8)) and z.dtype == jnp.float32
    chunked = dataclasses.replace(codec, chunk=2)
    np.testing.assert_allclose(encode(chunked, x), z, rtol=1e-4, atol=1e-5)
    y = decode(codec, z)
    assert y.shape == x.shape and y.dtype == jnp.uint8
    assert np.abs(np.asarray(decode(chunked, z), int) - y).max() <= 1


def test_floats_are_pictures_in_minus_one_to_one():
    codec, x = bound(), video(1, 3, 4, 8)
    want, unit = encode(codec, x), x / np.float32(127.5) - 1
    by_unit = jax.jit(lambda codec, x: codec.encode_unit(x))
    np.testing.assert_allclose(by_unit(codec, unit), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(codec.encode(unit), want, rtol=1e-4, atol=1e-5)
    assert jax.eval_shape(by_unit, codec.replace(chunk=1), unit).shape == want.shape
    assert np.any(by_unit(codec, np.nextafter(unit, 2, dtype=np.float32)) != want)  # not rounded
    np.testing.assert_array_equal(codecs.PixelCodec(2).encode(unit), codecs.PixelCodec(2).encode(x))
    for wrong, said in (
        (unit + 2, r"float32 from 1 to 3$"),
        (unit * np.nan, "from nan to nan"),
        (x / np.float32(255), r"may be in \[0, 1\]: if so, pass 2 x - 1"),
        (x.astype(np.int32), "not int32"),
    ):
        with pytest.raises(TypeError, match=said):
            codec.encode(wrong)
    with pytest.raises(TypeError, match="inside jit, .*`encode_unit`"):
        encode(codec, unit)
    with pytest.raises(TypeError, match="takes floats in .*not uint8"):
        codec.encode_unit(x)


@pytest.mark.parametrize("bottleneck", BOTTLENECKS[1:], ids=lambda b: type(b).__name__)
def test_tokens_are_the_latents(bottleneck):
    codec = bound(bottleneck, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    x = video(2, 3, 4, 8)
    ids = np.asarray(jax.jit(lambda codec, x: codec.tokens(x))(codec, x))
    assert ids.shape == (2, *codec.shape(3, 4, 8)[:3]) and np.issubdtype(ids.dtype, np.integer)
    assert 0 <= ids.min() and ids.max() < codec.vocabulary and len(np.unique(ids)) > 1
    latents = jax.jit(lambda codec, ids: codec.from_tokens(ids))(codec, ids)
    np.testing.assert_allclose(latents, encode(codec, x), rtol=1e-5, atol=1e-6)


def test_an_unbound_codec_says_so():
    codec = VAECodec(TINY, Gaussian(3))
    assert hash(codec) == hash(VAECodec(TINY, Gaussian(3)))
    with pytest.raises(ValueError, match=r"codec.bind\(params\)"):
        codec.encode(video(1, 1, 4, 4))


@pytest.mark.parametrize("temporal, spatial", [(1, 2), (1, 8), (2, 4), (4, 8), (4, 16)])
def test_small_codecs_have_the_strides_they_are_asked_for(temporal, spatial):
    config = types.SimpleNamespace(
        kind="kl", channels=6, spatial=spatial, temporal=temporal, width=8, mean=(), std=()
    )
    codec = codecs.build(config)
    assert codec.shape(1 + 2 * temporal, 32, 64) == (3, 32 // spatial, 64 // spatial, 6)
    params = jax.eval_shape(codec.init, jax.random.key(0))
    clip = jax.ShapeDtypeStruct((1, 1 + 2 * temporal, 32, 64, 3), jnp.uint8)
    latents = jax.eval_shape(lambda p, x: codec.bind(p).encode(x), params, clip)
    assert latents.shape == (1, 3, 32 // spatial, 64 // spatial, 6)


def test_what_cannot_be_built_is_an_error():
    with pytest.raises(ValueError, match="'wan3' is not one of .*'pixel'.*'wan2.2'.*'vq'"):
        codecs.build(types.SimpleNamespace(kind="wan3"))
    for spatial, temporal in ((12, 1), (2, 4), (8, 3), (64, 1)):
        with pytest.raises(ValueError, match="power of 2"):
            codecs.small(Gaussian(4), spatial, temporal, 8)
    with pytest.raises(ValueError, match="style 'causl'"):
        dataclasses.replace(published.WAN_21, style="causl")
    with pytest.raises(ValueError, match="one entry less than multipliers"):
        dataclasses.replace(published.WAN_21, temporal=(True,))
