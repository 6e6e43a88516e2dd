"""Tests sampling from given noise, and its intermediate states, for every sampler and policy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wam import cosmos_tiny, tiny
from wam import test_autoregressive as tokens
from wam import test_denoising as pictures
from wam import test_rolling as rolls
from wam.test_policy import normalizers, observation

from wamjax.wam.cosmos_policy.injection import extract
from wamjax.wam.video.autoregressive import pick
from wamjax.wam.video.objective import streams
from wamjax.wam.video.rolling import roll

KEY = jax.random.key(3)
B = 2


def test_fast_wam_starts_from_given_noise_and_shows_its_way():
    objective, params = tiny.fast_wam("idm", steps=2), tiny.params("idm")
    first = np.asarray(tiny.CODEC.encode(observation()["video"]))

    @jax.jit
    def run(params, key):
        seen = params, normalizers(2.0), observation()
        noise = {g: objective._noise(g, first, key, None) for g in ("future", "action")}
        return (
            noise,
            objective.policy(*seen, None, "imagine", noise),
            objective.sample(*seen, key, "imagine", states=True),
            objective.sample(*seen, None, "video", noise),
            objective.imagine(*seen, None, noise),
        )

    noise, given, way, video, shown = jax.device_get(run(params, KEY))
    for group, states in way.items():
        assert states.shape == (3, *noise[group].shape)
        np.testing.assert_array_equal(states[0], noise[group])
    np.testing.assert_allclose(way["action"][-1] / 2, given, rtol=1e-5, atol=1e-6)  # robot units
    np.testing.assert_allclose(way["future"][-1], video["future"], atol=1e-5)
    decoded = np.asarray(tiny.CODEC.decode(np.concatenate([first, video["future"]], axis=1)))
    assert np.ptp(decoded[:, 1:]) > 100
    np.testing.assert_array_equal(shown, decoded)


def test_invalid_noise_is_an_error():
    objective, params = tiny.fast_wam("joint", steps=1), tiny.params("joint")

    def act(*args, **kwargs):
        policy = functools.partial(objective.policy, params, normalizers(), observation(), *args)
        return jax.eval_shape(functools.partial(policy, **kwargs))

    noise = {"future": jnp.zeros((B, 2, 4, 4, 12)), "action": jnp.zeros((B, 3, 2))}
    with pytest.raises(KeyError, match="noise for 'future' is missing, .* noise for .'action'"):
        act(None, noise={"action": noise["action"]})
    with pytest.raises(ValueError, match=r"'action'\] has shape \(2, 3, 1\), .* \(2, 3, 2\)"):
        act(None, noise=noise | {"action": noise["action"][..., :1]})
    with pytest.raises(ValueError, match=r"give a key, or noise\['future'\] of shape"):
        act(None)


def test_cosmos_policy_acts_from_given_noise_and_shows_its_way():
    objective, params = cosmos_tiny.objective(steps=2), cosmos_tiny.params()
    asked = params, cosmos_tiny.normalizers(), cosmos_tiny.observation()

    @jax.jit
    def run(params, key):
        asked = params, cosmos_tiny.normalizers(), cosmos_tiny.observation()
        noise = jax.random.normal(key, (B, 9, *objective.latent))
        now = objective.observe(*asked)
        way = objective.act(params, now, noise=noise, states=True)
        return objective.policy(*asked, key), way, now.latents, noise

    actions, way, latents, noise = jax.device_get(run(params, KEY))
    assert way.shape == (3, *noise.shape)
    want = 2 * np.asarray(extract(objective.layout, way[-1], "action"))  # the normaliser's scale
    np.testing.assert_allclose(actions, want, atol=1e-5)
    given = slice(0, objective.layout.conditional)
    for states in way:
        np.testing.assert_array_equal(states[:, given], latents[:, given])
    # It starts at level sigma / (1 + sigma) of noise of this size.
    np.testing.assert_allclose(way[0, :, 4:], 80 / 81 * noise[:, 4:], rtol=1e-6)
    with pytest.raises(ValueError, match="give a key, or noise of shape"):
        jax.eval_shape(lambda: objective.act(params, objective.observe(*asked)))


@pytest.mark.parametrize("scheme, known", [("diffusion", 0), ("blocks", 2)])
def test_clips_start_from_given_noise(scheme, known):
    objective = rolls.make(scheme, steps=2, text="none")
    params, condition = rolls.parameters(objective), rolls.condition_of(objective)
    frames = objective.frames
    given = rolls.clip(frames)[:, :known].astype(jnp.float32) if known else None
    noise = rolls.clip(frames - known, 1).astype(jnp.float32)

    @jax.jit
    def run(noise):
        sample = functools.partial(objective.sample, params, condition, None, given, B, noise)
        return sample(), sample(states=True)

    made, way = run(noise)
    assert way.shape == (3, *made.shape)
    np.testing.assert_allclose(way[-1], made, atol=1e-5)
    np.testing.assert_array_equal(way[0, :, known:], noise)
    if known:
        np.testing.assert_array_equal(way[1, :, :known], given)
        again = jax.jit(
            lambda n: roll(objective, params, condition, None, frames, given, B, noise=n)
        )(noise)
        np.testing.assert_allclose(again, made, atol=5e-5)
        with pytest.raises(ValueError, match="noise has shape .* the frames to sample have"):
            roll(objective, params, condition, None, frames, given, B, noise=noise[:, :2])
    with pytest.raises(ValueError, match="noise has shape .* the frames to sample have"):
        objective.sample(params, condition, None, given, B, noise[..., :3])
    with pytest.raises(ValueError, match="give a key, or noise of shape"):
        objective.sample(params, condition, None, given, B)


def test_noise_of_ancestral_steps_is_given_as_well():
    objective = pictures.make(**pictures.CASES["ddpm"])
    params, condition = pictures.parameters(objective), {"label": np.zeros(B, np.int32)}
    shape = B, 1, *objective.network.latent

    def sample(o, *noise):
        return jax.eval_shape(lambda p: o.sample(p, condition, None, None, B, *noise), params)

    noise = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match="'ancestral' adds noise at every step: give a key or"):
        sample(objective, noise)

    @jax.jit
    def drawn(key):
        """Makes the sampler's draws outside of it."""
        key, stream = streams(key, 0)
        keys = jax.vmap(lambda k: jax.random.split(k, 1)[0])(jax.random.split(key, objective.steps))
        fresh = jax.vmap(lambda k: jax.random.normal(k, shape))(keys)
        return jax.random.normal(jax.random.fold_in(stream, 0), shape), fresh

    noise, fresh = jax.device_get(drawn(KEY))
    want = jax.jit(lambda p, k: objective.sample(p, condition, k, None, B))(params, KEY)
    got = jax.jit(
        lambda p, n, f: objective.sample(p, condition, None, None, B, n, False, f)
    )(params, noise, fresh)  # fmt: skip
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    still = dataclasses.replace(objective, solver="ddim")
    with pytest.raises(ValueError, match="'ddim' adds no noise at its steps: leave out"):
        sample(still, noise, False, fresh)
    with pytest.raises(ValueError, match="fresh has shape .* the frames to sample have"):
        sample(objective, noise, False, fresh[1:])


