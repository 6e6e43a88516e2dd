"""Tests bottlenecks against closed forms and brute force, and the objective that trains codecs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wamjax.models import codec as codecs
from wamjax.models.vae.bottleneck import CodeBook, FiniteScalar, Gaussian, kl_to_normal
from wamjax.models.vae.bottleneck import health as measure
from wamjax.models.vae.training import CodecObjective, psnr


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_kl_is_the_expected_log_ratio():
    mean, log_variance = 0.7, -1.2
    sigma = np.exp(0.5 * log_variance)
    x = np.linspace(mean - 12 * sigma, mean + 12 * sigma, 20001)
    density = np.exp(-0.5 * ((x - mean) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    ratio = -0.5 * ((x - mean) / sigma) ** 2 - np.log(sigma) + 0.5 * x**2
    want = np.trapezoid(density * ratio, x)
    np.testing.assert_allclose(kl_to_normal(mean, log_variance), want, rtol=1e-5)
    assert kl_to_normal(0.0, 0.0) == 0


def test_the_log_variance_is_clamped():
    h = jnp.array([[1.0, 1e6], [2.0, -1e6]])
    z, loss, _ = Gaussian(1).train({}, h, jax.random.key(0))
    assert np.isfinite(loss) and np.isfinite(z).all()
    np.testing.assert_allclose(z[1], 2.0, rtol=1e-5)


@pytest.mark.parametrize("levels", [(8, 5, 5), (2, 3), (4, 4, 4, 4)])
def test_finite_scalar_codes_are_all_reached_and_invert(levels):
    fsq = FiniteScalar(levels)
    ids = jnp.arange(fsq.vocabulary)
    z = fsq.lookup({}, ids)
    assert len(np.unique(z, axis=0)) == fsq.vocabulary == np.prod(levels)
    for channel, count in zip(np.asarray(z).T, levels, strict=True):
        values = np.unique(channel)
        assert len(values) == count and values[0] == -1 and 0 in values
        np.testing.assert_allclose(np.diff(values), 1 / (count // 2), rtol=1e-6)
    # A wide input reaches every code, and a code's latents are its entry in the table.
    h = jnp.asarray(
        20 * np.random.default_rng(0).uniform(-1, 1, (20 * fsq.vocabulary + 500, len(levels)))
    )
    h = jnp.concatenate([h, draw(20 * fsq.vocabulary + 500, len(levels))])
    got = fsq.ids({}, h)
    assert set(np.asarray(got).tolist()) == set(range(fsq.vocabulary))
    np.testing.assert_allclose(fsq.latents({}, h), fsq.lookup({}, got), atol=1e-6)


def test_finite_scalar_of_zero_is_zero_with_the_gradient_of_the_bound():
    fsq = FiniteScalar((8, 5))
    np.testing.assert_array_equal(fsq.latents({}, jnp.zeros((1, 2))), 0)
    h = jnp.array([0.3, -0.4])
    got = jax.grad(lambda h: fsq.latents({}, h).sum())(h)
    half = np.array([7, 4]) * (1 + 1e-3) / 2
    shift = np.arctanh(np.array([0.5, 0]) / half)
    want = half / np.array([4, 2]) * (1 - np.tanh(np.asarray(h) + shift) ** 2)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_code_is_the_nearest_and_gradients_go_straight_through():
    vq = CodeBook(11, 4)
    params, h = vq.init(jax.random.key(0)), draw(5, 3, 4, seed=1)

    def sphere(x):
        return np.asarray(x) / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True))

    codes = sphere(params["embedding"])
    distance = np.square(sphere(h)[..., None, :] - codes).sum(axis=-1)
    want = distance.argmin(axis=-1)
    np.testing.assert_array_equal(vq.ids(params, h), want)
    (z, loss, metrics), latents = jax.jit(
        lambda p, h: (vq.train(p, h, jax.random.key(0)), vq.latents(p, h))
    )(params, h)
    np.testing.assert_allclose(z, codes[want], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(latents, codes[want], rtol=1e-5)
    nearest = distance.min(axis=-1).mean() / 4
    np.testing.assert_allclose(metrics["quantisation"], nearest, rtol=1e-5)
    logits = (sphere(h) @ codes.T / 4 / vq.temperature).reshape(15, 11).astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    each = -(p * np.log(np.maximum(p, 1e-300))).sum(axis=-1).mean()
    gap = each + (p.mean(axis=0) * np.log(p.mean(axis=0))).sum()
    np.testing.assert_allclose(loss, 1.25 * nearest + vq.entropy * gap, rtol=1e-4)

    weights = draw(5, 3, 4, seed=2)
    # Without the entropy term the loss moves the codes that were used and no others.
    bare = CodeBook(11, 4, entropy=0.0)

    @jax.jit
    def gradients(params, h):
        got = jax.grad(lambda h: jnp.sum(weights * vq.train(params, h, None)[0]))(h)
        norm = lambda h: jnp.sqrt(jnp.mean(h * h, -1, keepdims=True))  # noqa: E731
        straight = jax.grad(lambda h: jnp.sum(weights * h / norm(h)))(h)
        return got, straight, jax.grad(lambda p: bare.train(p, h, None)[1])(params)["embedding"]

    got, straight, grad = gradients(params, h)
    np.testing.assert_allclose(got, straight, rtol=1e-4, atol=1e-5)
    moved = np.flatnonzero(np.abs(grad).max(axis=-1) > 0)
    np.testing.assert_array_equal(moved, np.unique(want))


def test_the_entropy_term_spreads_a_code_book():
    """Encoder outputs lie in a narrow cone, so without the term a few codes represent all."""
    h = jnp.asarray([3.0, 0, 0, 0]) + 0.3 * draw(256, 4)

    @functools.partial(jax.jit, static_argnums=0)
    def used(vq):
        params = {"codes": vq.init(jax.random.key(0)), "h": h}
        tx = optax.adam(1e-2)

        def step(carry, _):
            grads = jax.grad(lambda p: vq.train(p["codes"], p["h"], None)[1])(carry[0])
            updates, state = tx.update(grads, carry[1])
            return (optax.apply_updates(carry[0], updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=100)
        return measure(vq.ids(params["codes"], params["h"]), vq.codes)

    spread, bare = (used(CodeBook(32, 4, entropy=weight)) for weight in (0.1, 0.0))
    assert spread["usage"] > 3 * bare["usage"] and spread["perplexity"] > 2 * bare["perplexity"]


def test_health_of_a_code_book():
    health = jax.jit(measure, static_argnums=1)
    even = health(np.arange(12).reshape(3, 4), 12)
    assert even["usage"] == 1
    np.testing.assert_allclose(even["perplexity"], 12, rtol=1e-5)
    collapsed = health(np.full((3, 4), 5), 12)
    np.testing.assert_allclose(collapsed["usage"], 1 / 12, rtol=1e-6)
    np.testing.assert_allclose(collapsed["perplexity"], 1, rtol=1e-5)
    skewed = health(np.array([0, 0, 0, 1]), 4)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    np.testing.assert_allclose(skewed["perplexity"], np.exp(entropy), rtol=1e-5)


def squares(seed, size=8, frames=3):
    """Returns a bright square moving over a dark background: uint8 (size, frames, 8, 8, 3)."""
    rng = np.random.default_rng(seed)
    x = np.full((size, frames, 8, 8, 3), 30, np.uint8)
    for clip, (row, column) in zip(x, rng.integers(0, 4, (size, 2)), strict=True):
        for t, frame in enumerate(clip):
            frame[row : row + 4, column + t // 2 : column + t // 2 + 4] = (220, 60, 120)
    return x


def drawn(abstract):
    """Draws parameters by the law of `objective.init`, which takes long to compile."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        x = rng.standard_normal(leaf.shape).astype(leaf.dtype)
        name = path[-1].key
        if name == "kernel":
            return x / np.sqrt(np.prod(leaf.shape[:-1])).astype(leaf.dtype)
        return x if name == "embedding" else np.full_like(x, name == "scale")

    return jax.tree_util.tree_map_with_path(draw, abstract)


