"""Places arrays on devices: the mesh, and ordered rules from parameter paths to shardings.

Models use only `constrain` of this file. A rule is a regex over the full path and one mesh axis (or
None) for each dimension of the leaf, or None for a leaf that is replicated. Parameters are split
the FSDP way over ``fsdp`` along one matmul dimension and the Megatron way over ``tensor`` along the
other: columns of the first matmul of a pair (q, k, v, ffn/in), rows of the second (o, ffn/out), so
that a pair costs one all-reduce. A batch is split over ``data`` and ``fsdp`` together.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from wamjax import tree
from wamjax.config import did_you_mean

AXES = ("data", "fsdp", "tensor")
_SPLIT = ("TPU v5 lite", "TPU v5e")  # a dimension of their torus may hold two axes, as in JAX
BATCH = P(("data", "fsdp"))
Rule = tuple[str, tuple[str | None, ...] | None]

_FREE = r"(video|action|value)"
_ATTENTION = r"(self_attn|cross_attn)"
# What a block holds, for any expert. Below blocks/ leaves lead with a layer axis, which is never
# split: the scan over blocks slices it. A final_block stands alone. What is small is replicated on
# purpose.
_IN_BLOCK: tuple[Rule, ...] = (
    (rf"{_ATTENTION}/(q|k|v)/kernel", ("fsdp", "tensor")),
    (rf"{_ATTENTION}/(q|k|v)/bias", ("tensor",)),
    (rf"{_ATTENTION}/(q_norm|k_norm)/scale", (None,)),
    (rf"{_ATTENTION}/o/kernel", ("tensor", "fsdp")),
    (rf"{_ATTENTION}/o/bias", (None,)),
    (r"ffn/(in|gate)/kernel", ("fsdp", "tensor")),
    (r"ffn/(in|gate)/bias", ("tensor",)),
    (r"ffn/out/kernel", ("tensor", "fsdp")),
    (r"ffn/out/bias", (None,)),
    (r"(self|cross|ffn)_norm/(scale|bias)", (None,)),
    (r"modulation", (None, None)),  # a table
    (r"modulation/((self|cross|ffn)_up/)?kernel", (None, "fsdp")),
    (r"modulation/bias", (None,)),
    (r"modulation/(self|cross|ffn)_down/kernel", ("fsdp", None)),
    (r"position_bias", (None, None)),
)

# The first rule that matches the whole path decides.
RULES: tuple[Rule, ...] = (
    *((rf"blocks/\w+/{path}", (None, *axes)) for path, axes in _IN_BLOCK),
    *((rf"final_block/\w+/{path}", axes) for path, axes in _IN_BLOCK),
    (rf"{_FREE}/(text_mlp|time_mlp)/in/kernel", ("fsdp", "tensor")),
    (rf"{_FREE}/(text_mlp|time_mlp)/in/bias", ("tensor",)),
    (rf"{_FREE}/(text_mlp|time_mlp)/out/kernel", ("tensor", "fsdp")),
    (rf"{_FREE}/(text_mlp|time_mlp)/out/bias", (None,)),
    (rf"{_FREE}/time_proj/kernel", ("fsdp", "tensor")),
    (rf"{_FREE}/time_proj/bias", ("tensor",)),
    # One side of these is as narrow as a robot's action or a patch of pixels; only the width of
    # the expert is split.
    (r"(video/patch_embed|(action|value)/encoder|proprio|text_embed)/kernel", (None, "fsdp")),
    (r"(video/patch_embed|(action|value)/encoder|proprio|text_embed)/bias", (None,)),
    (rf"{_FREE}/head/kernel", ("fsdp", None)),
    (rf"{_FREE}/head/bias", (None,)),
    (r"video/(head_table|anticipation)", (None, None)),
    (r"video/(text_proj|head_modulation|head_up)/kernel", (None, "fsdp")),
    (r"video/(text_proj|head_modulation)/bias", (None,)),
    (r"video/head_down/kernel", ("fsdp", None)),
    (r"video/(head_norm|time_norm)/(scale|bias)", (None,)),
    (r"pooled_mlp/(in|out)/kernel", (None, "fsdp")),
    (r"pooled_mlp/(in|out)/bias", (None,)),
    (r"(labels|code_embed|start|places)/embedding", (None, None)),
    # Logits of autoregressive video; a vocabulary need not divide by anything.
    (r"head/kernel", ("fsdp", None)),
    (r"head/bias|head_norm/(scale|bias)", (None,)),
    (r"(text|tokens)/(embedding|positions)", (None, None)),  # the gradient of a lookup splits badly
    (r"gate/.*", None),
    (r"tokens/(words|encoder)/.*", None),  # small, and trained along
    # The text encoders, which are frozen; umT5's embedding alone is 4 GB.
    (r"embedding", (None, "fsdp")),
    (r"position_bias", (None, None)),
    (r"final_norm/scale", (None,)),
    # Convolutions, frozen below codec/ or trained alone: whole on every device.
    (r"codec/.*|(encoder|decoder|quant|post_quant)/.*|codebook/embedding", None),
    (r"blocks/.*/lora_(down|up)", (None, None, None)),
    (r".*/lora_(down|up)", (None, None)),
)

# Logical names of activation dimensions, for `constrain`.
LOGICAL: dict[str, Any] = {
    "batch": ("data", "fsdp"),
    "tokens": None,
    "slots": None,
    "embed": None,
    "heads": "tensor",
    "head_dim": None,
    "hidden": "tensor",
    "layers": None,
}


class Shape(NamedTuple):
    """Stands in for a mesh on devices that are not attached; the sharding rules read only this."""

    shape: dict[str, int]


def make_mesh(sizes: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of ``config.mesh``, over all devices of all processes by default.

    Args:
      sizes: mapping of the three axes to sizes; at most one is -1 and takes the rest.

    Raises:
      ValueError: sizes that do not multiply to the number of devices, or see `over_slices`.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = tuple(axis_sizes(sizes, len(devices)).values())
    # make_mesh defaults to Explicit axes, which Linen cannot trace under.
    kinds = (AxisType.Auto,) * len(AXES)
    # Only TPUs and GPUs have it; a slice is what faster links join, of GPUs a node.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:  # which jax.make_mesh refuses
        return Mesh(over_slices(shape, slices, devices), AXES, axis_types=kinds)
    return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)


def over_slices(shape: Sequence[int], slices: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """Arranges the devices of several slices as a mesh that uses the slow network between them
    least.

    ``data`` goes from slice to slice as far as it divides, since it communicates least; ``fsdp``
    does with what is left, ``tensor`` never.

    Args:
      shape: sizes of `AXES`.

    Raises:
      ValueError: slices are left over, or differ in size.
    """
    data = math.gcd(shape[0], slices)
    fsdp = slices // data
    if shape[1] % fsdp:
        text = " x ".join(f"{a}={n}" for a, n in zip(AXES, shape, strict=True))
        raise ValueError(
            f"mesh {text} on {slices} slices: tensor must stay within one, so make mesh.data a "
            f"multiple of {slices}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (shape[0] // data, shape[1] // fsdp, shape[2]),
        (data, fsdp, 1),
        devices,
        allow_split_physical_axes=devices[0].device_kind in _SPLIT,
    )


def abstract_mesh(sizes: Any, devices: int) -> AbstractMesh:
    """Returns the mesh of ``config.mesh`` on abstract devices: enough to trace and to lower."""
    shape = axis_sizes(sizes, devices)
    return AbstractMesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(sizes: Any, devices: int) -> dict[str, int]:
    """Returns the sizes of the axes on this many devices; arguments and errors as for
    `make_mesh`."""
    requested = {a: int(sizes[a]) for a in AXES}
    text = " x ".join(f"{a}={n}" for a, n in requested.items())
    free = [a for a, n in requested.items() if n == -1]
    if len(free) > 1 or any(n < 1 and n != -1 for n in requested.values()):
        raise ValueError(f"mesh {text}: sizes are positive, and at most one is -1")
    fixed = int(np.prod([n for n in requested.values() if n != -1]))
    if devices < 1 or devices % fixed or (not free and fixed != devices):
        raise ValueError(
            f"mesh {text} does not fit {devices} devices: {fixed} "
            f"{'do not divide' if free else 'is not'} {devices}; change config.mesh"
        )
    return {a: devices // fixed if n == -1 else n for a, n in requested.items()}


def check_config(config, mesh: Mesh) -> None:
    """Raises the errors that a mesh and a config cause together, before anything is compiled."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = shards * config.optim.accumulate
    if config.data.batch_size % parts:
        raise ValueError(
            f"data.batch_size {config.data.batch_size} does not divide into mesh.data x mesh.fsdp "
            f"= {shards} shards x optim.accumulate = {config.optim.accumulate} microbatches; make "
            f"it a multiple of {parts}"
        )
    if config.model.heads % mesh.shape["tensor"]:
        raise ValueError(
            f"model.heads {config.model.heads} does not divide by mesh.tensor "
            f"{mesh.shape['tensor']}: heads are what the tensor axis splits"
        )


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[Rule] = RULES) -> P:
    """Returns the partition of one parameter by the first rule that matches its full path.

    Raises:
      ValueError: no rule matches, the rule has another rank, or a dimension does not divide.
    """
    pattern, axes = next((r for r in rules if re.fullmatch(r[0], path)), (None, ()))
    if pattern is None:
        raise ValueError(
            f"no sharding rule matches parameter {path!r} {shape}; add one to "
            "wamjax.training.sharding.RULES (all None replicates it)"
        )
    axes = (None,) * len(shape) if axes is None else axes
    if len(axes) != len(shape):
        raise ValueError(
            f"sharding rule {pattern!r} names {len(axes)} dimensions, {path!r} has shape {shape}"
        )
    for dim, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"parameter {path!r} {shape}: dimension {dim} of size {size} does not divide by "
                f"mesh axis {axis!r} of size {mesh.shape[axis]}; change config.mesh.{axis} or "
                "the model's size"
            )
    return P(*axes)


