"""Implements an attention kernel, and a published model with its own key map and sizes."""

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
    """Returns the keys of DiT's public files, with a prefix and in capitals."""
    table = FAMILIES["dit"].layouts["official"].rows(sizes)
    return tuple(Row(f"NET.{row.theirs}", *row[1:]) for row in table)


BACKBONE = dataclasses.replace(FAMILIES["dit"], layouts={"capitals": Layout(rows)})
