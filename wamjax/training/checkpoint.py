"""Saves checkpoints by Orbax: asynchronous, atomic, with all of a run's state in one step.

A step holds the items ``params``, ``ema`` (if any: the average of the trained parameters),
``optimizer`` (its state and the counters), ``data`` (the position of each process's data iterator),
``config``, ``statistics``, and the ``digests`` of all of these, with which everything read is
compared. Code that acts with a policy needs only `restore_params`, which reads the parameters and
their description.

A damaged step is reported, and the one before it is used. Training then renames it to
``damaged-STEP``; nothing is deleted.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain.checkpoint as grain_checkpoint
import jax
import orbax.checkpoint as ocp
from absl import flags
from ml_collections import ConfigDict

from wamjax import config as configs
from wamjax import disk, files, tree
from wamjax.console import say
from wamjax.training import guards, integrity, partition, step_items
from wamjax.training.integrity import Damaged
from wamjax.training.state import TrainState
from wamjax.weights import store

Tree = Any
FOLDER = "checkpoints"
TEMPORARY = "*.orbax-checkpoint-tmp*"


class Restored(NamedTuple):
    """Holds what evaluation, serving and conversion need from a run.

    Attributes:
      params: nested dict of arrays.
      config: config of the checkpoint's training.
      statistics: JSON of the data's normalization statistics.
      step: step of the checkpoint.
    """

    params: Tree
    config: ConfigDict
    statistics: dict[str, Any]
    step: int


class Checkpoints:
    """Manages the checkpoints of a run directory; a context manager that waits for the last
    save."""

    def __init__(self, workdir: str | os.PathLike, keep: int):
        self.folder = files.absolute(workdir) / FOLDER
        self._manager = step_items.manager(
            self.folder, max_to_keep=keep, enable_async_checkpointing=True
        )
        self._reader = step_items.own_reader(self.folder)
        self._damaged: list[int] = []
        self._keep, self._size = keep, 0

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            with self._room():
                self._reader.close()
                self._manager.close()
        except disk.NoRoom:
            if kind is None:  # otherwise it was reported already
                raise

    @property
    def latest(self) -> int | None:
        """Returns the newest complete step that is not known to be damaged, or None."""
        return max((s for s in self._steps() if s not in self._damaged), default=None)

    def check_room(self, state: TrainState) -> None:
        """Warns if the disk lacks room for the checkpoints of a state, which may be abstract.

        Raises:
          disk.NoRoom: there is no room for a single one.
        """
        # A new one is complete before an old one is deleted.
        count = max(self._keep + 1 - len(self._steps()), 1)
        if warning := disk.check_room(self.folder, tree.nbytes(state), count):
            say(f"warning: {warning}")

    def save(self, state: TrainState, iterator, config: ConfigDict, statistics: dict) -> int:
        """Starts saving `state` under its step; an existing step stays.

        Arrays and the iterator's position are copied before this returns, so the caller may
        continue at once.
        """
        step = int(state.step)
        if step == self.latest:
            return step
        arrays, self._size = step_items.arrays_of(state), tree.nbytes(state)
        plain = {"config": configs.to_json(config), "statistics": statistics}
        with self._room():
            items = {name: ocp.args.StandardSave(value) for name, value in arrays.items()}
            items |= {name: ocp.args.JsonSave(value) for name, value in plain.items()}
            items["data"] = grain_checkpoint.CheckpointSave(iterator)
            items["digests"] = ocp.args.JsonSave(step_items.digests_of(arrays, plain, iterator))
            self._manager.save(step, args=ocp.args.Composite(**items))
        return step

    def config(self) -> dict[str, Any]:
        """Returns the config of the newest checkpoint as JSON."""
        return self._newest(lambda step: step_items.read_json(self._reader, step, "config"))

    def statistics(self) -> dict[str, Any]:
        """Returns the normalization statistics of the newest checkpoint as JSON."""
        return self._newest(lambda step: step_items.read_json(self._reader, step, "statistics"))

    def restore(self, abstract: TrainState, iterator) -> TrainState:
        """Restores the newest state with the shardings of `abstract`, and moves `iterator` to its
        position.

        Newer damaged steps are set aside, so `latest` is then the restored one.

        Args:
          abstract: `ShapeDtypeStruct` with shardings, on any mesh.

        Raises:
          ValueError: a parameter's shape differs from the checkpoint's.
          Damaged: no checkpoint is intact.
        """
        state = self._newest(lambda step: self._restore(step, abstract, iterator))
        self._set_aside()
        return state

    def wait(self) -> None:
        """Waits until everything saved is committed; raises an error of the saving thread."""
        with self._room():
            self._manager.wait_until_finished()

    def _steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def _restore(self, step: int, abstract: TrainState, iterator) -> TrainState:
        with _agreed():
            written = step_items.read_digests(self._reader, step)
            saved = step_items.shapes_of(self._reader, step, "params")
            step_items.check_unchanged(saved, written, self.folder / str(step))
            step_items.check_shapes(saved, abstract.params, step)
            wanted = step_items.arrays_of(abstract)
            if abstract.ema is not None:
                # An earlier version averaged what is frozen, too.
                whole = tree.flatten(step_items.shapes_of(self._reader, step, "ema")).keys()
                trained = tree.flatten(abstract.ema).keys()
                wanted["ema"] = abstract.ema if whole == trained else abstract.params
            items = {name: ocp.args.StandardRestore(value) for name, value in wanted.items()}
            position = step_items.read_position(self.folder / str(step) / "data", step, written)
            with step_items.reading(self.folder, step):
                found = self._reader.restore(step, args=ocp.args.Composite(**items))
                iterator.set_state(position)
                iterator.start_prefetch()
        found = {name: found[name] for name in wanted}
        if written is not None:  # a digest is computed by all processes together
            read = integrity.digests(found)
            integrity.check(read, written["arrays"], f"checkpoint {step} in {self.folder}")
        if abstract.ema is not None:
            found["ema"] = partition.split(found["ema"], trained.__contains__)[0]
        return TrainState(params=found["params"], ema=found.get("ema"), **found["optimizer"])

    def _newest(self, read: Callable[[int], Any]) -> Any:
        """Returns `read`'s result for the newest intact step, the same for all processes."""
        while True:
            step, error = self.latest, ""
            try:
                with _agreed():
                    return read(step)
            except Damaged as damage:
                error = str(damage)
            if step == min(self._steps()):
                more = f"; so are the newer ones {self._damaged}" if self._damaged else ""
                raise Damaged(f"{error}. There is no older one to go on from{more}: restore the "
                              "folder from a copy, or start in another --workdir")  # fmt: skip
            self._damaged.append(step)
            say(f"{error}. Going on from the one before, checkpoint {self.latest}")

    def _set_aside(self) -> None:
        """Renames damaged steps; call it after restoring an older one, since otherwise this code
        may be at fault."""
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
        """Wraps writes: reports a full disk and removes partial files."""
        try:
            with disk.sentence(self.folder, "a checkpoint", self._size):
                yield
        except disk.NoRoom:
            if jax.process_index() == 0:
                for partial in files.glob(self.folder, TEMPORARY):
                    files.remove(partial)
            raise


