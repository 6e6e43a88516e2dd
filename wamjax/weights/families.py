"""Defines the published models that can be loaded: sizes, networks, and the layouts of their
files."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from wamjax import files
from wamjax.config import did_you_mean
from wamjax.config_keys import RENAMED
from wamjax.models import t5
from wamjax.models.vae import published
from wamjax.named import find
from wamjax.weights import beside, bounds, networks, plan, tables, vae_tables
from wamjax.weights.beside import Check
from wamjax.weights.plan import Plan
from wamjax.weights.table import Table

Sizes = Mapping[str, Any]
# Sizes of denoisers have the names of a config; networks and key maps use short names.
KEYS = {
    **{key: f"model.{key}" for key in ("layers", "heads", "head_dim", "patch", "context_width",
                                       "freq_dim", "rope_scale", "position_table")},
    "lora_rank": "model.modulation_rank",
    "width": "model.video.width", "ffn": "model.video.ffn", "action_width": "model.action.width",
    "action_ffn": "model.action.ffn", "channels": "model.codec.channels",
    "pooled_width": "model.text.pooled_width", "action_dim": "data.declared.action_dim",
    "proprio_dim": "data.declared.proprio_dim",
}  # fmt: skip
_SHORT = {key: short for short, key in KEYS.items()}


def named(**sizes: Any) -> dict[str, Any]:
    """Returns sizes by their names in a config."""
    return {KEYS.get(short, short): value for short, value in sizes.items()}


def short(sizes: Sizes) -> dict[str, Any]:
    """Reverses `named`."""
    return {_SHORT.get(key, key): value for key, value in sizes.items()}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Describes one way in which a family is published.

    Attributes:
      rows: returns the key map for sizes.
      ignore: returns, for sizes, regexes of unused keys that a file may have, each with its check,
        see `beside`.
      tied: key -> the key whose values it repeats; a file may have it, but none is written.
      plain: other entries of a torch file: "step", "torch_dtype".
    """

    rows: Callable[[Any], Table]
    ignore: Callable[[Any], Mapping[str, Check]] = lambda sizes: {}
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    plain: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Family:
    """Describes a published model.

    Attributes:
      sizes: published sizes, by names of a config; a config changes some of them.
      params: shapes of the parameters at sizes.
      functions: functions of parameters and inputs that the network computes, by name.
      layouts: layouts by name; the first is the default for exports.
      rows_of: arguments of a layout's `rows`, from sizes.
    """

    sizes: Sizes
    params: Callable[[Sizes], Any]
    functions: Callable[[Sizes], dict[str, Callable]]
    layouts: Mapping[str, Layout]
    rows_of: Callable[[Sizes], Any] = short


def _denoiser(build, sizes: Sizes, layouts: Mapping[str, Layout], **more: Any) -> Family:
    def params(sizes: Sizes) -> Any:
        return networks.denoiser_params(build, short(sizes))

    compute = more.get("functions", functools.partial(networks.denoisers, build))
    return Family(named(**sizes), params, lambda sizes: compute(short(sizes)), layouts)


def _text(sizes: Sizes, **more: Layout) -> Family:
    # Files of the whole T5 hold its decoder, too.
    transformers = Layout(
        tables.t5_transformers,
        lambda sizes: dict.fromkeys((r"decoder\..*", r"lm_head\..*"), beside.other_network),
        {"encoder.embed_tokens.weight": "shared.weight"},
    )
    sizes = dict(mlp="relu", shared_bias=True, buckets=32, max_distance=128) | sizes
    layouts = {"transformers": transformers, **more}
    functions = networks.text_functions
    return Family(sizes, networks.text_params, functions, layouts, rows_of=dict)


def _vae(sizes: published.Sizes, **layouts: Layout) -> Family:
    return Family(
        dataclasses.asdict(sizes),
        networks.vae_params,
        networks.vae_functions,
        layouts,
        rows_of=networks.vae_sizes,
    )


DIT = dict(
    layers=28, width=1152, heads=16, ffn=4608, channels=4, outputs=8, patch=2, classes=1000,
    freq_dim=256,
)  # fmt: skip
WAN21 = dict(
    layers=30, width=1536, heads=12, ffn=8960, channels=16, patch=2, context_width=4096,
    freq_dim=256,
)  # fmt: skip
WAN22 = WAN21 | dict(width=3072, heads=24, ffn=14336, channels=48)
COSMOS = dict(
    layers=28, width=2048, heads=16, ffn=8192, channels=16, patch=2, context_width=1024,
    lora_rank=256, rope_scale=(1.0, 3.0, 3.0),
)  # fmt: skip
SD3 = dict(
    layers=24, width=1536, heads=24, ffn=6144, channels=16, patch=2, context_width=4096,
    pooled_width=2048, position_table=(192, 64), freq_dim=256,
)  # fmt: skip
FAST_WAM = dict(
    layers=30, heads=24, head_dim=128, width=3072, ffn=14336, action_width=1024, action_ffn=4096,
    channels=48, patch=2, context_width=4096, freq_dim=256, action_dim=7, proprio_dim=8,
)  # fmt: skip

