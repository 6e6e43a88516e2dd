"""What keeps a run from ruining its own state: non-finite steps, divergence, signals, a twin."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import signal
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


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
def alone(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other trainings out of a run's folder; of several processes the first one does.

    Held by the file ``.lock`` in it, which the system lets go when the process ends, however it
    ends. Where the file system knows no locks nothing is kept out.

    Raises:
      Occupied: one does.
    """
    if jax.process_index() > 0:
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Occupied(
                f"{workdir} is in use: {file.read().strip() or 'another process'} trains there; "
                "wait for it or stop it, or use another --workdir"
            ) from None
        except OSError:  # not every network file system has them
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


class Interrupts:
    """Turns SIGTERM and SIGINT into a question the loop asks between steps.

    A second signal acts as usual. As a context manager it restores the handlers on leaving.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.received: str | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        try:
            self._old = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        except ValueError:  # not the main thread: whoever owns that one handles signals
            self._old = {}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def agreed(self, step: int, every: int) -> bool:
        """Whether all processes stop after `step`; several agree only each `every` steps.

        A signal may reach one process only, and all must stop at the same step.
        """
        if jax.process_count() == 1:
            return self.received is not None
        if step % every:
            return False
        flags = multihost_utils.process_allgather(np.asarray(self.received is not None))
        return bool(np.any(flags))

    def _handle(self, number: int, _frame) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}
