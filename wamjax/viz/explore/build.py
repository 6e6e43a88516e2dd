"""Builds the explorer's page of a config from the config's objects, as one file."""

from __future__ import annotations

import dataclasses
import os
from importlib import resources
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from wamjax import config as configs
from wamjax import files, tree, wam
from wamjax.console import say
from wamjax.data import pipeline
from wamjax.data.sources import missing
from wamjax.models.codec import CachedLatents
from wamjax.training.step import compute_cast
from wamjax.viz import page
from wamjax.viz.explore import noising, schemes, stages, tables
from wamjax.wam.loss import Denoises
from wamjax.wam.video.autoregressive import Autoregressive

FILE = "explore.html"
SCRIPTS = ("parts.js", "sections.js", "keys.js")  # in this order
SECTIONS = {
    "noising": ("Noise", "From a real example to noise and back",
                "An example of the data, mixed with noise at the levels that sampling visits, from "
                "noise to data. Training draws a random level, and the network learns to undo the "
                "noise."),
    "schemes": ("Order", "Autoregression and diffusion, step by step",
                "The same clip sampled in different orders. Each frame is drawn as noisy as its "
                "level. The number of evaluations of the network is the cost."),
    "slots": ("Slots", "One network, several uses",
              "A sample is a row of slots. A use gives some, predicts others, and leaves others "
              "out."),
    "tables": ("Masks", "Who sees whom, token by token",
               "Rows attend columns. Point at a pair, or step through the rows."),
    "programs": ("Cache", "What is computed, what is read, and what it costs",
                 "Every evaluation of the network in a program, as recorded while tracing it."),
}  # fmt: skip
KEYS = ("<p class='note'>Keys: 1 to 5 choose a section, ← and → step, space plays. "
        "On a phone: the buttons, the slider, and a finger on the mask.</p>")  # fmt: skip


def write(config: ConfigDict, output: str | os.PathLike, measure: bool = False) -> files.Path:
    """Writes explore.html of a config into a folder; returns its path.

    Args:
      measure: whether to time every stage on this machine, with fresh parameters.

    Raises:
      ValueError: the config cannot be trained, or its objective neither denoises slots nor predicts
        tokens.
    """
    folder = files.path(output, "--output")
    files.make_folder(folder, "give another --output")
    files.write_text(folder / FILE, html(data(config, measure)))
    return folder / FILE


def html(found: dict[str, Any]) -> str:
    """Returns the page for the output of `data`."""
    links = "".join(
        f"<a href='#{key}'>{i + 1} {short}</a>" for i, (key, (short, *_)) in enumerate(
            SECTIONS.items())
    )  # fmt: skip
    parts = [f"<h1>{page.text(found['title'])}</h1>", page.table(found["facts"]), KEYS,
             f"<nav>{links}</nav>"]  # fmt: skip
    for key, (_, title, words) in SECTIONS.items():
        note = found["notes"].get(key, "")
        more = f"<p class='note'>{page.text(note)}</p>" if note else ""
        parts.append(f"<section id='{key}'><h2>{title}</h2><p>{words}</p>{more}</section>")
    parts.append(page.embed("explore", {k: found[k] for k in SECTIONS}))
    here = resources.files(__package__)
    script = "\n".join((here / name).read_text() for name in SCRIPTS)
    style = (here / "explore.css").read_text()
    return page.page(f"wamjax: {found['title']}", "\n".join(parts), style, script)


def data(config: ConfigDict, measure: bool = False) -> dict[str, Any]:
    """Returns everything that the page shows, from the objects that the config builds."""
    configs.validate(config)
    wam.check_training(config)
    objective = wam.build(config, pipeline.spec_of(config))
    if not isinstance(objective, Denoises | Autoregressive):
        raise ValueError(f"config.objective.name = {config.objective.name!r}: the explorer shows "
                         "only methods that denoise slots or predict tokens")  # fmt: skip
    params = jax.eval_shape(objective.init, jax.random.key(0))
    found = programs(config, objective, params, measure)
    tokens: dict[str, int] = {}
    for program in found:
        for stage in program.stages:
            for group, number in (stage.cached | stage.computed).items():
                tokens[group] = max(number, tokens.get(group, 0))
    ways, note = _ways(config, objective)
    notes = {"noising": note}
    if not objective.uses:
        notes["slots"] = "This method has no slots: it predicts every token from those before."
    if measure:
        notes["programs"] = f"Milliseconds are of {jax.devices()[0].device_kind}, batch 1."
    return {
        "title": config.objective.name,
        "facts": _facts(config, objective, params),
        "notes": notes,
        "noising": ways,
        "schemes": _schemes(objective, tokens),
        "slots": tables.slots(objective),
        "tables": tables.tables(objective, tokens),
        "programs": [_program(p) for p in found],
    }


