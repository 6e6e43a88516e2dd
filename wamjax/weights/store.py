"""Parameters as an Orbax checkpoint that is written and read layer by layer.

    DIR/params/       an Orbax checkpoint of the parameter tree, as any other
    DIR/weights.json  the family, its sizes, and where they came from
    DIR/tokenizer/    of a text encoder: the published file of its tokenizer

Orbax saves whole arrays, and thirty stacked layers of a large model are gigabytes. So it is asked
to save a tree of numbers, and the arrays that these stand for are then written in pieces: an Orbax
checkpoint without OCDBT holds a zarr array for each leaf, in a folder named by its path. A chunk of
such an array is a layer, or some rows of one.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging

from wamjax import tree
from wamjax.models import tokenizer as tokenizers
from wamjax.weights import files
from wamjax.weights.plan import Slice
from wamjax.weights.tensor import Tensor

FORMAT = 1
PARAMS, ABOUT, TOKENIZER = "params", "weights.json", "tokenizer"
CHUNK = 64 * 2**20  # bytes at most


def write(
    folder: str | os.PathLike,
    slices: Mapping[Slice, Tensor],
    about: Mapping[str, Any],
    progress: Callable[[int], Any] = lambda count: None,
    tokenizer: str | os.PathLike | None = None,
) -> None:
    """Writes a checkpoint, all or nothing; no more than one slice is in memory.

    Args:
      slices: all layers of all parameters.
      about: what `weights.json` says; json.
      progress: is told the bytes that were written.
      tokenizer: file, or folder that holds one, that goes along.

    Raises:
      FileExistsError: there is something at `folder`.
      FileNotFoundError: there is no such tokenizer.
    """
    beside = _tokenizer_files(tokenizer) if tokenizer else []
    layers: dict[str, int] = {}
    for path, layer in slices:
        layers[path] = layers.get(path, 0) + (layer is not None)
    with files.draft(folder) as draft:
        draft.mkdir()
        place = draft / PARAMS
        leaves = {path: np.zeros((), slices[path, 0 if n else None].dtype)
                  for path, n in layers.items()}  # fmt: skip
        _save_numbers(place, leaves)
        for path, count in layers.items():
            array = _create(place, path, slices[path, 0 if count else None], count)
            for layer in range(count) if count else (None,):
                _fill(array if layer is None else array[layer], slices[path, layer], progress)
        text = json.dumps({"format": FORMAT, **about}, indent=2)
        (draft / ABOUT).write_text(text + "\n")
        for file in beside:
            (draft / TOKENIZER).mkdir(exist_ok=True)
            shutil.copyfile(file, draft / TOKENIZER / file.name)


def _tokenizer_files(path: str | os.PathLike) -> list[pathlib.Path]:
    path = pathlib.Path(path)
    files = [path / name for name in tokenizers.FILES] if path.is_dir() else [path]
    found = [file for file in files if file.name in tokenizers.FILES and file.exists()]
    if not found:
        raise FileNotFoundError(f"{path} is and holds none of {', '.join(tokenizers.FILES)}")
    return found


def _save_numbers(place: pathlib.Path, leaves: Mapping[str, np.ndarray]) -> None:
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # it warns that there is nothing of OCDBT to merge
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
            checkpointer.save(place, args=ocp.args.PyTreeSave(tree.unflatten(leaves)))
    finally:
        logging.set_verbosity(verbosity)


def _create(place: pathlib.Path, path: str, one: Tensor, layers: int) -> ts.TensorStore:
    """The empty array of a parameter, in the place of the number that Orbax wrote."""
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{place / path.replace('/', '.')}/"},
        "metadata": {"compressor": {"id": "zstd", "level": 1}},  # Orbax's own
        "store_data_equal_to_fill_value": True,
    }
    stack = (layers,) if layers else ()
    chunk = (1,) * len(stack) + (_rows(one), *one.shape[1:])[: len(one.shape)]
    return ts.open(
        spec,
        dtype=ts.dtype(one.dtype),
        shape=(*stack, *one.shape),
        chunk_layout=ts.ChunkLayout(chunk_shape=[max(n, 1) for n in chunk]),
        create=True,
        delete_existing=True,
    ).result()


def _rows(one: Tensor) -> int:
    """Entries along the first axis that make a chunk."""
    if not one.shape or not one.nbytes:
        return 1
    return max(1, min(one.shape[0], CHUNK // (one.nbytes // one.shape[0])))


def _fill(array: ts.TensorStore, one: Tensor, progress: Callable[[int], Any]) -> None:
    values, rows = one.read(), _rows(one)
    if not one.shape:
        array.write(values).result()
        progress(one.nbytes)
        return
    for start in range(0, one.shape[0], rows):
        part = np.ascontiguousarray(values[start : start + rows])
        array[start : start + len(part)].write(part).result()
        progress(part.nbytes)


class Stored:
    """Parameters of a checkpoint, by path, not read yet."""

    def __init__(self, arrays: Mapping[str, ts.TensorStore]):
        self.arrays = arrays
        # Where all layers of a parameter lie in one chunk they are read at once.
        self._whole = functools.lru_cache(maxsize=1)(lambda path: arrays[path].read().result())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {path: tuple(a.shape) for path, a in self.arrays.items()}

    def slice(self, key: Slice) -> Tensor:
        """A layer of a parameter, or the whole; ask for the layers of a parameter in a row."""
        path, layer = key
        array = self.arrays[path]
        shape, dtype = tuple(array.shape), array.dtype.numpy_dtype
        if layer is None:
            return Tensor(shape, dtype, lambda: array.read().result())
        if array.chunk_layout.read_chunk.shape[0] == 1:
            return Tensor(shape[1:], dtype, lambda: array[layer].read().result())
        return Tensor(shape[1:], dtype, lambda: self._whole(path)[layer])


def read(folder: str | os.PathLike) -> Stored:
    """Opens an Orbax checkpoint of a tree of dicts, whoever wrote it.

    Raises:
      FileNotFoundError: it is none.
    """
    folder = pathlib.Path(folder).absolute()
    if not (folder / "_METADATA").exists():
        raise FileNotFoundError(f"{folder} is no Orbax checkpoint of parameters")
    about = json.loads((folder / "_METADATA").read_text())
    arrays = {}
    for entry in about["tree_metadata"].values():
        names = [str(part["key"]) for part in entry["key_metadata"]]
        base, name = {"driver": "file", "path": f"{folder}/"}, ".".join(names)
        kvstore = {"driver": "file", "path": f"{folder / name}/"}
        if about["use_ocdbt"]:
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        driver = "zarr3" if about["use_zarr3"] else "zarr"
        arrays["/".join(names)] = ts.open({"driver": driver, "kvstore": kvstore}, read=True)
    return Stored({path: future.result() for path, future in arrays.items()})


def locate(source: str | os.PathLike) -> tuple[pathlib.Path, int]:
    """Where the parameters of a converted folder or of a run lie, and their step.

    Of a run these are the newest checkpoint's; the moving average, if there is one.

    Raises:
      FileNotFoundError: it is neither.
    """
    from wamjax.checkpoint import FOLDER

    source = pathlib.Path(source)
    if (source / ABOUT).exists():
        return source / PARAMS, about(source)["plain"].get("step", 0)
    runs = source / FOLDER
    steps = [int(p.name) for p in runs.iterdir() if p.name.isdigit()] if runs.is_dir() else []
    if not steps:
        raise FileNotFoundError(f"{source} is neither a folder of wamjax.convert ({ABOUT}) nor a "
                                f"run with a checkpoint ({FOLDER}/)")  # fmt: skip
    folder = runs / str(max(steps))
    return folder / ("ema" if (folder / "ema").is_dir() else "params"), max(steps)


def about(folder: str | os.PathLike) -> dict[str, Any]:
    """What ``weights.json`` of a converted folder says.

    Raises:
      FileNotFoundError, ValueError: it is none, or of another format.
    """
    path = pathlib.Path(folder) / ABOUT
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no {ABOUT}: it was not made by wamjax.convert")
    found = json.loads(path.read_text())
    if found["format"] != FORMAT:
        raise ValueError(f"{path} has format {found['format']}, this wamjax reads {FORMAT}; "
                         "convert again")  # fmt: skip
    return found
