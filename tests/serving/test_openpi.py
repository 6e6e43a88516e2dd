"""Tests the bytes of openpi's client on a raw socket, and, if installable, that client itself."""

import os
import socket
import struct
import subprocess
import sys

import numpy as np
import pytest
from serving.fake import observation, serving, total
from serving.test_wire import RECORDED

from wamjax.serving import wire
from wamjax.serving.worker import Batching

# What the client of PyPI 0.1.2 sends first (websockets 17, as recorded; the key is RFC 6455's).
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    b"Authorization: Api-Key 0123456789abcdef\r\n"
    b"User-Agent: Python/3.11 websockets/17.4\r\n\r\n"
)


def exactly(sock, count):
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        assert part, "the server hung up"
        data += part
    return data


def frame(sock):
    """Returns (first byte, payload) of a server's frame, which is not masked."""
    first, size = exactly(sock, 2)
    assert size < 128
    if size == 126:
        size = struct.unpack(">H", exactly(sock, 2))[0]
    return first, exactly(sock, size)


def send(sock, payload, opcode=0x82, mask=b"\x01\x02\x03\x04"):
    masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
    sock.sendall(bytes([opcode, 0xFE]) + struct.pack(">H", len(payload)) + mask + masked)


def test_a_recorded_exchange_byte_for_byte():
    with serving(key="0123456789abcdef", about={"a": 1}) as running:
        with socket.create_connection(("127.0.0.1", running.port), timeout=10) as sock:
            sock.sendall(UPGRADE)
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += exactly(sock, 1)
            assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
            assert b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in head  # RFC 6455, section 1.3
            assert b"extensions" not in head.lower()
            first, metadata = frame(sock)
            assert first == 0x82 and metadata.startswith(b"\x83\xa1a\x01\xa8protocol\x01")
            send(sock, wire.pack(observation(2)))
            first, reply = frame(sock)
            numbers = struct.pack("<10f", *[2, total()] * 5)
            assert first == 0x82 and reply.startswith(
                b"\x83\xa7actions\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x28" + numbers
                + b"\xc4\x05dtype\xa3<f4\xc4\x05shape\x92\x05\x02"
                + b"\xadpolicy_timing\x81\xa8infer_ms\xcb"
            )  # fmt: skip
            send(sock, RECORDED + bytes(200 - len(RECORDED)))  # not one message
            first, error = frame(sock)
            assert first == 0x81 and error.startswith(b"this is not a msgpack message")
            sock.sendall(b"\x88\x82\x00\x00\x00\x00\x03\xe8")  # goodbye
            assert frame(sock) == (0x88, b"\x03\xe8")


THEIRS = """
import sys, numpy as np
from openpi_client import action_chunk_broker, msgpack_numpy, websocket_client_policy as w
assert np.__version__.startswith("1.")
port, key = int(sys.argv[1]), sys.argv[2]
client = w.WebsocketClientPolicy("127.0.0.1", port, api_key=key)
assert client.get_server_metadata()["protocol"] == 1
def seen(number):
    return {"observation/image": np.full((4, 6, 3), 1, np.uint8),
            "observation/wrist_image": np.full((4, 4, 3), 1, np.uint8),
            "observation/state": np.array([number, 0, 0]), "prompt": "lift"}
for number in range(20):
    reply = client.infer(seen(number))
    assert reply["actions"].shape == (5, 2) and (reply["actions"][:, 0] == number).all()
assert reply["server_timing"]["prev_total_ms"] > 0
broker = action_chunk_broker.ActionChunkBroker(client, 5)
for number in range(10):
    step = broker.infer(seen(number))
    assert step["actions"].shape == (2,) and step["actions"][0] == number // 5 * 5
try:
    client.infer({"observation/image": 1})
    raise SystemExit("no error")
except RuntimeError as error:
    assert "wrist_image" in str(error) and "Traceback" not in str(error)
state = np.array([1, 2], np.float32)
print(msgpack_numpy.packb({"prompt": "lift", "observation/state": state}).hex())
"""


@pytest.mark.slow
def test_the_client_of_pypi_with_its_numpy_1_connects_and_acts(tmp_path):
    """Needs a package index; creates a separate environment for openpi-client."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    install = [python, "-m", "pip", "install", "-q", "openpi-client==0.1.2", "typing_extensions"]
    if subprocess.run(install).returncode:
        pytest.skip("openpi-client cannot be installed here")
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    key = "0123456789abcdef"
    with serving(key=key, chosen=["libero"], batching=Batching(2)) as running:
        done = subprocess.run([python, "-c", THEIRS, str(running.port), key], env=alone, text=True,
                              capture_output=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours = wire.pack({"prompt": "lift", "observation/state": np.array([1, 2], np.float32)})
    assert bytes.fromhex(done.stdout.strip()) == ours
