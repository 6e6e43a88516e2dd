"""Serves a policy whose actions encode its observation, in a thread of the test."""

from __future__ import annotations

import contextlib
import threading
import time

import numpy as np

from wamjax.bundle.observation import BadObservation, Observer
from wamjax.bundle.policy import Chunk
from wamjax.data.spec import DataSpec
from wamjax.serving import server
from wamjax.serving.names import Names, tables
from wamjax.serving.worker import Batching, Worker

SPEC = DataSpec({"image": (4, 6), "wrist_image": (4, 4)}, 3, 2, 5, 3, 1, 8, 10.0)


class Policy:
    """Returns actions (b, 5, 2): the first number of the state, and the sum of all pictures.

    Attributes:
      seconds: duration of a call.
      gate: calls wait until it is set.
      batches: batch size of each call.
      adapts: whether it tells rungs, the first number of the state modulo 3.
    """

    def __init__(self, spec=SPEC, seconds=0.0):
        self.observer, self.seconds = Observer(spec), seconds
        self.batches, self.budgets = [], []
        self.gate = threading.Event()
        self.gate.set()
        self.chunk, self.adapts = spec.chunk, False

    def example(self):
        return self.observer.example()

    def admit(self, observation, prefix=None, budget_ms=None):
        self.budgets.append(budget_ms)
        arrays = self.observer(observation)[0]
        if observation["instruction"] == "crash":
            raise ZeroDivisionError("of the policy")
        return arrays

    def act(self, arrays, key):
        assert self.gate.wait(30)
        time.sleep(self.seconds)
        self.batches.append(len(arrays["proprio"]))
        first, total = arrays["proprio"][:, 0], arrays["video"].sum((1, 2, 3, 4))
        rows = np.stack([first, total], -1).astype(np.float32)
        out = np.repeat(rows[:, None], self.chunk, 1)
        out[first == -13] = np.nan
        return Chunk(out, first.astype(int) % 3 if self.adapts else None)


def observation(number=1.0, pixel=1, style="openpi", **more):
    images = {name: np.full((*size, 3), pixel, np.uint8) for name, size in SPEC.cameras.items()}
    state = np.array([number, 0, 0], np.float32)
    if style == "native":
        return {"images": images, "proprio": state, "instruction": "lift", **more}
    return {f"observation/{name}": x for name, x in images.items()} | {
        "observation/state": state, "prompt": "lift", **more,
    }  # fmt: skip


def total(pixel=1):
    return pixel * 3 * sum(h * w for h, w in SPEC.cameras.values())


@contextlib.contextmanager
def serving(policy=None, batching=None, chosen=(), key="", instruction="", about=None,
            policies=None, work=None, tls=None, **limits):  # fmt: skip
    """Runs a `Server` with the policy `policy` at `address`."""
    names = Names(tables(chosen, tuple(SPEC.cameras)), instruction, max_pixels=64 * 64)
    work = work or Worker(
        policies or {"direct": policy or Policy()}, names, batching or Batching()
    )
    work.start()
    about = {"horizon": SPEC.chunk} if about is None else about
    application = server.Application(work, about, server.Limits(**limits), key)
    with server.bind("127.0.0.1", 0) as sock:
        running = server.Server(application, sock, **tls or {})
        thread = threading.Thread(target=running.run, daemon=True)
        thread.start()
        until = time.monotonic() + 10
        while not running.started and time.monotonic() < until:
            time.sleep(0.005)
        running.port = sock.getsockname()[1]
        try:
            yield running
        finally:
            for gate in (p.gate for p in work.policies.values() if hasattr(p, "gate")):
                gate.set()
            running.should_exit = True
            thread.join(10)
            work.stop(10)
            assert not thread.is_alive()


__all__ = ["BadObservation", "Policy", "SPEC", "observation", "serving", "total"]
