"""Reads and writes weights on disk: files or folders of any kind, as tensors by key.

Keys of nested dicts are joined by "/", which no state dict uses: ``mot/mixtures.video.head.bias``.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from wamjax import files as storage
from wamjax.weights import bounds, safetensors, torch_files
from wamjax.weights.bounds import BadFile
from wamjax.weights.tensor import Tensor, Tensors

SAFETENSORS, TORCH = (".safetensors",), (".pt", ".pth", ".bin", ".pkl", ".ckpt")
_CONTAINERS = (Tensor, Mapping, list, tuple)
SHARD = 5 * 10**9  # bytes; as on the hubs


class Contents(NamedTuple):
    """Holds the contents of a source.

    Attributes:
      tensors: by key.
      plain: other values of a torch file, by key.
    """

    tensors: dict[str, Tensor]
    plain: dict[str, Any]


def read(path: str | os.PathLike) -> Contents:
    """Opens a file, an index of shards, or a folder that holds one of either.

    Raises:
      FileNotFoundError, ValueError: the source does not exist, or is ambiguous.
      BadFile: the file cannot be read; names it and the problem.
    """
    path = storage.path(path)
    if path.is_dir():
        path = _only(path)
    if path.name.endswith(".index.json"):
        return Contents(_sharded(path), {})
    return _one(path)


def _one(path: storage.Path) -> Contents:
    if path.suffix in SAFETENSORS:
        return Contents(safetensors.read(storage.fetch(path)), {})
    if path.suffix in TORCH:
        value = torch_files.read(storage.fetch(path))
        with bounds.reading(path, "cannot be read as a torch file"):
            return _flatten(value)
    raise ValueError(f"{path} must end in one of {', '.join((*SAFETENSORS, *TORCH))}")


def _only(folder: storage.Path) -> storage.Path:
    """Returns the only file in a folder that holds weights; an index takes precedence over its
    shards."""
    names = sorted(p.name for p in folder.iterdir())
    for endings in ((".index.json",), SAFETENSORS, TORCH):
        candidates = [n for n in names if n.endswith(endings)]
        if len(candidates) == 1:
            return folder / candidates[0]
        if candidates:
            raise ValueError(f"{folder} holds several files of weights: give one of {candidates}")
    raise FileNotFoundError(
        f"{folder} has no file of weights ({', '.join((*SAFETENSORS, *TORCH))}), only "
        f"{names or 'nothing'}: give the folder of the weights"
    )


def _sharded(index: storage.Path) -> dict[str, Tensor]:
    """Returns the tensors of all shards, which must agree with the index."""
    with bounds.reading(index, "is not an index of shards"):
        local = storage.fetch(index)
        size = bounds.size_of(local)
        if size > bounds.HEADER:
            raise ValueError(f"it has {size} bytes, more than the {bounds.HEADER} allowed")
        where = bounds.read_json(local.read_bytes())["weight_map"]
        if not isinstance(where, dict) or not all(isinstance(n, str) for n in where.values()):
            raise ValueError("its weight_map must map keys to names of files")
        for key in where:
            bounds.check_name(key)
        names = sorted(set(where.values()))
        for n in names:
            if pathlib.PurePath(n).name != n or "\\" in n or not n.isprintable():
                raise ValueError(f"{bounds.short(n)} in its weight_map must be in the same folder")
            if not n.endswith((*SAFETENSORS, *TORCH)):
                raise ValueError(f"{bounds.short(n)} in its weight_map must end in one of "
                                 f"{', '.join((*SAFETENSORS, *TORCH))}")  # fmt: skip
        gone = [n for n in names if not (index.parent / n).exists()]
        if gone:
            raise FileNotFoundError(
                f"{index} names {bounds.few(gone)}, which do not exist: download them to its folder"
            )
    shards = {n: _one(index.parent / n).tensors for n in names}
    short = bounds.short
    lacks = [f"{n} lacks {short(k)}" for k, n in where.items() if k not in shards[n]]
    held = [(n, k) for n, shard in shards.items() for k in shard]
    extra = [f"{n} has {short(k)}" for n, k in held if where.get(k) != n]
    if lacks or extra:
        problems = [bounds.few(some) for some in (lacks, extra) if some]
        raise BadFile(f"{index} does not match its shards, download them again: "
                      + "; ".join(problems))  # fmt: skip
    return {k: shards[n][k] for k, n in where.items()}


def _flatten(value: Any) -> Contents:
    out = Contents({}, {})

    def walk(node: Any, key: str) -> None:
        kind = out.tensors if isinstance(node, Tensor) else out.plain
        children = [] if isinstance(node, Tensor) else _children(node)
        if not children:
            if key in out.tensors or key in out.plain:
                raise ValueError(f"two entries have the key {key!r}")
            kind[key] = node
        for name, child in children:
            if len(key) + len(str(name)) > bounds.NAME:
                raise ValueError(f"a key is longer than the {bounds.NAME} characters allowed")
            walk(child, f"{key}/{name}" if key else str(name))

    walk(value, "")
    return out


def _children(node: Any) -> list[tuple[Any, Any]]:
    """Returns the items of a dict, or of a list that does not hold only numbers and text."""
    if isinstance(node, Mapping):
        return list(node.items())
    if isinstance(node, list | tuple) and any(isinstance(x, _CONTAINERS) for x in node):
        return list(enumerate(node))
    return []


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Builds nested dicts from keys with "/"."""
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
    """Writes tensors in the format that the name asks for, all or nothing, reading one at a time.

    Args:
      path: ``*.safetensors``, ``*.pt`` or ``*.pth``, or a folder, which then holds
        ``model.safetensors`` in shards of at most `limit` bytes.
      plain: further entries of a torch file.

    Raises:
      FileExistsError: the path exists.
      ValueError: the format does not support a key or a value.
    """
    path = storage.path(path)
    if plain and path.suffix not in TORCH:
        raise ValueError(
            f"{path} cannot hold {sorted(plain)}: only a torch file ({', '.join(TORCH)}) can"
        )
    with storage.draft(path) as place:
        if path.suffix in TORCH:
            torch_files.write(place, nested({**tensors, **(plain or {})}))
        elif path.suffix in SAFETENSORS:
            safetensors.write(place, tensors)
        else:
            place.mkdir()
            safetensors.write_sharded(place, tensors, limit)
