"""Tests pictures in slots: the composed video, which part of it is encoded, and decoding."""

import colorsys
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.helpers import random_params

from wamjax.models.codec import CachedLatents, PixelCodec, wan21
from wamjax.models.vae.autoencoder import Sizes
from wamjax.models.vae.bottleneck import Gaussian
from wamjax.models.vae.vae_codec import VAECodec
from wamjax.wam.cosmos_policy import injection, targets
from wamjax.wam.cosmos_policy.augment import (
    STRENGTHS,
    Strength,
    _kept,
    _shift_hue,
    augment,
    centre_crop,
)
from wamjax.wam.cosmos_policy.clips import assemble, decode, encode, split
from wamjax.wam.cosmos_policy.layouts import LAYOUTS, name_of, parse

LIBERO = parse(LAYOUTS["libero"])
KEY = jax.random.key(0)


def images(size=16, frames=2, cameras=LIBERO.cameras, b=1):
    rng = np.random.default_rng(0)
    return {
        c: rng.integers(1, 256, (b, frames, size, size, 3)).astype(np.uint8) for c in cameras
    }


def test_a_slot_is_as_many_frames_as_a_latent_of_the_codec():
    assert wan21().temporal == 4
    assert PixelCodec(8).temporal == 1
    assert CachedLatents(16, 8, 4).temporal == 4
    for name, whole, needed in (("libero", 33, 13), ("robocasa", 41, 17), ("aloha", 41, 17)):
        layout = parse(LAYOUTS[name])
        pictures = images(2, cameras=layout.cameras)
        assert assemble(layout, pictures, len(layout), 4).shape[1] == whole
        assert assemble(layout, pictures, layout.conditional, 4).shape[1] == needed


@pytest.mark.parametrize("k", [1, 4])
def test_the_clip_has_every_picture_in_its_slot_and_black_elsewhere(k):
    x = images()
    clip = np.asarray(assemble(LIBERO, x, 9, k))
    slots = [clip[:, :1], *(clip[:, 1 + k * i : 1 + k * (i + 1)] for i in range(8))]
    for slot, frames in zip(LIBERO.slots, slots, strict=True):
        assert frames.shape[1] == (k if slot.kind != "blank" else 1)
        want = np.zeros((1, 16, 16, 3), np.uint8)
        if slot.camera:
            want = x[slot.camera][:, 1 if slot.kind == "future_camera" else 0]
        for i in range(frames.shape[1]):
            np.testing.assert_array_equal(frames[:, i], want, err_msg=name_of(slot))
    # When acting, the present fills the future's slots, which are denoised anyway.
    now = {c: v[:, :1] for c, v in x.items()}
    same = np.asarray(assemble(LIBERO, now, 9, k))
    np.testing.assert_array_equal(same[:, 1 + 6 * k], x["agentview"][:, 0])


@pytest.fixture(scope="module")
def vae():
    """Returns a causal autoencoder with Wan's strides: 4 frames and 8 x 8 pixels per latent."""
    sizes = Sizes("causal", 4, 8, multipliers=(1, 1, 1), blocks=1, temporal=(True, True), patch=2)
    codec = VAECodec(sizes, Gaussian(4))
    return codec.bind(random_params(jax.eval_shape(codec.init, KEY)))


@functools.partial(jax.jit, static_argnums=2)
def _encoded(codec, pictures, n):
    return encode(LIBERO, codec, pictures, n)


def encoded(*args):
    return np.asarray(_encoded(*args))


def test_what_a_policy_is_given_needs_the_first_frames_only(vae):
    """Test vector 11: the first four latents of 13 and of 33 frames are equal."""
    x = images()
    whole, few = encoded(vae, x, 9), encoded(vae, x, LIBERO.conditional)
    assert whole.shape == (1, 9, 2, 2, 4) and few.shape == (1, 4, 2, 2, 4)
    np.testing.assert_allclose(few, whole[:, :4], atol=1e-5)
    # A latent depends on earlier frames, so the order of the slots matters.
    other = encoded(vae, x | {"wrist": x["agentview"]}, 9)
    assert np.abs(other[:, 3] - whole[:, 3]).max() > 1e-3


