"""Collects the metadata that a server sends its clients."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import wamjax
from wamjax.bundle import files
from wamjax.bundle.policy import LoadedPolicy
from wamjax.data.windows import held, padding
from wamjax.serving.names import EXTRAS, Names
from wamjax.serving.worker import Batching


def metadata(
    bundle: str | os.PathLike,
    policies: Mapping[str, LoadedPolicy],
    names: Names,
    batching: Batching,
) -> dict[str, Any]:
    """Returns plain values that describe the policy's inputs and outputs; see docs/robot.md for
    each.

    Args:
      policies: mode -> policy, the default mode first.
    """
    mode, policy = next(iter(policies.items()))
    manifest, spec = policy.manifest, policy.manifest.spec
    return {
        "server": f"wamjax {wamjax.__version__}",
        "bundle": files.fingerprint(bundle),
        "source": manifest.source,
        "step": manifest.step,
        "horizon": spec.chunk,
        "control_hz": spec.control_hz,
        "cameras": {name: [*size, 3] for name, size in spec.cameras.items()},
        "resizes": bool(spec.resize),
        "names": [table.to_json() for table in names.tables],
        "actions": _dimensions(spec.action_dim, manifest.action_names) | {"hold": _hold(manifest)},
        "state": _dimensions(spec.proprio_dim, manifest.proprio_names),
        "mode": mode,
        "modes": list(policies),
        "rung_ms": policy.rung_ms,  # of the default mode, if it is adaptive
        "prefix": policy.prefix_max,  # maximum number of committed actions
        "extras": list(EXTRAS),
        "max_batch": batching.max_batch,
        "instructions": list(policy.instructions)[:256],
    }


def _dimensions(size: int, names: tuple[str, ...]) -> dict[str, Any]:
    """Describes dimensions; bundles know no units other than those of the demonstrations."""
    return {"size": size, "names": list(names), "units": "as recorded", "normalized": False}


def _hold(manifest: files.Manifest) -> list[bool]:
    """Returns which actions keep their last command when the queue is empty; the others are motions
    and stand still at 0. If the data does not say, all keep it."""
    words = padding(manifest.config.data.padding)
    size = manifest.spec.action_dim
    if words is None:
        return [True] * size
    return held(words, manifest.action_names, size).tolist()
