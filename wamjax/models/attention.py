"""Computes attention group by group: dense calls over exactly the keys that a table lets a group
see.

No boolean mask is built and no masked product is computed, so every fast kernel applies unchanged.
`masked` computes the same with one masked call; it is the reference for the tests and the fallback
for tables with many distinct rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from wamjax.config import did_you_mean
from wamjax.models import kernels
from wamjax.models.layers import at_least_float32
from wamjax.models.visibility import Visibility
from wamjax.named import find

Groups = Mapping[str, Array]


def attend(
    q: Float[Array, "b n l k"],
    k: Float[Array, "b n s k"],
    v: Float[Array, "b n s k"],
    mask: Bool[Array, "*b l s"] | None = None,
    bias: Float[Array, "n l s"] | None = None,
    zeros: int = 0,
    kernel: str = "xla",
    keys: Bool[np.ndarray, " s"] | None = None,
) -> Float[Array, "b n l k"]:
    """Computes softmax attention with scale ``1 / sqrt(k)``; the softmax runs in float32.

    Heads come before tokens, the layout that batched matmuls and flash kernels read without a
    transpose. Cached keys and values are stored that way.

    Args:
      mask: True where a query sees a key, (l, s) or (b, l, s); sizes of 1 broadcast.
      bias: added to the logits.
      zeros: number of extra keys whose keys and values are zero. Each adds exp(0) to the
        denominator of the softmax and nothing to its numerator.
      kernel: see `wamjax.models.kernels`. Used only without a mask, bias or zeros; XLA computes the
        other calls.
      keys: which keys exist, static; all by default. Every kernel leaves out the missing ones.
    """
    if mask is None and bias is None and not zeros:
        return kernels.attend(kernel, q, k, v, keys, xla=_dense)
    if keys is not None:
        mask = keys[None] if mask is None else mask & keys
    logits = _logits(q, k)
    if bias is not None:
        logits += bias
    if mask is not None:
        logits = jnp.where(mask[:, None] if mask.ndim == 3 else mask, logits, -jnp.inf)
    weights = _softmax(logits, zeros).astype(v.dtype)
    return checkpoint_name(jnp.einsum("bnls,bnsk->bnlk", weights, v), kernels.RESULT)


def _softmax(logits: Array, zeros: int) -> Array:
    """Returns the softmax over the last axis and `zeros` more logits of zero, which are not
    returned."""
    if not zeros:
        return jax.nn.softmax(logits, axis=-1)
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), 0))
    weights = jnp.exp(logits - top)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + zeros * jnp.exp(-top))


@jax.custom_vjp
def _dense(q, k, v, keys=None):
    return _dense_forward(q, k, v, keys)[0]


def _logits(q: Array, k: Array) -> Array:
    q = q * q.shape[-1] ** -0.5  # the smallest array to scale
    return jnp.einsum("bnlk,bnsk->bnls", q, k, preferred_element_type=at_least_float32(q).dtype)


def _dense_forward(q, k, v, keys=None):
    logits = _logits(q, k)
    if keys is not None:
        logits = jnp.where(keys, logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    # Named here, not by the caller: otherwise a backward pass that saves it would recompute it.
    y = checkpoint_name(jnp.einsum("bnls,bnsk->bnlk", weights, v), kernels.RESULT)
    return y, (q, k, v, weights, y)


def _dense_backward(residuals, dy):
    """Computes the gradients in the flash-attention form: the softmax's row sums come from the
    output (b, n, l, k) instead of one more pass over the (b, n, l, s) weights. Halves the time of
    the backward pass on CPU."""
    q, k, v, weights, y = residuals
    scale = q.shape[-1] ** -0.5
    dv = jnp.einsum("bnls,bnlk->bnsk", weights, dy)
    dweights = jnp.einsum(
        "bnlk,bnsk->bnls", dy, v, preferred_element_type=at_least_float32(q).dtype
    )
    rows = jnp.sum(at_least_float32(dy) * at_least_float32(y), axis=-1, keepdims=True)
    dlogits = (weights * (dweights - rows) * scale).astype(q.dtype)
    dq = jnp.einsum("bnls,bnsk->bnlk", dlogits, k)
    dk = jnp.einsum("bnls,bnlk->bnsk", dlogits, q)
    return dq, dk, dv, None


_dense.defvjp(_dense_forward, _dense_backward)


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Calls `grouped` with a fixed kernel; hashable and comparable, as a module's attribute must
    be."""

    kernel: str = "xla"

    def __call__(self, q, k, v, visibility, valid=None, bias=None) -> dict[str, Array]:
        return grouped(q, k, v, visibility, valid, bias, self.kernel)


def named(kind: str) -> Callable:
    """Returns the attention that ``config.model.attention`` names: a kernel, or "masked", the
    reference.

    A custom kernel, MODULE:FUNCTION, is called as ``f(q, k, v, keys)`` with q (b, n, l, k), k and v
    (b, n, s, k), and `keys`, which says which keys exist; None for all.

    Raises:
      ValueError: the name is unknown.
    """
    if kind == "masked":
        return masked
    if ":" in kind:
        find(kind, {}, "config.model.attention")
    elif kind not in kernels.KERNELS:
        choices = (*kernels.KERNELS, "masked")
        raise ValueError(f"config.model.attention = {kind!r} must be one of {choices}"
                         f"{did_you_mean(kind, choices)}, or MODULE:FUNCTION")  # fmt: skip
    return Grouped(kind)


