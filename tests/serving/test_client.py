"""Tests the client: late answers, lost servers, threads, TLS, and chunks as single actions."""

import concurrent.futures
import shutil
import socket
import ssl
import subprocess
import threading
import time

import numpy as np
import pytest
import websockets.sync.server
from serving import fake
from serving.fake import observation, serving

from wamjax.serving import ActionChunks, wire
from wamjax.serving.client import Client, ServerError, Superseded


@pytest.fixture(scope="module")
def running():
    with serving(rate=1e4) as out:
        yield out


def test_the_client_reconnects_after_a_late_answer():
    policy = fake.Policy()
    with serving(policy) as running, Client(port=running.port, timeout=10) as client:
        assert client.infer(observation(1))["actions"][0, 0] == 1
        policy.gate.clear()
        with pytest.raises(TimeoutError, match="closed the connection"):
            client.infer(observation(2), timeout=0.2)
        threading.Timer(0.1, policy.gate.set).start()
        assert client.infer(observation(3))["actions"][0, 0] == 3  # not the answer to 2
        with pytest.raises(ServerError, match="are missing"):
            client.infer({"x": 1})
        assert client.infer(observation(4, request_id="mine"))["request_id"] == "mine"
        assert "request_id" not in client.infer(observation(4))


def test_a_server_that_reads_nothing_does_not_block_the_client():
    def answer(connection):
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.send(wire.pack({}))
        free.wait(10)

    free = threading.Event()
    with websockets.sync.server.serve(answer, "127.0.0.1", 0, max_size=None, max_queue=1) as deaf:
        threading.Thread(target=deaf.serve_forever, daemon=True).start()
        client = Client(port=deaf.socket.getsockname()[1], timeout=0.1)
        start = time.monotonic()
        with pytest.raises((ConnectionError, TimeoutError)):
            client.infer({"x": np.zeros(2**24, "u1")})
        assert time.monotonic() - start < 8  # the server cannot make it wait longer
        free.set()
        client.close()


def test_the_client_reconnects_after_a_server_restart():
    with serving() as running:
        port = running.port
        client = Client(port=port)
        assert client.infer(observation(1))["actions"][0, 0] == 1
    with pytest.raises(ConnectionError, match="no server at"):
        client.infer(observation(2), timeout=0.3)
    with pytest.raises(ConnectionError, match="no server at"):
        Client(port=port, connect_timeout=0.2)
    client.close()


def test_threads_may_share_a_client(running):
    with Client(port=running.port) as client:
        def ask(number):
            return client.infer(observation(number))["actions"][0, 0] == number

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert all(pool.map(ask, range(80)))


def test_tls_is_the_librarys_own(tmp_path):
    files = {"ssl_certfile": str(tmp_path / "cert"), "ssl_keyfile": str(tmp_path / "key")}
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=IP:127.0.0.1", "-out", files["ssl_certfile"],
            "-keyout", files["ssl_keyfile"]]  # fmt: skip
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl to make a certificate with")
    subprocess.run(made, check=True, capture_output=True)
    with serving(tls=files) as running:
        trust = ssl.create_default_context(cafile=files["ssl_certfile"])
        with Client("wss://127.0.0.1", running.port, ssl=trust) as client:
            assert client.infer(observation(2))["actions"][0, 0] == 2
        for address in ("wss://127.0.0.1", "ws://127.0.0.1"):  # not trusted; not encrypted
            with pytest.raises(ConnectionError):
                Client(address, running.port, connect_timeout=0.1)


def test_action_chunks_over_the_wire_plays_what_was_seen_lately(running):
    with Client(port=running.port) as client:
        robot, played = ActionChunks(client, "switch", execute=2), []
        for now in range(40):
            played.append(int(robot.act(observation(now))[0]))
            time.sleep(0.005)
        robot.close()
    assert played[0] == 0 and played == sorted(played)  # never back to an older observation
    assert all(seen <= now for now, seen in enumerate(played)) and played[-1] > 25


def test_superseded_is_an_error_of_its_own():
    assert issubclass(Superseded, ServerError)
    client = object.__new__(Client)
    with pytest.raises(Superseded):
        client._read(wire.pack({"superseded": True, "request_id": 1}), 1, True)
