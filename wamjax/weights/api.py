"""Published files to parameters, and parameters to published files."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wamjax import tree
from wamjax.weights import families, files, store
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
    """Parameters from a published file, index of shards, or folder; or a folder of `convert`.

        params = load("wan22_ti2v", "Wan2.2-TI2V-5B", dtype="bfloat16")
        velocity = functions("wan22_ti2v")["denoise"](params, latents, levels, {"context": text})

    Args:
      family: one of `families.FAMILIES`.
      config: sizes that are not the published ones, or a json file of them; a folder of `convert`
        says its own.
      layout: of the file; the one that its keys fit best by default.
      dtype: of the parameters; that of the file by default.
      shardings: where each parameter goes; the first local device by default. The host holds one
        device's share of one parameter at a time, and of the file what that share is made of.

    Raises:
      Mismatch: keys or shapes are not those of the family; names all of them.
    """
    path = pathlib.Path(path)
    if (path / store.ABOUT).exists():
        plan, slices = _converted(family, path, config)
    else:
        tensors = files.read(path).tensors
        plan = fit(family, tensors, config, layout)[1]
        slices = plan.to_ours(tensors).__getitem__
    if shardings is None:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        flat = dict.fromkeys(plan.params, place)
    else:
        flat = tree.flatten(shardings)
    layers = {p.ours for p in plan.pieces if p.layer is not None}
    built = {}
    for name, shape in plan.params.items():
        built[name] = _place(name, shape, name in layers, slices, flat[name], dtype)
    return tree.unflatten(built)


def _converted(
    family: str, folder: pathlib.Path, config: Config
) -> tuple[Plan, Callable[[Slice], Tensor]]:
    """The key map of a folder of `convert`, and the slices of its parameters."""
    about = store.about(folder)
    if about["family"] != family:
        raise ValueError(f"{folder} holds {about['family']!r}, not {family!r}")
    layout = next(iter(families.family(family).layouts))
    plan = families.plans(family, config or about["sizes"], layout)[layout]
    params = store.read(folder / store.PARAMS)
    plan.check_ours(params.shapes)
    return plan, params.slice


def fit(
    family: str, tensors: Tensors, config: Config = None, layout: str | None = None
) -> tuple[str, Plan]:
    """The layout that a source is in, and its key map, checked.

    Raises:
      Mismatch: it is in none.
    """
    plans = families.plans(family, config, layout)
    best = max(plans, key=lambda name: plans[name].overlap(tensors))
    if not plans[best].overlap(tensors):
        some = ", ".join(list(tensors)[:3]) or "nothing"
        raise Mismatch(f"the source is no {family}: it holds {some} ...; layouts are "
                       + ", ".join(f"{n} ({next(iter(p.published))} ...)" for n, p in plans.items())
                       )  # fmt: skip
    plans[best].check(tensors)
    return best, plans[best]


def _place(
    path: str,
    shape: tuple[int, ...],
    stacked: bool,
    slices: Callable[[Slice], Tensor],
    sharding: Any,
    dtype: Any,
) -> jax.Array:
    """One parameter on its devices, a device after the other; equal shares are read once."""
    dtype = jax.dtypes.canonicalize_dtype(dtype or slices((path, 0 if stacked else None)).dtype)

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

    # By the text of an index: slices are no keys before Python 3.12.
    devices: dict[str, list[tuple[jax.Device, tuple[slice, ...]]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        devices.setdefault(str(index), []).append((device, index))
    parts = []
    for (device, index), *others in devices.values():
        first = jax.device_put(share(index), device)
        first.block_until_ready()  # so that the host's copy can go
        parts += [first, *(jax.device_put(first, other) for other, _ in others)]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


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
    """Parameters as a file in a published layout; `load` reads it, and so does the original code.

    Args:
      path: see `files.write`.
      layout: the family's first by default.
      dtype: of the file; the published one, or that of the parameters, by default.
      plain: further entries of a torch file.

    Raises:
      Mismatch: the parameters are not of the family at these sizes; names all of them.
      FileExistsError: there is something at `path`.
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
    """The tensors of a published file, each made of parameters when it is read."""
    kind = families.family(family)
    layout = layout or next(iter(kind.layouts))
    plan = families.plans(family, config, layout)[layout]
    plan.check_ours(shapes)
    dtype = dtype or kind.dtype
    return plan.to_theirs(ours, None if dtype is None else jnp.dtype(dtype))


def shapes_of(flat: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by path."""
    return {path: tuple(x.shape) for path, x in flat.items()}


def in_memory(flat: Mapping[str, Any]) -> Callable[[Slice], Tensor]:
    """Slices of parameters that are arrays."""

    def get(key: Slice) -> Tensor:
        path, layer = key
        x = flat[path]
        if layer is None:
            return Tensor(tuple(x.shape), np.dtype(x.dtype), lambda: np.asarray(x))
        return Tensor(tuple(x.shape[1:]), np.dtype(x.dtype), lambda: np.asarray(x[layer]))

    return get
