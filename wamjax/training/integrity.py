"""Computes digests of arrays, which verify that data read equals the data written.

A digest is a sum over the words of an array, each mixed with its position, so it does not depend on
how the array is cut into shards, layers or chunks: one device verifies what eight saved, and the
digests of layers add up to that of the stack. One changed word always changes the digest, whether
it is flipped, zeroed or moved; several do so except with a chance of 2^-64. It guards against
faulty disks, networks and interrupted copies, not against deliberate deception.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from wamjax import tree

Tree = Any
SMALL = 2**24  # bytes


class Damaged(ValueError):
    """Data that was read differs from what was written."""


def digests(arrays: Tree) -> dict[str, str]:
    """Returns the digest of each array of a tree by its path, as 16 hexadecimal digits.

    One program computes the whole tree; arrays may be spread over devices and processes, all of
    which get the same answer. Small local arrays are computed without a program, which takes a
    second to compile.
    """
    leaves = jax.tree.leaves(arrays)
    if sum(x.nbytes for x in leaves) <= SMALL and all(map(_is_at_hand, leaves)):
        flat = tree.flatten(arrays)
        return {path: text(_host_sums(_bits(np.asarray(x)).reshape(-1), 0))
                for path, x in flat.items()}  # fmt: skip
    arrays = jax.tree.map(_bits, arrays)
    return {path: text(sums) for path, sums in tree.flatten(jax.device_get(_all(arrays))).items()}


def sums(x: Array | np.ndarray, offset: int = 0) -> UInt32[np.ndarray, "2"]:
    """Returns both sums of an array, or of a part of one that starts at element `offset` of the
    whole.

    The sums of neighbouring parts add up, modulo 2^32, to those of the whole; `text` turns them
    into the digest.
    """
    words = offset * (2 if x.dtype.itemsize == 8 else 1)
    if isinstance(x, jax.Array):
        return np.asarray(_one(x, np.uint32(words % 2**32)))
    return _host_sums(_bits(x).reshape(-1), words)


def text(sums: UInt32[np.ndarray, "2"]) -> str:
    """Formats `sums` as a digest."""
    return "".join(f"{int(value):08x}" for value in sums)


def of_json(value: Any) -> str:
    """Returns the digest of a JSON value, independent of the order of keys."""
    plain = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def check(read: Mapping[str, str], written: Mapping[str, str], where: str) -> None:
    """Compares the digests of data that was read with those stored when it was written.

    Raises:
      Damaged: they differ; names `where` and the first differences.
    """
    wrong = [path for path in [*read, *(p for p in written if p not in read)]
             if read.get(path) != written.get(path)]  # fmt: skip
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise Damaged(f"{where} is damaged: {wrong[0]!r}{more} of {len(written)} arrays "
                      "is not what was written")  # fmt: skip


def _is_at_hand(x: Array | np.ndarray) -> bool:
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def _bits(x: Array | np.ndarray) -> Array | np.ndarray:
    """Returns a numpy array as unsigned words, so that JAX cannot narrow types that it lacks."""
    if isinstance(x, jax.Array):
        return x
    x = np.ascontiguousarray(x)
    if x.dtype.itemsize == 8:
        return x.reshape(-1).view(np.uint32).reshape(*x.shape, 2)
    return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def _host_sums(words: np.ndarray, offset: int) -> UInt32[np.ndarray, "2"]:
    """Computes `_sums` in numpy, so that hosts that read files need no device and no
    compilation."""
    first, second, size = 0, 0, 2**15  # blocks stay in the cache of a core
    for start in range(0, len(words), size):
        block = words[start : start + size].astype(np.uint32)
        place = np.arange(len(block), dtype=np.uint32) + np.uint32((offset + start) % 2**32)
        place = _mix_in_place(place)
        first += int(_mix_in_place(block ^ place).sum(dtype=np.uint64))
        block += place * np.uint32(0x9E3779B1)
        second += int(_mix_in_place(block).sum(dtype=np.uint64))
    return np.array([first % 2**32, second % 2**32], np.uint32)


def _mix_in_place(x: np.ndarray) -> np.ndarray:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x ^= x >> shift
        x *= np.uint32(factor)
    x ^= x >> 16
    return x


@jax.jit
def _all(arrays: Tree) -> Tree:
    return jax.tree.map(lambda x: _sums(x, jnp.uint32(0)), arrays)


@jax.jit
def _one(x: Array, offset: Array) -> Array:
    return _sums(x, offset)


def _sums(x: Array, offset: Array) -> UInt32[Array, "2"]:
    size = x.dtype.itemsize
    if x.dtype == bool:
        words = x.astype(jnp.uint32)
    else:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[size]
        words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    place, stride = offset, 1
    for axis in reversed(range(words.ndim)):
        step = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place, stride = place + step * jnp.uint32(stride % 2**32), stride * words.shape[axis]
    place = _mix(place)
    first, second = _mix(words ^ place), _mix(words + place * jnp.uint32(0x9E3779B1))
    return jnp.stack([jnp.sum(part, dtype=jnp.uint32) for part in (first, second)])


def _mix(x: Array) -> Array:
    """Applies the finalizer of MurmurHash3, a bijection of 32-bit words."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
