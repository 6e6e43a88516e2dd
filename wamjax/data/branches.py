"""Reads branches from disk: several chunks of actions from one state, with their outcomes.

    DIR/about.json        origin of the branches, with a fingerprint of the policy
    DIR/statistics.json   statistics of the policy's data, with its sizes
    DIR/part-00000.npz    arrays: "video" (s, 1, H, W, 3), "proprio" (s, p) and "actions"
                          (s, n, j, a) in robot units, the policy's instruction, "success"
                          and "steps" (s, n, m) of m continuations, "episode" and "at" (s,)

``config.data.kind = "branches"`` serves them like `arrays`, normalized as for the policy.
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
GATE_SHARE = 4  # the branches of one in this many episodes train the gate of a ladder
_CAME = ("success", "steps", "episode", "at", "tasks")  # outcomes and origin of the proposals


def fingerprint(workdir) -> str:
    """Hashes the parameter digests of a run's newest checkpoint."""
    digests = store.source(workdir)[0].digests
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()[:16]


def read(folder: files.Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    """Returns (about, statistics, arrays) of a folder, with all parts concatenated.

    Raises:
      FileNotFoundError, ValueError: there are no branches, or they are incomplete.
    """
    if not (folder / ABOUT).exists():
        raise FileNotFoundError(f"there are no branches in {folder}: collect them with python -m "
                                f"wamjax.branches --workdir=RUN --out={folder}")  # fmt: skip
    about = json.loads((folder / ABOUT).read_text())
    parts = files.glob(folder, "part-*.npz")
    if len(parts) != about["parts"]:
        raise ValueError(f"{folder} has only {len(parts)} of {about['parts']} parts: run the same "
                         "python -m wamjax.branches command again to continue it")  # fmt: skip
    loaded = []
    for part in parts:
        with np.load(files.fetch(part)) as arrays:
            loaded.append(dict(arrays))
    arrays = {key: np.concatenate([part[key] for part in loaded]) for key in loaded[0]}
    return about, json.loads((folder / STATISTICS).read_text()), arrays


def ladder_of(folder: files.Path) -> tuple[tuple[int, ...], tuple[str, ...], int]:
    """Returns (rungs, modes, proposals) of branches made for a ladder; no rungs for others."""
    about = json.loads((folder / ABOUT).read_text())
    return tuple(about.get("rungs", ())), tuple(about.get("modes", ())), about["proposals"]


def seen(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the observations that the proposals were made from."""
    return {k: x for k, x in arrays.items() if k not in (*_CAME, "actions")}


def open_branches(config) -> tuple[DataSpec, dict[str, Any], Arrays]:
    """Returns the data that a judge is trained on.

    Raises:
      ValueError: the branches belong to a policy other than the one training starts from.
    """
    if not config.data.branches:
        raise ValueError("config.data.branches is not set: collect branches with python -m "
                         "wamjax.branches, and name their folder by "
                         "--config=FILE:run=RUN,branches=DIR")  # fmt: skip
    folder = files.below(data_root(config.data.root), config.data.branches)
    about, statistics, arrays = read(folder)
    source = config.init_from.path
    if source and fingerprint(source) != about["policy"]:
        raise ValueError(
            f"config.data.branches = {config.data.branches!r} was collected with another policy "
            f"than config.init_from.path = {source!r}: collect branches with this one, by python "
            "-m wamjax.branches"
        )
    for key in ("rungs", "modes"):
        if about.get("modes") and list(config.objective.judge[key]) != about[key]:
            raise ValueError(
                f"config.objective.judge.{key} = {tuple(config.objective.judge[key])} must be "
                f"{tuple(about[key])}, with which config.data.branches was collected"
            )
    normalise = normalizers(statistics, config.data.normalization)
    table = seen(arrays) | {"actions": arrays["actions"]}
    for key in ("proprio", "actions"):
        table[key] = np.asarray(normalise[key].forward(table[key]), np.float32)
    # Average several continuations, because the value of a proposal is an expectation.
    table["success"] = arrays["success"].mean(axis=2).astype(np.float32)
    steps = np.where(arrays["success"], arrays["steps"], 0).sum(axis=2)
    table["steps"] = (steps / np.maximum(arrays["success"].sum(axis=2), 1)).astype(np.float32)
    table["gate"] = arrays["episode"] % GATE_SHARE == 0
    spec = DataSpec.from_json(statistics["spec"])
    return spec, {k: v for k, v in statistics.items() if k != "spec"}, Arrays(table)
