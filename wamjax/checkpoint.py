"""Checkpoints by Orbax: asynchronous, atomic, all of a run's state in one step.

A step holds the items ``params``, ``ema`` (if any: the average of what is trained), ``optimizer``
(its state and the counters), ``data`` (the position of the data iterator, of each process),
``config`` and ``statistics``, and ``digests`` of all of these, by which whatever is read is told
from what a disk has made of it. What acts on a policy needs no more than `restore_params`, which
reads the first two and the two with the config.

A step that is damaged is named, and the one before it is used. Training then renames it to
``damaged-STEP``; nothing is deleted.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain.checkpoint as grain_checkpoint
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from wamjax import config as configs
from wamjax import disk, guards, integrity, partition, tree
from wamjax.integrity import Damaged
from wamjax.metrics import say
from wamjax.state import TrainState

Tree = Any
FOLDER = "checkpoints"
TEMPORARY = "*.orbax-checkpoint-tmp*"


class Restored(NamedTuple):
    """What evaluation, serving and conversion need of a run.

    Attributes:
      params: nested dict of arrays.
      config: the config the checkpoint was trained with.
      statistics: json of the data's normalisation statistics.
      step: the step of the checkpoint.
    """

    params: Tree
    config: ConfigDict
    statistics: dict[str, Any]
    step: int


def _manager(folder: pathlib.Path, **options) -> ocp.CheckpointManager:
    """A manager that knows every item by name, so that it can also tell what is in a step."""
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(**options),
        item_handlers={
            "params": ocp.StandardCheckpointHandler(),
            "ema": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "data": grain_checkpoint.CheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
            "statistics": ocp.JsonCheckpointHandler(),
            "digests": ocp.JsonCheckpointHandler(),
        },
    )


class Checkpoints:
    """The checkpoints of a run directory; a context manager that waits for the last save."""

    def __init__(self, workdir: str | os.PathLike, keep: int):
        self.folder = pathlib.Path(workdir).absolute() / FOLDER
        self._manager = _manager(self.folder, max_to_keep=keep, enable_async_checkpointing=True)
        self._damaged: list[int] = []
        self._keep, self._size = keep, 0

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            with self._room():
                self._manager.close()
        except disk.NoRoom:
            if kind is None:  # else it is said already
                raise

    @property
    def latest(self) -> int | None:
        """The newest complete step that is not known to be damaged, or None."""
        return max((s for s in self._steps() if s not in self._damaged), default=None)

    def check_room(self, state: TrainState) -> None:
        """Says what the disk lacks for the checkpoints of a state, which may be abstract.

        Raises:
          disk.NoRoom: there is none for a single one.
        """
        # A new one is complete before an old one goes.
        count = max(self._keep + 1 - len(self._steps()), 1)
        if warning := disk.check_room(self.folder, tree.nbytes(state), count):
            say(f"warning: {warning}")

    def save(self, state: TrainState, iterator, config: ConfigDict, statistics: dict) -> int:
        """Starts saving `state` under its step; a step that is already there stays.

        Arrays and the iterator's position are copied before this returns, so that the caller may
        go on at once.
        """
        step = int(state.step)
        if step == self.latest:
            return step
        arrays, self._size = _arrays(state), tree.nbytes(state)
        plain = {"config": configs.to_json(config), "statistics": statistics}
        with self._room():
            items = {name: ocp.args.StandardSave(value) for name, value in arrays.items()}
            items |= {name: ocp.args.JsonSave(value) for name, value in plain.items()}
            items["data"] = grain_checkpoint.CheckpointSave(iterator)
            items["digests"] = ocp.args.JsonSave(_digests(arrays, plain, iterator))
            self._manager.save(step, args=ocp.args.Composite(**items))
        return step

    def config(self) -> dict[str, Any]:
        """The config of the newest checkpoint, as json."""
        return self._newest(lambda step: _json(self._manager, step, "config"))

    def statistics(self) -> dict[str, Any]:
        """The normalisation statistics of the newest checkpoint, as json."""
        return self._newest(lambda step: _json(self._manager, step, "statistics"))

    def restore(self, abstract: TrainState, iterator) -> TrainState:
        """The newest state, placed as `abstract` says; moves `iterator` to where it was.

        Newer ones that are damaged are set aside, and `latest` is then the one that was restored.

        Args:
          abstract: `ShapeDtypeStruct` with shardings, on any mesh.

        Raises:
          ValueError: a parameter's shape is not that of the checkpoint.
          Damaged: no checkpoint is whole.
        """
        state = self._newest(lambda step: self._restore(step, abstract, iterator))
        self._set_aside()
        return state

    def wait(self) -> None:
        """Returns when what was saved is committed; an error of the saving thread is raised."""
        with self._room():
            self._manager.wait_until_finished()

    def _steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def _restore(self, step: int, abstract: TrainState, iterator) -> TrainState:
        written = _written(self._manager, step)
        saved = _shapes(self._manager, step, "params")
        _check_written(saved, written, self.folder / str(step))
        _check_shapes(saved, abstract.params, step)
        wanted = _arrays(abstract)
        if abstract.ema is not None:
            # An earlier version averaged what is frozen, too.
            whole = tree.flatten(_shapes(self._manager, step, "ema")).keys()
            trained = tree.flatten(abstract.ema).keys()
            wanted["ema"] = abstract.ema if whole == trained else abstract.params
        items = {name: ocp.args.StandardRestore(value) for name, value in wanted.items()}
        position = _position(self.folder / str(step) / "data", step, written)
        with _reading(self.folder, step):
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
            iterator.set_state(position)
            iterator.start_prefetch()
        found = {name: found[name] for name in wanted}
        if written is not None:
            read = integrity.digests(found)
            integrity.check(read, written["arrays"], f"checkpoint {step} in {self.folder}")
        if abstract.ema is not None:
            found["ema"] = partition.split(found["ema"], trained.__contains__)[0]
        return TrainState(params=found["params"], ema=found.get("ema"), **found["optimizer"])

    def _newest(self, read: Callable[[int], Any]) -> Any:
        """What `read` gives of the newest step that is whole, the same one for all processes."""
        while True:
            step, value, error = self.latest, None, ""
            try:
                value = read(step)
            except Damaged as damage:
                error = str(damage)  # alone: its traceback holds what was read
            if not _any_process(bool(error)):
                return value
            value = None
            error = error or f"checkpoint {step} in {self.folder} is damaged for another process"
            if step == min(self._steps()):
                more = f"; so are the newer ones {self._damaged}" if self._damaged else ""
                raise Damaged(f"{error}. There is no older one to go on from{more}: restore the "
                              "folder from a copy, or start in another --workdir")  # fmt: skip
            self._damaged.append(step)
            say(f"{error}. Going on from the one before, checkpoint {self.latest}")

    def _set_aside(self) -> None:
        """Renames the steps that are damaged; to be called when an older one was restored, since
        until then it may be this code that cannot read them."""
        if not self._damaged:
            return
        if jax.process_index() == 0:
            for step in self._damaged:
                names = (f"damaged-{step}{n}" for n in ("", *(f"-{i}" for i in range(2, 1000))))
                place = next(p for p in (self.folder / n for n in names) if not p.exists())
                (self.folder / str(step)).rename(place)
                say(f"checkpoint {step} is set aside as {place}, which can be deleted")
        guards.barrier()
        self._manager.reload()
        self._damaged = []

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """Around what writes: if the disk is full that is said, and what is partial removed."""
        try:
            with disk.sentence(self.folder, "a checkpoint", self._size):
                yield
        except disk.NoRoom:
            if jax.process_index() == 0:
                for partial in self.folder.glob(TEMPORARY):
                    shutil.rmtree(partial, ignore_errors=True)
            raise


class Found(NamedTuple):
    """A checkpoint whose parameters are not read yet.

    Attributes:
      step: of the checkpoint.
      config, statistics: see `Restored`.
      folder: of its parameters, or of their moving average; `wamjax.weights.store.read` opens it.
    """

    step: int
    config: ConfigDict
    statistics: dict[str, Any]
    folder: pathlib.Path


def find(workdir: str | os.PathLike, step: int | None = None, ema: bool | None = None) -> Found:
    """The checkpoint of a run that `restore_params` restores; arguments and errors as there."""
    folder = pathlib.Path(workdir).absolute() / FOLDER
    if not folder.is_dir():
        raise FileNotFoundError(f"{workdir} holds no {FOLDER}/ folder: not a run's --workdir")
    with _manager(folder, create=False) as m:
        steps = sorted(m.all_steps())
        if not steps:
            raise FileNotFoundError(
                f"{workdir} has no checkpoint yet: the same `python -m wamjax.train` command "
                "starts the run, or continues it"
            )
        step = step if step is not None else steps[-1]
        if step not in steps:
            raise FileNotFoundError(f"{workdir} has no checkpoint {step}; it has {steps}")
        config = configs.load(_json(m, step, "config"))
        has_ema = config.optim.ema_decay > 0
        if ema and not has_ema:
            raise ValueError(f"{workdir} has no moving average: optim.ema_decay was 0")
        item = "ema" if (has_ema if ema is None else ema) else "params"
        return Found(step, config, _json(m, step, "statistics"), folder / str(step) / item)


def restore_params(
    workdir: str | os.PathLike,
    step: int | None = None,
    ema: bool | None = None,
    shardings: Tree | None = None,
) -> Restored:
    """Parameters, config and statistics of a run, without its optimiser.

    Args:
      workdir: of the run.
      step: which checkpoint; the newest by default.
      ema: the moving average, or not; by default if the run has one.
      shardings: where each parameter goes; the first local device by default.

    Raises:
      FileNotFoundError: no such checkpoint; names those that there are.
      ValueError: the average of a run that has none.
    """
    step, config, statistics, folder = find(workdir, step, ema)
    item = folder.name
    with _manager(folder.parent.parent, create=False) as m:
        saved = _shapes(m, step, item)
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        if shardings is None:
            shardings = jax.tree.map(lambda _: place, saved)
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), saved, shardings
        )
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
        with _reading(m.directory, step):
            params = m.restore(step, args=args)[item]
        return Restored(params, config, statistics, step)


def _arrays(state: TrainState) -> dict[str, Tree]:
    """The items of arrays in a step."""
    counters = {"step": state.step, "skips": state.skips, "streak": state.streak}
    out = {"params": state.params, "optimizer": counters | {"opt_state": state.opt_state}}
    return out if state.ema is None else out | {"ema": state.ema}


def _digests(arrays: dict[str, Tree], plain: dict[str, Any], iterator) -> dict[str, Any]:
    """What the item of digests holds: of arrays by item and path, of json by item, of positions by
    file; and the shapes of the parameters, so that a damaged shape is none of another model."""
    shapes = {path: list(x.shape) for path, x in tree.flatten(arrays["params"]).items()}
    own = integrity.of_json(iterator.get_state())
    every = multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(own), np.uint8))
    every, n = every.reshape(-1, len(own) // 2), jax.process_count()
    return {
        "arrays": integrity.digests(arrays),
        "json": {name: integrity.of_json(value) for name, value in plain.items()},
        "data": {f"process_{i}-of-{n}.json": bytes(row).hex() for i, row in enumerate(every)},
        "shapes": shapes,
    }


def _written(manager: ocp.CheckpointManager, step: int) -> dict[str, Any] | None:
    """The digests of a step; None, and a line that says so, if it is of a version without them."""
    if not (pathlib.Path(manager.directory) / str(step) / "digests").exists():
        _say_unchecked(manager.directory, step)
        return None
    args = ocp.args.Composite(digests=ocp.args.JsonRestore())
    with _reading(manager.directory, step):
        found = dict(manager.restore(step, args=args)["digests"])
        if {name: type(value) for name, value in found.items()} != dict.fromkeys(_PARTS, dict):
            raise ValueError(f"digests of {sorted(found)}")
        return found


_PARTS = ("arrays", "json", "data", "shapes")


@functools.cache
def _say_unchecked(folder, step: int) -> None:
    say(f"checkpoint {step} in {folder} has no digests, as an earlier version wrote it: whether it "
        "is damaged cannot be told")  # fmt: skip


def _json(manager: ocp.CheckpointManager, step: int, item: str) -> dict[str, Any]:
    args = ocp.args.Composite(**{item: ocp.args.JsonRestore()})
    with _reading(manager.directory, step):
        found = manager.restore(step, args=args)[item]
    written = _written(manager, step)
    if written is not None and integrity.of_json(found) != written["json"].get(item):
        raise Damaged(f"checkpoint {step} in {manager.directory} is damaged: {item!r} is not "
                      "what was written")  # fmt: skip
    return found


def _check_written(saved: Tree, written: dict[str, Any] | None, folder: pathlib.Path) -> None:
    """That the shapes that an item says are those that it had."""
    shapes = {path: list(x.shape) for path, x in tree.flatten(saved).items()}
    if written is not None and shapes != written["shapes"]:
        raise Damaged(f"checkpoint {folder.name} in {folder.parent} is damaged: its parameters "
                      "have not the shapes that they had")  # fmt: skip


def _any_process(value: bool) -> bool:
    return bool(np.any(multihost_utils.process_allgather(np.asarray(value))))


@contextlib.contextmanager
def _reading(folder, step: int | None) -> Iterator[None]:
    """Says which checkpoint it is that cannot be read. None is half-written by us, but disks fill
    up, copies break off, and libraries change."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):  # a machine that is too small
        raise
    except Exception as error:  # a flipped bit in the files of Orbax comes out as anything
        raise Damaged(
            f"checkpoint {step} in {folder} cannot be read: it is damaged, or of another version "
            f"of this code: {_line(error)}"
        ) from error


