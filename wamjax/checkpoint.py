"""Checkpoints by Orbax: asynchronous, atomic, all of a run's state in one step.

A step holds the items ``params``, ``ema`` (if any), ``optimizer`` (its state and the counters),
``data`` (the position of the data iterator, of each process), ``config`` and ``statistics``. What
acts on a policy needs no more than `restore_params`, which reads the first two and the last two.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import grain.checkpoint as grain_checkpoint
import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from wamjax import config as configs
from wamjax import tree
from wamjax.state import TrainState

Tree = Any
FOLDER = "checkpoints"


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
        },
    )


class Checkpoints:
    """The checkpoints of a run directory; a context manager that waits for the last save."""

    def __init__(self, workdir: str | os.PathLike, keep: int):
        self.folder = pathlib.Path(workdir).absolute() / FOLDER
        self._manager = _manager(self.folder, max_to_keep=keep, enable_async_checkpointing=True)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, iterator, config: ConfigDict, statistics: dict) -> int:
        """Starts saving `state` under its step; a step that is already there stays.

        Arrays and the iterator's position are copied before this returns, so that the caller may
        go on at once.
        """
        step = int(state.step)
        if step == self.latest:
            return step
        counters = {"step": state.step, "skips": state.skips, "streak": state.streak}
        items = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave(counters | {"opt_state": state.opt_state}),
            "data": grain_checkpoint.CheckpointSave(iterator),
            "config": ocp.args.JsonSave(configs.to_json(config)),
            "statistics": ocp.args.JsonSave(statistics),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        self._manager.save(step, args=ocp.args.Composite(**items))
        return step

    def config(self) -> dict[str, Any]:
        """The config of the newest checkpoint, as json."""
        return _json(self._manager, self.latest, "config")

    def statistics(self) -> dict[str, Any]:
        """The normalisation statistics of the newest checkpoint, as json."""
        return _json(self._manager, self.latest, "statistics")

    def restore(self, abstract: TrainState, iterator) -> TrainState:
        """The newest state, placed as `abstract` says; moves `iterator` to where it was.

        Args:
          abstract: `ShapeDtypeStruct` with shardings, on any mesh.

        Raises:
          ValueError: a parameter's shape is not that of the checkpoint.
        """
        step = self.latest
        _check_shapes(_shapes(self._manager, step, "params"), abstract.params, step)
        counters = {"step": abstract.step, "skips": abstract.skips, "streak": abstract.streak}
        items = {
            "params": ocp.args.StandardRestore(abstract.params),
            "optimizer": ocp.args.StandardRestore(counters | {"opt_state": abstract.opt_state}),
        }
        if abstract.ema is not None:
            items["ema"] = ocp.args.StandardRestore(abstract.ema)
        position = _position(self.folder / str(step) / "data", step)
        with _reading(self.folder, step):
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
            iterator.set_state(position)
            iterator.start_prefetch()
        return TrainState(params=found["params"], ema=found.get("ema"), **found["optimizer"])

    def wait(self) -> None:
        """Returns when what was saved is committed; an error of the saving thread is raised."""
        self._manager.wait_until_finished()


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


def _json(manager: ocp.CheckpointManager, step: int | None, item: str) -> dict[str, Any]:
    args = ocp.args.Composite(**{item: ocp.args.JsonRestore()})
    with _reading(manager.directory, step):
        return manager.restore(step, args=args)[item]


@contextlib.contextmanager
def _reading(folder, step: int | None) -> Iterator[None]:
    """Says which checkpoint it is that cannot be read. None is half-written by us, but disks fill
    up, copies break off, and libraries change."""
    try:
        yield
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"checkpoint {step} in {folder} cannot be read: it is damaged, or of another version "
            f"of this code: {error!r}"
        ) from error


def _shapes(manager: ocp.CheckpointManager, step: int, item: str) -> Tree:
    """Nested dicts of the shapes and dtypes that an item holds."""
    with _reading(manager.directory, step):
        return tree.unflatten(tree.flatten(dict(manager.item_metadata(step)[item])))


def _position(folder: pathlib.Path, step: int) -> dict[str, Any]:
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
