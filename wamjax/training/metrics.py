"""Reports a run's progress: metrics.jsonl, a progress bar or lines, optional writers.

metrics.jsonl has one JSON object for each step, numbered by completed steps: the objective's
metrics, loss, grad_norm, learning_rate, skips, skips_in_a_row; null where a value is not finite. At
each multiple of log_every it also has step_time (seconds, mean of the window), data_wait (share
of that time spent waiting for the next batch) and mfu. A resumed run first drops the lines after
its checkpoint, so its file has the losses of an uninterrupted run.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from wamjax import files
from wamjax.console import say

FILE = "metrics.jsonl"
IN_FLIGHT = 2  # steps the host may be ahead of the device
Row = dict[str, float]


def read(workdir: str | os.PathLike) -> list[Row]:
    """Returns all rows of a run's metrics.jsonl, with NaN for null, without an incomplete last
    line."""
    path = files.path(workdir) / FILE
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        rows.append({k: math.nan if v is None else v for k, v in row.items()})
    return rows


def rewind(workdir: str | os.PathLike, step: int) -> None:
    """Drops all lines after `step`, in one atomic replacement of the file."""
    path = files.path(workdir) / FILE
    files.write_text(path, "".join(_line(r) for r in read(workdir) if r["step"] <= step))


class Recorder:
    """Takes device metrics of every step and writes them out a few steps later.

    Values are copied to the host in the background and read once `IN_FLIGHT` later steps are
    queued, so the device always has work; the same reading keeps the host from running ahead.
    """

    def __init__(self, workdir, config, start: int, flops: float, peak: tuple[float, str]):
        """Args: run directory, config, steps done so far, FLOPs of a step, (FLOP/s, its name)."""
        self.every, self.total = config.log_every, config.total_steps
        self._flops, (self._peak, peak_name) = flops, peak
        self._pending: collections.deque[tuple[Row, dict[str, jax.Array]]] = collections.deque()
        self._writes = jax.process_index() == 0
        self._window_start, self._window_steps, self._waited = time.perf_counter(), 0, 0.0
        self._file, self._bar, self._extra = None, None, []
        if self._writes:
            rewind(workdir, start)
            self._file = files.Journal(files.path(workdir) / FILE)
            self._extra = writers(workdir, config)
            bar = sys.stderr.isatty()
            self._bar = tqdm(total=self.total, initial=start, disable=not bar, unit="step")
            say(f"mfu is {flops:.3e} model FLOPs a step against the {peak_name}")

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_) -> None:
        if self._writes:
            self._file.close()
            self._bar.close()
            for writer in self._extra:
                writer.close()

    def next(self, iterator: Iterator[Any]) -> Any:
        """Returns the next batch; the time it takes counts as waiting for data."""
        begin = time.perf_counter()
        try:
            return next(iterator)
        except StopIteration:
            raise ValueError("the data ended before total_steps: repeat the data set") from None
        finally:
            self._waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Wraps work that is not training, such as saving, and excludes it from the step time."""
        begin = time.perf_counter()
        yield
        self._window_start += time.perf_counter() - begin

    def add(self, step: int, metrics: dict[str, jax.Array]) -> list[Row]:
        """Queues the metrics of `step`; returns the rows that became ready, oldest first."""
        for value in metrics.values():
            value.copy_to_host_async()
        self._window_steps += 1
        row = {"step": step}
        if step % self.every == 0:
            row |= self._window()
        self._pending.append((row, metrics))
        return self.drain(keep=IN_FLIGHT)

    def drain(self, keep: int = 0) -> list[Row]:
        """Writes all but the newest `keep` steps; waits for the device if it must."""
        rows = []
        while len(self._pending) > keep:
            row, metrics = self._pending.popleft()
            rows.append({**row, **{k: float(np.asarray(v)) for k, v in metrics.items()}})
            self._write(rows[-1])
        return rows

    def flush(self) -> None:
        """Flushes every line to disk, because a checkpoint must not be newer than its lines."""
        if self._writes:
            self._file.flush(must=True)

    def _window(self) -> Row:
        now = time.perf_counter()
        seconds = max(now - self._window_start, 1e-9)
        step_time = seconds / self._window_steps
        row = {
            "step_time": step_time,
            "data_wait": self._waited / seconds,
            "mfu": self._flops / step_time / self._peak,
        }
        self._window_start, self._window_steps, self._waited = now, 0, 0.0
        return row

    def _write(self, row: Row) -> None:
        if not self._writes:
            return
        self._file.write(_line(row))
        self._bar.update()
        if "step_time" not in row:
            return
        self._file.flush()
        for writer in self._extra:
            writer.write(row)
        eta = datetime.timedelta(seconds=round((self.total - row["step"]) * row["step_time"]))
        text = (
            f"loss {row['loss']:.4f}  {row['step_time'] * 1e3:.1f} ms/step  "
            f"data {row['data_wait']:.1%}  mfu {row['mfu']:.1%}  eta {eta}"
        )
        if self._bar.disable:
            say(f"step {row['step']}/{self.total}  {text}")
        else:
            self._bar.set_postfix_str(text)