def test_behind_the_last_picture_nothing_is_encoded_to_train(vae):
    x = images(64)  # 256 numbers per latent, of which actions fill 112
    rng = np.random.default_rng(0)
    values = {
        name: rng.standard_normal((1, *slot.shape)).astype(np.float32)
        for name, slot in LIBERO.numbers.items()
    }
    assert LIBERO.pictures == 8 and parse(LAYOUTS["aloha"]).pictures == 10

    @jax.jit
    def both(vae, x, values):
        whole = injection.inject(LIBERO, encode(LIBERO, vae, x, 9), values)
        return targets.latents(LIBERO, vae, x, values, None, KEY), whole

    np.testing.assert_allclose(*both(vae, x, values), atol=1e-5)


def test_the_future_is_decoded_from_its_slots_as_the_codec_knows_them(vae):
    x = images()
    now = {c: v[:, :1] for c, v in x.items()}
    run = jax.jit(lambda vae, z: decode(LIBERO, vae, z, now))
    clean = encoded(vae, x, 9)
    # Slots of numbers and a denoised blank are reset to black before decoding.
    written = clean.copy()
    written[:, [0, 1, 4, 5, 8]] = 3.0
    got = jax.device_get(run(vae, written))
    whole = np.asarray(jax.jit(lambda vae, z: vae.decode(z))(vae, clean))
    for camera, i in LIBERO.decoded.items():
        np.testing.assert_allclose(
            got[camera].astype(int), whole[:, 4 * (i - 1) + 1].astype(int), atol=1
        )
    written[:, 6] += 1.0
    moved = run(vae, written)
    assert np.any(moved["wrist"] != got["wrist"])


def test_pixels_round_trip():
    codec, x = PixelCodec(4), images()
    latents = encode(LIBERO, codec, x, 9)
    got = decode(LIBERO, codec, latents, x)
    assert list(got) == ["wrist", "agentview"]
    for camera, picture in got.items():
        np.testing.assert_array_equal(picture, x[camera][:, 1])


def test_a_composite_is_cut_by_its_widths():
    video = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 2, 4, 10, 3)), jnp.uint8)
    parts = split(video, {"a": 4, "b": 6})
    np.testing.assert_array_equal(parts["b"], video[:, :, :, 4:])
    with pytest.raises(ValueError, match="10 pixels wide, the cameras {'a': 4, 'b': 4}"):
        split(video, {"a": 4, "b": 4})


# ---- augmentation ----


def run_augment(x, strength, key=KEY):
    return np.asarray(jax.jit(augment, static_argnums=2)(key, x, strength))


