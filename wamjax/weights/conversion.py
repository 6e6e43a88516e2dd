"""Converts a published file to a folder of parameters, once."""

from __future__ import annotations

import os

import jax.numpy as jnp
import tqdm

from wamjax.weights import api, files, sizing, store


def bring_in(
    family: str,
    source: str | os.PathLike,
    output: str | os.PathLike,
    config: api.Config = None,
    layout: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
    tokenizer: str | os.PathLike | None = None,
) -> None:
    """Converts a published file to a folder; see `api.load` and `store.write`."""
    contents = files.read(source)
    sizes = sizing.of_file(family, contents.tensors, config, layout, source)
    layout, plan = api.fit(family, contents.tensors, sizes, layout)
    slices = plan.to_ours(contents.tensors, None if dtype is None else jnp.dtype(dtype))
    about = {
        "family": family,
        "layout": layout,
        "sizes": sizes,
        "source": str(source),
        "plain": {k: v for k, v in contents.plain.items() if isinstance(v, str | int | float)},
    }
    size = sum(x.nbytes for x in slices.values())
    with bar("import", size, progress) as shown:
        store.write(output, slices, about, shown.update, tokenizer)


def bar(name: str, size: int, progress: bool) -> tqdm.tqdm:
    """Returns a progress bar of bytes."""
    return tqdm.tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=not progress)
