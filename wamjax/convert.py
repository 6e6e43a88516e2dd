"""Converts published weights to a wamjax checkpoint, and back.

    python -m wamjax.convert --family=wan22_ti2v --source=Wan2.2-TI2V-5B --output=weights/wan22
    python -m wamjax.convert --direction=export --family=fast_wam --source=runs/libero \\
        --output=libero.pt

Import reads a safetensors or torch file, a shard index, or a folder with one of them. It creates a
folder with an Orbax checkpoint (`params`) and `weights.json`; --tokenizer=FILE adds the tokenizer
of a text encoder. Export reads such a folder or a training run (its newest checkpoint; the moving
average if there is one; adapters merged). It writes a file, in the format of its extension, or a
folder of shards. Every tensor must be used once and every parameter filled once; otherwise the
command lists what is wrong and writes nothing. Tensors are converted one at a time, so memory use
is that of the largest tensor, not of the model.

Sizes and dtype come from the source: from the config of a run, or from the tensors of a published
file and the config.json next to it. Give whatever these do not say with --config, under the names
that sizes have in a config: {"model.heads": 24}.

``--family=list`` lists the families and their layouts.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import tqdm
from absl import app, flags, logging

from wamjax import cli
from wamjax import files as storage
from wamjax.training import checkpoint
from wamjax.training.integrity import Damaged
from wamjax.weights import api, families, files, sizing, store
from wamjax.weights.bounds import BadFile
from wamjax.weights.conversion import bar, bring_in
from wamjax.weights.merging import merged
from wamjax.weights.plan import Mismatch
from wamjax.weights.tensor import Tensor, Tensors

CODEC = "codec/"  # parameters of a codec within a run


def send_out(
    family: str,
    source: str | os.PathLike,
    output: str | os.PathLike,
    config: api.Config = None,
    layout: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
    ema: bool | None = None,
) -> None:
    """Exports a folder of `convert`, or a training run, to a published file; see the module and
    `api.export`.

    `ema`: see `store.source`.
    """
    shapes, get, sizes, layout_then, step = _ours(family, storage.path(source), config, ema)
    layout = layout or layout_then or next(iter(families.family(family).layouts))
    tensors = api.published(family, shapes, get, sizes, layout, dtype)
    known = {"step": step, "torch_dtype": f"torch.{next(iter(tensors.values())).dtype}"}
    names = families.family(family).layouts[layout].plain
    is_torch = storage.path(output).suffix in files.TORCH
    plain = {name: known[name] for name in names} if is_torch else {}
    with bar("export", sum(x.nbytes for x in tensors.values()), progress) as shown:
        files.write(output, _watched(tensors, shown), plain)


def _ours(family: str, source: storage.Path, config: api.Config, ema: bool | None):
    """Returns (shapes, slices, sizes, layout or None, step) of a folder of `convert`, or of a
    run."""
    params, step = store.source(source, ema)
    shapes, get = merged(params)
    if not (source / store.ABOUT).exists():
        codec = [path for path in shapes if path.startswith(CODEC)]
        if codec:
            logging.warning("%s: the %d parameters of its codec are not part of a %s and are left "
                            "out", source, len(codec), family)  # fmt: skip
        shapes = {path: shape for path, shape in shapes.items() if path not in codec}
        if sizing.is_known(family):
            run = None if config else checkpoint.find(source).config
            config = sizing.of_run(family, run, shapes) | families.changes(family, config)
        return shapes, get, config, None, step
    about = store.about(source)
    if about["family"] != family:
        raise ValueError(f"{source} holds weights of {about['family']!r}, not of {family!r}: give "
                         "that family, or another source")  # fmt: skip
    return shapes, get, config or families.sizes_of(about), about["layout"], step


def _watched(tensors: Tensors, bar: tqdm.tqdm) -> Mapping[str, Tensor]:
    def watch(x: Tensor) -> Tensor:
        def read():
            bar.update(x.nbytes)
            return x.read()

        return Tensor(x.shape, x.dtype, read)

    return {key: watch(x) for key, x in tensors.items()}


def listing() -> str:
    """Returns the families, their sizes and layouts, as text."""
    lines = []
    for name, kind in families.FAMILIES.items():
        values = ", ".join(f"{k}={v}" for k, v in kind.sizes.items())
        lines.append(f"{name}: {' | '.join(kind.layouts)}\n    {values}")
    return "\n".join(lines)


def define_flags() -> None:
    """Defines the flags; not on import, since several entry points share flag names."""
    flags.DEFINE_string("family", None, "published model, or `list` to list them")
    flags.DEFINE_string("source", None, "file or folder to read")
    flags.DEFINE_string("output", None, "folder to create; for an export also a file")
    flags.DEFINE_string("config", None, "json file with sizes that the source does not give")
    flags.DEFINE_enum(
        "direction", "import", ("import", "export"), "import published weights, or export ours"
    )
    flags.DEFINE_string("layout", None, "layout of the published file; detected on import")
    flags.DEFINE_string(
        "dtype", None, "dtype of the result, such as bfloat16; that of the source by default"
    )
    flags.DEFINE_string("tokenizer", None, "of a text encoder: file or folder to store with it")
    checkpoint.define_ema_flag()
    flags.mark_flag_as_required("family")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    values: Any = flags.FLAGS
    if values.family == "list":
        print(listing())
        return
    if not values.source or not values.output:
        raise app.UsageError("give --source and --output")
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    run = functools.partial(send_out, ema=checkpoint.asked_ema())
    if values.direction == "import":
        run = functools.partial(bring_in, tokenizer=values.tokenizer)
        if values["ema"].present:
            raise app.UsageError("--ema is for exports: published weights are what they are")
    elif values.tokenizer:
        raise app.UsageError("--tokenizer is for imports: exports are weights alone")
    try:
        run(values.family, values.source, values.output, values.config, values.layout, values.dtype)
    except (Mismatch, BadFile, Damaged, FileNotFoundError, FileExistsError) as error:
        raise SystemExit(f"nothing was written: {error}") from None
    print(f"wrote {values.output}")


if __name__ == "__main__":
    cli.run(main, define_flags)