class TensorBoard:
    """Writes rows as TensorBoard scalars, without TensorFlow."""

    def __init__(self, folder: files.Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError(_missing("log.tensorboard", "tensorboardX")) from error
        self._writer = SummaryWriter(str(folder))
        self.close = self._writer.close

    def write(self, row: Row) -> None:
        for key, value in row.items():
            self._writer.add_scalar(key, value, int(row["step"]))


class WandB:
    """Writes rows to a wandb project; a resumed run continues in the same wandb run."""

    def __init__(self, project: str, workdir: files.Path, config):
        try:
            import wandb
        except ImportError as error:
            raise ImportError(_missing("log.wandb", "wandb")) from error
        path = files.absolute(workdir)
        place = files.cache() / "wandb" if files.is_remote(path) else workdir
        os.makedirs(place, exist_ok=True)
        self._run = wandb.init(
            project=project, id=_wandb_id(path), name=path.name, dir=str(place), resume="allow",
            config=config.to_dict(),
        )  # fmt: skip
        self.close = self._run.finish

    def write(self, row: Row) -> None:
        self._run.log(row, step=int(row["step"]))


def _wandb_id(folder: files.Path) -> str:
    """Returns the run's id, stored in the folder: others may have the same name, and a folder may
    move."""
    file = folder / "wandb_id.txt"
    if not file.exists():
        # A run that older code started went by the name of its folder.
        begun = (folder / "wandb").is_dir()
        name = folder.name if begun else f"{folder.name}-{secrets.token_hex(4)}"
        files.write_text(file, name)
    return file.read_text()


def writers(workdir, config) -> list[TensorBoard | WandB]:
    """Returns the extra writers of ``config.log``."""
    workdir, out = files.path(workdir), []
    if config.log.tensorboard:
        out.append(TensorBoard(workdir / "tensorboard"))
    if config.log.wandb:
        out.append(WandB(config.log.wandb, workdir, config))
    return out


class Profile:
    """Traces the steps of ``config.profile``."""

    def __init__(self, config, folder: files.Path):
        self.folder, self._running, self._draft = folder, False, contextlib.ExitStack()
        self.first = config.profile.start
        self.last = self.first + config.profile.steps

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Starts or stops the trace before the step that follows `step` completed ones."""
        if self._running and step >= self.last:
            self._stop()
        if not self._running and self.first <= step < self.last:
            place = self.folder
            if files.is_remote(place):  # the profiler writes on this machine
                place = self._draft.enter_context(files.draft(place / f"from_{step}", replace=True))
            jax.profiler.start_trace(str(place))
            self._running = True

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._draft.close()
            self._running = False
            say(f"profile: {self.folder}")


def _line(row: Row) -> str:
    return json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n"


def _missing(key: str, package: str) -> str:
    return f"config.{key} needs {package}: pip install 'wamjax[log]', or unset config.{key}"
