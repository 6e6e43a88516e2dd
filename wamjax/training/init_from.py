"""Starts training from existing parameters: converted weights, or another run.

``init_from.path`` is a folder of `wamjax.convert`, or the ``--workdir`` of a run (its newest
checkpoint; the moving average, if it has one). Further ones may follow after commas, each for the
parameters below a prefix: ``weights/cosmos,codec=weights/wan21_vae``. Paths and shapes must agree.
Parameters that the source lacks start fresh if they are listed in ``init_from.missing``; those that
the model lacks are dropped if they are listed in ``init_from.unused``. Parameters in
``init_from.fresh`` start fresh in any case, such as a head for other actions. Everything else is an
error, and the message lists all of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from wamjax import files, tree
from wamjax.training import adapters
from wamjax.training import state as states
from wamjax.weights import store

Params = dict[str, Any]


def params(objective, config, abstract: Params) -> Params:
    """Returns the parameters that a run starts with.

    Args:
      objective: its `init` makes missing parameters; those that its optional method `derive`
        (parameters to parameters) returns are derived from others where they are missing.
      abstract: shapes, dtypes and shardings of all parameters.

    Raises:
      ValueError: source and model do not agree.
      Damaged: the source changed after it was written.
    """
    source = sources(config.init_from.path)
    targets = tree.flatten(abstract)
    missing = check(source.shapes, targets, config.init_from)
    loaded = source.load({p: x for p, x in targets.items() if p not in missing})
    if not missing:
        return tree.unflatten(loaded)
    places = {p: targets[p].sharding for p in missing}

    def complete(loaded):
        whole = tree.flatten(states.init_params(objective, config)) | loaded
        # Adapters may lie beside some kernels only, and nothing follows from them.
        kernels = {p: x for p, x in whole.items() if not adapters.is_adapter(p)}
        flat = whole | tree.flatten(objective.derive(tree.unflatten(kernels)))
        return {p: flat[p].astype(targets[p].dtype) for p in missing}

    return tree.unflatten(loaded | jax.jit(complete, out_shardings=places)(loaded))


def sources(text: str) -> store.Stored:
    """Returns the parameters of all sources of an ``init_from.path``; see the module.

    Raises:
      FileNotFoundError: one of the paths is not a source.
      ValueError: two sources have the same parameter; names all of these.
    """
    arrays, digests, twice = {}, {}, []
    for part in text.split(","):
        prefix, _, folder = part.strip().rpartition("=")
        found, _ = store.source(folder)
        below = f"{prefix}/" if prefix else ""
        named = {below + p: array for p, array in found.arrays.items()}
        twice += sorted(named.keys() & arrays.keys())
        arrays |= named
        digests |= {below + p: digest for p, digest in found.digests.items()}
    if twice:
        raise ValueError(f"config.init_from.path {text!r}: more than one source has {twice}")
    return store.Stored(arrays, digests, text)


def check(
    source: Mapping[str, tuple[int, ...]],
    want: Mapping[str, Any],
    allowed: Any = None,
    what: str = "config.init_from does not fit the model",
) -> set[str]:
    """Returns the parameters that start fresh: those that the source may lack and does, or that are
    listed.

    Args:
      allowed: ``config.init_from``, or None if nothing may be missing or unused.
      what: start of the error message.

    Raises:
      ValueError: anything else is wrong; names all of it.
    """
    may_lack, may_have, fresh, unless = (), (), (), ""
    if allowed is not None:
        may_lack, may_have, fresh = allowed.missing, allowed.unused, allowed.fresh
        unless = ", and not in init_from."
    source = {p: shape for p, shape in source.items() if not _listed(p, fresh)}
    missing = {p for p in want if p not in source}
    unused = {p for p in source if p not in want}
    new = (*may_lack, *fresh)
    fine = [p for p in missing if _listed(p, new) or (allowed and adapters.is_adapter(p))]
    problems = {
        "missing in the source" + (unless and f"{unless}missing"): missing - set(fine),
        "unknown to the model" + (unless and f"{unless}unused"): {
            p for p in unused if not _listed(p, may_have)
        },
        "of another shape (source, model)": {
            f"{p} {source[p]} {tuple(want[p].shape)}"
            for p in want.keys() & source.keys()
            if source[p] != tuple(want[p].shape)
        },
        "in init_from.missing, but nothing of it is missing": {
            r for r in may_lack if not any(re.fullmatch(r, p) for p in missing)
        },
        "in init_from.unused, but nothing of it is unused": {
            r for r in may_have if not any(re.fullmatch(r, p) for p in unused)
        },
        "in init_from.fresh, but the model has nothing of it": {
            r for r in fresh if not any(re.fullmatch(r, p) for p in want)
        },
    }
    lines = [f"\n  {what}:" + "".join(f"\n    {x}" for x in sorted(found))
             for what, found in problems.items() if found]  # fmt: skip
    if lines:
        raise ValueError(f"{what}:" + "".join(lines))
    return missing


def words(config, checkpoints) -> tuple[str, ...]:
    """Returns the words with the first ids in a run: its own, or those of its source.

    Args:
      checkpoints: checkpoints of the run.

    Raises:
      ValueError: the source maps words to ids in the other way, so its embedding of them would mean
      nothing.
    """
    if checkpoints.latest is not None:
        return tuple(checkpoints.statistics().get("spec", {}).get("words", ()))
    if config.model.text.kind != "tokens" or config.data.kind != "episodes":
        return ()
    asked, fresh = config.data.vocabulary, config.init_from.fresh
    for part in filter(None, map(str.strip, config.init_from.path.split(","))):
        if "=" in part or (said := _vocabulary_of(part)) is None:
            continue
        was, known = said
        if was != asked and any(path.endswith("/embedding") and not _listed(path, fresh)
                                for path in store.source(part)[0].shapes):  # fmt: skip
            raise ValueError(f"config.data.vocabulary = {asked!r}, and {part} was trained with "
                             f"{was!r}: set it to that, or name its embedding of words in "
                             "config.init_from.fresh")  # fmt: skip
        return known if was == asked else ()
    return ()


def _vocabulary_of(folder: str) -> tuple[str, tuple[str, ...]] | None:
    """Returns ``data.vocabulary`` and the words of a run, or of its weights; None if unknown."""
    from wamjax.training import checkpoint

    path = files.path(folder)
    if (path / store.ABOUT).exists():
        known = store.about(path).get("plain", {}).get("words")
        return None if known is None else ("words" if known else "hash", tuple(known))
    if not (path / checkpoint.FOLDER).is_dir():
        return None  # reading it raises the error
    config, statistics, _ = checkpoint.find(path)
    if config.model.text.kind != "tokens" or config.data.kind != "episodes":
        return None
    return config.data.vocabulary, tuple(statistics.get("spec", {}).get("words", ()))


def _listed(path: str, rules: Sequence[str]) -> bool:
    return any(re.fullmatch(rule, path) for rule in rules)