@pytest.mark.parametrize(
    "bottleneck, temporal",
    [(Gaussian(6), 2), (FiniteScalar((8, 8, 5, 5)), 1), (CodeBook(32, 6), 1)],
    ids=lambda b: type(b).__name__,
)
def test_codecs_learn_a_batch(bottleneck, temporal):
    codec = codecs.small(bottleneck, 2 * temporal, temporal, 8)
    objective = CodecObjective(codec, 3, (8, 8))
    batch = {"video": squares(0), "actions": np.zeros((8, 3))}
    assert objective.batch_spec(8)["video"].shape == batch["video"].shape
    params = drawn(jax.eval_shape(objective.init, jax.random.key(0)))
    tx = optax.adam(5e-3)

    @jax.jit
    def step(params, state, key):
        grad_of = jax.value_and_grad(objective.loss, has_aux=True)
        (loss, metrics), grads = grad_of(params, batch, key)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, metrics, grads

    zeros = functools.partial(jax.tree.map, lambda x: np.zeros(x.shape, x.dtype))
    state, history = zeros(jax.eval_shape(tx.init, params)), []
    for key in jax.random.split(jax.random.key(0), 50):
        params, state, metrics, grads = step(params, state, key)
        history.append(metrics["psnr"])
        if len(history) == 1:
            assert all(np.any(g) for g in jax.tree.leaves(grads))
    flat = np.square((np.median(batch["video"], axis=(0, 1)) - batch["video"]) / 127.5)
    assert np.mean(history[-5:]) > psnr(flat.mean()) + 2
    assert metrics["reconstruction"] > 0
    assert ("kl" in metrics) == isinstance(bottleneck, Gaussian)
    assert ("perplexity" in metrics) != isinstance(bottleneck, Gaussian)


def test_the_objective_refuses_clips_that_do_not_divide():
    codec = codecs.small(Gaussian(4), 4, 2, 8)
    with pytest.raises(ValueError, match="4 frames"):
        CodecObjective(codec, 4, (8, 8)).batch_spec(1)
