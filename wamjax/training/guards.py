"""Protects a run's state: from non-finite steps, divergence, signals, a second training in the same
folder, and the death of one of its processes."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from wamjax import files, locks

LAG = 2  # steps from a signal in one process to the stop of all
HEARTBEAT = 20  # seconds without a sign of life after which a process counts as dead
PATIENCE = 7 * 24 * 3600  # seconds: one process may collect data, or evaluate, for long
_LINE = 2048  # bytes of what a process tells the others
# What JAX says when another process is gone.
_ALONE = re.compile(r"Gloo|by peer|UNAVAILABLE|DEADLINE_EXCEEDED|heartbeat|coordination service")


class Diverged(RuntimeError):
    """Too many steps in a row were non-finite."""


class Occupied(RuntimeError):
    """Another process trains in the folder of a run."""


def finite(loss: jax.Array, gradient_norm: jax.Array) -> jax.Array:
    """Returns whether a step may be taken: a global decision, the same on every device and host."""
    return jnp.isfinite(loss) & jnp.isfinite(gradient_norm)


def select(keep: jax.Array, new: Any, old: Any) -> Any:
    """Returns `new` if `keep`, else `old`, bit for bit (a NaN in `new` does not leak)."""
    return jax.tree.map(lambda n, o: jnp.where(keep, n, o), new, old)


def check_streak(row: dict[str, float], limit: int, last_checkpoint: int | None) -> None:
    """Stops the run when `row` ends `limit` non-finite steps in a row.

    Raises:
      Diverged: names the step, the values and the newest checkpoint.
    """
    if row["skips_in_a_row"] < limit:
        return
    checkpoint = (
        f"checkpoint {last_checkpoint} is kept" if last_checkpoint else "no checkpoint was saved"
    )
    raise Diverged(
        f"loss {row['loss']} or gradient norm {row['grad_norm']} was not finite for "
        f"{int(row['skips_in_a_row'])} steps in a row, up to step {int(row['step'])}; {checkpoint}"
        ". Lower optim.learning_rate, or check the data with `python -m wamjax.doctor`"
    )


@contextlib.contextmanager
def alone(workdir: files.Path) -> Iterator[None]:
    """Keeps other trainings out of a run's folder; the first of several processes holds the lock.

    The lock is the file ``.lock`` in the folder, which the system releases when the process ends
    for any reason. A file system without locks keeps nothing out. In a bucket, see `locks.hold`.

    Raises:
      Occupied: another training holds the lock.
    """
    if jax.process_index() > 0:
        yield
        return
    advice = "wait for it or stop it, or use another --workdir"
    if files.is_remote(workdir):
        try:
            with locks.hold(
                workdir / ".lock",
                lambda other: _end(f"{workdir} was taken by {other}, which trains there now"),
            ):
                yield
        except locks.Held as error:
            raise Occupied(f"{workdir} is in use: {error} trains there; {advice}") from None
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / ".lock", "a+") as file:
        try:
            locks.lock(file)
        except BlockingIOError:
            file.seek(0)
            raise Occupied(
                f"{workdir} is in use: {file.read().strip() or 'another process'} trains there; "
                f"{advice}"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {locks.host()}")
        file.flush()
        yield


class Interrupts:
    """Turns SIGTERM and SIGINT into a flag that the loop checks after every step.

    A signal may reach only one of several processes, and all must stop at the same step. So each
    puts its own answer on its devices after every step, a small program joins them, and the result
    is read `LAG` steps later, when the devices are done with it: nobody waits, and all read the
    same after the same step.

    A second signal acts as usual. As a context manager it restores the handlers on leaving.

    Args:
      mesh: mesh of all processes; needed if there are several.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, mesh: Mesh | None = None):
        self.received: str | None = None
        self._old: dict[int, Any] = {}
        self._outcomes: collections.deque[jax.Array] = collections.deque()
        if jax.process_count() > 1:
            every = NamedSharding(mesh, P(mesh.axis_names))
            self._join = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
            self._answers = [
                jax.make_array_from_callback((mesh.size,), every, lambda _, x=x: np.array([x]))
                for x in (False, True)
            ]

    def __enter__(self) -> Interrupts:
        try:
            self._old = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        except ValueError:  # not the main thread: whoever owns that one handles signals
            self._old = {}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def agreed(self) -> bool:
        """Returns whether all processes stop here; each of them calls it after every step."""
        if jax.process_count() == 1:
            return self.received is not None
        outcome = self._join(self._answers[self.received is not None])
        outcome.copy_to_host_async()
        self._outcomes.append(outcome)
        return len(self._outcomes) > LAG and bool(self._outcomes.popleft())

    def _handle(self, number: int, _frame) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}


# ---- the other processes of a run ----

_barriers = itertools.count()


def barrier() -> None:
    """Waits until all processes arrive, however long the others take."""
    if jax.process_count() > 1:
        import orbax.checkpoint as ocp

        # Not by a program of the devices, which would give up after minutes.
        ocp.multihost.sync_global_processes(
            f"wamjax_{next(_barriers)}",
            timeout=PATIENCE,
            processes=set(range(jax.process_count())),
        )


def any_text(text: str) -> str:
    """Returns the first non-empty text of all processes; all of them must call it."""
    own = np.frombuffer(text.encode()[:_LINE].ljust(_LINE), np.uint8)
    every = multihost_utils.process_allgather(own).reshape(-1, _LINE)
    texts = (row.tobytes().decode(errors="ignore").rstrip() for row in every)
    return next(filter(None, texts), "")


@contextlib.contextmanager
def first() -> Iterator[None]:
    """Lets process 0 go first; the others follow when it is done and find its results."""
    if jax.process_index() > 0:
        barrier()
    yield
    if jax.process_index() == 0:
        barrier()


_AGAIN = "Start all of them again: the same commands continue from the newest checkpoint."
# A witness waits until its process has ended, and speaks if that left no word.
_WITNESS = "import sys; sys.stdin.buffer.read() or print(sys.argv[1], file=sys.stderr)"
_witnesses: list[subprocess.Popen] = []


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Wraps joint computation of processes: if another process dies, this one ends at once, since
    it can neither continue nor save, and an orderly exit would wait for the other."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not _ALONE.search(str(error)):
            raise
        gist = " ".join(str(error).split())[:300]
        _end(f"another process of this run died or cannot be reached. {_AGAIN} ({gist})")


@contextlib.contextmanager
def company() -> Iterator[None]:
    """Wraps all work of one of several processes: when one fails, all end soon.

    A failing process does not wait at its exit for the others, which wait for it in the middle of a
    step. They notice: at once if their joint computation breaks off, else `HEARTBEAT` seconds
    later, when JAX ends them from within; a witness then says what happened.
    """
    if jax.process_count() > 1:
        text = (f"{_me()} ended without a word: it was killed, or JAX ended it (then it says so "
                f"above) because another process of this run died. {_AGAIN}")  # fmt: skip
        command = [sys.executable, "-S", "-E", "-c", _WITNESS, text]
        witness = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        _witnesses.append(witness)
    try:
        with together():
            yield
    except BaseException as error:
        if jax.process_count() == 1 or (isinstance(error, SystemExit) and not error.code):
            raise
        short = isinstance(error, SystemExit)
        _end(str(error.code) if short else "".join(traceback.format_exception(error)))
    finally:
        _dismiss()


def _end(text: str) -> None:
    _dismiss()
    sys.stdout.flush()
    print(f"{_me()}: {text}", file=sys.stderr, flush=True)
    os._exit(1)


def _me() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


def _dismiss() -> None:
    while _witnesses:
        _witnesses.pop().communicate(b"it said what there is to say")
