"""Runs the policy in one thread, on batches of the newest observation of each client."""

from __future__ import annotations

import collections
import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from wamjax.bundle.observation import BadObservation
from wamjax.bundle.policy import Chunk
from wamjax.serving import metrics as counted
from wamjax.serving import wire
from wamjax.serving.metrics import Metrics
from wamjax.serving.names import Names, prefix_of

LATENCIES = 512  # most recent calls that percentiles are computed over
TRIALS = 10  # timed calls before the port opens
_fold_in = jax.jit(jax.random.fold_in)  # takes a fifth of the time of the plain call
RECENT = 1.0  # seconds without a request after which a batch no longer waits for a client


class Acts(Protocol):
    """Defines what a worker needs from a policy; `LoadedPolicy` satisfies it."""

    def admit(
        self,
        observation: dict[str, Any],
        prefix: np.ndarray | None = None,
        budget_ms: float | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns arrays with a batch axis, including the committed actions (d, a) and the
        milliseconds that the plan may take; raises BadObservation."""

    def act(self, arrays: dict[str, np.ndarray], key: Any) -> Chunk:
        """Returns actions (b, j, a) and, of a policy that adapts, rungs (b,)."""

    def example(self) -> dict[str, Any]:
        """Returns an observation of one robot."""


@dataclasses.dataclass(eq=False)
class Request:
    """Holds an observation in the queue.

    Attributes:
      client: the sender; only the newest request of each client is queued.
      message: as sent, see `Names`.
      done: called once, in the worker's thread, with an `Answer`.
      arrival: time in seconds, see `time.perf_counter`.
    """

    client: Hashable
    message: Any
    done: Callable[[Answer], None]
    arrival: float = dataclasses.field(default_factory=time.perf_counter)


@dataclasses.dataclass
class Answer:
    """Holds the result of a request.

    Attributes:
      outcome: "ok", or one of `metrics`.
      actions: (j, a), if the outcome is "ok".
      rung: rung that the plan reached, of a policy that adapts.
      extras: the client's additions to its observation.
      error: a sentence for the client, if the outcome is not "ok".
      timing: milliseconds: "infer" of the policy, "queue" before it; "batch": the batch size.
    """

    outcome: str
    actions: np.ndarray | None = None
    rung: int | None = None
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""
    timing: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Batching:
    """Configures how observations of several clients form a batch.

    Attributes:
      max_batch: maximum number of observations per call of the policy.
      max_wait: maximum seconds that the oldest observation waits for others once the policy is
        free; there is no wait if all clients of the last second have sent theirs, so a single
        client never waits.
    """

    max_batch: int = 8
    max_wait: float = 0.005

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes that are compiled: powers of two, and the largest size."""
        powers = [1 << n for n in range(self.max_batch.bit_length()) if 1 << n < self.max_batch]
        return (*powers, self.max_batch)


class Worker:
    """Owns the policies and the thread that runs them.

    Attributes:
      policies: mode -> policy; the first serves requests without a mode.
    """

    def __init__(
        self,
        policies: Mapping[str, Acts],
        names: Names,
        batching: Batching = Batching(),
        metrics: Metrics | None = None,
        seed: int = 0,
    ):
        self.policies, self.names, self.batching = dict(policies), names, batching
        self.metrics = metrics or Metrics()
        self._waiting: dict[Hashable, Request] = {}  # in order of arrival
        self._last_request: dict[Hashable, float] = {}
        self._change = threading.Condition()
        self._stopping, self._busy, self._calls = False, False, 0
        self._key = jax.random.key(seed)
        self._milliseconds = {mode: collections.deque(maxlen=LATENCIES) for mode in policies}
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)

    def start(self) -> None:
        """Compiles every mode for every batch size, times them, and starts the thread.

        The statistics exclude compilation.
        """
        for mode, policy in self.policies.items():
            row = policy.admit(policy.example())
            for size in self.batching.sizes:
                policy.act(_stack([row] * size, size), self._next_key())
            for _ in range(TRIALS):
                start = time.perf_counter()
                policy.act(row, self._next_key())
                self._milliseconds[mode].append(1e3 * (time.perf_counter() - start))
        self._thread.start()

    def latency(self) -> dict[str, dict[str, float]]:
        """Returns milliseconds of the policy by mode: p50 and p99 of the last calls."""
        out = {}
        for mode, times in self._milliseconds.items():
            p50, p99 = np.percentile(list(times) or [0.0], (50, 99))
            out[mode] = {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}
        return out

    def submit(self, request: Request) -> None:
        """Queues an observation; it replaces an older one of the same client."""
        with self._change:
            stopping, older = self._stopping, None
            if not stopping:
                older = self._waiting.pop(request.client, None)
                self._waiting[request.client] = request
                self._last_request[request.client] = request.arrival
            self.metrics.queue.set(len(self._waiting))
            self._change.notify()
        if older is not None:
            _answer(older, Answer(counted.SUPERSEDED), self.metrics)
        if stopping:
            _answer(request, Answer(counted.DROPPED, error="the server is shutting down"),
                    self.metrics)  # fmt: skip

    def forget(self, client: Hashable) -> None:
        """Drops a client: its queued request is not executed, and batches no longer wait for it."""
        with self._change:
            self._last_request.pop(client, None)
            older = self._waiting.pop(client, None)
            self.metrics.queue.set(len(self._waiting))
        if older is not None:
            _answer(older, Answer(counted.DROPPED, error="the client is gone"), self.metrics)

    def stop(self, timeout: float = 30.0) -> bool:
        """Answers the queued requests, accepts no more, and ends; returns whether it ended within
        `timeout` seconds."""
        with self._change:
            self._stopping = True
            self._change.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while batch := self._take():
            mode, requests = batch
            try:
                self._serve(mode, requests)
            except Exception as error:  # no error of a policy may end the thread
                self._fail(requests, error)
            del batch, requests  # free the pictures before the next batch arrives

    def _take(self) -> tuple[str, list[Request]] | None:
        """Returns the next batch, oldest first; None once the worker has stopped."""
        with self._change:
            while not self._waiting:
                if self._stopping:
                    return None
                self._change.wait()
            # Start now: a client that was just answered may send its next request at once and join.
            deadline = time.perf_counter() + self.batching.max_wait
            while len(self._waiting) < self._expected():
                remaining = deadline - time.perf_counter()
                if remaining <= 0 or self._stopping or not self._change.wait(remaining):
                    break
            if not self._waiting:  # the client left in the meantime
                return self._take()
            mode = self._mode(next(iter(self._waiting.values())))
            requests = [r for r in self._waiting.values() if self._mode(r) == mode]
            requests = requests[: self.batching.max_batch]
            for request in requests:
                del self._waiting[request.client]
            self.metrics.queue.set(len(self._waiting))
            return mode, requests

    def _expected(self) -> int:
        """Returns how many observations may form a batch: one per recently active client."""
        old = time.perf_counter() - RECENT
        self._last_request = {client: at for client, at in self._last_request.items() if at > old}
        return min(self.batching.max_batch, max(1, len(self._last_request)))

    def _mode(self, request: Request) -> str:
        message = request.message
        mode = message.get("mode") if isinstance(message, Mapping) else None
        is_served = isinstance(mode, str) and mode in self.policies
        return mode if is_served else next(iter(self.policies))

    def _serve(self, mode: str, requests: Sequence[Request]) -> None:
        """Runs the policy on one batch and answers all its requests."""
        start, policy = time.perf_counter(), self.policies[mode]
        rows, accepted, extras = [], [], []
        for request in requests:
            try:
                observation, extra = self.names(request.message)
                if extra.get("mode") not in (None, mode):
                    raise BadObservation(f"mode {extra['mode']!r} is not served; there are "
                                         f"{', '.join(self.policies)}")  # fmt: skip
                budget = extra.get("budget_ms")
                rows.append(policy.admit(observation, prefix_of(request.message), budget))
            except BadObservation as error:
                _answer(request, Answer(counted.REFUSED, error=wire.sentence(error)), self.metrics)
            except Exception as error:
                self._fail([request], error)
            else:
                accepted.append(request)
                extras.append(extra)
        if not accepted:
            return
        size = next(n for n in self.batching.sizes if n >= len(accepted))
        act_start = time.perf_counter()
        try:
            acted = policy.act(_stack(rows, size), self._next_key())
        except Exception as error:
            self._fail(accepted, error)
            return
        infer = 1e3 * (time.perf_counter() - act_start)
        self._milliseconds[mode].append(infer)
        self.metrics.inference.labels(mode).observe(infer / 1e3)
        self.metrics.batch.observe(len(accepted))
        for i, (request, extra) in enumerate(zip(accepted, extras, strict=True)):
            actions = acted.actions[i]
            if not np.isfinite(actions).all():
                self._fail([request], ValueError("actions are not finite"))
                continue
            timing = {"infer": infer, "prepare": 1e3 * (act_start - start),
                      "queue": 1e3 * (start - request.arrival), "batch": len(accepted)}  # fmt: skip
            rung = None if acted.rung is None else int(acted.rung[i])
            _answer(request, Answer("ok", actions, rung, extra, timing=timing), self.metrics)

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """Logs the traceback; a client gets a sentence with an id to find it by."""
        name = secrets.token_hex(4)
        logging.error("error %s: %s", name, error, exc_info=error)
        text = f"the policy could not act on this; the server's log says why at error {name}"
        for request in requests:
            _answer(request, Answer(counted.FAILED, error=text), self.metrics)

    def _next_key(self) -> Any:
        self._calls += 1
        return _fold_in(self._key, self._calls)


def _stack(rows: Sequence[Mapping[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
    """Concatenates rows to a batch and repeats the last one up to a compiled size."""
    rows = [*rows, *[rows[-1]] * (size - len(rows))]
    return {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}


def _answer(request: Request, answer: Answer, metrics: Metrics) -> None:
    metrics.requests.labels(answer.outcome).inc()
    if answer.outcome == "ok":
        metrics.latency.observe(time.perf_counter() - request.arrival)
        if answer.rung is not None:
            metrics.rungs.labels(answer.rung).inc()
    try:
        request.done(answer)
    except Exception:  # the event loop is closed, so no client is left to answer
        logging.exception("an answer could not be given back")
