"""Weights on disk: a file or a folder of any kind, as tensors by key.

Keys of nested dicts are joined by "/", which no state dict uses: ``mot/mixtures.video.head.bias``.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from wamjax.weights import safetensors, torch_files
from wamjax.weights.tensor import Tensor, Tensors

SAFETENSORS, TORCH = (".safetensors",), (".pt", ".pth", ".bin", ".pkl", ".ckpt")
_CONTAINERS = (Tensor, Mapping, list, tuple)
SHARD = 5 * 10**9  # bytes; what the hubs write


class Contents(NamedTuple):
    """What a source holds.

    Attributes:
      tensors: by key.
      plain: whatever else is in a torch file, by key.
    """

    tensors: dict[str, Tensor]
    plain: dict[str, Any]


def read(path: str | os.PathLike) -> Contents:
    """Opens a file, an index of shards, or a folder that holds one of either.

    Raises:
      FileNotFoundError, ValueError: it is not there, not clear which, or not readable.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = _only(path)
    if path.name.endswith(".index.json"):
        return Contents(_sharded(path), {})
    if path.suffix in SAFETENSORS:
        return Contents(safetensors.read(path), {})
    if path.suffix in TORCH:
        return _flatten(torch_files.read(path))
    raise ValueError(f"{path} is none of {', '.join((*SAFETENSORS, *TORCH))}")


def _only(folder: pathlib.Path) -> pathlib.Path:
    """The one thing in a folder that holds weights; an index goes before its shards."""
    names = sorted(p.name for p in folder.iterdir())
    for endings in ((".index.json",), SAFETENSORS, TORCH):
        found = [n for n in names if n.endswith(endings)]
        if len(found) == 1:
            return folder / found[0]
        if found:
            raise ValueError(f"{folder} holds {found}; name the one to read")
    raise FileNotFoundError(f"{folder} holds no weights: {names or 'it is empty'}")


def _sharded(index: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of all shards; the index and they must agree."""
    try:
        where = json.loads(index.read_text())["weight_map"]
        names = sorted(set(where.values()))
        if any(pathlib.PurePath(n).name != n for n in names):
            raise ValueError("it names files of other folders")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards: {error!r}") from error
    gone = [n for n in names if not (index.parent / n).exists()]
    if gone:
        raise FileNotFoundError(f"{index} names {gone}, which are not beside it")
    shards = {n: read(index.parent / n).tensors for n in names}
    lacks = [f"{n} lacks {k}" for k, n in where.items() if k not in shards[n]]
    extra = [f"{n} has {k}" for n, shard in shards.items() for k in shard if where.get(k) != n]
    if lacks or extra:
        raise ValueError(f"{index} and its shards disagree: " + "; ".join(lacks + extra))
    return {k: shards[n][k] for k, n in where.items()}


def _flatten(value: Any) -> Contents:
    out = Contents({}, {})

    def walk(node: Any, key: str, above: tuple[int, ...]) -> None:
        if isinstance(node, Tensor):
            out.tensors[key] = node
            return
        if id(node) in above:
            raise ValueError(f"{key!r} holds itself")
        children = _children(node)
        if not children:
            out.plain[key] = node
        for name, child in children:
            walk(child, f"{key}/{name}" if key else str(name), (*above, id(node)))

    walk(value, "", ())
    return out


def _children(node: Any) -> list[tuple[Any, Any]]:
    """Of a dict, and of a list that is not of plain numbers and text alone."""
    if isinstance(node, Mapping):
        return list(node.items())
    if isinstance(node, list | tuple) and any(isinstance(x, _CONTAINERS) for x in node):
        return list(enumerate(node))
    return []


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dicts within dicts from keys with "/"."""
    out: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split("/")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return out


def write(
    path: str | os.PathLike,
    tensors: Tensors,
    plain: Mapping[str, Any] | None = None,
    limit: int = SHARD,
) -> None:
    """Writes tensors to what the name asks for, all or nothing; reads one of them at a time.

    Args:
      path: ``*.safetensors``, ``*.pt`` or ``*.pth``, or a folder, which then holds
        ``model.safetensors`` in shards of at most `limit` bytes.
      plain: further entries of a torch file.

    Raises:
      FileExistsError: it is there already.
      ValueError: keys or values that the format does not have.
    """
    path = pathlib.Path(path)
    if plain and path.suffix not in TORCH:
        raise ValueError(f"only a torch file ({', '.join(TORCH)}) holds {sorted(plain)}: {path}")
    with draft(path) as place:
        if path.suffix in TORCH:
            torch_files.write(place, nested({**tensors, **(plain or {})}))
        elif path.suffix in SAFETENSORS:
            safetensors.write(place, tensors)
        else:
            place.mkdir()
            safetensors.write_sharded(place, tensors, limit)


@contextlib.contextmanager
def draft(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A place to write a file or folder that appears at `path` when it is complete, or never.

    Raises:
      FileExistsError: there is one already.
    """
    path = pathlib.Path(path).absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists; remove it or choose another output")
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.with_name(f".{os.getpid()}-{path.name}")  # keeps the ending
    try:
        yield place
        place.rename(path)
    finally:
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
