"""Measures what a server adds to the time of its policy, and what batching gains.

    python -m wamjax.bench serve --json
    python -m wamjax.bench serve --bundle=bundles/quickstart --clients=1,16

Without a bundle, the policy takes `--policy_ms` for any batch, like a large policy on an
accelerator that is far from full, so the rest is the server's own time. Clients run in another
process, share the cores with the server, and send two pictures of 224x224 or an observation of the
bundle.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from wamjax.bundle.observation import Observer
from wamjax.bundle.policy import Chunk, load_policy
from wamjax.data.spec import DataSpec
from wamjax.serving import server, wire
from wamjax.serving.names import Names, tables
from wamjax.serving.worker import Acts, Batching, Worker

CLIENTS = (1, 4, 16, 64)
SPEC = DataSpec({"image": (224, 224), "wrist_image": (224, 224)}, 8, 7, 32, 9, 4, 16, 20.0)


class Sleeper:
    """Stands in for a policy: waits for some seconds and returns zeros."""

    def __init__(self, seconds: float):
        self._observer, self._seconds = Observer(SPEC), seconds
        self.spec = SPEC

    def example(self) -> dict[str, Any]:
        """See `worker.Acts`."""
        return self._observer.example()

    def admit(
        self,
        observation: dict[str, Any],
        prefix: np.ndarray | None = None,
        budget_ms: float | None = None,
    ) -> dict[str, np.ndarray]:
        """See `worker.Acts`."""
        return self._observer(observation)[0]

    def act(self, arrays: dict[str, np.ndarray], key: Any) -> Chunk:
        """See `worker.Acts`."""
        time.sleep(self._seconds)
        size = len(arrays["proprio"])
        return Chunk(np.zeros((size, SPEC.chunk, SPEC.action_dim), np.float32))


def run(
    clients: Sequence[int], seconds: float, max_batch: int, policy_ms: float, bundle: str = ""
) -> dict[str, Any]:
    """Measures round trips at each number of clients, without and with batching.

    Args:
      clients: numbers of clients at once.
      seconds: duration of each measurement.
      max_batch: maximum batch size with batching.
      policy_ms: milliseconds per call of the stand-in policy.
      bundle: folder of a real policy to measure instead; '' = the stand-in.
    """
    policy = load_policy(bundle) if bundle else Sleeper(policy_ms / 1e3)
    cameras = (policy.manifest.spec if bundle else SPEC).cameras
    question = wire.pack(policy.example())
    rows = []
    for size in (1, max_batch):
        with serving(policy, tuple(cameras), Batching(size), max(clients)) as port:
            rows += [_row(_ask(port, n, seconds, question), n, size, seconds) for n in clients]
    return {
        "benchmark": "serve", "policy": bundle or f"{policy_ms:g} ms a call", "rows": rows,
        "message_kb": len(question) // 1024, "seconds": seconds,
    }  # fmt: skip


def show(report: dict[str, Any]) -> None:
    """Prints the report as a table, and below it how much faster batching is."""
    print(f"policy: {report['policy']}; {report['message_kb']} kB an observation")
    columns = ("clients", "max_batch", "per_second", "p50_ms", "p99_ms", "above_p50_ms",
               "above_p99_ms", "batch", "service_max_over_median", "least_over_median")  # fmt: skip
    print("  ".join(columns))
    for row in report["rows"]:
        print("  ".join(f"{row[name]:>{len(name)}.5g}" for name in columns))
    by = {(row["clients"], row["max_batch"]): row["per_second"] for row in report["rows"]}
    for (clients, size), rate in by.items():
        if size > 1:
            print(f"{clients} clients: batches are {rate / by[clients, 1]:.2f} times as fast")


@contextlib.contextmanager
def serving(
    policy: Acts, cameras: tuple[str, ...], batching: Batching, clients: int
) -> Iterator[int]:
    """Runs a server in a thread of this process and yields its port."""
    work = Worker({"direct": policy}, Names(tables((), cameras)), batching)
    work.start()
    limits = server.Limits(clients=clients + 1, rate=1e9)
    with server.bind("127.0.0.1", 0) as sock:
        running = server.Server(server.Application(work, {}, limits), sock)
        thread = threading.Thread(target=running.run, daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.01)
        yield sock.getsockname()[1]
        running.should_exit = True
        thread.join()
        work.stop()


def _ask(port: int, clients: int, seconds: float, question: bytes) -> list[dict[str, list]]:
    code = f"from wamjax.bench import robots; robots.main({port}, {clients}, {seconds})"
    done = subprocess.run(
        [sys.executable, "-c", code], input=question, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


def _row(
    measured: list[dict[str, list]], clients: int, max_batch: int, seconds: float
) -> dict[str, Any]:
    """Summarizes one measurement; "above" is a round trip without the policy's call."""
    trips = np.concatenate([m["round_trip"] for m in measured])
    above = trips - np.concatenate([m["policy"] for m in measured])
    means = np.array([np.mean(m["round_trip"]) for m in measured if m["round_trip"]])
    counts = np.array([len(m["round_trip"]) for m in measured])
    return {
        "clients": clients, "max_batch": max_batch, "per_second": len(trips) / seconds,
        "p50_ms": float(np.percentile(trips, 50)), "p99_ms": float(np.percentile(trips, 99)),
        "above_p50_ms": float(np.percentile(above, 50)),
        "above_p99_ms": float(np.percentile(above, 99)),
        "batch": float(np.concatenate([m["batch"] for m in measured]).mean()),
        # Fairness between clients: of their mean round trips, and of their numbers of answers.
        "service_max_over_median": float(means.max() / np.median(means)),
        "least_over_median": float(counts.min() / np.median(counts)),
    }  # fmt: skip