def kernel_of(attention: Callable) -> str:
    """Returns the kernel of an attention, so that cross-attention can use the same one."""
    return attention.kernel if isinstance(attention, Grouped) else "xla"


def grouped(
    q: Groups,
    k: Groups,
    v: Groups,
    visibility: Visibility,
    valid: Groups | None = None,
    bias: Groups | None = None,
    kernel: str = "xla",
) -> dict[str, Array]:
    """Computes the attention output of every query group, with one dense call per distinct set of
    visible keys.

    Args:
      q: queries (b, n, l_g, k) by group.
      k, v: keys and values (b, n, s_g, k) by group; may hold more groups than `q` (a cache).
      visibility: the table; key groups that are not in `k` are absent and skipped.
      valid: group -> which of its keys exist, (b | 1, s_g); all for groups not listed. A numpy
        array (1, s_g) is static.
      bias: group -> (n, l_g, l_g) added to the logits of a group with itself.
      kernel: see `attend`.

    Returns:
      (b, n, l_g, k) for every group of `q`.
    """
    visibility = visibility.restrict(k)
    valid, bias = valid or {}, bias or {}
    outputs: dict[str, Array] = {}
    for queries, keys in visibility.calls(q, apart=bias):
        if not keys:
            raise ValueError(f"groups {queries} see none of the groups in the input: correct "
                             f"visibility table {visibility.name!r}")  # fmt: skip
        lengths = {g: k[g].shape[2] for g in keys}
        static = _static(lengths, valid)
        dynamic = {} if static is not None else valid
        y = attend(
            _join(q, queries),
            _join(k, keys),
            _join(v, keys),
            _mask(queries, lengths, visibility, dynamic),
            _bias(queries, lengths, bias),
            kernel=kernel,
            keys=static,
        )
        start = 0
        for group in queries:
            length = q[group].shape[2]
            outputs[group] = y[:, :, start : start + length]
            start += length
    return outputs


def masked(
    q: Groups,
    k: Groups,
    v: Groups,
    visibility: Visibility,
    valid: Groups | None = None,
    bias: Groups | None = None,
) -> dict[str, Array]:
    """Computes the same as `grouped` with one call under the token-level mask."""
    visibility = visibility.restrict(k)
    queries = [g for g in visibility.groups if g in q]
    lengths = {g: k[g].shape[2] for g in visibility.groups}
    starts = dict(zip(lengths, np.cumsum([0, *lengths.values()]), strict=False))
    rows = np.concatenate([np.arange(lengths[g]) + starts[g] for g in queries])
    mask = jnp.asarray(visibility.mask(lengths)[rows])
    for group, keys in (valid or {}).items():
        if group in lengths:
            all_valid = jnp.ones((keys.shape[0], 1, sum(lengths.values())), bool)
            mask &= all_valid.at[:, 0, starts[group] : starts[group] + lengths[group]].set(keys)
    total = None
    row = dict(zip(queries, np.cumsum([0, *(lengths[g] for g in queries)]), strict=False))
    for group, group_bias in (bias or {}).items():
        if total is None:
            total = jnp.zeros((group_bias.shape[0], *mask.shape[-2:]), group_bias.dtype)
        place = (0, int(row[group]), int(starts[group]))
        total = jax.lax.dynamic_update_slice(total, group_bias, place)
    y = attend(
        _join(q, queries), _join(k, visibility.groups), _join(v, visibility.groups), mask, total
    )
    outputs, start = {}, 0
    for group in queries:
        outputs[group] = y[:, :, start : start + lengths[group]]
        start += lengths[group]
    return outputs


def _static(lengths, valid: Groups) -> Bool[np.ndarray, " s"] | None:
    """Returns which keys of a call exist if that is known at trace time (padding of slots), else
    None."""
    parts = {g: valid[g] for g in lengths if g in valid}
    if not parts or not all(isinstance(x, np.ndarray) and len(x) == 1 for x in parts.values()):
        return None
    return np.concatenate(
        [parts[g][0] if g in parts else np.ones(n, bool) for g, n in lengths.items()]
    )


def _mask(queries, lengths, visibility: Visibility, valid: Groups) -> Array | None:
    """Returns the mask of one dense call, or None; needed for missing keys and for causal
    groups."""
    causal = queries[0] if queries[0] in visibility.causal else None
    if causal is None and not valid.keys() & lengths.keys():
        return None
    parts = []
    rows = lengths[causal] if causal else 1
    for group, length in lengths.items():
        part = valid[group][:, None] if group in valid else jnp.ones((1, 1, length), bool)
        if group == causal:
            part &= jnp.tri(length, dtype=bool)
        parts.append(part)
    batch = max(p.shape[0] for p in parts)
    return jnp.concatenate([jnp.broadcast_to(p, (batch, rows, p.shape[2])) for p in parts], axis=2)


def _bias(queries, lengths, bias: Groups) -> Array | None:
    """Returns the position bias of one dense call; it applies only to a group with itself."""
    group_bias = bias.get(queries[0])
    if group_bias is None:
        return None
    n, rows, _ = group_bias.shape
    parts = [
        group_bias if g == queries[0] else jnp.zeros((n, rows, size)) for g, size in lengths.items()
    ]
    return jnp.concatenate(parts, axis=2)


def _join(values: Groups, groups) -> Array:
    parts = [values[g] for g in groups]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)