def _line(error: Exception) -> str:
    """An error in a line; TensorStore tells all of its state."""
    text = " ".join(repr(error).split())
    return text if len(text) < 300 else f"{text[:300]}..."


def _shapes(manager: ocp.CheckpointManager, step: int, item: str) -> Tree:
    """Nested dicts of the shapes and dtypes that an item holds."""
    with _reading(manager.directory, step):
        return tree.unflatten(tree.flatten(dict(manager.item_metadata(step)[item])))


def _position(
    folder: pathlib.Path, step: int, written: dict[str, Any] | None
) -> dict[str, Any]:
    """Where the data stood. Each process left its position; all are the number of the next batch,
    of which each made some rows, so it goes for any number of processes.

    Raises:
      ValueError: there is no position, or processes that are no longer there had different ones.
    """
    own = folder / f"process_{jax.process_index()}-of-{jax.process_count()}.json"
    with _reading(folder.parent.parent, step):
        files = [own] if own.exists() else sorted(folder.glob("process_*-of-*.json"))
        if not files:
            raise FileNotFoundError(f"{folder} holds no position of the data")
        positions = [json.loads(file.read_text()) for file in files]
    for file, position in zip(files, positions, strict=True):
        if written is not None and integrity.of_json(position) != written["data"].get(file.name):
            raise Damaged(f"{file} is damaged: it is not what was written")
    for file, position in zip(files, positions, strict=True):
        if position != positions[0]:
            raise ValueError(
                f"{file} is at {position}, {files[0].name} at {positions[0]}, and now there are "
                f"{jax.process_count()} processes: continue with as many as before"
            )
    return positions[0]


def _check_shapes(saved: Tree, wanted: Tree, step: int) -> None:
    saved, wanted = tree.flatten(saved), tree.flatten(wanted)
    for path in [*wanted, *saved]:
        a = saved[path].shape if path in saved else "absent"
        b = wanted[path].shape if path in wanted else "absent"
        if a != b:
            raise ValueError(
                f"parameter {path!r} is {a} in checkpoint {step} and {b} in the model that this "
                "config builds; the data or the code changed. Train in another --workdir"
            )
