"""What keeps a run from ruining its own state: non-finite steps, divergence, signals, a twin, and
the death of one of its processes."""

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
    """Too many non-finite steps in a row."""


class Occupied(RuntimeError):
    """Another process trains in the folder of a run."""


def finite(loss: jax.Array, gradient_norm: jax.Array) -> jax.Array:
    """Whether a step may be taken: a global decision, so the same on every device and host."""
    return jnp.isfinite(loss) & jnp.isfinite(gradient_norm)


def select(keep: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `keep`, else `old`, bit for bit (a NaN in `new` does not leak)."""
    return jax.tree.map(lambda n, o: jnp.where(keep, n, o), new, old)


def check_streak(row: dict[str, float], limit: int, last_checkpoint: int | None) -> None:
    """Stops the run when `row` ends `limit` non-finite steps in a row.

    Raises:
      Diverged: names the step, the values and the checkpoint that is kept.
    """
    if row["skips_in_a_row"] < limit:
        return
    kept = f"checkpoint {last_checkpoint} is kept" if last_checkpoint else "no checkpoint was saved"
    raise Diverged(
        f"loss {row['loss']} or gradient norm {row['grad_norm']} was not finite for "
        f"{int(row['skips_in_a_row'])} steps in a row, up to step {int(row['step'])}; {kept}. "
        "Lower optim.learning_rate, or check the data with `python -m wamjax.doctor`"
    )


@contextlib.contextmanager
def alone(workdir: files.Path) -> Iterator[None]:
    """Keeps other trainings out of a run's folder; of several processes the first one does.

    Held by the file ``.lock`` in it, which the system lets go when the process ends, however it
    ends. Where the file system knows no locks nothing is kept out. In a bucket, see `locks.hold`.

    Raises:
      Occupied: one does.
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
    """Turns SIGTERM and SIGINT into a question the loop asks after every step.

    A signal may reach one of several processes, and all must stop at the same step. So each puts
    its own answer on its devices after every step, a small program joins them, and what it found
    is read `LAG` steps later, when the devices are done with it: nobody waits, and all read the
    same after the same step.

    A second signal acts as usual. As a context manager it restores the handlers on leaving.

    Args:
      mesh: of all processes; needed where there are several.
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
        """Whether all processes stop here; to be asked after every step by each of them."""
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
    """Waits until all processes are here, for as long as what the others do takes."""
    if jax.process_count() > 1:
        import orbax.checkpoint as ocp

        # Not by a program of the devices, which would give up after minutes.
        ocp.multihost.sync_global_processes(
            f"wamjax_{next(_barriers)}",
            timeout=PATIENCE,
            processes=set(range(jax.process_count())),
        )


def any_text(text: str) -> str:
    """The first text of all processes that is not empty; to be asked by all of them."""
    own = np.frombuffer(text.encode()[:_LINE].ljust(_LINE), np.uint8)
    every = multihost_utils.process_allgather(own).reshape(-1, _LINE)
    texts = (row.tobytes().decode(errors="ignore").rstrip() for row in every)
    return next(filter(None, texts), "")


@contextlib.contextmanager
def first() -> Iterator[None]:
    """Lets process 0 go ahead, and the others when it is through: they find what it made."""
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
    """Around what processes compute together: if another one is gone, this one ends at once, since
    it can neither go on nor save, and leaving in order would wait for the other."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not _ALONE.search(str(error)):
            raise
        gist = " ".join(str(error).split())[:300]
        _end(f"another process of this run died or cannot be reached. {_AGAIN} ({gist})")


@contextlib.contextmanager
def company() -> Iterator[None]:
    """Around all that one of several processes does: when one fails all end, and soon.

    A process that fails does not wait at its exit for the others, which wait for it in the middle
    of a step. Those notice: at once if what they compute together breaks off, else `HEARTBEAT`
    seconds later, when JAX ends them from within; a witness then says what it was.
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