def programs(config: ConfigDict, objective, params, measure: bool = False):
    """Records the programs of a config: acting or sampling, and the forward pass of training."""
    dtype = config.precision.compute
    cast = jax.eval_shape(lambda p: compute_cast(p, dtype), params)
    fresh = None
    if measure:
        fresh = jax.jit(lambda key: compute_cast(objective.init(key), dtype))(jax.random.key(0))
    key = jax.eval_shape(lambda: jax.random.key(0))
    one = objective.batch_spec(1)

    def record(name, program, *args):
        say(f"tracing {name}")
        return stages.record(name, objective, program, cast, *args, measure=fresh)

    out = []
    if objective.kind == "policy":
        same = {"actions": _Same(), "proprio": _Same()}
        observation = objective.observation_spec(1)
        for mode in objective.modes:
            out.append(record(
                f"act: {mode}", lambda p, o, k, mode=mode: objective.policy(p, same, o, k, mode),
                observation, key,
            ))  # fmt: skip
        if objective.imagines:
            imagining = _with_latents(objective)
            out.append(record("imagine", lambda p, o, k: imagining.imagine(p, same, o, k),
                              observation, key))  # fmt: skip
    else:
        condition = {k: v for k, v in one.items() if k != objective.codec.key}
        out.append(record("sample", lambda p, c, k: objective.clips(p, c, k, count=1),
                          condition, key))  # fmt: skip
        whole = one[objective.codec.key]
        if given := objective.always_given:
            begun = jax.ShapeDtypeStruct((1, given, *whole.shape[2:]), whole.dtype)
            out[-1] = record("sample", lambda p, c, k, g: objective.clips(p, c, k, g, count=1),
                             condition, key, begun)  # fmt: skip
    batch = objective.batch_spec(objective.row)
    name = f"train: the forward pass of {objective.row}"
    return [*out, record(name, objective.loss, batch, key)]


def _with_latents(objective):
    """Returns the objective, which shows latents if its codec cannot decode them."""
    if not isinstance(objective.codec, CachedLatents):
        return objective
    return dataclasses.replace(objective, codec=_Latents(**vars(objective.codec)))


class _Latents(CachedLatents):
    """Shows latents without decoding them."""

    def decode(self, latents):
        return latents


class _Same:
    """Stands in for normalization at no cost."""

    def forward(self, x):
        return x

    inverse = forward


def _program(program: stages.Program) -> dict[str, Any]:
    rows = [dataclasses.asdict(s) | {"name": s.name} for s in program.stages]
    return {"name": program.name, "flops": program.flops, "rest": program.rest, "stages": rows}


def _ways(config: ConfigDict, objective) -> tuple[list[dict[str, Any]], str]:
    """Returns `noising.ways` of the config's data; without data, the levels and the reason."""
    if not isinstance(objective, Denoises):
        return [], "This method predicts tokens; nothing is noised."
    batch, note = _batch(config, objective)
    if batch is not None:
        return noising.ways(objective, batch, config.seed), ""
    groups = dict.fromkeys(g for use in objective.uses for g in use.predicted)
    return [noising.levels(objective, g) | {"steps": []} for g in groups], note


def _batch(config: ConfigDict, objective) -> tuple[dict[str, np.ndarray] | None, str]:
    """Returns the first examples of the config's data and ''; or None and the reason."""
    if jax.eval_shape(objective.codec.init, jax.random.key(0)):
        return None, ("The codec of this config has weights of its own, which a config does not "
                      "hold: the levels are shown without a latent.")  # fmt: skip
    if config.data.kind == "episodes":
        absent = [str(path) for name, path in missing(config.data).items()
                  if not config.data.sources[name].stand_in]  # fmt: skip
        if absent:
            return None, f"The levels are shown without data: there is none in {', '.join(absent)}."
    try:
        batch = next(iter(pipeline.open_data(config)[2]))
    except OSError as error:
        return None, f"The levels are shown without data, which could not be opened: {error}"
    return {k: np.asarray(v)[: objective.row] for k, v in batch.items()}, ""


def _schemes(objective, tokens: dict[str, int]) -> list[dict[str, Any]]:
    """Returns the schemes for clips with the length, steps and tokens per frame of the config."""
    if isinstance(objective, Denoises):
        groups = [g for g in objective.network.groups if g.expert == "video" and g.name in tokens]
        frames = len({p for g in groups for p in g.positions})
        each = tokens[groups[0].name] // len(groups[0].positions)
        way = noising.levels(objective, groups[-1].name)
        shares = way["sigma"] / (way["alpha"] + way["sigma"])
    else:
        frames, *grid = objective.network.grid
        each, shares = int(np.prod(grid)), np.linspace(1, 0, 11)
    return schemes.all_of(frames, shares, each)


def _facts(config: ConfigDict, objective, params) -> dict[str, str]:
    counts = tree.count_by_expert(params)
    return {
        "method": f"{type(objective).__name__}, {wam.label(config)}",
        "parameters": ", ".join(f"{name} {count:,}" for name, count in counts.items()),
        "batch": ", ".join(f"{k} {tuple(s.shape[1:])}" for k, s in objective.batch_spec(1).items()),
        "codec": type(objective.codec).__name__,
    }
