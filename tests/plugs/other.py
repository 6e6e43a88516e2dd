"""A kernel of attention, and a published model with a key map and sizes of its own."""

import dataclasses

import jax
import jax.numpy as jnp

from wamjax.weights.families import FAMILIES, Layout
from wamjax.weights.table import Row

CALLS = []


def kernel(q, k, v, keys=None):
    CALLS.append(q.shape)
    logits = jnp.einsum("bnlk,bnsk->bnls", q, k) * q.shape[-1] ** -0.5
    if keys is not None:
        logits = jnp.where(keys, logits, -jnp.inf)
    return jnp.einsum("bnls,bnsk->bnlk", jax.nn.softmax(logits, axis=-1), v)


def rows(sizes):
    """The keys of DiT's public files, below a prefix and in capitals."""
    table = FAMILIES["dit"].layouts["official"].rows(sizes)
    return tuple(Row(f"NET.{row.theirs}", *row[1:]) for row in table)


BACKBONE = dataclasses.replace(FAMILIES["dit"], layouts={"capitals": Layout(rows)})