def params_shardings(params: Any, mesh: Mesh, rules: Sequence[Rule] = RULES) -> Any:
    """Returns the `NamedSharding` of every parameter; `params` may be abstract."""
    return tree.map_with_path(
        lambda path, x: NamedSharding(mesh, spec_of(path, x.shape, mesh, rules)), params
    )


def state_shardings(state: Any, params: Any, mesh: Mesh, rules: Sequence[Rule] = RULES) -> Any:
    """Returns the shardings of a train state: leaves that mirror a parameter have its sharding."""
    specs = state_specs(state, params, mesh, rules)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def state_specs(state: Any, params: Any, mesh: Mesh, rules: Sequence[Rule] = RULES) -> Any:
    """Returns the same as partitions; `mesh` may be anything with a ``shape``.

    A leaf mirrors the parameter whose path ends its own path and whose shape it has (Adam's
    moments, the moving average); scalars and the coefficients of Muon are replicated.

    Raises:
      ValueError: a leaf is neither.
    """
    specs = {
        path: (x.shape, spec_of(path, x.shape, mesh, rules))
        for path, x in tree.flatten(params).items()
    }

    def place(path: str, leaf) -> P:
        names = path.split("/")
        for start in range(len(names)):
            shape, spec = specs.get("/".join(names[start:]), (None, None))
            if shape == leaf.shape:
                return spec
        if leaf.ndim == 0 or names[-1] == "ns_coeffs":  # three constants of Muon
            return P()
        raise ValueError(f"state leaf {path!r} {leaf.shape} mirrors no parameter")

    return tree.map_with_path(place, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of every leaf of a batch: its leading dimension over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding with the same value on every device."""
    return NamedSharding(mesh, P())


def batch_rows(
    mesh: Mesh, size: int, devices: Sequence[jax.Device] | None = None
) -> np.ndarray:
    """Returns the rows of a batch of `size` on some devices, ascending; this process's by default.

    Processes that hold the same shard (a ``tensor`` axis that spans them) have the same rows, and
    those of a process need not be neighbours: a mesh follows the network of the devices.
    """
    return _rows(mesh, size, None if devices is None else tuple(devices))


@functools.lru_cache(maxsize=16)  # asked for every batch, and a pod has thousands of devices
def _rows(mesh: Mesh, size: int, devices: tuple[jax.Device, ...] | None) -> np.ndarray:
    own_devices = set(mesh.local_devices if devices is None else devices)
    places = batch_sharding(mesh).devices_indices_map((size,))
    slices = {index[0].indices(size) for device, index in places.items() if device in own_devices}
    out = np.concatenate([np.arange(*ends) for ends in sorted(slices)])
    out.flags.writeable = False
    return out


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Builds global arrays from each process's share.

    Args:
      batch: the rows of `batch_rows`, in their order.
    """
    sharding, shards = batch_sharding(mesh), mesh.shape["data"] * mesh.shape["fsdp"]
    local = len(batch_rows(mesh, shards))  # of the shards

    def assemble(share: np.ndarray) -> jax.Array:
        size = len(share) // local * shards
        rows = batch_rows(mesh, size)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            first = int(np.searchsorted(rows, start))
            return share[first : first + stop - start]

        return jax.make_array_from_callback((size, *share.shape[1:]), sharding, part)

    return {key: assemble(share) for key, share in batch.items()}


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Adds shardings to abstract arrays, for lowering and for restoring."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains the sharding of an activation by the logical name of each dimension.

    Dimensions of size 1 are left alone, since they broadcast.

    Raises:
      ValueError: an unknown name, or not one name for each dimension.
      RuntimeError: no mesh is set; without one the constraint would silently do nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise RuntimeError("constrain needs a mesh: call it under `with jax.set_mesh(mesh):`")
    if len(names) != x.ndim:
        raise ValueError(f"constrain got {len(names)} names {names} for shape {x.shape}")
    axes = []
    for name, size in zip(names, x.shape, strict=True):
        if name is not None and name not in LOGICAL:
            raise ValueError(f"unknown dimension {name!r}{did_you_mean(name, LOGICAL)}; "
                             f"there are {sorted(LOGICAL)}")  # fmt: skip
        axes.append(LOGICAL[name] if name is not None and size > 1 else None)
    return jax.lax.with_sharding_constraint(x, P(*axes))
