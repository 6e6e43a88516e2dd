"""The one thread that acts: it takes the newest observation of each client, in batches."""

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
from wamjax.serving import metrics as counted
from wamjax.serving import wire
from wamjax.serving.metrics import Metrics
from wamjax.serving.names import Names, prefix_of

LATENCIES = 512  # calls that a percentile is of: older ones are forgotten
TRIALS = 10  # timed calls before the port opens
_fold_in = jax.jit(jax.random.fold_in)  # a fifth of the time of the plain call
RECENT = 1.0  # seconds after which a client is no longer waited for


class Acts(Protocol):
    """What a worker needs of a policy; `LoadedPolicy` is one."""

    def admit(
        self, observation: dict[str, Any], prefix: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Arrays with a batch axis, the actions (d, a) that are committed among them; or
        BadObservation."""

    def act(self, arrays: dict[str, np.ndarray], key: Any) -> np.ndarray:
        """Actions (b, j, a)."""

    def example(self) -> dict[str, Any]:
        """An observation of one robot."""


@dataclasses.dataclass(eq=False)
class Request:
    """An observation that waits.

    Attributes:
      client: whose; of each only the newest one waits.
      message: as it was sent, see `Names`.
      done: called once, in the worker's thread, with an `Answer`.
      arrival: seconds, see `time.perf_counter`.
    """

    client: Hashable
    message: Any
    done: Callable[[Answer], None]
    arrival: float = dataclasses.field(default_factory=time.perf_counter)


@dataclasses.dataclass
class Answer:
    """What became of a request.

    Attributes:
      outcome: "ok", or one of `metrics`.
      actions: (j, a), if ok.
      extras: what the client had added to its observation.
      error: a sentence for the client, otherwise.
      timing: milliseconds: "infer" of the policy, "queue" before it; "batch", its size.
    """

    outcome: str
    actions: np.ndarray | None = None
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""
    timing: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Batching:
    """How observations of several clients come together.

    Attributes:
      max_batch: in one call of the policy.
      max_wait: seconds that the oldest one waits for others once the policy is free; none are
        waited for if all clients of the last second have asked, so a single one never waits.
    """

    max_batch: int = 8
    max_wait: float = 0.005

    @property
    def sizes(self) -> tuple[int, ...]:
        """Those that are compiled: powers of two, and the largest."""
        powers = [1 << n for n in range(self.max_batch.bit_length()) if 1 << n < self.max_batch]
        return (*powers, self.max_batch)


class Worker:
    """Owns the policies and the thread in which they act.

    Attributes:
      policies: mode -> policy; the first is that of requests without a mode.
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
        self._waiting: dict[Hashable, Request] = {}  # in the order of arrival
        self._asked: dict[Hashable, float] = {}
        self._change = threading.Condition()
        self._ended, self._busy, self._calls = False, False, 0
        self._key = jax.random.key(seed)
        self._milliseconds = {mode: collections.deque(maxlen=LATENCIES) for mode in policies}
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)

    def start(self) -> None:
        """Compiles every mode for every batch size, measures them, and begins to act.

        What compiling takes is in no statistic.
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
        """Milliseconds of the policy by mode: p50 and p99 of the last calls."""
        out = {}
        for mode, times in self._milliseconds.items():
            p50, p99 = np.percentile(list(times) or [0.0], (50, 99))
            out[mode] = {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}
        return out

    def submit(self, request: Request) -> None:
        """Puts an observation in; an older one of that client that waits is not acted on."""
        with self._change:
            ended, older = self._ended, None
            if not ended:
                older = self._waiting.pop(request.client, None)
                self._waiting[request.client] = request
                self._asked[request.client] = request.arrival
            self.metrics.queue.set(len(self._waiting))
            self._change.notify()
        if older is not None:
            _answer(older, Answer(counted.SUPERSEDED), self.metrics)
        if ended:
            _answer(request, Answer(counted.DROPPED, error="the server is shutting down"),
                    self.metrics)  # fmt: skip

    def forget(self, client: Hashable) -> None:
        """A client is gone: what it asked is not acted on, and nobody waits for it."""
        with self._change:
            self._asked.pop(client, None)
            older = self._waiting.pop(client, None)
            self.metrics.queue.set(len(self._waiting))
        if older is not None:
            _answer(older, Answer(counted.DROPPED, error="the client is gone"), self.metrics)

    def stop(self, timeout: float = 30.0) -> bool:
        """Answers what waits, takes nothing more, and ends; False: it did not, in `timeout` s."""
        with self._change:
            self._ended = True
            self._change.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while batch := self._take():
            mode, requests = batch
            try:
                self._serve(mode, requests)
            except Exception as error:  # the thread outlives whatever a policy does
                self._fail(requests, error)
            del batch, requests  # pictures are not kept until the next ones come

    def _take(self) -> tuple[str, list[Request]] | None:
        """The next batch, oldest first; None: it is over."""
        with self._change:
            while not self._waiting:
                if self._ended:
                    return None
                self._change.wait()
            # From now on: who was just answered may ask again at once, and come along.
            until = time.perf_counter() + self.batching.max_wait
            while len(self._waiting) < self._expected():
                left = until - time.perf_counter()
                if left <= 0 or self._ended or not self._change.wait(left):
                    break
            if not self._waiting:  # the client went away meanwhile
                return self._take()
            mode = self._mode(next(iter(self._waiting.values())))
            requests = [r for r in self._waiting.values() if self._mode(r) == mode]
            requests = requests[: self.batching.max_batch]
            for request in requests:
                del self._waiting[request.client]
            self.metrics.queue.set(len(self._waiting))
            return mode, requests

    def _expected(self) -> int:
        """How many observations may come together: of the clients that asked lately."""
        old = time.perf_counter() - RECENT
        self._asked = {client: at for client, at in self._asked.items() if at > old}
        return min(self.batching.max_batch, max(1, len(self._asked)))

    def _mode(self, request: Request) -> str:
        message = request.message
        asked = message.get("mode") if isinstance(message, Mapping) else None
        fits = isinstance(asked, str) and asked in self.policies
        return asked if fits else next(iter(self.policies))

    def _serve(self, mode: str, requests: Sequence[Request]) -> None:
        """Acts on one batch and answers all of it."""
        start, policy = time.perf_counter(), self.policies[mode]
        rows, good, extras = [], [], []
        for request in requests:
            try:
                observation, added = self.names(request.message)
                if added.get("mode") not in (None, mode):
                    raise BadObservation(f"mode {added['mode']!r} is not served; there are "
                                         f"{', '.join(self.policies)}")  # fmt: skip
                rows.append(policy.admit(observation, prefix_of(request.message)))
            except BadObservation as error:
                _answer(request, Answer(counted.REFUSED, error=wire.sentence(error)), self.metrics)
            except Exception as error:
                self._fail([request], error)
            else:
                good.append(request)
                extras.append(added)
        if not good:
            return
        size = next(n for n in self.batching.sizes if n >= len(good))
        called = time.perf_counter()
        try:
            actions = policy.act(_stack(rows, size), self._next_key())
        except Exception as error:
            self._fail(good, error)
            return
        infer = 1e3 * (time.perf_counter() - called)
        self._milliseconds[mode].append(infer)
        self.metrics.inference.labels(mode).observe(infer / 1e3)
        self.metrics.batch.observe(len(good))
        for request, added, chunk in zip(good, extras, actions, strict=False):  # without padding
            if not np.isfinite(chunk).all():
                self._fail([request], ValueError("actions are not finite"))
                continue
            timing = {"infer": infer, "prepare": 1e3 * (called - start),
                      "queue": 1e3 * (start - request.arrival), "batch": len(good)}  # fmt: skip
            _answer(request, Answer("ok", chunk, added, timing=timing), self.metrics)

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """The traceback stays here; a client gets a sentence and an id to find it by."""
        name = secrets.token_hex(4)
        logging.error("error %s: %s", name, error, exc_info=error)
        text = f"the policy could not act on this; the server's log says why at error {name}"
        for request in requests:
            _answer(request, Answer(counted.FAILED, error=text), self.metrics)

    def _next_key(self) -> Any:
        self._calls += 1
        return _fold_in(self._key, self._calls)


def _stack(rows: Sequence[Mapping[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
    """Rows as one batch; the last one again up to a size that was compiled."""
    rows = [*rows, *[rows[-1]] * (size - len(rows))]
    return {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}


def _answer(request: Request, answer: Answer, metrics: Metrics) -> None:
    metrics.requests.labels(answer.outcome).inc()
    if answer.outcome == "ok":
        metrics.latency.observe(time.perf_counter() - request.arrival)
    try:
        request.done(answer)
    except Exception:  # a loop that is closed: nobody is there to be told
        logging.exception("an answer could not be given back")
