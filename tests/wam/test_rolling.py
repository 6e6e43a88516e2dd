"""Tests rolling: within the training length it equals sampling, beyond it a window moves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.helpers import precision, random_params

from wamjax.diffusion.flow import RectifiedFlow
from wamjax.models import dit
from wamjax.models.codec import PixelCodec
from wamjax.models.rope import rotate, video_rope
from wamjax.wam.slots import groups_of
from wamjax.wam.video.objective import Denoising
from wamjax.wam.video.rolling import moved, roll
from wamjax.wam.video.schemes import SCHEMES, slots_of

B, PICTURE, GRID = 2, (4, 4, 3), (2, 2)
FRAMES = {"blocks": 6, "forcing_causal": 3}  # three chunks of two, and of one


def make(scheme, layers=2, positions="rope", text="none", **options):
    frames = FRAMES.get(scheme, 4)
    network = dit.DiT(
        video_spec=dit.expert(24, 40, text=text),
        groups=groups_of(slots_of(SCHEMES[scheme], frames)),
        latent=(*GRID, 12),
        layers=layers,
        heads=2,
        head_dim=12,
        patch=1,
        classes=3,
        text=text,
        context_width=10 if text != "none" else 0,
        vocabulary=7 if text != "none" else 0,
        instruction_length=5,
        positions=positions,
        freq_dim=16,
    )
    return Denoising(
        network, PixelCodec(2), RectifiedFlow(), SCHEMES[scheme], frames, PICTURE,
        instruction_length=5, **{"steps": 2} | options,
    )  # fmt: skip


def parameters(objective, dtype=np.float32):
    return random_params(jax.eval_shape(objective.init, jax.random.key(0)), 1, dtype)


def condition_of(objective):
    rng = np.random.default_rng(0)
    sizes = {"label": 3, "instruction": 7}
    return {
        k: rng.integers(0, sizes[k], s.shape).astype(s.dtype)
        for k, s in objective.batch_spec(B).items()
        if k in sizes
    }


def clip(frames, seed=0):
    return np.random.default_rng(seed).standard_normal((B, frames, *GRID, 12))


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def rolled(objective, frames, params, given=None, window=0):
    key, condition = jax.random.key(5), condition_of(objective)
    return roll(objective, params, condition, key, frames, given, B, window)


@functools.partial(jax.jit, static_argnums=0)
def sampled(objective, params, given=None):
    return objective.sample(params, condition_of(objective), jax.random.key(5), given)


CASES = {
    "float32": (dict(scheme="blocks"), 0),
    "given": (dict(scheme="blocks"), 2),
    "two given": (dict(scheme="forcing_causal"), 2),
    "absolute positions": (dict(scheme="blocks", positions="both"), 2),
    "guided text": (dict(scheme="forcing_causal", guidance=2.0, text="both"), 1),
}


@pytest.mark.parametrize("case", CASES)
def test_rolling_within_the_training_length_equals_sampling(case):
    options, known = CASES[case]
    objective = make(**options)
    frames = objective.frames
    double = case != "float32"
    with precision(double):
        dtype = np.float64 if double else np.float32
        params = parameters(objective, dtype)
        given = clip(frames)[:, :known] if known else None
        want = sampled(objective, params, given)
        got = rolled(objective, frames, params, given)
        assert got.dtype == dtype and np.std(want) > 0.1
        np.testing.assert_allclose(got, want, atol=1e-12 if double else 5e-5)
        if case == "given":  # lists of layers, and a longer clip
            loose = objective.prepare(params)
            longer = rolled(objective, 2 * frames, loose, given)
            np.testing.assert_allclose(longer[:, :frames], want, atol=1e-12)
            assert np.all(np.isfinite(longer)) and np.std(longer[:, frames:]) > 0.1


@pytest.mark.parametrize("positions", ["rope", "both"])
def test_beyond_it_one_layer_sees_exactly_the_window(positions):
    """Keys of one layer depend on their own chunk, so the oracle is `Denoising.sample` on the last
    chunks as if they were a clip of their own; then the same with a smaller window."""
    with precision(True):
        objective = make("blocks", layers=1, positions=positions)
        params, size = parameters(objective, np.float64), objective.scheme.chunk
        total = objective.frames + 2 * size
        got = np.asarray(rolled(objective, total, params))
        for end in (objective.frames + size, total):
            window = got[:, end - objective.frames : end - size]
            made = _one_more(objective, params, window, end // size - 1)
            np.testing.assert_allclose(made, got[:, end - size : end], atol=1e-11)
        small = np.asarray(rolled(objective, total, params, window=1))
        made = _one_more(objective, params, small[:, -2 * size : -size], total // size - 1)
        np.testing.assert_allclose(made, small[:, -size:], atol=1e-11)
        assert np.abs(small - got).max() > 1e-3


def _one_more(objective, params, before, number):
    """Samples one chunk after clean frames by the plain sampler, with the noise of chunk
    `number`."""
    known = before.shape[1] // objective.scheme.chunk
    return _after(objective, known)(params, before, number)


@functools.cache
def _after(objective, known):
    """Returns its program for a number of clean chunks."""
    groups = objective.network.groups[: known + 1]
    network = objective.network.clone(groups=groups)
    short = dataclasses.replace(objective, network=network)
    shape = B, objective.scheme.chunk, *objective.network.latent

    @jax.jit
    def run(params, before, number):
        key, stream = jax.random.split(jax.random.fold_in(jax.random.key(5), number))
        noise = {groups[-1].name: jax.random.normal(jax.random.fold_in(stream, 0), shape)}
        sampler = short._sampler(params, short.condition(condition_of(short)), B)
        return sampler(short.split_given(before), noise, None, key)[0][groups[-1].name]

    return run


@pytest.mark.parametrize("style", ["pairs", "half"])
def test_moved_keys_are_those_of_the_new_positions(style):
    """Deeper layers differ, since their tokens have seen dropped frames."""
    with precision(True):
        keys = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 12, 24)))
        at, later = (
            rotate(keys, video_rope(range(s, s + 3), 2, 2, 24), style) for s in (0, 5)
        )  # fmt: skip
        np.testing.assert_allclose(moved(later, -5, style), at, atol=1e-13)
        np.testing.assert_allclose(moved(at, 5, style), later, atol=1e-13)
        assert np.abs(at - later).max() > 0.1
        turned = at.astype(jnp.float32)
        for _ in range(50):  # over a long window, rounding errors hardly accumulate
            turned = moved(turned, -1, style)
        np.testing.assert_allclose(turned, moved(at, -50, style), atol=3e-5)


def test_memory_does_not_grow_with_the_length():
    objective = make("forcing_causal", steps=1)
    params = parameters(objective)
    sizes = []
    for frames in (16, 64):
        program = rolled.lower(objective, frames, params, clip(1).astype(np.float32), 0)
        memory = program.compile().memory_analysis()
        frame = B * np.prod((*GRID, 12)) * 4
        sizes.append((memory.temp_size_in_bytes, memory.output_size_in_bytes, frames * frame))
    (small, out_small, want_small), (large, out_large, want_large) = sizes
    assert (out_small, out_large) == (want_small, want_large)
    # Without the result itself, which the scan stacks and which is then reordered.
    assert large - small <= 2 * (out_large - out_small) + 1024


def test_errors_say_what_is_wrong():
    def run(objective, frames=8, given=None, window=0):
        return roll(objective, {}, {}, jax.random.key(0), frames, given, B, window)

    for scheme in ("diffusion", "forcing", "image_to_video"):
        with pytest.raises(ValueError, match="causal scheme with independent levels"):
            run(make(scheme))
    with pytest.raises(ValueError, match="needs positions 'rope' or 'both', not 'sincos'"):
        run(make("blocks", positions="sincos"))
    blocks = make("blocks")
    with pytest.raises(ValueError, match="window = 3 must be less than the 3 chunks"):
        run(blocks, window=3)
    for frames, known in ((7, 0), (8, 1), (8, 8)):
        with pytest.raises(ValueError, match=f"{known} given frames and {frames} .* of 2"):
            run(blocks, frames, clip(8)[:, :known] if known else None)
