"""Attention by groups: dense calls over exactly the keys that a table lets a group see.

No boolean mask is built and no masked product is computed, so every fast kernel applies as it is.
`masked` computes the same with one masked call; it is the reference for the tests and the fallback
for tables with many distinct rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from wamjax.models.layers import at_least_float32
from wamjax.models.visibility import Visibility

Groups = Mapping[str, Array]


def attend(
    q: Float[Array, "b n l k"],
    k: Float[Array, "b n s k"],
    v: Float[Array, "b n s k"],
    mask: Bool[Array, "l s"] | None = None,
) -> Float[Array, "b n l k"]:
    """Softmax attention with scale ``1 / sqrt(k)``; the softmax runs in float32.

    Heads come before tokens, the layout that batched matmuls and flash kernels read without a
    transpose; cached keys and values are stored that way.
    """
    if mask is None:
        return _dense(q, k, v)
    logits = jnp.where(mask, _logits(q, k), -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bnls,bnsk->bnlk", weights, v)


@jax.custom_vjp
def _dense(q, k, v):
    return _dense_forward(q, k, v)[0]


def _logits(q: Array, k: Array) -> Array:
    q = q * q.shape[-1] ** -0.5  # the smallest array to scale
    return jnp.einsum("bnlk,bnsk->bnls", q, k, preferred_element_type=at_least_float32(q).dtype)


def _dense_forward(q, k, v):
    weights = jax.nn.softmax(_logits(q, k), axis=-1).astype(v.dtype)
    y = jnp.einsum("bnls,bnsk->bnlk", weights, v)
    return y, (q, k, v, weights, y)


def _dense_backward(saved, dy):
    """The flash-attention form: the softmax's row sums come from the output (b, n, l, k) instead of
    one more pass over the (b, n, l, s) weights. Halves the time of the backward pass on CPU."""
    q, k, v, weights, y = saved
    scale = q.shape[-1] ** -0.5
    dv = jnp.einsum("bnls,bnlk->bnsk", weights, dy)
    dweights = jnp.einsum(
        "bnlk,bnsk->bnls", dy, v, preferred_element_type=at_least_float32(q).dtype
    )
    rows = jnp.sum(at_least_float32(dy) * at_least_float32(y), axis=-1, keepdims=True)
    dlogits = (weights * (dweights - rows) * scale).astype(q.dtype)
    dq = jnp.einsum("bnls,bnsk->bnlk", dlogits, k)
    dk = jnp.einsum("bnls,bnlk->bnsk", dlogits, q)
    return dq, dk, dv


_dense.defvjp(_dense_forward, _dense_backward)


def grouped(q: Groups, k: Groups, v: Groups, visibility: Visibility) -> dict[str, Array]:
    """Attention output of every query group; one dense call per distinct set of visible keys.

    Args:
      q: queries (b, n, l_g, k) by group.
      k, v: keys and values (b, n, s_g, k) by group; may hold more groups than `q` (a cache).
      visibility: the table; key groups that are not in `k` are absent and skipped.

    Returns:
      (b, n, l_g, k) for every group of `q`.
    """
    visibility = visibility.restrict(k)
    outputs: dict[str, Array] = {}
    for queries, keys in visibility.calls(q):
        if not keys:
            raise ValueError(f"{queries} see no present group in table {visibility.name!r}")
        y = attend(_join(q, queries), _join(k, keys), _join(v, keys))
        start = 0
        for group in queries:
            length = q[group].shape[2]
            outputs[group] = y[:, :, start : start + length]
            start += length
    return outputs


def masked(q: Groups, k: Groups, v: Groups, visibility: Visibility) -> dict[str, Array]:
    """The same as `grouped` by one call under the token-level mask."""
    visibility = visibility.restrict(k)
    queries = [g for g in visibility.groups if g in q]
    lengths = {g: k[g].shape[2] for g in visibility.groups}
    mask = visibility.mask(lengths)
    starts, start = {}, 0
    for group in visibility.groups:
        starts[group], start = start, start + lengths[group]
    rows = jnp.concatenate([jnp.arange(lengths[g]) + starts[g] for g in queries])
    y = attend(
        _join(q, queries),
        _join(k, visibility.groups),
        _join(v, visibility.groups),
        jnp.asarray(mask)[rows],
    )
    outputs, start = {}, 0
    for group in queries:
        outputs[group] = y[:, :, start : start + lengths[group]]
        start += lengths[group]
    return outputs


def _join(values: Groups, groups) -> Array:
    parts = [values[g] for g in groups]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)
