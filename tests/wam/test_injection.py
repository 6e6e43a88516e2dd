"""Tests numbers in latent frames with the specification's vectors (section 4) and a numpy
oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax.data.normalize import normalizers, statistics
from wamjax.wam.cosmos_policy.injection import (
    extract,
    inject,
    read_value,
    tile,
    untile,
    value_target,
)
from wamjax.wam.cosmos_policy.layouts import LAYOUTS, holds_numbers, parse

LATENT = (28, 28, 16)  # of a 224 x 224 picture behind the Wan 2.1 autoencoder
SIZE = 28 * 28 * 16


def oracle(values, shape):
    """Reorders as in the public code: (c, h, w), in C order."""
    flat = np.asarray(values, np.float64).reshape(len(values), -1)
    copies = np.concatenate([flat] * -(-SIZE // flat.shape[1]), axis=1)[:, :SIZE]
    return copies.reshape(-1, 16, 28, 28).transpose(0, 2, 3, 1)


# shape -> (full copies, numbers left over): section 4.
COPIES = {(16, 7): (112, 0), (32, 7): (56, 0), (50, 14): (17, 644), (9,): (1393, 7),
          (14,): (896, 0), (): (SIZE, 0)}  # fmt: skip


@pytest.mark.parametrize("shape", COPIES, ids=str)
def test_tiling_is_the_published_one_and_untiling_is_the_mean_over_full_copies(shape):
    rng = np.random.default_rng(0)
    n = int(np.prod(shape))
    assert divmod(SIZE, n) == COPIES[shape]
    x = rng.standard_normal((2, *shape)).astype(np.float32)
    latents = tile(jnp.asarray(x), shape, LATENT)
    np.testing.assert_array_equal(latents, oracle(x, shape))
    np.testing.assert_allclose(untile(latents, shape), x, rtol=1e-6)
    # Errors of the network are averaged over full copies only, without the truncated one.
    noise = rng.standard_normal((2, *LATENT)).astype(np.float32)
    flat = np.moveaxis(np.asarray(latents + noise, np.float64), -1, 1).reshape(2, -1)
    full = COPIES[shape][0] * n
    mean = flat[:, :full].reshape(2, -1, n).mean(axis=1).reshape(x.shape)
    np.testing.assert_allclose(untile(latents + noise, shape), mean, atol=1e-5)
    if full < SIZE:
        spoilt = flat.copy()
        spoilt[:, full:] = 1e6
        spoilt = np.moveaxis(spoilt.reshape(2, 16, 28, 28), 1, -1)
        np.testing.assert_allclose(untile(jnp.asarray(spoilt, jnp.float32), shape), mean, atol=1e-5)


def test_structure_of_the_published_tilings():
    """Section 4: LIBERO's 16 channels are equal, with 28 distinct 2 x 2 tokens, 7 of each."""
    x = np.arange(112.0).reshape(1, 16, 7)
    frame = np.asarray(tile(jnp.asarray(x), (16, 7), LATENT))[0]
    assert np.all(frame == frame[..., :1])
    tokens = frame.reshape(14, 2, 14, 2, 16).transpose(0, 2, 1, 3, 4).reshape(196, -1)
    _, counts = np.unique(tokens, axis=0, return_counts=True)
    assert len(counts) == 28 and set(counts) == {7}
    aloha = np.asarray(tile(jnp.arange(700.0).reshape(1, 50, 14), (50, 14), LATENT))[0]
    # 784 = 700 + 84: each channel is the previous one, shifted by three rows.
    np.testing.assert_array_equal(aloha[:-3, :, 1], aloha[3:, :, 0])


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_slot_of_numbers_round_trips_and_touches_no_other(name):
    layout = parse(LAYOUTS[name])
    rng = np.random.default_rng(1)
    latents = jnp.asarray(rng.standard_normal((2, len(layout), 8, 8, 192)), jnp.float32)
    values = {
        n: jnp.asarray(rng.uniform(-1, 1, (2, *s.shape)), jnp.float32)
        for n, s in layout.numbers.items()
    }
    out = jax.jit(lambda l, v: inject(layout, l, v))(latents, values)
    for n, x in values.items():
        np.testing.assert_allclose(extract(layout, out, n), x, atol=1e-6)
    pictures = [i for i, s in enumerate(layout.slots) if not holds_numbers(s)]
    np.testing.assert_array_equal(out[:, pictures], latents[:, pictures])
    # Only the first slots, as for a policy.
    few = inject(layout, latents[:, : layout.conditional], {"proprio": values["proprio"]})
    np.testing.assert_array_equal(few[:, 1], out[:, 1])


def test_values_fill_a_frame_and_are_read_as_returns_between_zero_and_one():
    layout = parse(LAYOUTS["libero"])
    returns = jnp.asarray([0.0, 0.25, 1.0])
    latents = jnp.zeros((3, 9, 4, 4, 16))
    out = inject(layout, latents, {"value": value_target(returns)})
    np.testing.assert_array_equal(np.ptp(out[:, 8], axis=(1, 2, 3)), 0)
    np.testing.assert_array_equal(out[:, 8, 0, 0, 0], [-1, -0.5, 1])
    np.testing.assert_allclose(read_value(layout, out), returns, atol=1e-6)
    np.testing.assert_array_equal(read_value(layout, 3 * out), [0, 0, 1])  # clipped


def test_min_max_statistics_of_the_demonstrations_map_to_the_unit_box():
    """Checks section 4's 2 (x - min) / (max - min) - 1 per dimension; a constant one becomes 0
    instead of a division by zero."""
    rng = np.random.default_rng(2)
    x = rng.uniform(-3, 5, (50, 7)).astype(np.float32)
    x[:, 3] = 0.7
    pair = normalizers(statistics({"actions": [x], "proprio": [x]}), "min_max")["actions"]
    low, high = x.min(0), x.max(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        want = 2 * (x - low) / (high - low) - 1
    want[:, 3] = 0
    np.testing.assert_allclose(pair.forward(x), want, atol=1e-5)
    np.testing.assert_allclose(pair.inverse(pair.forward(x)), x, atol=1e-5)
    shape = (50, 7)
    through = untile(tile(jnp.asarray(pair.forward(x))[None], shape, LATENT), shape)[0]
    np.testing.assert_allclose(pair.inverse(np.asarray(through)), x, atol=1e-4)


def test_numbers_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="33 numbers .* of shape \\(2, 4, 4\\), which has 32"):
        tile(jnp.zeros((1, 11, 3)), (11, 3), (2, 4, 4))
