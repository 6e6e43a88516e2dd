"""What a server adds to the time of its policy, and what batching gains.

    python -m wamjax.bench serve --json
    python -m wamjax.bench serve --bundle=bundles/quickstart --clients=1,16

Without a bundle the policy takes `--policy_ms` whatever the batch, as a large one on an accelerator
does that is far from full; so what is measured is the server's own. Clients are of another process
and send two pictures of 224x224, or what the bundle takes. Clients share the cores with the server.
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
from wamjax.bundle.policy import load_policy
from wamjax.data.spec import DataSpec
from wamjax.serving import server, wire
from wamjax.serving.names import Names, tables
from wamjax.serving.worker import Acts, Batching, Worker

CLIENTS = (1, 4, 16, 64)
SPEC = DataSpec({"image": (224, 224), "wrist_image": (224, 224)}, 8, 7, 32, 9, 4, 16, 20.0)


class Sleeper:
    """A policy that takes so many seconds and does nothing."""

    def __init__(self, seconds: float):
        self._observer, self._seconds = Observer(SPEC), seconds
        self.spec = SPEC

    def example(self) -> dict[str, Any]:
        """See `worker.Acts`."""
        return self._observer.example()

    def admit(
        self, observation: dict[str, Any], prefix: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """See `worker.Acts`."""
        return self._observer(observation)[0]

    def act(self, arrays: dict[str, np.ndarray], key: Any) -> np.ndarray:
        """See `worker.Acts`."""
        time.sleep(self._seconds)
        return np.zeros((len(arrays["proprio"]), SPEC.chunk, SPEC.action_dim), np.float32)


def run(
    clients: Sequence[int], seconds: float, max_batch: int, policy_ms: float, bundle: str = ""
) -> dict[str, Any]:
    """Round trips at each number of clients, without batches and with.

    Args:
      clients: how many at once.
      seconds: of each measurement.
      max_batch: with batches.
      policy_ms: of the policy that only waits.
      bundle: a real one instead.
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
    """Prints it as a table; how much faster batches are, below."""
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
    """A server in a thread of this process; its port."""
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
    """Of one measurement; "above" is what a round trip takes beyond the policy's call."""
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
        # Of a client's mean round trip, and of how many answers it got.
        "service_max_over_median": float(means.max() / np.median(means)),
        "least_over_median": float(counts.min() / np.median(counts)),
    }  # fmt: skip
