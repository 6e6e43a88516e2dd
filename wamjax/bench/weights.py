"""Lists the parameters of the published models at full size, and how a mesh shards them.

    python -m wamjax.bench weights --mesh=data=4,fsdp=16 --family=fast_wam,umt5 --json
    python -m wamjax.bench weights --convert=fast_wam --scratch=DIR

Everything is computed from shapes; nothing is allocated. For `--convert` see `conversion`.

The load plan is that of `wamjax.weights.load` with the shardings of
`wamjax.training.sharding.RULES`. An autoencoder counts as the frozen codec of a policy, which is
replicated on every device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from wamjax.config import did_you_mean
from wamjax.training import sharding
from wamjax.training.sharding import Shape
from wamjax.weights import families
from wamjax.weights.plan import Plan

ITEM = {"bfloat16": 2, "float32": 4}


def parse_mesh(text: str) -> dict[str, int]:
    """Parses ``data=4,fsdp=16`` to sizes of the axes; axes that are not named have size 1.

    Raises:
      ValueError: the text has another format, or names an unknown axis.
    """
    sizes = dict.fromkeys(sharding.AXES, 1)
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in sizes:
            raise ValueError(f"--mesh={text}: no axis {axis!r}{did_you_mean(axis, sizes)}; there "
                             f"are {', '.join(sizes)}")  # fmt: skip
        if not size.isdigit() or int(size) < 1:
            raise ValueError(f"--mesh={text}: {axis} is {size!r}, it must be a number of devices")
        sizes[axis] = int(size)
    return sizes


def run(names: Sequence[str], mesh: Mapping[str, int]) -> dict[str, Any]:
    """Returns the parameters of every family and how they are loaded.

    Args:
      names: names of families; all if empty.
      mesh: size of each axis.

    Raises:
      ValueError: a family is unknown, or the mesh does not divide its parameters.
    """
    rows = [_row(name, Shape(dict(mesh))) for name in names or families.FAMILIES]
    return {
        "benchmark": "weights",
        "mesh": dict(mesh),
        "devices": math.prod(mesh.values()),
        "rows": rows,
    }


def _row(name: str, mesh: Shape) -> dict[str, Any]:
    plans = families.plans(name)
    shapes = next(iter(plans.values())).params
    numbers = sum(map(math.prod, shapes.values()))
    return {
        "family": name,
        "parameters": numbers,
        "arrays": len(shapes),
        "bytes": {dtype: numbers * size for dtype, size in ITEM.items()},
        "layouts": {layout: _published(plan) for layout, plan in plans.items()},
        "load": _load(shapes, mesh, "codec/" if name.endswith("_vae") else ""),
    }


def _published(plan: Plan) -> dict[str, Any]:
    key, shape = max(plan.published.items(), key=lambda item: math.prod(item[1]))
    return {
        "tensors": len(plan.published),
        "numbers": sum(map(math.prod, plan.published.values())),
        "largest": {"key": key, "shape": shape, "numbers": math.prod(shape)},
    }


def _load(shapes: Mapping[str, tuple[int, ...]], mesh: Shape, prefix: str) -> dict[str, Any]:
    """Computes how a mesh shards parameters.

    Returns:
      the numbers of sharded and of replicated arrays; path, shape and bytes by dtype of the largest
      array; bytes by dtype on one device, and of the largest shard of an array, which is what the
      host holds at a time.
    """
    shares = {}
    for path, shape in shapes.items():
        axes = sharding.spec_of(prefix + path, shape, mesh)
        shares[path] = math.prod(shape) // math.prod(mesh.shape[a] for a in axes if a is not None)
    whole = [path for path, shape in shapes.items() if shares[path] == math.prod(shape)]
    largest = max(shapes, key=lambda path: math.prod(shapes[path]))

    def sizes(numbers: int) -> dict[str, int]:
        return {dtype: numbers * size for dtype, size in ITEM.items()}

    return {
        "sharded": len(shapes) - len(whole),
        "replicated": len(whole),
        "replicated_bytes": sizes(sum(shares[path] for path in whole)),
        "device_bytes": sizes(sum(shares.values())),
        "largest": {"path": largest, "shape": shapes[largest],
                    "bytes": sizes(math.prod(shapes[largest]))},
        "host_bytes": sizes(max(shares.values())),
    }  # fmt: skip


def show(report: dict[str, Any]) -> None:
    """Prints the report as a table; sizes in GB of bfloat16."""
    mesh = " x ".join(f"{axis}={n}" for axis, n in report["mesh"].items())
    print(f"load plan for {report['devices']} devices, {mesh}; GB of bfloat16, twice as much in "
          "float32")  # fmt: skip
    print(f"{'family':<17}{'parameters':>14}{'GB':>8}{'split':>7}{'whole':>7}{'device':>8}"
          f"{'host':>7}{'largest':>9}  layouts (tensors)")  # fmt: skip
    for row in report["rows"]:
        load = row["load"]
        layouts = ", ".join(f"{k} ({v['tensors']})" for k, v in row["layouts"].items())
        size, device, host, largest = (
            x["bfloat16"] / 1e9
            for x in (row["bytes"], load["device_bytes"], load["host_bytes"],
                      load["largest"]["bytes"])
        )  # fmt: skip
        arrays = f"{load['sharded']:>7}{load['replicated']:>7}"
        print(f"{row['family']:<17}{row['parameters']:>14,}{size:>8.2f}{arrays}{device:>8.3f}"
              f"{host:>7.3f}{largest:>9.2f}  {layouts}")  # fmt: skip
