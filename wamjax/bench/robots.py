"""Runs clients that send the next request on every answer, in one process without JAX; see
`serve`."""

from __future__ import annotations

import asyncio
import json
import sys
import time

import websockets.asyncio.client

from wamjax.serving import wire

WARM_UP = 0.5  # seconds before measuring


async def robot(port: int, question: bytes, until: float, start: float) -> dict[str, list]:
    """Runs one client and returns what it measures from `start` to `until`."""
    round_trips, policy, batches, waits = [], [], [], []
    address = f"ws://127.0.0.1:{port}"
    options = {"compression": None, "max_size": None, "open_timeout": 60}
    async with websockets.asyncio.client.connect(address, **options) as client:
        await client.recv()
        while (began := time.perf_counter()) < until:
            await client.send(question)
            answer = wire.unpack(await client.recv())
            if began >= start:
                timing = answer["server_timing"]
                round_trips.append(1e3 * (time.perf_counter() - began))
                policy.append(timing["infer_ms"])
                batches.append(timing["batch"])
                waits.append(timing["queue_ms"])
    return {"round_trip": round_trips, "policy": policy, "batch": batches, "queue": waits}


async def robots(port: int, count: int, seconds: float, question: bytes) -> list[dict[str, list]]:
    """Runs all clients at once."""
    start = time.perf_counter() + WARM_UP
    asked = [robot(port, question, start + seconds, start) for _ in range(count)]
    return list(await asyncio.gather(*asked))


def main(port: int, count: int, seconds: float) -> None:
    """Sends the request from standard input, and prints the measurements as JSON."""
    print(json.dumps(asyncio.run(robots(port, count, seconds, sys.stdin.buffer.read()))))
