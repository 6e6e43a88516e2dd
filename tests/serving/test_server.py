"""Tests the protocol over a real port: what clients get, and what strangers do not."""

import concurrent.futures
import contextlib
import json
import signal
import socket
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import websockets.exceptions
import websockets.sync.client
import websockets.sync.server
from serving import fake
from serving.fake import observation, serving, total

from wamjax.serving import server, wire
from wamjax.serving.client import Client
from wamjax.serving.worker import Batching


def connect(running, **options):
    """Opens a plain websocket like openpi's client, and reads the metadata."""
    out = websockets.sync.client.connect(
        f"ws://127.0.0.1:{running.port}", compression=None, max_size=None, **options
    ).__enter__()
    out.about = wire.unpack(out.recv(timeout=10))
    return out


def get(running, path, body=None, **headers):
    """Returns (status, body, headers) of an HTTP request."""
    request = urllib.request.Request(f"http://127.0.0.1:{running.port}{path}", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status, reply.read(), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


@pytest.fixture(scope="module")
def policy():
    return fake.Policy()


@pytest.fixture(scope="module")
def running(policy):
    chosen = ["libero", "openvla_oft"]
    with serving(policy, chosen=chosen, message=2**17, clients=40, rate=1e4) as out:
        yield out


def test_the_exchange_is_openpis(running):
    with connect(running) as client:
        assert client.about["horizon"] == 5 and client.about["protocol"] == 1
        assert client.about["latency_ms"]["direct"]["p50"] > 0
        for turn in range(3):
            client.send(wire.pack(observation(turn)))
            raw = client.recv(timeout=10)
            assert isinstance(raw, bytes)
            assert b"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x28" in raw
            reply = wire.unpack(raw)
            np.testing.assert_array_equal(reply["actions"], [[turn, total()]] * 5)
            assert reply["policy_timing"]["infer_ms"] >= 0
            timing = reply["server_timing"]
            assert ("prev_total_ms" in timing) == (turn > 0)  # of the previous request
            arrays = [x for x in reply.values() if isinstance(x, np.ndarray)]
            assert len(arrays) == 1  # openpi's broker slices every one
    assert get(running, "/healthz")[:2] == (200, b"OK\n")


def test_extras_are_echoed_and_errors_leave_the_connection_usable(running, policy):
    with connect(running) as client:
        extras = {"request_id": "a-7", "timestamp": 3.5, "executed_actions": 4,
                  "inference_delay": 2, "mode": "direct", "budget_ms": 50.0}  # fmt: skip
        client.send(wire.pack(observation(1, **extras)))
        assert extras.items() <= wire.unpack(client.recv(timeout=10)).items()
        assert 50.0 in policy.budgets
        for message, text in [
            ({"observation/imge": 1, "observation/wrist_image": 1}, "did you mean"),
            (observation(1, extra=1), "['extra'] are unknown"),
            (observation(np.nan), "must be finite"), ([1, 2], "must be a map of keys"),
            (observation(1, mode="imagine"), "mode 'imagine' is not served; there are direct"),
            (observation(1, timestamp=[1]), "timestamp is a list"),
            ({**observation(), "observation/image": np.zeros((400, 9, 9), "u1")}, "at most 4096"),
            ({**observation(), "observation/image": np.zeros((4, 6, 3))}, "is float64, not uint8"),
            (observation(-13), "could not act on this; the server's log says why at error"),
            ({**observation(), "prompt": "crash"}, "could not act on this"),
        ]:  # fmt: skip
            client.send(wire.pack(message))
            reply = client.recv(timeout=10)
            assert isinstance(reply, str) and text in reply, (text, reply)
            assert "Traceback" not in reply and "\n" not in reply and "ZeroDivision" not in reply
        client.send(b"\xc1")
        assert "not a msgpack" in client.recv(timeout=10)
        client.send(wire.pack(observation(5)))
        assert wire.unpack(client.recv(timeout=10))["actions"][0, 0] == 5


def test_bad_neighbours_in_a_batch_do_no_harm():
    policy = fake.Policy()
    with serving(policy, Batching(8, 0.3)) as running, connect(running) as first:
        policy.gate.clear()
        others = [connect(running) for _ in range(4)]
        first.send(wire.pack(observation(9)))
        time.sleep(0.1)
        good, nan, bad, crash = others
        good.send(wire.pack(observation(1)))
        nan.send(wire.pack(observation(-13)))
        bad.send(wire.pack({"x": 1}))
        crash.send(wire.pack({**observation(), "prompt": "crash"}))
        time.sleep(0.1)
        policy.gate.set()
        assert wire.unpack(first.recv(timeout=10))["actions"][0, 0] == 9
        reply = wire.unpack(good.recv(timeout=10))
        assert reply["actions"][0, 0] == 1 and reply["server_timing"]["batch"] == 2
        assert all(isinstance(client.recv(timeout=10), str) for client in (nan, bad, crash))
        for client in others:
            client.close()


def test_clients_are_batched_and_each_gets_its_own_answer():
    policy = fake.Policy(seconds=0.02)
    with serving(policy, Batching(8, 0.05), rate=1e4) as running:
        def ask(number):
            with Client(port=running.port) as client:
                for turn in range(10):
                    value = 100 * number + turn
                    assert client.infer(observation(value, turn))["actions"].tolist() == [
                        [value, total(turn)]
                    ] * 5

        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            list(pool.map(ask, range(12)))
        compiled = policy.batches[: len(Batching(8).sizes)]
        assert compiled == [1, 2, 4, 8] and set(policy.batches) <= {1, 2, 4, 8}
        served = get(running, "/metrics")[1].decode()
        assert 'wamjax_requests_total{outcome="ok"} 120.0' in served
        calls = float(served.partition("wamjax_batch_size_count ")[2].split()[0])
        assert calls < 60 and "wamjax_latency_seconds_bucket" in served  # two at least, each time


def test_an_answer_tells_the_rung_that_its_plan_reached():
    policy = fake.Policy(seconds=0.01)
    policy.adapts = True
    with serving(policy, Batching(4, 0.05), rate=1e4) as running:
        def ask(number):
            with Client(port=running.port) as client:
                reply = client.infer(observation(number))
                assert reply["actions"][0, 0] == number and reply["rung"] == number % 3

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            list(pool.map(ask, range(6)))
        assert max(policy.batches) > 1
        served = get(running, "/metrics")[1].decode()
        assert all(f'wamjax_rungs_total{{rung="{rung}"}} 2.0' in served for rung in range(3))
        body = json.dumps(observation(4), default=np.ndarray.tolist).encode()
        status, _, headers = get(running, "/act", body)
        assert status == 200 and headers["X-rung"] == "1"


def test_the_newest_observation_wins_and_answers_stay_in_order():
    policy = fake.Policy()
    with serving(policy) as running, connect(running) as client:
        policy.gate.clear()
        for number in range(4):
            client.send(wire.pack(observation(number, request_id=number)))
            time.sleep(0.05)
        policy.gate.set()
        replies = [wire.unpack(client.recv(timeout=10)) for _ in range(4)]
        assert [r["request_id"] for r in replies if "actions" in r] == [0, 3]
        assert [r.get("superseded", False) for r in replies] == [False, True, True, False]
        for reply in (replies[0], replies[3]):
            assert reply["actions"][0, 0] == reply["request_id"]


def test_the_event_loop_never_blocks_on_the_policy():
    policy = fake.Policy()
    with serving(policy) as running, connect(running) as client:
        policy.gate.clear()
        client.send(wire.pack(observation()))
        time.sleep(0.05)
        with connect(running) as other:  # connects, gets metadata and pongs meanwhile
            assert other.ping().wait(timeout=5)
            assert get(running, "/healthz")[0] == 200
            assert 'outcome="ok"} 0.0' in get(running, "/metrics")[1].decode()
        policy.gate.set()
        assert b"actions" in client.recv(timeout=10)


def test_a_client_that_leaves_frees_its_slot_and_gets_no_policy_call():
    policy = fake.Policy()
    with serving(policy, clients=2) as running:
        first, second = connect(running), connect(running)
        with pytest.raises(websockets.exceptions.InvalidStatus, match="503"):
            connect(running)
        policy.gate.clear()
        before = len(policy.batches)
        first.send(wire.pack(observation(1)))
        time.sleep(0.1)
        second.send(wire.pack(observation(2)))
        time.sleep(0.1)
        second.socket.shutdown(socket.SHUT_RDWR)  # no goodbye
        until = time.monotonic() + 5
        while b"wamjax_clients 2.0" in get(running, "/metrics")[1]:
            assert time.monotonic() < until
            time.sleep(0.01)
        with connect(running) as third:
            policy.gate.set()
            first.recv(timeout=10)
            third.send(wire.pack(observation(3)))
            assert wire.unpack(third.recv(timeout=10))["actions"][0, 0] == 3
        assert len(policy.batches) == before + 2
        first.close()


def test_limits_of_size_rate_and_patience(running):
    with connect(running) as client:
        with pytest.raises(websockets.exceptions.ConnectionClosed) as error:
            client.send(bytes(2**17 + 1))
            client.recv(timeout=10)
        assert error.value.rcvd.code == 1009
    with connect(running) as client, pytest.raises(websockets.exceptions.ConnectionClosed) as error:
        for _ in range(20):
            client.send(b"\xc1")
            client.recv(timeout=10)
    assert error.value.rcvd.code == 1008
    with connect(running) as client, pytest.raises(websockets.exceptions.ConnectionClosed) as error:
        client.send("text")
        client.recv(timeout=10)
    assert error.value.rcvd.code == 1003
    with serving(rate=3) as slow, connect(slow) as client:
        replies = []
        for _ in range(6):
            client.send(wire.pack(observation()))
            replies.append(client.recv(timeout=10))
        assert [isinstance(r, str) for r in replies] == [False] * 3 + [True] * 3
        assert replies[-1] == "at most 3 observations a second"
        time.sleep(0.5)
        client.send(wire.pack(observation()))
        assert isinstance(client.recv(timeout=10), bytes)


def test_incomplete_requests_are_disconnected(running, monkeypatch):
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.2)
    with connect(running) as client:
        for text in (b"", b"GET / HT", b"POST /act HTTP/1.1\r\nHost: x\r\n"):
            with socket.create_connection(("127.0.0.1", running.port), timeout=10) as other:
                other.sendall(text)
                with contextlib.suppress(ConnectionResetError):
                    assert other.recv(100) == b""
        client.send(wire.pack(observation(2)))  # a silent client stays connected
        assert b"actions" in client.recv(timeout=10)