@contextlib.contextmanager
def _agreed() -> Iterator[None]:
    """Makes a damaged read of one process one of all of them.

    Wraps what every process reads for itself, so that none waits for another in what they compute
    together next.

    Raises:
      Damaged: with the same words in all processes.
    """
    error = ""
    try:
        yield
    except Damaged as damage:
        error = str(damage)  # only the text: the traceback keeps the read arrays alive
    if error := guards.any_text(error):
        raise Damaged(error)


class Found(NamedTuple):
    """Describes a checkpoint whose parameters are not read yet; for its attributes see
    `Restored`."""

    config: ConfigDict
    statistics: dict[str, Any]
    step: int


def find(workdir: str | os.PathLike, step: int | None = None) -> Found:
    """Returns a checkpoint's description of its parameters; arguments and errors as for
    `restore_params`."""
    with _opened(workdir) as manager:
        return _newest_whole(manager, step, lambda step: _found(manager, step))


def parameters(
    workdir: str | os.PathLike, step: int | None = None, ema: bool | None = None
) -> tuple[store.Stored, int]:
    """Returns the parameters of a run, to be read one by one, and their step; see `restore_params`.

    If there is an older checkpoint to fall back to, all parameters are read once and compared with
    the digests first. Otherwise they are compared while they are read.
    """

    def read(number: int) -> tuple[store.Stored, int]:
        stored = _stored(manager, number, ema)
        if step is None and number > min(manager.all_steps()):
            stored.verify()
            stored = store.Stored(stored.arrays, {}, stored.where)
        return stored, number

    with _opened(workdir) as manager:
        return _newest_whole(manager, step, read)


