"""What keeps a run from ruining its own state: non-finite steps, divergence, signals."""

from __future__ import annotations

import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


class Diverged(RuntimeError):
    """Too many non-finite steps in a row."""


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
