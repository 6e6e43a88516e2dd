"""Tests autoregressive video: drawing tokens, the loss, cached sampling against recomputation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models.helpers import precision, random_params

from wamjax.models import blocks
from wamjax.models import codec as codecs
from wamjax.models.autoregressive import AutoregressiveTransformer
from wamjax.models.blocks import ExpertSpec
from wamjax.models.palette import Palette
from wamjax.models.vae.bottleneck import FiniteScalar
from wamjax.wam.video.autoregressive import Autoregressive, pick

B, CODES, FRAMES, PICTURE = 3, 13, 3, (4, 4, 3)


def palette(seed=0):
    table = np.random.default_rng(seed).integers(0, 256, (CODES, 12)).astype(np.uint8)
    return Palette(2, codes=table.tobytes())


def make(codec=None, frames=FRAMES, picture=PICTURE, layers=2, positions="rope", **options):
    codec = codec or palette()
    network = AutoregressiveTransformer(
        ExpertSpec("video", 24, 40, **blocks.GPT),
        codec.vocabulary,
        codec.shape(frames, *picture[:2])[:3],
        layers,
        heads=2,
        head_dim=12,
        positions=positions,
        classes=3,
        vocabulary=7,
        instruction_length=4,
    )
    return Autoregressive(network, codec, frames, picture, **options)


def batch_of(objective, b=B, seed=0):
    rng = np.random.default_rng(seed)
    high = {"video": 256, "instruction": 7, "label": 3}
    return {
        k: rng.integers(0, high[k], s.shape).astype(s.dtype)
        for k, s in objective.batch_spec(b).items()
    }


def condition_of(batch):
    return {k: v for k, v in batch.items() if k != "video"}


def parameters(objective, dtype=np.float32):
    return random_params(jax.eval_shape(objective.init, jax.random.key(0)), 1, dtype)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def sample(objective, params, condition, given=None, frames=0, count=None):
    key = jax.random.key(7)
    return objective.sample(params, condition, key, given, count, frames)


# ---- the draw ----

LOGITS = jnp.log(jnp.array([[0.05, 0.4, 0.25, 0.1, 0.2], [0.6, 0.1, 0.1, 0.1, 0.1]]))


@pytest.mark.parametrize(
    "options, kept",
    [
        ({}, ([1, 1, 1, 1, 1], [1, 1, 1, 1, 1])),
        (dict(top_k=2), ([0, 1, 1, 0, 0], [1, 1, 1, 1, 1])),  # ties with the last are kept
        (dict(top_k=99), ([1, 1, 1, 1, 1], [1, 1, 1, 1, 1])),
        (dict(top_p=0.6), ([0, 1, 1, 0, 0], [1, 0, 0, 0, 0])),
        (dict(top_p=0.0), ([0, 1, 0, 0, 0], [1, 0, 0, 0, 0])),
        (dict(top_k=3, top_p=0.7), ([0, 1, 1, 0, 0], None)),
        (dict(temperature=0.5, top_p=0.8), ([0, 1, 1, 0, 0], [1, 0, 0, 0, 0])),
    ],
)
def test_tokens_are_drawn_from_what_is_kept_in_proportion(options, kept):
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.jit(jax.vmap(lambda key: pick(LOGITS, key, **options)))(keys)
    p = np.exp(np.asarray(LOGITS)) ** (1 / options.get("temperature", 1))
    for row, mask in enumerate(kept):
        if mask is not None:
            want = p[row] * mask / np.sum(p[row] * mask)
            got = np.bincount(drawn[:, row], minlength=5) / len(keys)
            np.testing.assert_allclose(got, want, atol=0.03)
            assert not np.any(got[np.array(mask) == 0])


def test_temperature_zero_takes_the_most_likely():
    np.testing.assert_array_equal(pick(LOGITS, jax.random.key(0), 0, 1, 0.1), [1, 0])


# ---- the objective ----


def test_loss_is_the_mean_of_the_negative_log_likelihood_of_the_next_token():
    objective = make()
    params, batch = parameters(objective), batch_of(objective)
    loss, metrics = jax.jit(objective.loss)(params, batch, jax.random.key(0))
    ids = np.asarray(objective.codec.tokens(batch["video"])).reshape(B, -1)
    logits = np.asarray(jax.jit(objective.logits)(params, batch, ids), np.float64)
    likelihood = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -np.take_along_axis(likelihood, ids[..., None], axis=-1).mean()
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(-1) == ids).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["usage"], len(np.unique(ids)) / CODES, rtol=1e-6)
    assert 1 < metrics["perplexity"] <= CODES


def test_every_parameter_has_a_gradient_and_training_learns_clips_by_heart():
    objective = make()
    params, batch = jax.jit(objective.init)(jax.random.key(0)), batch_of(objective)
    tx = optax.adam(1e-2)
    grad = jax.value_and_grad(lambda p: objective.loss(p, batch, None)[0])

    def step(carry, _):
        params, state = carry
        loss, grads = grad(params)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state), loss

    @jax.jit
    def train(params):
        return jax.lax.scan(step, (params, tx.init(params)), None, 40)

    (_, state), losses = train(params)
    np.testing.assert_allclose(losses[0], np.log(CODES), rtol=0.2)  # nothing is learned yet
    assert losses[-1] < 0.3 * losses[0]
    for path, leaf in jax.tree_util.tree_leaves_with_path(state[0].mu):
        assert np.any(leaf), jax.tree_util.keystr(path)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_cached_sampling_equals_recomputation(temperature):
    """The oracle recomputes the whole causal network before each token."""
    with precision(True):
        objective = make(temperature=temperature, top_p=0.9 if temperature else 1.0)
        params, batch = parameters(objective, np.float64), batch_of(objective)
        condition = condition_of(batch)
        given = np.asarray(objective.codec.tokens(batch["video"]))[:, :1]


        @jax.jit
        def draw(params, condition, ids, i, key):
            row = objective.logits(params, condition, ids)[:, i]
            return pick(row, key, temperature, 0, objective.top_p)

        # At temperature zero, only the draw differs.
        for known in (0, 1) if temperature else (1,):
            got = sample(objective, params, condition, given if known else None)
            ids = np.zeros((B, FRAMES * 4), int)
            ids[:, : 4 * known] = np.asarray(given).reshape(B, -1)[:, : 4 * known]
            keys = jax.random.split(jax.random.key(7), 4 * (FRAMES - known))
            for i in range(4 * known, 4 * FRAMES):
                ids[:, i] = draw(params, condition, ids, i, keys[i - 4 * known])
            np.testing.assert_array_equal(got.reshape(B, -1), ids)
            if known:
                np.testing.assert_array_equal(got[:, :1], given)
        if temperature:
            again = sample(objective, objective.prepare(params), condition, given)
            np.testing.assert_array_equal(again, got)
        assert len({tuple(row) for row in ids.tolist()}) == B


def test_a_rolled_clip_begins_like_one_of_training_and_goes_on_within_the_window():
    """One layer: its keys depend on their tokens alone, so the moved cache is exact, and the
    oracle recomputes from the frames that are left, placed at the start."""
    with precision(True):
        objective = make(layers=1, temperature=0.0)
        params, batch = parameters(objective, np.float64), batch_of(objective)
        condition = condition_of(batch)
        given = np.asarray(objective.codec.tokens(batch["video"]))[:, :1]
        total = 2 * FRAMES
        got = np.asarray(sample(objective, params, condition, given, total))
        short = sample(objective, params, condition, given)
        np.testing.assert_array_equal(got[:, :FRAMES], short)
        logits = jax.jit(objective.logits)
        for frame in range(FRAMES, total):
            window = got[:, frame - FRAMES + 1 : frame + 1].reshape(B, -1)
            said = np.asarray(logits(params, condition, window)).argmax(-1)
            # The first token of a frame was drawn before the window moved, unlike in the oracle.
            np.testing.assert_array_equal(window[:, -3:], said[:, -3:])
        loose = sample(objective, objective.prepare(params), condition, given, total)
        np.testing.assert_array_equal(loose, got)


def test_a_trained_codec_makes_the_tokens():
    codec = codecs.small(FiniteScalar((3, 2)), 2, 1, 8)
    objective = make(codec, frames=2)
    params, batch = parameters(objective), batch_of(objective)
    step = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    (loss, metrics), grads = jax.device_get(step(params, batch, jax.random.key(0)))
    assert all(np.all(g == 0) for g in jax.tree.leaves(grads["codec"]))
    assert np.isfinite(loss) and metrics["usage"] <= 1

    @jax.jit
    def run(params, batch):
        bound = codec.bind(params["codec"])
        given = bound.tokens(batch["video"])[:, :1]
        ids = objective.sample(params, condition_of(batch), jax.random.key(1), given)
        return ids, bound.decode(bound.from_tokens(ids))

    assert jax.eval_shape(run, params, batch)[1].shape == batch["video"].shape
    ids = np.asarray(jax.jit(lambda *args: run(*args)[0])(params, batch))
    assert ids.shape == (B, 2, 2, 2) and 0 <= ids.min() and ids.max() < 6


def test_errors_say_what_is_wrong():
    objective = make()
    params, batch = parameters(objective), batch_of(objective)
    with pytest.raises(KeyError, match="has no 'video'"):
        objective.loss(params, {"x": np.zeros(2)}, None)
    with pytest.raises(ValueError, match=r"batch\['label'\] has shape \(3, 1\)"):
        objective.loss(params, batch | {"label": batch["label"][:, None]}, None)
    with pytest.raises(ValueError, match="13 codes.*from 12"):
        network = objective.network.clone(codes=12)
        dataclasses.replace(objective, network=network)
    given = objective.codec.tokens(batch["video"])
    with pytest.raises(ValueError, match="3 given frames must be fewer than the 3"):
        objective.sample(params, condition_of(batch), jax.random.key(0), given)
    with pytest.raises(ValueError, match="train with model.positions='rope'"):
        make(positions="learned").sample(params, {}, jax.random.key(0), given, frames=4)
    with pytest.raises(ValueError, match="needs a condition, given frames or a count"):
        objective.sample(params, {}, jax.random.key(0))
