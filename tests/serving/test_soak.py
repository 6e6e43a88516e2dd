"""Tests many clients at once, some misbehaving: nothing crashes or hangs, and answers are never
mixed up."""

import asyncio
import contextlib
import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest
import websockets.asyncio.client
import websockets.exceptions
from serving.fake import SPEC, observation, total
from serving.test_wire import RECORDED, mutated

from wamjax.serving import wire

ROOT = pathlib.Path(__file__).parents[2]
CLOSED = (websockets.exceptions.WebSocketException, OSError, EOFError)

# The server runs in its own process, so that its memory can be measured.
SERVER = """
import sys, threading
from serving import fake
from wamjax.serving.worker import Batching
with fake.serving(fake.Policy(seconds=0.005), Batching(16, 0.005), message=2**16, clients=128) as s:
    print(s.port, flush=True)
    sys.stdin.read()
    print("ended", flush=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Returns (a serving process, its port); its log goes to a file, since nobody reads it."""
    with open(tmp_path_factory.mktemp("soak") / "log", "w") as log:
        yield from serve(log)


def serve(log):
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        stderr=log, env=dict(os.environ, PYTHONPATH=path, JAX_PLATFORMS="cpu"),
    )  # fmt: skip
    port = int(process.stdout.readline())
    try:
        yield process, port
    finally:
        process.stdin.close()
        process.wait(20)


def memory(process):
    """Returns the resident bytes of the server."""
    pages = pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def open_(port):
    return websockets.asyncio.client.connect(
        f"ws://127.0.0.1:{port}", compression=None, max_size=None, open_timeout=30,
        close_timeout=0.2,
    )  # fmt: skip


async def behave(port, number, until, pause):
    """Returns how many answers it got, each checked to be of its own last observation."""
    rng, count = random.Random(number), 0
    async with open_(port) as client:
        await client.recv()
        while asyncio.get_running_loop().time() < until:
            value, pixel = number * 1000 + count % 1000, rng.randrange(256)
            await client.send(wire.pack(observation(value, pixel, request_id=count)))
            reply = wire.unpack(await asyncio.wait_for(client.recv(), 20))
            assert reply["request_id"] == count
            np.testing.assert_array_equal(reply["actions"], [[value, total(pixel)]] * SPEC.chunk)
            count += 1
            await asyncio.sleep(pause)
    return count


async def half_message(client, rng, port):
    data = wire.pack(observation())
    await client.send(data[: rng.randrange(len(data))])