_WAN = {"official": Layout(tables.wan_official), "diffusers": Layout(tables.wan_diffusers)}
_WAN_VAE = {
    "official": Layout(vae_tables.wan_official),
    "diffusers": Layout(vae_tables.wan_diffusers),
}
_COSMOS = {
    "official": Layout(
        tables.cosmos_official,
        # Tables that are computed, counters, transformer-engine's state, and the average that
        # some releases have beside the weights.
        lambda sizes: {
            **beside.cosmos_positions(sizes),
            r"net\.accum_.*": beside.counter,
            r".*_extra_state": beside.opaque,
            r"net_ema\..*": beside.twin("net_ema.", "net."),
        },
    ),
    "diffusers": Layout(tables.cosmos_diffusers),
}
_cosmos = functools.partial(
    _denoiser, networks.cosmos, COSMOS, _COSMOS, functions=networks.cosmos_denoisers
)

FAMILIES: dict[str, Family] = {
    "dit": _denoiser(
        networks.picture,
        DIT,
        {
            "official": Layout(tables.dit_official, lambda s: {"pos_embed": beside.sincos(s)}),
            "diffusers": Layout(tables.dit_diffusers),
        },
    ),
    "wan21_t2v": _denoiser(networks.wan, WAN21, _WAN),
    "wan22_ti2v": _denoiser(networks.wan, WAN22, _WAN),
    "cosmos_predict2": _cosmos(),
    "cosmos_policy": _cosmos(),
    "sd3": _denoiser(
        networks.mmdit,
        SD3,
        {
            "diffusers": Layout(
                tables.sd3_diffusers, lambda s: {r"pos_embed\.pos_embed": beside.sincos(s)}
            )
        },
    ),
    "fast_wam": Family(
        named(**FAST_WAM),
        lambda sizes: networks.mixture_params(short(sizes)),
        lambda sizes: networks.mixture_functions(short(sizes)),
        {"released": Layout(tables.fast_wam, plain=("step", "torch_dtype"))},
    ),
    "t5": _text(t5.T5_11B),
    "t5_v1_1": _text(t5.T5_V1_1_XXL),
    "umt5": _text(t5.UMT5_XXL, wan=Layout(tables.t5_wan)),
    "sd_vae": _vae(
        published.SD,
        diffusers=Layout(vae_tables.sd_diffusers),
        diffusers_old=Layout(vae_tables.sd_diffusers_old),
        official=Layout(
            vae_tables.sd_official,
            lambda sizes: {
                r"state_dict/loss\..*": beside.other_network,
                r"state_dict/model_ema\..*": beside.twin(
                    "state_dict/model_ema.", "state_dict/", False, ("decay", "num_updates")
                ),
            },
        ),
    ),
    "wan21_vae": _vae(published.WAN_21, **_WAN_VAE),
    "wan22_vae": _vae(published.WAN_22, **_WAN_VAE),
}


def family(name: str) -> Family:
    """Returns a family by name, or by MODULE:ATTRIBUTE of your own; raises ValueError if
    unknown."""
    return find(name, FAMILIES, "--family") if ":" in name else _known("family", name, FAMILIES)


def sizes(name: str, config: Sizes | str | os.PathLike | None = None) -> dict[str, Any]:
    """Returns the sizes of a family: the published ones, changed by a config.

    Args:
      config: sizes by their names in a config (``model.layers``), or a JSON file.

    Raises:
      ValueError: the family does not have a size.
    """
    return dict(family(name).sizes) | changes(name, config)


def changes(name: str, config: Sizes | str | os.PathLike | None = None) -> dict[str, Any]:
    """Returns a config's changes to the sizes of a family; see `sizes`."""
    known = family(name).sizes
    given = config or {}
    if not isinstance(given, Mapping):
        with bounds.reading(given, "must hold a JSON object of sizes"):
            given = bounds.read_json(files.path(given).read_bytes())
            if not isinstance(given, dict):
                raise ValueError(f"it is {bounds.short(given)}")
    old = {key: KEYS[key] for key in given if key not in known and KEYS.get(key) in known}
    if old:
        said = ", ".join(f"{key!r} to {new!r}" for key, new in old.items())
        raise ValueError(f"sizes of {name} must be named as in a config: rename {said}")
    for key in given:
        _known(f"size of {name}", key, known)
    return dict(given)


def sizes_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the sizes in a ``weights.json``; older files have short names."""
    published = family(about["family"]).sizes
    before = RENAMED | KEYS
    return {
        key if key in published else before.get(key, key): x for key, x in about["sizes"].items()
    }


def plans(
    name: str, config: Sizes | str | os.PathLike | None = None, layout: str | None = None
) -> dict[str, Plan]:
    """Returns the key maps of a family at sizes, with the shapes of their tensors, by layout.

    Args:
      layout: restricts the result to this layout.
    """
    kind, values = family(name), sizes(name, config)
    if layout is not None:
        _known(f"layout of {name}", layout, kind.layouts)
    params = _shapes(name, json.dumps(values))
    return {
        key: plan.make(
            f"{name} in the {key} layout",
            how.rows(kind.rows_of(values)),
            params,
            how.ignore(kind.rows_of(values)),
            how.tied,
        )
        for key, how in kind.layouts.items()
        if layout in (None, key)
    }


@functools.lru_cache(maxsize=16)
def _shapes(name: str, values: str) -> Any:
    """Returns shapes of parameters; tracing a large network takes seconds."""
    return family(name).params(json.loads(values))


def functions(
    name: str, config: Sizes | str | os.PathLike | None = None
) -> dict[str, Callable[..., Any]]:
    """Returns the functions of parameters and inputs that a family computes; see `networks`."""
    return family(name).functions(sizes(name, config))


def _known(what: str, key: str, known: Mapping[str, Any]) -> Any:
    if key not in known:
        raise ValueError(
            f"there is no {what} {key!r}{did_you_mean(key, known)}; there are {', '.join(known)}"
        )
    return known[key]