def still(**changes):
    nothing = dict(area=1.0, degrees=0.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    return Strength(**nothing | changes)


def test_no_strength_changes_nothing_and_each_changes_something():
    x = images(20, 2, ("wrist",), b=2)["wrist"]
    np.testing.assert_array_equal(run_augment(x, still()), x)
    for change in (dict(area=0.8), dict(degrees=20.0), dict(brightness=0.5), dict(contrast=0.5),
                   dict(saturation=0.5), dict(hue=0.3)):  # fmt: skip
        assert np.abs(run_augment(x, still(**change)).astype(int) - x).mean() > 1, change


def test_frames_of_a_sample_are_changed_alike_and_samples_are_not():
    one = images(20, 1, ("wrist",))["wrist"]
    x = jnp.tile(one, (3, 2, 1, 1, 1))
    y = run_augment(x, STRENGTHS["strong"])
    np.testing.assert_array_equal(y[:, 0], y[:, 1])
    assert np.any(y[0] != y[1]) and np.any(y[1] != y[2])
    np.testing.assert_array_equal(y, run_augment(x, STRENGTHS["strong"]))
    assert np.any(y != run_augment(x, STRENGTHS["strong"], jax.random.key(1)))
    assert not run_augment(jnp.zeros_like(x), STRENGTHS["strong"]).any()  # black stays black


def test_crops_are_the_published_size_and_are_resized_back():
    assert _kept(224, 0.9) == 213
    ramp = np.tile(np.arange(224, dtype=np.uint8)[:, None, None], (1, 1, 224, 3))[None]
    rows = (np.arange(224) + 0.5) * 213 / 224 - 0.5  # of the crop
    seen = np.asarray(centre_crop(jnp.asarray(ramp), 0.9))[0, 0, :, 5, 0]
    np.testing.assert_allclose(seen[1:-1], (5.5 + rows)[1:-1], atol=0.51)
    starts = set()
    for seed in range(30):
        row = run_augment(jnp.asarray(ramp), still(area=0.9), jax.random.key(seed))[0, 0, :, 5, 0]
        start = row[112] - rows[112]
        assert -0.6 < start < 11.6
        np.testing.assert_allclose(row[2:-2], (start + rows)[2:-2], atol=1.1)
        starts.add(round(float(start)))
    assert len(starts) > 6


def test_rotation_turns_about_the_middle_and_fills_with_black():
    x = np.zeros((1, 1, 41, 41, 3), np.uint8)
    x[..., 19:22, 34:37, :] = 128  # 15 to the right of the middle
    full = np.full_like(x, 200)
    angles = []
    for seed in range(5):
        key = jax.random.key(seed)
        y = run_augment(jnp.asarray(x), still(degrees=30.0), key)[0, 0, ..., 0]
        row, column = np.argwhere(y == 128).mean(axis=0) - 20
        assert abs(np.hypot(row, column) - 15) < 0.7
        angles.append(np.degrees(np.arctan2(row, column)))
        corners = run_augment(jnp.asarray(full), still(degrees=30.0), key)[0, 0][::40, ::40]
        assert (corners.min() == 0) == (abs(angles[-1]) > 2)
    assert max(np.abs(angles)) < 31 and np.std(angles) > 5


def test_hue_is_that_of_the_colour_circle():
    rng = np.random.default_rng(0)
    colours = np.concatenate([rng.random((40, 3)), np.zeros((1, 3)), np.full((1, 3), 0.4)])
    for shift in (-0.4, 0.03, 0.25):
        got = _shift_hue(jnp.asarray(colours, jnp.float32), shift)
        want = []
        for rgb in colours:
            h, s, v = colorsys.rgb_to_hsv(*rgb)
            want.append(colorsys.hsv_to_rgb((h + shift) % 1, s, v))
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_colours_follow_their_formulas():
    """Computes torchvision's: a factor, then blends with the mean grey and with each pixel's
    grey."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (1, 1, 6, 6, 3)).astype(np.uint8)
    grey = np.array([0.2989, 0.587, 0.114])
    draws = np.asarray(jax.random.uniform(jax.random.split(KEY, 1)[0], (7,)))
    unit = x[0, 0] / 255.0

    def factor(i, reach):
        return 1 + (2 * draws[i] - 1) * reach

    f = factor(3, 0.3)
    want = {"brightness": np.clip(f * unit, 0, 1)}
    f = factor(4, 0.3)
    want["contrast"] = np.clip(f * unit + (1 - f) * (unit @ grey).mean(), 0, 1)
    f = factor(5, 0.3)
    want["saturation"] = np.clip(f * unit + (1 - f) * (unit @ grey)[..., None], 0, 1)
    for name, value in want.items():
        got = run_augment(jnp.asarray(x), still(**{name: 0.3}))[0, 0]
        np.testing.assert_allclose(got, 255 * value, atol=0.51, err_msg=name)
