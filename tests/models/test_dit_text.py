"""Tests the text encoder trained with a DiT, and what each route can read of a caption."""

import jax
import numpy as np
import pytest
from models.helpers import random_params

from wamjax.models import blocks, dit
from wamjax.models.blocks import ExpertSpec
from wamjax.models.shell import GroupSpec
from wamjax.models.text import ContextEncoder
from wamjax.models.visibility import bidirectional

LENGTH, WIDTH = 6, 16
IDS = np.array([[1, 2, 3, 0, 0, 0], [3, 2, 1, 0, 0, 0], [1, 2, 3, 4, 5, 6], [0] * 6], np.int32)


@pytest.fixture(scope="module")
def encoder():
    net = ContextEncoder(vocabulary=9, width=WIDTH, length=LENGTH, layers=2, heads=2)
    params = random_params(jax.eval_shape(net.init, jax.random.key(0), IDS)["params"], 1)
    return net, params


def test_words_see_each_other_and_no_padding(encoder):
    net, params = encoder
    run = jax.jit(lambda p: net.apply({"params": p}, IDS))
    out = np.asarray(run(params))
    assert out.shape == (4, LENGTH, WIDTH)
    np.testing.assert_array_equal(out[:2, 3:], 0)
    np.testing.assert_array_equal(out[3], 0)
    # The embedding of the first word depends on the other words and on their order.
    assert np.abs(out[0, 0] - out[2, 0]).max() > 0.1 < np.abs(out[0, 0] - out[1, 2]).max()
    changed = jax.tree.map(np.array, params)
    changed["words"]["embedding"][0] += 1  # the row of padding
    np.testing.assert_array_equal(run(changed), out)


def test_a_text_without_words_has_finite_gradients(encoder):
    net, params = encoder
    grads = jax.jit(jax.grad(lambda p: net.apply({"params": p}, IDS).sum()))(params)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def outputs(route, layers, ids):
    spec = ExpertSpec("text", 24, 32, **blocks.MMDIT) if route == "joint" else None
    net = dit.DiT(
        video_spec=dit.expert(24, 32, text=route), groups=(GroupSpec("g", "video", (0,)),),
        latent=(4, 4, 3), layers=1, heads=2, head_dim=12, text=route, text_spec=spec,
        context_width=WIDTH, vocabulary=9,
        instruction_length=LENGTH, text_layers=layers, freq_dim=16,
    )  # fmt: skip
    x = np.random.default_rng(0).standard_normal((1, 1, 4, 4, 3)).astype(np.float32)
    values = {"g": np.repeat(x, len(ids), axis=0)}
    table = bidirectional("g", *["text"] * (route == "joint"))
    args = values, {"g": np.full((len(ids), 1), 0.5, np.float32)}, {"instruction": ids}, table
    abstract = jax.eval_shape(lambda: net.init(jax.random.key(0), *args, method="evaluate"))
    params = random_params(abstract["params"], 1)
    evaluate = jax.jit(lambda p: net.apply({"params": p}, *args, method="evaluate")["g"])
    return np.asarray(evaluate(params))


@pytest.mark.parametrize("route", dit.TEXT[1:])
def test_only_pooled_text_ignores_word_order(route):
    forward, backward, *_ = outputs(route, 0, IDS)
    if route == "pooled":
        np.testing.assert_allclose(forward, backward, atol=1e-5)
    else:
        assert np.abs(forward - backward).max() > 1e-2
    forward, backward, *_ = outputs(route, 1, IDS)  # contextual words keep their order
    assert np.abs(forward - backward).max() > 1e-2