def test_tokens_are_drawn_by_given_uniforms():
    """Uses the inverse of the distribution, which any implementation can reproduce."""
    with np.errstate(divide="ignore"):
        logits = np.log(np.float32([[0.1, 0.2, 0.3, 0.4], [0.7, 0.0, 0.2, 0.1]]))
    draw = jax.jit(lambda u, top_k: pick(logits, None, top_k=top_k, uniform=u), static_argnums=1)
    for uniform, want in ((0.0, [0, 0]), (0.29, [1, 0]), (0.31, [2, 0]), (0.75, [3, 2]),
                          (0.9999999, [3, 3])):  # fmt: skip
        got = draw(np.full(2, np.float32(uniform)), 0)
        assert got.tolist() == want, uniform
    kept = [draw(np.full(2, np.float32(u)), 1).tolist() for u in (0.0, 0.9999999)]
    assert kept == [[3, 0], [3, 0]]

    objective = tokens.make(temperature=0.8)
    params = tokens.parameters(objective)
    condition = tokens.condition_of(tokens.batch_of(objective))
    b, (t, h, w) = len(condition["label"]), objective.network.grid
    uniforms = np.random.default_rng(0).uniform(size=(b, t, h, w)).astype(np.float32)
    sample = jax.jit(lambda p, u: objective.sample(p, condition, None, uniforms=u))
    made = sample(params, uniforms)
    # Each token from those before it, recomputed in one pass.
    flat = np.asarray(made).reshape(b, -1)
    odds = np.exp(np.asarray(jax.jit(objective.logits)(params, condition, flat), np.float64) / 0.8)
    p = (odds / odds.sum(axis=-1, keepdims=True)).cumsum(axis=-1)
    u = uniforms.reshape(b, -1)
    want = (p <= u[..., None]).sum(axis=-1)
    assert (flat == want).mean() > 0.98 and len(np.unique(flat)) > 4  # ties by rounding
    with pytest.raises(ValueError, match="give a key, or uniforms of shape"):
        objective.sample(params, condition, None)
    with pytest.raises(ValueError, match="uniforms has shape .* the new tokens have"):
        objective.sample(params, condition, None, uniforms=uniforms[:, :1])
