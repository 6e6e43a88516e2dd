"""Reads the text embeddings that Cosmos Policy publishes into a cache.

    python -m wamjax.data.embeddings --cache=DIR --pickle=libero_t5_embeddings.pkl \\
        --encoder=t5-11b --length=64

The file is a pickled dict {instruction: bfloat16 tensor (1, 512, 1024)}, in which the rows after
the tokens are zero. `wamjax.weights.torch_files` reads it without executing any of it, and refuses
by name anything that is neither a tensor nor plain data.

Source: the public ``t5_embedding_utils.py``.
"""

from __future__ import annotations

import os
import pathlib

import numpy as np

from wamjax import files
from wamjax.weights import bounds, torch_files
from wamjax.weights.bounds import BadFile
from wamjax.weights.tensor import Tensor


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns embeddings (rows, width) by instruction, without the zero rows at the end.

    Raises:
      FileNotFoundError: the file does not exist.
      BadFile: the file is not such a pickle; names what it holds instead.
    """
    path = files.fetch(path)
    values = torch_files.read(path)
    if not isinstance(values, dict) or not values:
        raise BadFile(f"{path} holds {_kind(values)}, not a dict of embeddings by instruction")
    invalid = [
        f"{bounds.short(text)}: {_kind(x)}"
        for text, x in values.items()
        if not (isinstance(text, str) and isinstance(x, Tensor) and _fits(x.shape))
    ]
    if invalid:
        raise BadFile(f"{path} must hold tensors (1, rows, width) by instruction, but not all are: "
                      f"{bounds.few(invalid)}")  # fmt: skip
    widths = {x.shape[-1] for x in values.values()}
    if len(widths) > 1:
        raise BadFile(f"the embeddings in {path} must have one width, they have {sorted(widths)}")
    with bounds.reading(path):
        return {text: _rows(path, text, x) for text, x in values.items()}


def cut(rows: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Returns the embeddings unchanged if none has more than `length` rows; else raises ValueError
    with the number needed."""
    long = {text: len(x) for text, x in rows.items() if len(x) > length}
    if long:
        text, most = max(long.items(), key=lambda item: item[1])
        raise ValueError(f"{len(long)} embeddings have more than --length={length} rows that are "
                         f"not zero; {text!r} has {most}: raise --length")  # fmt: skip
    return rows


def _fits(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)


def _rows(path: pathlib.Path, text: str, x: Tensor) -> np.ndarray:
    values = x.read().reshape(x.shape[-2:])
    precise = values.astype(np.float32)
    used = np.flatnonzero(precise.any(axis=1)) if np.isfinite(precise).all() else np.zeros(0)
    if not used.size:
        raise BadFile(f"{path}: the embedding of {bounds.short(text)} is zero, or not finite")
    return values[: used[-1] + 1]


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {value.shape} of {value.dtype}"
    return "an empty dict" if value == {} else f"a {type(value).__name__}"
