"""Tests that messages equal openpi's to the byte, and that nothing else is accepted."""

import ast
import base64
import io
import json
import pathlib
import pickle
import random
import subprocess
import sys

import msgpack
import numpy as np
import pytest
from serving import fake

from wamjax.bundle.observation import BadObservation
from wamjax.serving import wire
from wamjax.serving.names import Names, tables
from wamjax.serving.wire import BadMessage

ROOT = pathlib.Path(__file__).parents[2]

# {"prompt": "lift", "observation/state": float32 [1, 2], "n": numpy.float64(0.5)}, written out by
# the format of msgpack and the description of openpi's arrays, not by a library.
RECORDED = (
    b"\x83"
    b"\xa6prompt" b"\xa4lift"
    b"\xb1observation/state"
    b"\x84"
    b"\xc4\x0b__ndarray__" b"\xc3"
    b"\xc4\x04data" b"\xc4\x08\x00\x00\x80?\x00\x00\x00@"
    b"\xc4\x05dtype" b"\xa3<f4"
    b"\xc4\x05shape" b"\x91\x02"
    b"\xa1n"
    b"\x83"
    b"\xc4\x0d__npgeneric__" b"\xc3"
    b"\xc4\x04data" b"\xcb?\xe0\x00\x00\x00\x00\x00\x00"
    b"\xc4\x05dtype" b"\xa3<f8"
)  # fmt: skip


def test_a_recorded_message_is_read_and_written_to_the_byte():
    value = wire.unpack(RECORDED)
    state = value["observation/state"]
    assert state.dtype == np.float32 and state.tolist() == [1, 2] and not state.flags.writeable
    assert value["prompt"] == "lift" and value["n"] == 0.5
    again = wire.pack({"prompt": "lift", "observation/state": np.array([1, 2], np.float32)})
    assert again == b"\x82" + RECORDED[1 : RECORDED.index(b"\xa1n")]
    # msgpack itself packs float64 as a float, also in openpi; other scalars not
    assert b"__npgeneric__" in wire.pack(np.float32(1))
    half = RECORDED[RECORDED.index(b"\x83\xc4\x0d") :].replace(b"f8", b"f2")
    assert wire.unpack(half).dtype == np.float16


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "u1", "i8", "?", "<U3", "S2", "M8[ns]"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 0), (2, 3)])
def test_arrays_come_back(dtype, shape):
    array = np.zeros(shape, dtype)
    back = wire.unpack(wire.pack({"x": array}))["x"]
    assert back.dtype == array.dtype and back.shape == shape
    np.testing.assert_array_equal(back, array)
    strided = np.arange(24, dtype=np.float32).reshape(2, 3, 4).T[::2]
    np.testing.assert_array_equal(wire.unpack(wire.pack(strided)), strided)


def packed_array(**changes):
    fields = {"data": bytes(8), "dtype": "<f4", "shape": [2]} | changes
    out = {key.encode(): value for key, value in fields.items()}
    return msgpack.packb({b"__ndarray__": True} | out)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "a msgpack"), (b"\xc1", "a msgpack"), (b"\x81", "a msgpack"),
        (RECORDED + b"x", "a msgpack"), (RECORDED[:-3], "a msgpack"),
        (b"\x91" * 100_000, "a msgpack|more than"), (b"\x90" + b"\x90" * 9, "a msgpack"),
        (b"\xdd\xff\xff\xff\xff", "a msgpack"), (b"\xc6\xff\xff\xff\xff", "a msgpack"),
        (b"\xd5\x01xx", "a msgpack"), (b"\x81\x01\x01", "a msgpack"), (b"\xa1\xff", "a msgpack"),
        (msgpack.packb([[[]] * 30] * 30), "more than 512 maps and lists"),
        (packed_array(dtype="O"), "'O' is refused"), (packed_array(dtype="|V8"), "is refused"),
        (packed_array(dtype="<c8"), "is refused"), (packed_array(dtype="f4,f4"), "is refused"),
        (packed_array(dtype=None), "is refused"), (packed_array(dtype="<f3"), "there is no dtype"),
        (packed_array(shape=[3]), "has 8 bytes"), (packed_array(shape=[2**62, 4]), "a list"),
        (packed_array(shape=[-2]), "a list"), (packed_array(shape=[True, 2]), "a list"),
        (packed_array(shape=[1] * 9), "a list of at most 8"), (packed_array(shape=2), "a list"),
        (packed_array(data="text"), "has str bytes"), (packed_array(dtype="|S0"), "has 8 bytes"),
        (msgpack.packb({b"__npgeneric__": True, b"data": [], b"dtype": "<f4"}), "is a list"),
        (msgpack.packb({b"__npgeneric__": True, b"data": 1, b"dtype": "O"}), "is refused"),
    ],
)  # fmt: skip
def test_invalid_messages_are_one_line_errors(data, message):
    with pytest.raises(BadMessage, match=message) as error:
        wire.unpack(data)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_python_objects_are_neither_sent_nor_read():
    for array in (np.array([object()]), np.zeros(2, "c8"), np.zeros(2, "f4,f4"), np.complex64(1)):
        with pytest.raises(ValueError, match="cannot be sent"):
            wire.pack({"x": array})
    with pytest.raises(ValueError, match="a set cannot be sent"):
        wire.pack({1})
    evil = pickle.dumps(print)
    for data in (evil, packed_array(data=evil, dtype="O", shape=[1])):
        with pytest.raises(BadMessage):
            wire.unpack(data)
    file = io.BytesIO()
    np.save(file, np.array([print], object), allow_pickle=True)
    with pytest.raises(BadMessage, match="refused"):
        wire.from_json(json.dumps({"npy": base64.b64encode(file.getvalue()).decode()}).encode())