async def half_frame(client, rng, port):
    """Sends a frame shorter than its header says, and then nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    head += b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    writer.write(head[: rng.choice([20, len(head)])])
    await writer.drain()
    writer.write(b"\x82\xfe\x40\x00\x00\x00\x00\x00" + rng.randbytes(100))
    await asyncio.sleep(0.05)
    writer.close()


async def random_bytes(client, rng, port):
    await client.send(rng.randbytes(rng.randrange(1, 2000)))


async def wrong_shapes(client, rng, port):
    bad = observation()
    bad["observation/image"] = np.zeros([rng.randrange(9) for _ in range(rng.randrange(5))], "u1")
    await client.send(wire.pack(bad))


async def not_a_number(client, rng, port):
    await client.send(wire.pack(observation(rng.choice([np.nan, np.inf, -13]))))


async def huge_array(client, rng, port):
    await client.send(bytes(2**16 + 1))


async def says_nothing(client, rng, port):
    await asyncio.sleep(0.2)


async def hangs_up(client, rng, port):
    await client.send(wire.pack(observation()))
    client.transport.abort()


async def floods(client, rng, port):
    for _ in range(50):
        await client.send(wire.pack(observation()))


MISDEEDS = (half_message, half_frame, random_bytes, wrong_shapes, not_a_number, huge_array,
            says_nothing, hangs_up, floods)  # fmt: skip


async def misbehave(port, number, until):
    """Returns how often it tried each thing; the result is an error, a closed socket or an
    answer."""
    rng, tried = random.Random(number), dict.fromkeys(MISDEEDS, 0)
    while asyncio.get_running_loop().time() < until:
        with contextlib.suppress(*CLOSED, TimeoutError):
            async with open_(port) as client:
                await client.recv()
                for _ in range(rng.randrange(1, 6)):
                    deed = rng.choice(MISDEEDS)
                    tried[deed] += 1
                    await deed(client, rng, port)
                    reply = await asyncio.wait_for(client.recv(), 0.3)
                    assert isinstance(reply, bytes) or "Traceback" not in reply
    return tried


async def soak(port, clients, bad, seconds, pause, watch):
    until = asyncio.get_running_loop().time() + seconds
    good = [asyncio.create_task(behave(port, n + 1, until, pause)) for n in range(clients - bad)]
    others = [asyncio.create_task(misbehave(port, n, until)) for n in range(bad)]
    watching = asyncio.create_task(watch(until))
    counts = await asyncio.gather(*good)
    return counts, await asyncio.gather(*others), await watching


@pytest.mark.parametrize(
    "clients, bad, seconds",
    [(16, 4, 2.0), pytest.param(64, 3, 600.0, marks=pytest.mark.slow)],
    ids=["small", "ten_minutes"],
)
def test_well_behaved_clients_are_served_beside_others(clients, bad, seconds, server):
    process, port = server

    async def watch(until):
        loop, out = asyncio.get_running_loop(), []
        while loop.time() < until:
            out.append(memory(process))
            await asyncio.sleep(min(1.0, max(0.0, until - loop.time())))
        return out

    counts, tried, used = asyncio.run(soak(port, clients, bad, seconds, 0.02, watch))
    assert process.poll() is None
    total_tried = {deed: sum(t[deed] for t in tried) for deed in MISDEEDS}
    print(f"{sum(counts)} answers, {min(counts)} to {max(counts)} a client; "
          f"{sum(total_tried.values())} misdeeds; memory {used[len(used) // 4] / 2**20:.0f} to "
          f"{used[-1] / 2**20:.0f} MB")  # fmt: skip
    assert min(counts) > 0 and max(counts) < 3 * np.median(counts) < 9 * min(counts)
    assert sum(total_tried.values()) > 2 * bad
    assert seconds < 60 or min(total_tried.values()) > 0
    assert max(used) < used[len(used) // 4] + 64 * 2**20
    assert asyncio.run(answers(port, 0.3)) > 1  # it still acts


async def answers(port, seconds):
    return await behave(port, 7, asyncio.get_running_loop().time() + seconds, 0.01)


async def fuzz(port, seed, count):
    """Counts the results of malformed messages: answers, errors, closed sockets."""
    rng, out = random.Random(seed), {"answer": 0, "error": 0, "closed": 0}
    seeds = [RECORDED, *(wire.pack(observation(style=s)) for s in ("openpi", "native"))]
    while sum(out.values()) < count:
        with contextlib.suppress(*CLOSED):
            async with open_(port) as client:
                await client.recv()
                while sum(out.values()) < count:
                    await client.send(mutated(rng, rng.choice(seeds)))
                    try:
                        reply = await asyncio.wait_for(client.recv(), 20)
                    except CLOSED:
                        out["closed"] += 1
                        raise
                    if isinstance(reply, str):
                        assert "Traceback" not in reply and "\n" not in reply, reply
                    out["error" if isinstance(reply, str) else "answer"] += 1
    return out


@pytest.mark.parametrize("count", [400, pytest.param(100_000, marks=pytest.mark.slow)], ids=str)
def test_malformed_messages_get_an_error_or_a_closed_socket(count, server):
    process, port = server

    async def all_of_them():
        return await asyncio.gather(*(fuzz(port, n, count // 4) for n in range(4)))

    done = asyncio.run(all_of_them())
    sums = {kind: sum(one[kind] for one in done) for kind in done[0]}
    print(sums)
    assert sum(sums.values()) == count and sums["error"] > 0.8 * count
    assert process.poll() is None and asyncio.run(answers(port, 0.3)) > 1
