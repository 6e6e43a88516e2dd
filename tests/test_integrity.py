"""Tests that digests detect every flipped bit, and do not depend on how an array is split."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from wamjax.training import integrity, sharding

DTYPES = ["float32", "int32", "uint8", "bool", "float16", ml_dtypes.bfloat16, "float64", "int8"]


def array(dtype, shape=(6, 8, 5)):
    x = np.random.default_rng(0).normal(size=shape) * 50
    return (x > 0) if dtype == "bool" else x.astype(dtype)


def by_hand(x):
    """Computes the definition in Python integers."""
    words = np.ascontiguousarray(x).reshape(-1)
    size = min(words.dtype.itemsize, 4)
    words = [int(w) for w in words.view(f"u{size}")]

    def mix(v):
        v = ((v ^ (v >> 16)) * 0x85EBCA6B) % 2**32
        v = ((v ^ (v >> 13)) * 0xC2B2AE35) % 2**32
        return v ^ (v >> 16)

    first = sum(mix(w ^ mix(i)) for i, w in enumerate(words)) % 2**32
    second = sum(mix((w + mix(i) * 0x9E3779B1) % 2**32) for i, w in enumerate(words)) % 2**32
    return f"{first:08x}{second:08x}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_digests_equal_their_definition(dtype):
    x = array(dtype)
    assert integrity.digests({"x": x}) == {"x": by_hand(x)}
    assert integrity.text(integrity.sums(x)) == by_hand(x)
    if x.dtype.itemsize < 8:
        assert integrity.text(integrity.sums(jnp.asarray(x))) == by_hand(x)
        assert integrity.digests({"x": jnp.asarray(x)}) == {"x": by_hand(x)}


def test_float64_on_the_device_equals_float64_in_numpy():
    x = array("float64")
    with jax.enable_x64(True):
        assert integrity.digests({"x": jnp.asarray(x)}) == {"x": by_hand(x)}


@pytest.mark.parametrize("shape", [(), (0, 3), (1,)])
def test_odd_shapes(shape):
    x = np.ones(shape, np.float32)
    assert integrity.digests({"x": x}) == {"x": by_hand(x)}


def test_digests_do_not_depend_on_the_mesh():
    x = array("float32", (16, 8))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
    for spec in [("data", "fsdp"), (("data", "fsdp"), None), (None, None)]:
        spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        assert integrity.digests({"x": spread}) == {"x": by_hand(x)}


@pytest.mark.parametrize("dtype", ["float32", "float64", ml_dtypes.bfloat16])
def test_digests_of_parts_add_up(dtype):
    x = array(dtype)
    parts = [integrity.sums(layer, offset=i * layer.size) for i, layer in enumerate(x)]
    assert integrity.text(sum(parts[1:], parts[0])) == by_hand(x)


def test_every_flipped_bit_and_moved_or_missing_part_changes_it():
    x = array("float32", (4, 8))
    good = integrity.text(integrity.sums(x))
    for bit in range(8 * x.nbytes):
        raw = bytearray(x.tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        assert integrity.text(integrity.sums(np.frombuffer(raw, "f4").reshape(4, 8))) != good
    signs = x.copy()
    signs[0, :2] *= -1  # the top bits of two words
    zeroed = x.copy()
    zeroed[2] = 0
    for other in (signs, zeroed, x[::-1], x[:, ::-1]):
        assert integrity.text(integrity.sums(other)) != good


def test_mismatches_are_named():
    written = integrity.digests({"a": array("float32"), "b": array("int32")})
    integrity.check(written, written, where="step 3")
    with pytest.raises(integrity.Damaged, match="step 3 is damaged: 'b' of 2"):
        integrity.check(written | {"b": "0"}, written, where="step 3")
    with pytest.raises(integrity.Damaged, match="'a' and 1 more of 2"):
        integrity.check({}, written, where="step 3")


def test_json_does_not_depend_on_the_order_of_keys():
    assert integrity.of_json({"a": 1, "b": [2]}) == integrity.of_json({"b": [2], "a": 1})
    assert integrity.of_json({"a": 1}) != integrity.of_json({"a": 2})
