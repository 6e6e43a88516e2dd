"""Defines the items of a checkpoint's step, reads them, and detects damage.

A step holds ``params``, ``ema``, ``optimizer``, ``data``, ``config``, ``statistics`` (see
`training.checkpoint`) and ``digests``: a json of the digests of all the others, written with them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import grain.checkpoint as grain_checkpoint
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from wamjax import files, tree
from wamjax.console import say
from wamjax.training import integrity
from wamjax.training.integrity import Damaged
from wamjax.training.state import TrainState

Tree = Any
Digests = dict[str, dict[str, Any]]


def manager(folder: files.Path, **options) -> ocp.CheckpointManager:
    """A manager that knows every item by name, so that it can also tell what is in a step."""
    _say_errors_once()
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


def own_reader(folder: files.Path) -> ocp.CheckpointManager:
    """A manager by which each of several processes reads for itself. That of all waits for the
    others at the end of whatever it reads, in vain if one of them could not read it."""
    own = ocp.options.MultiprocessingOptions(active_processes={jax.process_index()})
    return manager(folder, create=False, multiprocessing_options=own)


@functools.cache
def _say_errors_once() -> None:
    """Where one array cannot be read or written Orbax raises that, closes its loop, and every other
    array is then told of by a trace. Only what is raised says something."""
    tell = sys.unraisablehook

    def hook(what):
        if str(what.exc_value) != "Event loop is closed":
            tell(what)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(
        lambda record: "exception was never retrieved" not in record.getMessage()
    )


def arrays_of(state: TrainState) -> dict[str, Tree]:
    """The items of arrays in a step."""
    counters = {"step": state.step, "skips": state.skips, "streak": state.streak}
    out = {"params": state.params, "optimizer": counters | {"opt_state": state.opt_state}}
    return out if state.ema is None else out | {"ema": state.ema}


def digests_of(arrays: dict[str, Tree], plain: dict[str, Any], iterator) -> dict[str, Any]:
    """Returns the content of the digests item: of arrays by item and path, of JSON by item, of
    positions by process; and the shapes of the parameters, so that a damaged shape is not mistaken
    for another model."""
    shapes = {path: list(x.shape) for path, x in tree.flatten(arrays["params"]).items()}
    own = integrity.of_json(iterator.get_state())
    every = multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(own), np.uint8))
    every = every.reshape(jax.process_count(), -1)
    return {
        "arrays": integrity.digests(arrays),
        "json": {name: integrity.of_json(value) for name, value in plain.items()},
        "data": {str(i): bytes(row).hex() for i, row in enumerate(every)},
        "shapes": shapes,
    }


def read_digests(manager: ocp.CheckpointManager, step: int) -> Digests | None:
    """Returns the digests of a step; None, with a message, if it was written by a version without
    them."""
    if not (files.path(manager.directory) / str(step) / "digests").exists():
        _say_unchecked(manager.directory, step)
        return None
    args = ocp.args.Composite(digests=ocp.args.JsonRestore())
    with reading(manager.directory, step):
        digests = dict(manager.restore(step, args=args)["digests"])
        if {name: type(value) for name, value in digests.items()} != dict.fromkeys(_PARTS, dict):
            raise ValueError(f"digests of {sorted(digests)}")
        return digests


_PARTS = ("arrays", "json", "data", "shapes")


@functools.cache
def _say_unchecked(folder, step: int) -> None:
    say(f"checkpoint {step} in {folder} has no digests, as an earlier version wrote it: whether it "
        "is damaged cannot be told")  # fmt: skip


def read_json(manager: ocp.CheckpointManager, step: int, item: str) -> dict[str, Any]:
    """Returns the config or the statistics of a step, after verifying it."""
    args = ocp.args.Composite(**{item: ocp.args.JsonRestore()})
    with reading(manager.directory, step):
        value = manager.restore(step, args=args)[item]
    written = read_digests(manager, step)
    if written is not None and integrity.of_json(value) != written["json"].get(item):
        raise Damaged(f"checkpoint {step} in {manager.directory} is damaged: {item!r} is not "
                      "what was written")  # fmt: skip
    return value


def check_unchanged(saved: Tree, written: Digests | None, folder: files.Path) -> None:
    """Checks that the shapes of an item are those that were written."""
    shapes = {path: list(x.shape) for path, x in tree.flatten(saved).items()}
    if written is not None and shapes != written["shapes"]:
        raise Damaged(f"checkpoint {folder.name} in {folder.parent} is damaged: its parameters "
                      "have not the shapes that they had")  # fmt: skip


@contextlib.contextmanager
def reading(folder, step: int | None) -> Iterator[None]:
    """Names the checkpoint in errors of reading it. Saves are atomic, but disks fill up, copies
    break off, and libraries change."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):  # the machine is too small
        raise
    except Exception as error:  # a flipped bit in the files of Orbax can raise anything
        raise Damaged(
            f"checkpoint {step} in {folder} cannot be read: it is damaged, or of another version "
            f"of this code: {_line(error)}"
        ) from error


def _line(error: Exception) -> str:
    """Formats an error in one line, because TensorStore's messages contain its whole state."""
    text = " ".join(repr(error).split())
    return text if len(text) < 300 else f"{text[:300]}..."


def shapes_of(manager: ocp.CheckpointManager, step: int, item: str) -> Tree:
    """Returns nested dicts of the shapes and dtypes in an item."""
    with reading(manager.directory, step):
        return tree.unflatten(tree.flatten(dict(manager.item_metadata(step)[item])))


def read_position(
    folder: files.Path, step: int, written: Digests | None
) -> dict[str, Any]:
    """Returns the position of the data. Each process saved its position; all equal the number of
    the next batch, so any number of processes can resume.

    Raises:
      ValueError: there is no position, or processes that no longer exist had different ones.
    """
    own = folder / f"process_{jax.process_index()}-of-{jax.process_count()}.json"
    with reading(folder.parent.parent, step):
        found = [own] if own.exists() else files.glob(folder, "process_*-of-*.json")
        if not found:
            raise FileNotFoundError(f"{folder} holds no position of the data")
        positions = [_position(file) for file in found]
    for file, position in zip(found, positions, strict=True):
        if written is not None and integrity.of_json(position) not in written["data"].values():
            raise Damaged(f"{file} is damaged: it is not what was written")
    for file, position in zip(found, positions, strict=True):
        if position != positions[0]:
            raise ValueError(
                f"{file} is at {position}, {found[0].name} at {positions[0]}, and now there are "
                f"{jax.process_count()} processes: continue with as many as before"
            )
    return positions[0]


def _position(file: files.Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error


def check_shapes(saved: Tree, wanted: Tree, step: int) -> None:
    """Raises ValueError if the parameters of a step do not match a model."""
    saved, wanted = tree.flatten(saved), tree.flatten(wanted)
    for path in [*wanted, *saved]:
        a = saved[path].shape if path in saved else "absent"
        b = wanted[path].shape if path in wanted else "absent"
        if a != b:
            raise ValueError(
                f"parameter {path!r} is {a} in checkpoint {step} and {b} in the model that this "
                "config builds; the data or the code changed. Train in another --workdir"
            )
