"""Converts published files to parameters, and parameters to published files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wamjax import files as storage
from wamjax import tree
from wamjax.weights import families, files, sizing, store
from wamjax.weights.plan import Mismatch, Plan, Slice
from wamjax.weights.tensor import Tensor, Tensors

Config = Mapping[str, Any] | str | os.PathLike | None


def load(
    family: str,
    path: str | os.PathLike,
    config: Config = None,
    *,
    layout: str | None = None,
    dtype: Any = None,
    shardings: Any = None,
) -> dict[str, Any]:
    """Loads parameters from a published file, an index of shards, a folder, or a folder of
    `convert`.

        params = load("wan22_ti2v", "Wan2.2-TI2V-5B", dtype="bfloat16")
        velocity = functions("wan22_ti2v")["denoise"](params, latents, levels, {"context": text})

    Args:
      family: one of `families.FAMILIES`.
      config: sizes by their names in a config, or a JSON file of them, if they are neither the
        published ones nor those that the file states, see `sizing`; a folder of `convert` has them.
      layout: layout of the file; by default the one that its keys match best.
      dtype: dtype of the parameters; that of the file by default.
      shardings: sharding of each parameter; the first local device by default. The host holds one
        device's share of one parameter at a time, and the part of the file that it comes from.

    Raises:
      Mismatch: keys or shapes differ from those of the family; names the first of each kind.
      Damaged: a folder of `convert` changed after it was written.
    """
    path = storage.path(path)
    if (path / store.ABOUT).exists():
        plan, params = _converted(family, path, config)
        return tree.unflatten(params.load(_wanted(plan, shardings, dtype, params.arrays)))
    tensors = files.read(path).tensors
    sizes = sizing.of_file(family, tensors, config, layout, path)
    plan = fit(family, tensors, sizes, layout)[1]
    slices = plan.to_ours(tensors).__getitem__
    layers = {p.ours for p in plan.pieces if p.layer is not None}
    sources = {p: slices((p, 0 if p in layers else None)) for p in plan.params}
    target = _wanted(plan, shardings, dtype, sources)
    return tree.unflatten({p: _place(p, x, p in layers, slices) for p, x in target.items()})


def _wanted(
    plan: Plan, shardings: Any, dtype: Any, sources: Mapping[str, Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape, dtype and sharding of each parameter; the dtype of its source by default."""
    if shardings is None:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = dict.fromkeys(plan.params, place)
    else:
        places = tree.flatten(shardings)
    out = {}
    for path, shape in plan.params.items():
        own = sources[path].dtype
        own = dtype or getattr(own, "numpy_dtype", own)
        own = jax.dtypes.canonicalize_dtype(own)
        out[path] = jax.ShapeDtypeStruct(shape, own, sharding=places[path])
    return out


def _converted(family: str, folder: storage.Path, config: Config) -> tuple[Plan, store.Stored]:
    """Returns the key map of a folder of `convert`, and its parameters."""
    about = store.about(folder)
    if about["family"] != family:
        raise ValueError(f"{folder} holds weights of {about['family']!r}, not of {family!r}: give "
                         "that family, or another folder")  # fmt: skip
    layout = next(iter(families.family(family).layouts))
    plan = families.plans(family, config or families.sizes_of(about), layout)[layout]
    params = store.read(folder / store.PARAMS)
    plan.check_ours(params.shapes)
    return plan, params


def fit(
    family: str, tensors: Tensors, config: Config = None, layout: str | None = None
) -> tuple[str, Plan]:
    """Returns the layout of a source and its key map, checked.

    Raises:
      Mismatch: it has none of the layouts.
    """
    plans = families.plans(family, config, layout)
    best = max(plans, key=lambda name: plans[name].overlap(tensors))
    if not plans[best].overlap(tensors):
        examples = ", ".join(list(tensors)[:3]) or "none"
        raise Mismatch(f"the source does not hold {family}: its keys are {examples} ...; give the "
                       "family of the file, or a file with the keys of one of the layouts "
                       + ", ".join(f"{n} ({next(iter(p.published))} ...)" for n, p in plans.items())
                       )  # fmt: skip
    plans[best].check(tensors)
    return best, plans[best]


def _place(
    path: str, want: jax.ShapeDtypeStruct, stacked: bool, slices: Callable[[Slice], Tensor]
) -> jax.Array:
    """Places one parameter of a published file on its devices."""
    shape, dtype = want.shape, want.dtype

    def share(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return np.array(slices((path, None)).read()[index], dtype)
        layers, *rest = index
        numbers = range(*layers.indices(shape[0]))
        sides = [len(range(*s.indices(n))) for s, n in zip(rest, shape[1:], strict=True)]
        out = np.empty((len(numbers), *sides), dtype)
        for row, i in zip(out, numbers, strict=True):
            row[...] = slices((path, i)).read()[tuple(rest)]
        return out

    return store.place(want, share)


def export(
    family: str,
    params: Any,
    path: str | os.PathLike,
    config: Config = None,
    *,
    layout: str | None = None,
    dtype: Any = None,
    plain: Mapping[str, Any] | None = None,
) -> None:
    """Writes parameters as a file in a published layout, which `load` and the original code read.

    Args:
      path: see `files.write`.
      layout: the family's first layout by default.
      dtype: dtype of the file; that of the parameters by default.
      plain: further entries of a torch file.

    Raises:
      Mismatch: the parameters do not match the family at these sizes.
      FileExistsError: `path` exists.
    """
    flat = tree.flatten(params)
    tensors = published(family, shapes_of(flat), in_memory(flat), config, layout, dtype)
    files.write(path, tensors, plain)


def published(
    family: str,
    shapes: Mapping[str, tuple[int, ...]],
    ours: Callable[[Slice], Tensor],
    config: Config = None,
    layout: str | None = None,
    dtype: Any = None,
) -> dict[str, Tensor]:
    """Returns the tensors of a published file, each computed from parameters when it is read."""
    kind = families.family(family)
    layout = layout or next(iter(kind.layouts))
    plan = families.plans(family, config, layout)[layout]
    plan.check_ours(shapes)
    return plan.to_theirs(ours, None if dtype is None else jnp.dtype(dtype))


def shapes_of(flat: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns shapes by path."""
    return {path: tuple(x.shape) for path, x in flat.items()}


def in_memory(flat: Mapping[str, Any]) -> Callable[[Slice], Tensor]:
    """Returns slices of parameters that are arrays."""

    def get(key: Slice) -> Tensor:
        path, layer = key
        x = flat[path]
        if layer is None:
            return Tensor(tuple(x.shape), np.dtype(x.dtype), lambda: np.asarray(x))
        return Tensor(tuple(x.shape[1:]), np.dtype(x.dtype), lambda: np.asarray(x[layer]))

    return get