def test_http_answers_clients_of_openvlas_kind(running):
    seen = observation(4, 2, "native", request_id="q")
    plain = {"images": {k: x.tolist() for k, x in seen["images"].items()},
             "proprio": seen["proprio"].tolist(), "instruction": "lift", "request_id": "q"}
    status, body, headers = get(running, "/act", json.dumps(plain).encode())
    assert (status, json.loads(body)) == (200, [[4, total(2)]] * 5)
    assert "infer;dur=" in headers["Server-Timing"] and headers["X-request-id"] == "q"
    status, body, headers = get(running, "/act", json.dumps(plain | {"request_id": "ü\n"}).encode())
    assert status == 200 and "X-request-id" not in headers
    packed = {"full_image": seen["images"]["image"], "wrist_image": seen["images"]["wrist_image"],
              "state": seen["proprio"]}
    packed = {k: wire.to_json(x, packed=True) for k, x in packed.items()}
    packed |= {"instruction": "lift", "unnorm_key": "libero"}
    body = json.dumps(packed).encode()
    actions, _ = wire.from_json(get(running, "/act", body)[1])
    np.testing.assert_array_equal(actions, [[4, total(2)]] * 5)
    encoded = json.dumps({"encoded": body.decode()}).encode()
    again, _ = wire.from_json(json.loads(get(running, "/act", encoded)[1]).encode())
    np.testing.assert_array_equal(again, actions)
    for body, status in ((b"{", 400), (b"{}", 400), (b" " * 2**18, 413), (b"3", 400)):
        code, text, _ = get(running, "/act", body)
        assert code == status and len(json.loads(text)["error"]) > 10, body
    plain["proprio"] = [-13, 0, 0]
    code, text, _ = get(running, "/act", json.dumps(plain).encode())
    assert code == 500 and b"at error" in text and b"Traceback" not in text
    assert get(running, "/act")[0] == 405 and get(running, "/nothing")[0] == 404


