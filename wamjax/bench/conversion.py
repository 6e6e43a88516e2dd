"""Measures memory and time of `wamjax.convert` on a file of a published model's full size.

    python -m wamjax.bench weights --convert=fast_wam --scratch=DIR

Nothing is downloaded: the file has the published layout and dtype, with random tensors written one
at a time. It is imported from safetensors and exported to a torch file, which is compared bit by
bit with the random tensors, and imported in turn. Every conversion runs in a process of its own,
whose peak of resident memory, including mapped pages of files, the kernel reports. `--scratch`
needs room for twice the model and is left empty.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from wamjax.weights import families, files, tensor
from wamjax.weights.plan import Plan
from wamjax.weights.tensor import Tensor, Tensors

# Masks that keep random bits out of the upper half of the exponents, which has infinity and NaN.
_MASKS = {2: np.uint16(0xBFFF), 4: np.uint32(0xBFFFFFFF)}

# A process starts with its parent's peak memory, so a small process starts it.
_LAUNCHER = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def random_tensors(plan: Plan, dtype: Any = tensor.BFLOAT16) -> Tensors:
    """Returns random tensors for a layout, drawn on access and always the same; copies are equal.

    Args:
      dtype: bfloat16, float16 or float32.
    """
    seeds = {key: i for i, key in enumerate(plan.published)}
    seeds |= {copy: seeds[p.theirs] for p in plan.pieces for copy in p.copies}
    return {
        key: _drawn(seeds[key], shape, np.dtype(dtype)) for key, shape in plan.published.items()
    }


def _drawn(seed: int, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    mask = _MASKS[dtype.itemsize]

    def read() -> np.ndarray:
        rng = np.random.Generator(np.random.SFC64(seed))
        bits = np.frombuffer(rng.bytes(out.nbytes), mask.dtype) & mask
        return bits.view(dtype).reshape(shape)

    out = Tensor(shape, dtype, read)
    return out


def run(
    family: str, scratch: str | os.PathLike = "", config: str = "", layout: str | None = None
) -> dict[str, Any]:
    """Measures both directions of a family; see the module.

    Args:
      config: JSON file of sizes other than the published ones.
      layout: layout of the file; the family's first by default.

    Raises:
      OSError: there is too little room in `scratch`.
      RuntimeError: a conversion failed, or changed a tensor.
    """
    kind = families.family(family)
    layout = layout or next(iter(kind.layouts))
    plan = families.plans(family, config or None, layout)[layout]
    dtype = np.dtype(tensor.BFLOAT16)
    tensors = random_tensors(plan, dtype)
    size = sum(x.nbytes for x in tensors.values())
    place = pathlib.Path(scratch or tempfile.gettempdir())
    place.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(place).free < 2.2 * size:
        raise OSError(f"{place} has no room for twice {size / 1e9:.1f} GB: set another --scratch")
    sizes = [f"--config={config}"] if config else []
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = pathlib.Path(name)
        rows = list(_rows(folder, family, layout, tensors, sizes))
    return {
        "benchmark": "conversion",
        "family": family,
        "layout": layout,
        "dtype": str(dtype),
        "bytes": size,
        "tensors": len(tensors),
        "largest_tensor_bytes": max(x.nbytes for x in tensors.values()),
        "rows": rows,
    }


def _rows(folder: pathlib.Path, family: str, layout: str, tensors: Tensors, sizes: list[str]):
    source, ours, again = folder / "x.safetensors", folder / "ours", folder / "y.pt"
    start = time.perf_counter()
    files.write(source, tensors)
    yield {"what": "write a random file", "seconds": time.perf_counter() - start}
    name = f"--family={family}"
    yield _converted("import safetensors", name, f"--source={source}", f"--output={ours}", *sizes)
    source.unlink()
    dtype = next(iter(tensors.values())).dtype
    export = "--direction=export", f"--layout={layout}", f"--dtype={dtype}"
    yield _converted("export .pt", name, *export, f"--source={ours}", f"--output={again}", *sizes)
    shutil.rmtree(ours)
    start = time.perf_counter()
    _compare(again, tensors)
    yield {"what": "compare, bit for bit", "seconds": time.perf_counter() - start}
    yield _converted("import .pt", name, f"--source={again}", f"--output={ours}", *sizes)


def _compare(path: pathlib.Path, want: Tensors) -> None:
    got = files.read(path).tensors
    if got.keys() != want.keys():
        raise RuntimeError(f"{path} does not have the tensors drawn: {got.keys() ^ want.keys()}")
    for key, x in want.items():
        a, b = (np.ascontiguousarray(y.read()).view(np.uint8) for y in (got[key], x))
        if not np.array_equal(a, b):
            raise RuntimeError(f"{key} of {path} is not what was drawn")


def _converted(what: str, *arguments: str) -> dict[str, Any]:
    """Runs the converter and returns its seconds and peak memory."""
    command = [sys.executable, "-m", "wamjax.convert", *arguments]
    start = time.perf_counter()
    peak, _ = peak_of(command)
    seconds = time.perf_counter() - start
    text = " ".join(["python", *command[1:]])
    return {"what": what, "seconds": seconds, "peak_bytes": peak, "command": text}


def peak_of(command: list[str]) -> tuple[int, str]:
    """Runs a command.

    Returns:
      (peak of resident memory in bytes, output).

    Raises:
      RuntimeError: the command failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", _LAUNCHER, *command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return 1024 * int(done.stdout), done.stderr


def show(report: dict[str, Any]) -> None:
    """Prints the report as a table."""
    print(f"{report['family']} ({report['layout']}, {report['dtype']}): {report['tensors']} "
          f"tensors, {report['bytes'] / 1e9:.2f} GB, the largest "
          f"{report['largest_tensor_bytes'] / 1e6:.0f} MB")  # fmt: skip
    print(f"{'what':<24}{'seconds':>9}{'peak GB':>9}")
    for row in report["rows"]:
        peak = f"{row['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in row else "-"
        print(f"{row['what']:<24}{row['seconds']:>9.1f}{peak:>9}")