def restore_params(
    workdir: str | os.PathLike,
    step: int | None = None,
    ema: bool | None = None,
    shardings: Tree | None = None,
) -> Restored:
    """Restores parameters, config and statistics of a run, without its optimizer.

    Args:
      workdir: folder of the run.
      step: step to restore; by default the newest one that is not damaged.
      ema: whether to use the moving average; by default if the run has one.
      shardings: sharding of each parameter; the first local device by default.

    Raises:
      FileNotFoundError: the checkpoint does not exist; lists the existing ones.
      ValueError: `ema` is set, but the run has no moving average.
      Damaged: the chosen checkpoint is damaged, or all of them are.
    """
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def read(step: int) -> Restored:
        checkpoint, stored = _found(manager, step), _stored(manager, step, ema)
        places = tree.flatten(shardings) if shardings is not None else {}
        targets = {}
        for path, array in stored.arrays.items():
            dtype = jax.dtypes.canonicalize_dtype(array.dtype.numpy_dtype)
            place = places[path] if places else one
            targets[path] = jax.ShapeDtypeStruct(tuple(array.shape), dtype, sharding=place)
        params = tree.unflatten(stored.load(targets))
        return Restored(params, checkpoint.config, checkpoint.statistics, step)

    with _opened(workdir) as manager:
        return _newest_whole(manager, step, read)


def define_ema_flag() -> None:
    """Defines ``--ema`` for commands that read the parameters of a run; see `asked_ema`."""
    flags.DEFINE_enum(
        "ema",
        "auto",
        tuple(_EMA),
        "parameters to use: moving average or last step; auto = the average if there is one",
    )


def asked_ema() -> bool | None:
    """Returns the value of ``--ema`` as the argument `ema` of `restore_params`."""
    return _EMA[flags.FLAGS.ema]


def name_of(ema: bool) -> str:
    """Returns the value of ``--ema`` for `ema`, for file names."""
    return next(name for name, value in _EMA.items() if value is ema)


_EMA = {"auto": None, "average": True, "params": False}


@contextlib.contextmanager
def _opened(workdir: str | os.PathLike) -> Iterator[ocp.CheckpointManager]:
    """Opens the checkpoints of a run for reading; there is at least one."""
    folder = files.absolute(files.path(workdir, "--workdir")) / FOLDER
    files.reach(folder, "give another --workdir")
    if not folder.is_dir():
        raise FileNotFoundError(f"{workdir} holds no {FOLDER}/ folder: not a run's --workdir")
    with step_items.manager(folder, create=False) as manager:
        if not manager.all_steps():
            raise FileNotFoundError(
                f"{workdir} has no checkpoint yet: the same `python -m wamjax.train` command "
                "starts the run, or continues it"
            )
        yield manager


def _newest_whole(
    manager: ocp.CheckpointManager, chosen: int | None, read: Callable[[int], Any]
) -> Any:
    """Returns `read`'s result for the chosen step, or else for the newest intact one."""
    steps = sorted(manager.all_steps())
    if chosen is not None:
        if chosen not in steps:
            workdir = files.path(manager.directory).parent
            raise FileNotFoundError(f"{workdir} has no checkpoint {chosen}; it has {steps}")
        return read(chosen)
    for older in reversed([None, *steps[:-1]]):
        try:
            return read(steps.pop())
        except Damaged as error:
            if older is None:
                raise
            say(f"{error}. Using the one before, checkpoint {older}")


def _found(manager: ocp.CheckpointManager, step: int) -> Found:
    config = configs.load(step_items.read_json(manager, step, "config"))
    return Found(config, step_items.read_json(manager, step, "statistics"), step)


def _stored(manager: ocp.CheckpointManager, step: int, ema: bool | None) -> store.Stored:
    """Returns the parameters of a checkpoint, or their average, with their digests."""
    written = step_items.read_digests(manager, step)
    folder = files.path(manager.directory) / str(step)
    has_ema = (folder / "ema").is_dir()
    if written is not None:
        has_ema = bool(_of_item(written["arrays"], "ema"))
    if ema and not has_ema:
        raise ValueError(f"{folder.parent.parent} has no moving average: optim.ema_decay was 0")
    # The average covers only trained parameters; take the rest from the parameters.
    items = ("params", "ema") if (has_ema if ema is None else ema) else ("params",)
    arrays, digests = {}, {}
    for item in items:
        known = None if written is None else _of_item(written["arrays"], item)
        with step_items.reading(manager.directory, step):
            arrays |= store.read(folder / item, known).arrays
        digests |= known or {}
    return store.Stored(arrays, digests, f"checkpoint {step} in {manager.directory}")


def _of_item(digests: dict[str, str], item: str) -> dict[str, str]:
    start = f"{item}/"
    return {k.removeprefix(start): v for k, v in digests.items() if k.startswith(start)}
