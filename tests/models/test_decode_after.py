"""Tests decoding of pictures that follow known ones: unchanged regions keep their pixels."""

import jax
import numpy as np
import pytest

from wamjax.models import codec as codecs


def pictures(rng, count):
    """Draws sharp pictures, of which eight numbers per square keep only a blurred version."""
    return rng.integers(0, 2, (count, 1, 16, 24, 3)).astype(np.uint8) * 200 + 20


@pytest.mark.parametrize("codec", [codecs.CosineCodec(8, 8), codecs.PixelCodec(8)])
def test_unchanged_regions_keep_their_pixels(codec):
    rng = np.random.default_rng(0)
    now, other = pictures(rng, 4), pictures(rng, 4)
    real = now.copy()
    real[:, :, :8, 8:16] = other[:, :, :8, 8:16] // 4  # one square changes, and is darker
    encode, decode, after = (
        jax.jit(f) for f in (codec.encode, codec.decode, codec.decode_after)
    )
    latents = encode(real)
    shown, blurred = np.asarray(after(latents, now)), np.asarray(decode(latents))
    np.testing.assert_array_equal(shown[:, :, 8:], real[:, :, 8:])
    np.testing.assert_array_equal(shown[..., 16:, :], real[..., 16:, :])
    # Nothing of the old square is left on the new one.
    square = np.s_[:, :, :8, 8:16]
    np.testing.assert_allclose(shown[square], np.float32(blurred[square]), atol=3)
    # One picture for all that come after it, or one for each.
    twice = np.concatenate([latents, latents], axis=1)
    one = np.asarray(jax.jit(codec.decode_after)(twice, now))
    each = np.asarray(jax.jit(codec.decode_after)(twice, np.concatenate([now, now], axis=1)))
    np.testing.assert_array_equal(one, each)
    np.testing.assert_array_equal(one[:, 1:], shown)


def test_the_noise_of_a_prediction_is_not_shown():
    codec, rng = codecs.CosineCodec(8, 8), np.random.default_rng(1)
    now = pictures(rng, 4)
    latents = np.asarray(codec.encode(now))

    def error(shown):
        return np.abs(np.float32(shown) - now).mean()

    noisy = latents + 0.1 * rng.normal(size=latents.shape)
    assert error(codec.decode_after(latents, now)) == 0
    assert error(codec.decode_after(noisy, now)) < 0.5 * error(codec.decode(noisy))