def test_a_key_is_needed_and_browsers_are_not_let_in(running, tmp_path):
    key = "0123456789abcdef"
    file = tmp_path / "key"
    file.write_text(key + "\n")
    assert server.read_key(str(file), "0.0.0.0") == key
    assert server.read_key("", "127.0.0.1") == server.read_key("", "::1") == ""
    for host in ("0.0.0.0", "192.168.1.4", "robot.local", "::"):
        with pytest.raises(ValueError, match="give --key_file"):
            server.read_key("", host)
    file.write_text("short")
    with pytest.raises(ValueError, match="at least 16"):
        server.read_key(str(file), "0.0.0.0")
    with pytest.raises(websockets.exceptions.InvalidStatus, match="403"):
        connect(running, origin="http://evil.example")
    assert get(running, "/act", b"{}", Origin="http://evil.example")[0] == 403
    with serving(key=key) as locked:
        for given in (None, "0123456789abcdeg", ""):
            with pytest.raises(ConnectionError, match="an API key is needed"):
                Client(port=locked.port, api_key=given)
        assert get(locked, "/act", b"{}")[0] == get(locked, "/metrics")[0] == 401
        assert get(locked, "/healthz")[0] == 200
        with Client(port=locked.port, api_key=key) as client:
            assert client.infer(observation(2))["actions"][0, 0] == 2
        assert get(locked, "/metrics", Authorization=f"Bearer {key}")[0] == 200


def test_a_stopping_server_answers_queued_requests():
    policy = fake.Policy()
    with serving(policy, drain=5) as running:
        client = connect(running)
        policy.gate.clear()
        for number in (1, 2):
            client.send(wire.pack(observation(number)))
            time.sleep(0.05)
        running.handle_exit(signal.SIGTERM, None)
        time.sleep(0.05)
        assert get(running, "/healthz")[0] == 503
        with pytest.raises(websockets.exceptions.InvalidStatus, match="503"):
            connect(running)
        client.send(wire.pack(observation(3)))
        policy.gate.set()
        assert [wire.unpack(client.recv(timeout=10))["actions"][0, 0] for _ in range(2)] == [1, 2]
        assert client.recv(timeout=10) == "the server is shutting down"
        with pytest.raises(websockets.exceptions.ConnectionClosed) as error:
            client.recv(timeout=10)
        assert error.value.rcvd.code in (1001, 1012)


def test_a_taken_port_is_an_error_before_compiling():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot serve at 127.0.0.1:{port}"):
            server.bind("127.0.0.1", port)
    with server.bind("127.0.0.1", 0) as sock, socket.socket() as early:  # not listening yet
        with pytest.raises(ConnectionRefusedError):
            early.connect(sock.getsockname())
