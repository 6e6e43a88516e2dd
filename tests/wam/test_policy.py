"""Tests acting: the cache is exact, layers may be unstacked, and normalisers are applied."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wam import tiny

KEY = jax.random.key(3)


class Affine:
    """Stands in for a `Normalizer`."""

    def __init__(self, scale=1.0):
        self.scale = scale

    def forward(self, x):
        return x * self.scale

    def inverse(self, x):
        return x / self.scale


def observation(size=2):
    batch = tiny.batch(size)
    return {k: batch[k] for k in ("proprio", "instruction")} | {"video": batch["video"][:, :1]}


def normalizers(actions=1.0, proprio=1.0):
    return {"actions": Affine(actions), "proprio": Affine(proprio)}


@pytest.mark.parametrize("variant, mode, solver", [
    ("joint", "joint", "heun"),
    ("optional_idm", "direct", "euler"),
    ("optional_idm", "imagine", "euler"),
    ("ladder", "anticipate", "euler"),
    ("ladder", "imagine:1", "euler"),
])  # fmt: skip
def test_cache_and_unstacked_layers_change_nothing(variant, mode, solver):
    make = functools.partial(tiny.fast_wam, variant, solver=solver, steps=2)
    cached, uncached = make(), make(use_cache=False)

    @jax.jit
    def run(params):
        act = lambda o, p: o.policy(p, normalizers(), observation(), KEY, mode)  # noqa: E731
        prepared = cached.prepare(params)
        assert "blocks" not in prepared
        return act(uncached, params), act(cached, prepared)

    # Both at once, since `test_parity` compares stacked layers with a cache with torch.
    want, got = run(tiny.params(variant))
    assert got.shape == (2, tiny.CHUNK, tiny.ACTION) and np.std(want) > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-5)


def test_modes_of_one_checkpoint_differ_in_what_actions_see():
    """Stopping at the last step equals imagining to the end; stopping earlier does not."""
    objective, params = tiny.fast_wam("ladder", steps=2), tiny.params("ladder")
    rng = np.random.default_rng(0)
    noise = {"action": rng.standard_normal((2, tiny.CHUNK, tiny.ACTION), np.float32),
             "future": rng.standard_normal((2, tiny.FRAMES - 1, 4, 4, 12), np.float32)}  # fmt: skip

    @jax.jit
    def run(params):
        modes = ("direct", "anticipate", "imagine:1", "imagine:2", "imagine")
        return {
            mode: objective.policy(params, normalizers(), observation(), None, mode, noise)
            for mode in modes
        }

    got = run(params)
    np.testing.assert_array_equal(got["imagine:2"], got.pop("imagine"))
    alike = [np.abs(x - y).max() < 1e-3 for x, y in itertools.combinations(got.values(), 2)]
    assert not any(alike)
    tokens = rng.standard_normal(params["video"]["anticipation"].shape, np.float32)
    changed = run(params | {"video": params["video"] | {"anticipation": tokens}})
    moved = [mode for mode in got if np.abs(changed[mode] - got[mode]).max() > 1e-3]
    assert moved == ["anticipate"]
    for mode in ("imagine:0", "imagine:3", "imagine:x", "anticipate:1", "imagination"):
        with pytest.raises(ValueError, match="imagine:K"):
            objective.check_mode(mode)


@functools.cache
def direct():
    objective = tiny.fast_wam("fast", steps=1)

    @jax.jit
    def run(params, observation, key, actions, proprio):
        return objective.policy(params, normalizers(actions, proprio), observation, key)

    return lambda *args: np.asarray(run(tiny.params("fast"), *args))


def test_observation_key_and_normalisers_all_matter():
    o = observation()
    base = direct()(o, KEY, 1.0, 1.0)
    np.testing.assert_array_equal(base, direct()(o, KEY, 1.0, 1.0))
    np.testing.assert_allclose(direct()(o, KEY, 4.0, 1.0), base / 4, rtol=1e-5, atol=1e-6)
    doubled = direct()(o, KEY, 1.0, 2.0)
    same = direct()(o | {"proprio": 2 * o["proprio"]}, KEY, 1.0, 1.0)
    np.testing.assert_allclose(doubled, same, rtol=1e-5, atol=1e-6)
    others = [
        doubled,
        direct()(o, jax.random.key(4), 1.0, 1.0),
        direct()(o | {"video": 255 - o["video"]}, KEY, 1.0, 1.0),
        direct()(o | {"instruction": (o["instruction"] + 1) % 11}, KEY, 1.0, 1.0),
    ]
    for other in others:
        assert np.abs(other - base).max() > 1e-3
    # examples do not affect each other
    changed = o | {"video": tiny.put(o["video"], 1, 0)}
    got = direct()(changed, KEY, 1.0, 1.0)
    np.testing.assert_array_equal(got[0], base[0])
    assert np.abs(got[1] - base[1]).max() > 1e-3


def test_imagined_video_starts_with_the_observed_frame():
    objective = tiny.fast_wam("idm", steps=1)
    imagine = jax.jit(lambda p, key: objective.imagine(p, normalizers(), observation(), key))
    run = lambda key: np.asarray(imagine(tiny.params("idm"), key))  # noqa: E731
    video = run(KEY)
    assert video.shape == (2, tiny.FRAMES, *tiny.PICTURE, 3) and video.dtype == jnp.uint8
    np.testing.assert_array_equal(video[:, 0], observation()["video"][:, 0])
    assert np.any(video[:, 1:] != run(jax.random.key(4))[:, 1:])


def test_the_pixel_codec_inverts_and_keeps_frames_apart():
    video = tiny.batch(2)["video"]
    latents = tiny.CODEC.encode(video)
    assert latents.shape == (2, *tiny.CODEC.shape(tiny.FRAMES, *tiny.PICTURE))
    assert latents.min() >= -1 and latents.max() <= 1
    np.testing.assert_array_equal(tiny.CODEC.decode(latents), video)
    np.testing.assert_array_equal(tiny.CODEC.encode(video[:, :1]), latents[:, :1])
    pixels = np.asarray(video[0, 1, 2:4, 4:6], np.float32) / 127.5 - 1  # one 2 x 2 square
    np.testing.assert_allclose(latents[0, 1, 1, 2], pixels.ravel(), atol=1e-6)


def test_errors():
    fast, params = tiny.fast_wam("fast"), tiny.params("fast")
    with pytest.raises(ValueError, match="fast acts in modes direct, not 'imagine'"):
        fast.policy(params, normalizers(), observation(), KEY, "imagine")
    with pytest.raises(ValueError, match="'no_cotrain' was not trained to predict video"):
        tiny.fast_wam("no_cotrain").imagine(params, normalizers(), observation(), KEY)
    clip = observation() | {"video": tiny.batch(2)["video"]}
    with pytest.raises(ValueError, match="acts on one frame, video has 3"):
        fast.policy(params, normalizers(), clip, KEY)
