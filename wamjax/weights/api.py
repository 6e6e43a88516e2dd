"""Published files to parameters, and parameters to published files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wamjax import tree
from wamjax.weights import families, files
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
    """Parameters from a published file, index of shards, or folder.

        params = load("wan22_ti2v", "Wan2.2-TI2V-5B", dtype="bfloat16")
        velocity = functions("wan22_ti2v")["denoise"](params, latents, levels, {"context": text})

    Args:
      family: one of `families.FAMILIES`.
      config: sizes that are not the published ones, or a json file of them.
      layout: of the file; the one that its keys fit best by default.
      dtype: of the parameters; that of the file by default.
      shardings: where each parameter goes; the first local device by default. No more than a
        device's share of one parameter is built on the host at a time.

    Raises:
      Mismatch: keys or shapes are not those of the family; names all of them.
    """
    tensors = files.read(path).tensors
    plan = fit(family, tensors, config, layout)[1]
    slices = plan.to_ours(tensors, dtype)
    if shardings is None:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        flat = dict.fromkeys(plan.params, place)
    else:
        flat = tree.flatten(shardings)
    built = {p: _place(p, s, slices, flat[p]) for p, s in plan.params.items()}
    return tree.unflatten(built)


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
    path: str, shape: tuple[int, ...], slices: Mapping[Slice, Tensor], sharding: Any
) -> jax.Array:
    """One parameter on its devices."""
    whole = slices.get((path, None))
    dtype = jax.dtypes.canonicalize_dtype((whole or slices[path, 0]).dtype)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if whole is not None:
            return np.array(whole.read()[index], dtype)
        layers, *rest = index
        numbers = range(*layers.indices(shape[0]))
        sides = [len(range(*s.indices(n))) for s, n in zip(rest, shape[1:], strict=True)]
        out = np.empty((len(numbers), *sides), dtype)
        for row, i in zip(out, numbers, strict=True):
            row[...] = slices[path, i].read()[tuple(rest)]
        return out

    return jax.make_array_from_callback(shape, sharding, part)


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