def npy(array, **changes):
    file = io.BytesIO()
    np.save(file, array)
    data = file.getvalue()
    for old, new in changes.get("replace", ()):
        data = data.replace(old, new)
    return json.dumps({"x": {"npy": base64.b64encode(data).decode()}}).encode()


def test_json_carries_arrays_in_three_ways():
    x = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    value, packed = wire.from_json(npy(x))
    np.testing.assert_array_equal(value["x"], x)
    assert not packed
    body = json.dumps({"x": wire.to_json(x, packed=True)})
    for text in (body, json.dumps({"encoded": body})):
        value, packed = wire.from_json(text.encode())
        np.testing.assert_array_equal(value["x"], x)
        assert packed and value["x"].dtype == np.float32
    assert wire.from_json(json.dumps({"x": wire.to_json(x, packed=False)}).encode()) == (
        {"x": x.tolist()}, False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "body, message",
    [
        (b"{", "a JSON"), (b"[" * 100_000, "a JSON"), (b"\xff", "a JSON"),
        (b"[" + b"1," * 600_000 + b"1]", "more than 500000 values"),
        (b'{"encoded": 3}', "a JSON"), (b'{"__numpy__": "x", "dtype": "<f4"}', "not base64"),
        (b'{"__numpy__": "AAAA", "dtype": "<f4", "shape": [1]}', "has 3 bytes"),
        (b'{"npy": "AAAA"}', "a .npy"), (b'{"x": ' + b"9" * 5000 + b"}", "a JSON"),
        (npy(np.zeros(2), replace=[(b"(2,)", b"(9,)")]), "has 16 bytes"),
        (npy(np.zeros(2), replace=[(b"(2,)", b"(a,)")]), "a .npy"),
    ],
)  # fmt: skip
def test_a_bad_body_is_a_one_line_error(body, message):
    with pytest.raises(BadMessage, match=message):
        wire.from_json(body)


def mutated(rng, data):
    """Returns a message with bytes changed, removed or repeated, or entirely random."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + rng.randint(1, 20)]
            case 2:
                data[at:at] = data[at : at + rng.randint(1, 40)]
            case _:
                data[at : at + rng.randint(0, 8)] = rng.randbytes(rng.randint(0, 16))
        data = data or bytearray(b"\x00")
    return bytes(data)


NAMES = Names(tables(["libero"], tuple(fake.SPEC.cameras)), "", 64 * 64)


def read(data):
    """Reads a message like the server; returns '' for an observation, else the error."""
    try:
        observation, extras = NAMES(wire.unpack(data))
        fake.Policy().admit(observation)
        wire.pack(extras)
    except (BadMessage, BadObservation) as error:
        return wire.sentence(error)  # as the server says it
    except ZeroDivisionError:  # the policy's own, see `fake`
        return "crash"
    return ""


@pytest.mark.parametrize(
    "count", [3_000, pytest.param(100_000, marks=pytest.mark.slow)], ids=str
)
def test_fuzzing_causes_only_clean_errors(count):
    rng = random.Random(count)
    seeds = [RECORDED, *(wire.pack(fake.observation(style=style, timestamp=1.5))
                         for style in ("openpi", "native"))]  # fmt: skip
    seen = set()
    for _ in range(count):
        error = read(mutated(rng, rng.choice(seeds)))
        assert len(error) <= 600 and error.isprintable()
        seen.add(error[:12])
    assert len(seen) > 10 and "" in seen


def test_the_robots_side_needs_only_python_3_9_without_jax():
    files = [ROOT / "wamjax" / "serving" / f"{name}.py"
             for name in ("__init__", "wire", "client", "chunks", "broker")]  # fmt: skip
    for file in [*files, ROOT / "wamjax" / "__init__.py"]:
        ast.parse(file.read_text(), feature_version=(3, 9))
    code = ("import sys; from wamjax.serving import ActionChunks, Client, chunks, wire; "
            "print(*{m.partition('.')[0] for m in sys.modules})")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"jax", "flax", "absl", "ml_collections", "uvicorn", "starlette", "prometheus_client"}
    assert not heavy & set(done.stdout.split()) and "msgpack" in done.stdout
