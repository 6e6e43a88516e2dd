"""Stores parameters as an Orbax checkpoint that is written and read layer by layer.

    DIR/params/       an Orbax checkpoint of the parameter tree, as any other
    DIR/weights.json  the family, its sizes, where they came from, and digests of everything
    DIR/tokenizer/    of a text encoder: the published file of its tokenizer

Orbax saves whole arrays, and thirty stacked layers of a large model are gigabytes. So Orbax saves a
tree of numbers, and the arrays that these stand for are then written in pieces: an Orbax checkpoint
without OCDBT holds a zarr array for each leaf, in a folder named by its path. A chunk of such an
array is a layer, or some rows of one. A missing chunk reads as zeros, and a flipped bit as another
number, so everything read is compared with the digests, see `Stored`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging

from wamjax import files as storage
from wamjax import tree
from wamjax.models import tokenizer as tokenizers
from wamjax.training import integrity
from wamjax.training.integrity import Damaged
from wamjax.weights.plan import Slice
from wamjax.weights.tensor import Tensor

FORMAT = 2
UNCHECKED = 1  # the format without digests
PARAMS, ABOUT, TOKENIZER = "params", "weights.json", "tokenizer"
CHUNK = 64 * 2**20  # bytes at most


def write(
    folder: str | os.PathLike,
    slices: Mapping[Slice, Tensor],
    about: Mapping[str, Any],
    progress: Callable[[int], Any] = lambda count: None,
    tokenizer: str | os.PathLike | None = None,
) -> None:
    """Writes a checkpoint, all or nothing, with at most one slice in memory.

    Args:
      slices: all layers of all parameters.
      about: contents of `weights.json`; JSON.
      progress: called with the number of bytes written.
      tokenizer: file, or folder with one, to include.

    Raises:
      FileExistsError: `folder` exists.
      FileNotFoundError: the tokenizer does not exist.
    """
    beside = _tokenizer_files(tokenizer) if tokenizer else []
    layers: dict[str, int] = {}
    for path, layer in slices:
        layers[path] = layers.get(path, 0) + (layer is not None)
    with storage.draft(folder, last=ABOUT) as draft:
        draft.mkdir()
        place = draft / PARAMS
        leaves = {path: np.zeros((), slices[path, 0 if n else None].dtype)
                  for path, n in layers.items()}  # fmt: skip
        _save_numbers(place, leaves)
        digests = {}
        for path, count in layers.items():
            array = _create(place, path, slices[path, 0 if count else None], count)
            total = np.zeros(2, np.uint32)
            for layer in range(count) if count else (None,):
                part = array if layer is None else array[layer]
                start = (layer or 0) * math.prod(part.shape)
                total += _fill(part, slices[path, layer], progress, start)
            digests[path] = integrity.text(total)
        for file in beside:
            (draft / TOKENIZER).mkdir(exist_ok=True)
            shutil.copyfile(storage.fetch(file), draft / TOKENIZER / file.name)
        text = {**about, "format": FORMAT, "digests": digests,
                "files": {file.name: _of_file(file) for file in beside}}  # fmt: skip
        text = json.loads(json.dumps(text))  # as it will be read: lists and text keys
        text["digest"] = _of_about(text)
        (draft / ABOUT).write_text(json.dumps(text, indent=2) + "\n")


def _of_about(text: Mapping[str, Any]) -> str:
    """Returns the digest of the other contents of a ``weights.json``."""
    return integrity.of_json({k: v for k, v in text.items() if k != "digest"})


def _of_file(path: storage.Path | pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _tokenizer_files(path: str | os.PathLike) -> list[storage.Path]:
    path = storage.path(path)
    files = [path / name for name in tokenizers.FILES] if path.is_dir() else [path]
    found = [file for file in files if file.name in tokenizers.FILES and file.exists()]
    if not found:
        raise FileNotFoundError(f"tokenizer {path} must be one of the files "
                                f"{', '.join(tokenizers.FILES)}, or a folder with one")  # fmt: skip
    return found


def _save_numbers(place: pathlib.Path, leaves: Mapping[str, np.ndarray]) -> None:
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # silences a warning about missing OCDBT data
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
            checkpointer.save(place, args=ocp.args.PyTreeSave(tree.unflatten(leaves)))
    finally:
        logging.set_verbosity(verbosity)


def _create(place: pathlib.Path, path: str, one: Tensor, layers: int) -> ts.TensorStore:
    """Creates the empty array of a parameter in place of the number that Orbax wrote."""
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
    """Returns the number of entries along the first axis per chunk."""
    if not one.shape or not one.nbytes:
        return 1
    return max(1, min(one.shape[0], CHUNK // (one.nbytes // one.shape[0])))


def _fill(
    array: ts.TensorStore, one: Tensor, progress: Callable[[int], Any], offset: int = 0
) -> np.ndarray:
    """Writes a slice that begins at element `offset` of its array; returns its `integrity.sums`."""
    values, rows = one.read(), _rows(one)
    if not one.shape:
        array.write(values).result()
        progress(one.nbytes)
        return integrity.sums(np.asarray(values, one.dtype), offset)
    total, row = np.zeros(2, np.uint32), math.prod(one.shape[1:])
    for start in range(0, one.shape[0], rows):
        part = np.ascontiguousarray(values[start : start + rows], one.dtype)
        array[start : start + len(part)].write(part).result()
        total += integrity.sums(part, offset + start * row)
        progress(part.nbytes)
    return total


class Stored:
    """Gives the parameters of a checkpoint by path and reads them on demand.

    `slice`, `load` and `verify` compare what they read with the digests: the call that reads the
    last part of a changed array raises `Damaged`.

    Attributes:
      arrays: arrays by path; direct reads are not checked.
      digests: digests of arrays by path; arrays without one are not checked.
      where: origin, for messages.
    """

    def __init__(
        self,
        arrays: Mapping[str, ts.TensorStore],
        digests: Mapping[str, str] | None = None,
        where: str = "the checkpoint",
    ):
        self.arrays, self.digests, self.where = arrays, dict(digests or {}), where
        self._sums: dict[str, dict[int | None, np.ndarray]] = {}
        # If all layers of a parameter share one chunk, read them at once.
        self._whole = functools.lru_cache(maxsize=1)(lambda path: self._read(path, None))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {path: tuple(a.shape) for path, a in self.arrays.items()}

    def slice(self, key: Slice) -> Tensor:
        """Returns a layer of a parameter, or the whole; ask for the layers of a parameter
        consecutively."""
        path, layer = key
        array = self.arrays[path]
        shape, dtype = tuple(array.shape), array.dtype.numpy_dtype

        def read() -> np.ndarray:
            if layer is None or array.chunk_layout.read_chunk.shape[0] == 1:
                values = self._read(path, layer)
            else:
                values = self._whole(path)[layer]
            self._note(path, layer, values)
            return values

        return Tensor(shape if layer is None else shape[1:], dtype, read)

    def load(self, want: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Loads parameters onto their devices, checked; every process reads its own shares.

        Args:
          want: shape, dtype and sharding by path. Parameters are checked in the dtype of the
            checkpoint, in which all of them are on the devices before they are cast.
        """
        narrow = [p for p in want if not _is_of_jax(self.arrays[p].dtype.numpy_dtype)]
        self.verify(narrow)  # devices cannot hold them as they are
        out = {}
        for path, x in want.items():
            dtype = x.dtype if path in narrow else self.arrays[path].dtype.numpy_dtype
            stored = jax.ShapeDtypeStruct(tuple(x.shape), dtype, sharding=x.sharding)
            out[path] = place(stored, functools.partial(self._share, path, dtype))
        known = {path: self.digests[path] for path in out
                 if path in self.digests and path not in narrow}  # fmt: skip
        if known:
            read = integrity.digests({path: out[path] for path in known})
            integrity.check(read, known, self.where)
        for path, x in want.items():
            if out[path].dtype != x.dtype:
                out[path] = _cast(x.dtype, x.sharding)(out[path])
        return out

    def verify(self, paths: Iterable[str] | None = None) -> None:
        """Reads arrays, all by default, and checks them, with at most a chunk in memory.

        Raises:
          Damaged: an array changed after it was written.
        """
        for path in self.arrays if paths is None else paths:
            if path not in self.digests:
                continue
            array, total = self.arrays[path], np.zeros(2, np.uint32)
            row = math.prod(array.shape[1:])
            step = CHUNK // max(row * array.dtype.numpy_dtype.itemsize, 1)
            step = max(step, *(array.chunk_layout.read_chunk.shape or ())[:1], 1)
            for start in range(0, array.shape[0], step) if array.shape else (None,):
                index = None if start is None else slice(start, min(start + step, array.shape[0]))
                total += integrity.sums(self._read(path, index), (start or 0) * row)
            self._check(path, total)

    def _read(self, path: str, index: Any) -> np.ndarray:
        array = self.arrays[path]
        try:
            return (array if index is None else array[index]).read().result()
        except (ValueError, OSError) as error:
            raise Damaged(f"{self.where} is damaged: {path!r} cannot be read: "
                          f"{_line(error)}") from error  # fmt: skip

    def _share(self, path: str, dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
        return self._read(path, index).astype(dtype)

    def _note(self, path: str, layer: int | None, values: np.ndarray) -> None:
        """Adds a read part of an array; checks the array once it is complete."""
        seen = self._sums.setdefault(path, {})
        if path not in self.digests or layer in seen:
            return
        seen[layer] = integrity.sums(values, (layer or 0) * values.size)
        parts = [v for k, v in seen.items() if (k is None) == (layer is None)]
        if layer is None or len(parts) == self.arrays[path].shape[0]:
            self._check(path, sum(parts, np.zeros(2, np.uint32)))

    def _check(self, path: str, total: np.ndarray) -> None:
        integrity.check({path: integrity.text(total)}, {path: self.digests[path]}, self.where)


def place(
    want: jax.ShapeDtypeStruct, share: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """Places an array on its devices, one device after the other; equal shares are computed
    once."""
    # Key by text, because slices are not hashable before Python 3.12.
    devices: dict[str, list[tuple[jax.Device, tuple[slice, ...]]]] = {}
    for device, index in want.sharding.addressable_devices_indices_map(want.shape).items():
        devices.setdefault(str(index), []).append((device, index))
    parts = []
    for (device, index), *others in devices.values():
        first = jax.device_put(share(index), device)
        first.block_until_ready()  # so that the host's copy is freed
        parts += [first, *(jax.device_put(first, other) for other, _ in others)]
    return jax.make_array_from_single_device_arrays(want.shape, want.sharding, parts)


def _is_of_jax(dtype: np.dtype) -> bool:
    return jax.dtypes.canonicalize_dtype(dtype) == dtype


@functools.lru_cache(maxsize=64)
def _cast(dtype: Any, place: Any) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x.astype(dtype), out_shardings=place)


def _line(error: BaseException) -> str:
    """Formats an error in one line, because TensorStore's messages contain its whole state."""
    return str(error).split("\n")[0].split(" [")[0][:200]


def read(folder: str | os.PathLike, digests: Mapping[str, str] | None = None) -> Stored:
    """Opens an Orbax checkpoint of a tree of dicts, whoever wrote it.

    Args:
      digests: digests of its arrays by path, see `integrity`; a folder of `write` has its own.

    Raises:
      FileNotFoundError: the folder is not a checkpoint.
      Damaged: it is broken, or lacks arrays of the digests.
    """
    folder = storage.absolute(folder)
    if not (folder / "_METADATA").exists():
        raise FileNotFoundError(
            f"{folder} is not an Orbax checkpoint of parameters, because it has no _METADATA"
        )
    try:
        arrays = _open(folder)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise Damaged(f"{folder} cannot be opened: {_line(error)}") from error
    if digests is None and folder.name == PARAMS and (folder.parent / ABOUT).exists():
        digests = about(folder.parent).get("digests")
        if digests is None:
            _say_unchecked(folder.parent)
            _check_chunks(folder, arrays)
    if digests is not None and arrays.keys() != digests.keys():
        differ = sorted(arrays.keys() ^ digests.keys())
        raise Damaged(f"{folder} is damaged: it has {len(arrays)} arrays, expected {len(digests)}; "
                      f"{differ[0]!r} is missing or unknown")  # fmt: skip
    return Stored(arrays, digests, str(folder))


@functools.cache
def _say_unchecked(folder: storage.Path) -> None:
    logging.warning(
        "%s is from an earlier version and has no digests, so damage goes unnoticed: convert or "
        "export it again", folder,
    )  # fmt: skip


def _open(folder: storage.Path) -> dict[str, ts.TensorStore]:
    about = json.loads((folder / "_METADATA").read_text())
    arrays = {}
    # Orbax 0.11.30 does not say which.
    is_ocdbt = about.get("use_ocdbt", (folder / "manifest.ocdbt").exists())
    for entry in about["tree_metadata"].values():
        names = [str(part["key"]) for part in entry["key_metadata"]]
        base, name = _kvstore(folder), ".".join(names)
        kvstore = _kvstore(folder / name)
        if is_ocdbt:
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        driver = "zarr3" if about["use_zarr3"] else "zarr"
        arrays["/".join(names)] = ts.open({"driver": driver, "kvstore": kvstore}, read=True)
    return {path: future.result() for path, future in arrays.items()}


def _kvstore(folder: storage.Path) -> dict[str, str]:
    """Returns TensorStore's description of a folder."""
    if not storage.is_remote(folder):
        return {"driver": "file", "path": f"{folder}/"}
    bucket, _, place = str(folder).removeprefix(storage.BUCKET).partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{place}/"}


def _check_chunks(folder: storage.Path, arrays: Mapping[str, ts.TensorStore]) -> None:
    """Raises `Damaged` if a file of an array is missing; `write` omits none."""
    for path, array in arrays.items():
        place = folder / path.replace("/", ".")
        stored = sum(not p.name.startswith(".") for p in place.iterdir())
        chunk = array.chunk_layout.read_chunk.shape or ()  # of a scalar: None
        expected = math.prod(-(-n // c) for n, c in zip(array.shape, chunk, strict=True))
        if stored < expected:
            raise Damaged(f"{folder} is damaged: {expected - stored} of {expected} chunks of "
                          f"{path!r} are missing, and would read as zeros")  # fmt: skip


def source(path: str | os.PathLike, ema: bool | None = None) -> tuple[Stored, int]:
    """Returns the parameters of a converted folder or of a run, and their step.

    For a run they are those of the newest checkpoint that is not damaged.

    Args:
      ema: for a run: whether to use the moving average; by default if it has one.

    Raises:
      FileNotFoundError: the folder is neither.
      ValueError: `ema` is set, but there is no moving average.
    """
    from wamjax.training import checkpoint

    path = storage.path(path)
    if (path / ABOUT).exists():
        if ema:
            raise ValueError(f"{path} holds converted weights, which have no moving average: leave "
                             "out --ema")  # fmt: skip
        return read(path / PARAMS), about(path).get("plain", {}).get("step", 0)
    runs = path / checkpoint.FOLDER
    if not (runs.is_dir() and any(p.name.isdigit() for p in runs.iterdir())):
        raise FileNotFoundError(f"{path} is neither a folder of wamjax.convert ({ABOUT}) nor a "
                                f"run with a checkpoint ({checkpoint.FOLDER}/)")  # fmt: skip
    return checkpoint.parameters(path, ema=ema)


def about(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns the contents of a converted folder's ``weights.json``.

    Raises:
      FileNotFoundError, ValueError: the file does not exist, or has another format.
      Damaged: the file, or a tokenizer file next to it, changed after it was written.
    """
    folder = storage.path(folder)
    path = folder / ABOUT
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} has no {ABOUT}, so it is not a folder of wamjax.convert: make one by it"
        )
    try:
        text = json.loads(path.read_text())
        version = text["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{path} is damaged, convert again: {_line(error)}") from error
    if version not in (FORMAT, UNCHECKED):
        raise ValueError(f"{path} has format {version}, this wamjax reads {UNCHECKED} to {FORMAT}: "
                         "convert again")  # fmt: skip
    if version == UNCHECKED:
        return text
    if text.get("digest") != _of_about(text):
        raise Damaged(f"{path} is damaged: it is not what was written; convert again")
    for name, digest in text["files"].items():
        file = folder / TOKENIZER / name
        if not file.exists() or _of_file(file) != digest:
            raise Damaged(f"{file} is damaged or missing: convert again with --tokenizer")
    return text
