"""Infers the sizes of a network of pictures from shapes of tensors and from neighbouring files.

Shapes determine all sizes except the number of heads, unless heads are normalized separately. A
wrong guess would silently give another network, so the number comes from a ``config.json`` next to
the file, from a published network of the same size, or from the caller.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from einops import EinopsError, rearrange

from wamjax import files
from wamjax.models import dit
from wamjax.weights import bounds, families, store
from wamjax.weights.plan import Mismatch, Plan
from wamjax.weights.table import Piece
from wamjax.weights.tensor import Tensors

Shapes = Mapping[str, tuple[int, ...]]
PATCH = "video/patch_embed/kernel"
QUERY = "blocks/video/self_attn/q/kernel"
HEAD_NORM = "blocks/video/self_attn/q_norm/scale"
# Size: a parameter with that size, and its axis.
_AT = {
    "layers": ("blocks/video/ffn/in/kernel", 0),
    "width": ("blocks/video/ffn/in/kernel", 1),
    "ffn": ("blocks/video/ffn/in/kernel", 2),
    "action_width": ("blocks/action/ffn/in/kernel", 1),
    "action_ffn": ("blocks/action/ffn/in/kernel", 2),
    "action_dim": ("action/encoder/kernel", 0),
    "proprio_dim": ("proprio/kernel", 0),
    "freq_dim": ("video/time_mlp/in/kernel", 0),
    "pooled_width": ("pooled_mlp/in/kernel", 0),
    "lora_rank": ("blocks/video/modulation/self_down/kernel", 2),
}
_CONTEXT = (
    ("video/text_mlp/in/kernel", 0), ("text_embed/kernel", 0),
    ("blocks/video/cross_attn/k/kernel", 1),
)  # fmt: skip
_MASKS = {"cosmos_predict2": 2, "cosmos_policy": 2}  # channels in addition to those of the latents
# (layers, width of all heads): number of heads of the published networks.
_HEADS = {
    "dit": {(layers, width): heads for layers, width, heads in dit.SIZES.values()},
    "wan21_t2v": {(30, 1536): 12, (40, 5120): 40},
    "wan22_ti2v": {(30, 3072): 24},
    "sd3": {(24, 1536): 24},
    "fast_wam": {(30, 3072): 24},
}


def is_known(family: str) -> bool:
    """Returns whether the sizes of a family can be inferred from shapes."""
    return "model.video.width" in families.family(family).sizes


def of_parameters(family: str, shapes: Shapes, patch: int) -> dict[str, Any]:
    """Infers sizes of a family from the shapes of our parameters, by names of a config."""
    out = {size: shapes[path][axis] for size, (path, axis) in _AT.items() if path in shapes}
    if "layers" in out:
        out["layers"] += any(path.startswith("final_block/") for path in shapes)
    for path, axis in _CONTEXT:
        if path in shapes:
            out["context_width"] = shapes[path][axis]
            break
    if PATCH in shapes:
        out["channels"] = shapes[PATCH][0] // patch**2 - _MASKS.get(family, 0)
    if "video/head/kernel" in shapes:
        out["outputs"] = shapes["video/head/kernel"][1] // patch**2
    if "labels/embedding" in shapes:
        out["classes"] = shapes["labels/embedding"][0] - 1  # one is "none of them"
    inner = shapes.get(QUERY, (0,))[-1]
    head = shapes.get(HEAD_NORM, (0, 0))[-1]
    if 0 < head < inner:
        out["heads"], out["head_dim"] = inner // head, head
    known = families.family(family).sizes
    return {key: value for key, value in families.named(**out).items() if key in known}


def of_file(
    family: str,
    tensors: Tensors,
    config: families.Sizes | str | os.PathLike | None = None,
    layout: str | None = None,
    path: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Returns the sizes of a published file: from a config, else from its tensors.

    Args:
      path: path of the file, or of its folder, which may hold a ``config.json``.

    Raises:
      Mismatch: the number of heads is unknown.
    """
    given, known = families.changes(family, config), families.family(family).sizes
    if not is_known(family):  # the published network need not be traced, which takes seconds
        return dict(known) | given
    plans = families.plans(family, None, layout)
    best = max(plans.values(), key=lambda plan: plan.overlap(tensors))
    shapes = _shapes(best, tensors)
    if _AT["layers"][0] not in shapes or QUERY not in shapes:
        return dict(known) | given  # another network, which `Plan.check` reports
    patch = given.get("model.patch") or _patch(best, tensors) or known["model.patch"]
    inferred = {"model.patch": patch} | of_parameters(family, shapes, patch)
    inner = shapes[QUERY][-1]
    inferred |= _beside(family, path, inferred["model.layers"], inner) | given
    if "model.heads" not in inferred:
        heads = _HEADS.get(family, {}).get((inferred["model.layers"], inner))
        if heads is None:
            raise Mismatch(
                f"{path or 'the source'} holds {family} at sizes that were not published, and its "
                "tensors do not determine the number of heads: give --config, a JSON file such as "
                '{"model.heads": 24}, or put the published config.json in the same folder'
            )
        inferred["model.heads"] = heads
    if "model.head_dim" in known:
        inferred.setdefault("model.head_dim", inner // inferred["model.heads"])
    return dict(known) | inferred


def of_run(family: str, config: Any, shapes: Shapes) -> dict[str, Any]:
    """Returns the sizes of a run's network from its config and its shapes.

    Args:
      config: config of the run; None: sizes that shapes do not determine are the published ones.

    Raises:
      Mismatch: the heads together are not as wide as the network, which the family requires.
    """
    known = families.family(family).sizes
    if config is None:
        return dict(known) | of_parameters(family, shapes, known["model.patch"])
    model = config.model
    told = {key: _of_config(config, key) for key in known if _of_config(config, key) is not None}
    wide = model.heads * model.head_dim
    if "model.head_dim" not in known and wide != model.video.width:
        raise Mismatch(f"the run has model.heads * model.head_dim = {wide} and model.video.width = "
                       f"{model.video.width}, which must be equal to export it as {family}"
                       )  # fmt: skip
    return dict(known) | told | of_parameters(family, shapes, model.patch)


def config_of(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns the part of a config with the sizes of converted weights, by key.

        config.update_from_flattened_dict(weights.config_of("weights/fast_wam"))

    Raises:
      FileNotFoundError, ValueError: the folder is not one of `wamjax.convert`, or its network is
      not one that a config builds.
    """
    about = store.about(folder)
    if about["family"] not in families.FAMILIES or not is_known(about["family"]):
        raise ValueError(f"{folder} holds weights of {about['family']!r}, whose sizes are not keys "
                         "of a config: give a folder of a DiT or a policy")  # fmt: skip
    sizes = families.sizes_of(about)
    out = {key: tuple(x) if isinstance(x, list) else x for key, x in sizes.items() if "." in key}
    out.setdefault("model.head_dim", out["model.video.width"] // out["model.heads"])
    return out


def _of_config(config: Any, key: str) -> Any:
    if "." not in key:
        return None
    for part in key.split("."):
        config = config[part]
    return config


def _shapes(plan: Plan, tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Returns shapes of our parameters for a file's tensors, independent of the plan's sizes."""
    out: dict[str, tuple[int, ...]] = {}
    for p in plan.pieces:
        if p.layer not in (None, 0) or p.theirs not in tensors:
            continue
        if p.ours.startswith("final_block/"):  # which is one of the layers of a file
            continue
        shape = _turned(p, tensors[p.theirs].shape)
        if shape is not None:
            out[p.ours] = shape if p.layer is None else (_layers(plan, p, tensors), *shape)
    return out


def _turned(piece: Piece, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    if piece.part[1] > 1:
        shape = (shape[0] // piece.part[1], *shape[1:]) if shape else ()
    if not piece.row.layout:
        return shape
    turn = functools.partial(rearrange, pattern=piece.row.layout)
    try:
        return jax.eval_shape(turn, jax.ShapeDtypeStruct(shape, np.float32)).shape
    except EinopsError:
        return None


def _layers(plan: Plan, first: Piece, tensors: Tensors) -> int:
    """Returns how many consecutive layers of a parameter a file has, from 0."""
    second = next(p.theirs for p in plan.pieces if p.ours == first.ours and p.layer == 1)
    a, b = first.theirs, second
    at = next(i for i in range(len(a)) if a[i] != b[i])
    count = 0
    while f"{a[:at]}{count}{a[at + 1 :]}" in tensors:
        count += 1
    return count


def _patch(plan: Plan, tensors: Tensors) -> int | None:
    """Returns the side of a patch if the file has it as a convolution."""
    for p in plan.pieces:
        if p.ours == PATCH and p.theirs in tensors and len(tensors[p.theirs].shape) > 3:
            return tensors[p.theirs].shape[-1]
    return None


def _beside(
    family: str, path: str | os.PathLike | None, layers: int, inner: int
) -> dict[str, Any]:
    """Reads the published ``config.json`` next to a file, if its network has the same size."""
    place = files.path(path or "")
    place = (place if place.is_dir() else place.parent) / "config.json"
    if path is None or not place.is_file():
        return {}
    with bounds.reading(place, "does not hold the sizes of a model"):
        said = bounds.read_json(place.read_bytes())
        heads = said.get("num_heads", said.get("num_attention_heads"))
        wide = said.get("dim", (heads or 0) * said.get("attention_head_dim", 0))
        if said.get("num_layers") != layers or wide != inner or not isinstance(heads, int):
            return {}
        out = {"model.heads": heads}
        if "model.rope_scale" in families.family(family).sizes and "rope_scale" in said:
            out["model.rope_scale"] = tuple(said["rope_scale"])
        if family == "sd3" and "pos_embed_max_size" in said:
            base = said["sample_size"] // said["patch_size"]
            out["model.position_table"] = (said["pos_embed_max_size"], base)
        return out
