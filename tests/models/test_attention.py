"""Tests that grouped attention equals masked attention and its gradients, over random tables."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.helpers import assert_trees_close, precision, random_table

from wamjax.models.attention import attend, grouped, masked
from wamjax.models.visibility import table

LENGTHS = {"g0": 3, "g1": 1, "g2": 2, "g3": 4}


def tensors(rng, groups, dtype):
    return {g: rng.standard_normal((2, 2, LENGTHS[g], 4)).astype(dtype) for g in groups}


def loop(q, k, v, visibility):
    """Computes attention token by token in numpy."""
    out = {}
    for g in q:
        keys = [h for h in visibility.groups if h in k and visibility.sees(g, h)]
        ks, vs = (np.concatenate([x[h] for h in keys], axis=2) for x in (k, v))
        out[g] = np.zeros_like(q[g])
        for index in np.ndindex(*q[g].shape[:3]):
            logits = ks[index[:2]] @ q[g][index] / np.sqrt(q[g].shape[-1])
            weights = np.exp(logits - logits.max())
            out[g][index] = weights / weights.sum() @ vs[index[:2]]
    return out


def trials(seed, count, dtype):
    """Draws tables and tensors; some groups are absent, some are keys only, as with a cache."""
    rng = np.random.default_rng(seed)
    while count:
        visibility = random_table(rng, 4)
        present = [g for g in visibility.groups if rng.random() < 0.8]
        queries = [g for g in present if rng.random() < 0.7]
        if queries and all(set(visibility.keys(g)) & set(present) for g in queries):
            count -= 1
            tensors_of = functools.partial(tensors, rng, dtype=dtype)
            q, k, v = tensors_of(queries), tensors_of(present), tensors_of(present)
            yield visibility, (q, k, v), tensors_of(queries)


@pytest.mark.parametrize("double", [False, True])
def test_grouped_equals_masked_with_gradients(double):
    dtype, tolerance = (np.float64, 1e-10) if double else (np.float32, 1e-5)
    tables, inputs, cotangents = zip(*trials(1 + double, 8, dtype), strict=True)
    assert any(set(k) - set(q) for q, k, _ in inputs)

    @functools.partial(jax.jit, static_argnums=0)
    def run(attention):  # one program for all trials: constants in, one compilation
        results = []
        for table_, x, cotangent in zip(tables, inputs, cotangents, strict=True):
            y, back = jax.vjp(lambda *x, t=table_: attention(*x, t), *x)
            results.append((y, back(cotangent)))
        return results

    with precision(double):
        got, want = run(grouped), run(masked)
    assert all(x.dtype == dtype for x in jax.tree.leaves(got))
    assert_trees_close(got, want, rtol=0, atol=tolerance)
    for table_, x, (y, _) in zip(tables, inputs, got, strict=True):
        assert_trees_close(y, loop(*x, table_), rtol=0, atol=tolerance)


def test_keys_that_are_not_seen_get_no_gradient_and_others_do():
    visibility = table("t", {"g0": "g0 g1", "g1": "g1", "g2": "g2"})
    rng = np.random.default_rng(2)
    q, k, v = (tensors(rng, visibility.groups, np.float32) for _ in range(3))
    of = jax.grad(lambda k, v: jnp.sum(grouped(q, k, v, visibility)["g0"] ** 2), (0, 1))
    grads = jax.jit(of)(k, v)
    for grad in grads:
        assert not np.any(grad["g2"])
        assert np.any(grad["g0"]) and np.any(grad["g1"])


def test_softmax_is_float32_in_half_precision():
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 2, 16, 32)), jnp.bfloat16) for _ in range(3))
    exact = attend(*(x.astype(jnp.float32) for x in (q, k, v)))
    got = attend(q, k, v)
    assert got.dtype == jnp.bfloat16
    # one rounding of the weights and one of the output: a few bfloat16 ulps
    np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=2e-2)


def test_a_query_without_keys_is_an_error():
    visibility = table("t", {"g0": "g1", "g1": "g1"})
    q = tensors(np.random.default_rng(0), ["g0"], np.float32)
    with pytest.raises(ValueError, match="'g0'.*none of the groups.*'t'"):
        grouped(q, q, q, visibility)


def options(rng, visibility, lengths):
    """Combines the given table with a causal group, missing keys and a position bias."""
    causal = [g for g in visibility.groups if visibility.sees(g, g) and rng.random() < 0.5]
    visibility = dataclasses.replace(visibility, causal=tuple(causal))
    valid = {}
    for g in visibility.groups:
        if rng.random() < 0.5:
            keys = rng.random((2, lengths[g])) < 0.6
            keys[:, 0] = True  # keep the first token, since every query must see a key
            valid[g] = keys
    bias = {
        g: rng.standard_normal((2, lengths[g], lengths[g]))
        for g in visibility.groups
        if visibility.sees(g, g) and rng.random() < 0.5
    }
    return visibility, valid, bias


def test_causal_groups_missing_keys_and_biases_equal_the_loop():
    rng = np.random.default_rng(7)
    cases = []
    for _ in range(8):
        visibility, valid, bias = options(rng, random_table(rng, 4, 0.6), LENGTHS)
        q, k, v = (tensors(rng, visibility.groups, np.float64) for _ in range(3))
        cases.append((q, k, v, visibility, valid, bias))
    used = np.sum([(len(v.causal), len(valid), len(bias)) for *_, v, valid, bias in cases], axis=0)
    assert np.all(used > 4)
    with precision(True):
        for attention in grouped, masked:
            run = jax.jit(lambda attention=attention: [attention(*case) for case in cases])
            for got, case in zip(run(), cases, strict=True):
                assert_trees_close(got, loop_with_options(*case), rtol=0, atol=1e-12)


def loop_with_options(q, k, v, visibility, valid, bias):
    out = {}
    for g in q:
        out[g] = np.zeros_like(q[g])
        for b, n, i in np.ndindex(*q[g].shape[:3]):
            logits, values = [], []
            for h in visibility.keys(g):
                for s in range(k[h].shape[2]):
                    hidden = h in valid and not valid[h][b, s]
                    if hidden or (g == h and g in visibility.causal and s > i):
                        continue
                    extra = bias[g][n, i, s] if g == h and g in bias else 0
                    logits.append(k[h][b, n, s] @ q[g][b, n, i] / np.sqrt(q[g].shape[-1]) + extra)
                    values.append(v[h][b, n, s])
            weights = np.exp(np.array(logits) - max(logits))
            out[g][b, n, i] = weights / weights.sum() @ np.array(values)
    return out
