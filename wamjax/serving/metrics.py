"""Counts a server's work for Prometheus."""

from __future__ import annotations

import prometheus_client as prometheus

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
SIZES = (1, 2, 4, 8, 16, 32, 64)

# Outcomes of a request other than "ok".
REFUSED, SUPERSEDED, FAILED, LIMITED, DROPPED = (
    "refused", "superseded", "failed", "limited", "dropped",
)  # fmt: skip


class Metrics:
    """Holds the counters of one server, in a registry of its own so that two servers do not mix."""

    def __init__(self):
        self.registry = prometheus.CollectorRegistry()
        with_registry = {"registry": self.registry}
        self.requests = prometheus.Counter(
            "wamjax_requests", "Observations by how they ended", ["outcome"], **with_registry
        )
        self.latency = prometheus.Histogram(
            "wamjax_latency_seconds", "From an observation's arrival to its answer",
            buckets=SECONDS, **with_registry,
        )  # fmt: skip
        self.inference = prometheus.Histogram(
            "wamjax_inference_seconds", "Of the policy, a batch", ["mode"], buckets=SECONDS,
            **with_registry,
        )  # fmt: skip
        self.rungs = prometheus.Counter(
            "wamjax_rungs", "Plans in mode adaptive by the rung that they reached", ["rung"],
            **with_registry,
        )  # fmt: skip
        self.batch = prometheus.Histogram(
            "wamjax_batch_size", "Observations acted on in one call", buckets=SIZES,
            **with_registry,
        )  # fmt: skip
        self.queue = prometheus.Gauge(
            "wamjax_queue_length", "Observations that wait", **with_registry
        )
        self.clients = prometheus.Gauge("wamjax_clients", "Connected clients", **with_registry)
        for outcome in ("ok", REFUSED, SUPERSEDED, FAILED, LIMITED, DROPPED):
            self.requests.labels(outcome)

    def text(self) -> bytes:
        """Returns all counters in the text format."""
        return prometheus.generate_latest(self.registry)
