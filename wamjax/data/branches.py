"""Branches on disk: of one state several chunks of actions, and what came of each.

    DIR/about.json        what they are of, and a fingerprint of the policy whose they are
    DIR/statistics.json   of the policy's data, with its sizes
    DIR/part-00000.npz    arrays: "video" (s, 1, H, W, 3), "proprio" (s, p) and "actions"
                          (s, n, j, a) in robot units, what the policy was told, "success"
                          and "steps" (s, n, m) of m continuations, "episode" and "at" (s,)

``config.data.kind = "branches"`` serves them like `arrays`, normalised as the policy was trained.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from wamjax import files
from wamjax.data.arrays import Arrays
from wamjax.data.normalize import normalizers
from wamjax.data.sources import data_root
from wamjax.data.spec import DataSpec
from wamjax.weights import store

ABOUT, STATISTICS = "about.json", "statistics.json"
GATE_SHARE = 4  # the branches of every so-manieth episode train the gate of a ladder
_CAME = ("success", "steps", "episode", "at", "tasks")  # of the proposals, and where from


def fingerprint(workdir) -> str:
    """Of the newest checkpoint of a run, by the digests of its parameters."""
    digests = store.source(workdir)[0].digests
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()[:16]


def read(folder: files.Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    """(about, statistics, arrays) of a folder, all parts together.

    Raises:
      FileNotFoundError, ValueError: there are none, or they are not complete.
    """
    if not (folder / ABOUT).exists():
        raise FileNotFoundError(f"there are no branches in {folder}: python -m wamjax.branches "
                                f"--workdir=RUN --out={folder} makes them")  # fmt: skip
    about = json.loads((folder / ABOUT).read_text())
    parts = files.glob(folder, "part-*.npz")
    if len(parts) != about["parts"]:
        raise ValueError(f"{folder} has {len(parts)} of {about['parts']} parts: the command that "
                         "made them goes on where it stopped")  # fmt: skip
    loaded = []
    for part in parts:
        with np.load(files.fetch(part)) as arrays:
            loaded.append(dict(arrays))
    arrays = {key: np.concatenate([part[key] for part in loaded]) for key in loaded[0]}
    return about, json.loads((folder / STATISTICS).read_text()), arrays


def ladder_of(folder: files.Path) -> tuple[tuple[int, ...], tuple[str, ...], int]:
    """(rungs, modes, proposals) of branches that were made for a ladder; no rungs where not."""
    about = json.loads((folder / ABOUT).read_text())
    return tuple(about.get("rungs", ())), tuple(about.get("modes", ())), about["proposals"]


def seen(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The observations that the proposals were made of."""
    return {k: x for k, x in arrays.items() if k not in (*_CAME, "actions")}


def open_branches(config) -> tuple[DataSpec, dict[str, Any], Arrays]:
    """What a judge is trained on.

    Raises:
      ValueError: the branches are of another policy than training starts from.
    """
    if not config.data.branches:
        raise ValueError("config.data.branches names no folder: python -m wamjax.branches makes "
                         "one, and --config=FILE:run=RUN,branches=DIR names it")  # fmt: skip
    folder = files.below(data_root(config.data.root), config.data.branches)
    about, statistics, arrays = read(folder)
    source = config.init_from.path
    if source and fingerprint(source) != about["policy"]:
        raise ValueError(
            f"config.data.branches = {config.data.branches!r} are of another policy than that of "
            f"config.init_from.path = {source!r}: what its proposals lead to is not in them; make "
            "new ones with python -m wamjax.branches"
        )
    for key in ("rungs", "modes"):
        if about.get("modes") and list(config.objective.judge[key]) != about[key]:
            raise ValueError(
                f"config.objective.judge.{key} = {tuple(config.objective.judge[key])}, and the "
                f"proposals of config.data.branches are those of {tuple(about[key])}"
            )
    normalise = normalizers(statistics, config.data.normalization)
    table = seen(arrays) | {"actions": arrays["actions"]}
    for key in ("proprio", "actions"):
        table[key] = np.asarray(normalise[key].forward(table[key]), np.float32)
    # Of several continuations the means: what a proposal leads to is an expectation.
    table["success"] = arrays["success"].mean(axis=2).astype(np.float32)
    steps = np.where(arrays["success"], arrays["steps"], 0).sum(axis=2)
    table["steps"] = (steps / np.maximum(arrays["success"].sum(axis=2), 1)).astype(np.float32)
    table["gate"] = arrays["episode"] % GATE_SHARE == 0
    spec = DataSpec.from_json(statistics["spec"])
    return spec, {k: v for k, v in statistics.items() if k != "spec"}, Arrays(table)
