"""Writes a data set from arrays, for formats that `wamjax.ingest` does not read."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from wamjax.config import did_you_mean
from wamjax.data import images
from wamjax.data.episodes import Episode
from wamjax.data.ingest.steps import returns_of
from wamjax.data.records import Writer
from wamjax.data.spec import Info

KEYS = ("images", "proprio", "actions", "instruction", "rewards", "success", "task")
DERIVED = ("cameras", "proprio_dim", "action_dim", "final_observation", "outcomes")


def write_episodes(
    path: str | os.PathLike,
    info: Mapping[str, Any] | float,
    episodes: Iterable[Mapping[str, Any]],
    discount: float = 0.99,
    pictures: str = "png",
) -> Info:
    """Writes a data set from arrays.

    Each episode is a mapping:

    * "images": camera -> uint8 (n, h, w, 3), or n encoded PNG or JPEG files;
    * "proprio": (n, p), robot units;
    * "actions": (T, a), robot units. n is T + 1, or T if there is no observation after the last
      action; then the last observation is stored twice, and the data set records that;
    * "instruction": text;
    * "rewards" (T,) or "success" (bool), if known: returns are their discounted sum, with success
      as a reward of 1 for the last action. Give them for all episodes or for none; a data set
      without them has no returns, so no value function can be learned from it;
    * "task": name of the task, if the instruction does not identify it.

    Args:
      path: folder of the data set; must not exist. It appears when it is complete.
      info: control steps per second; or fields of `wamjax.data.spec.Info` that the arrays do not
        contain, {"control_hz": 20.0, "action_names": ("x", "y", "gripper"), ...}. Do name the
        gripper.
      episodes: any iterable; episodes are written one at a time.
      discount: discount of the returns.
      pictures: how arrays are stored: "png" (lossless) or "jpeg".

    Returns:
      The `Info` of the data set.

    Raises:
      FileExistsError: the data set exists.
      ValueError: an episode does not match the first one, or an array is not as above; names it.
    """
    claim = {"control_hz": float(info)} if isinstance(info, int | float) else dict(info)
    rest = iter(episodes)
    first = next(rest, None)
    if first is None:
        raise ValueError(f"no episode to write to {path}")
    whole = _info(claim, first)
    with Writer(path, whole) as writer:
        for number, values in enumerate(itertools.chain([first], rest)):
            try:
                episode = _episode(values, whole, number, discount, pictures)
            except ValueError as error:
                raise ValueError(f"episode {number}: {error}") from error
            writer.write(episode)
    return whole


def _info(claim: dict[str, Any], first: Mapping[str, Any]) -> Info:
    fields = {f.name for f in dataclasses.fields(Info)} - set(DERIVED)
    for key in claim:
        if key not in fields:
            raise ValueError(f"info has no field {key!r}{did_you_mean(key, fields)}; there are "
                             f"{sorted(fields)}")  # fmt: skip
    if "control_hz" not in claim:
        raise ValueError("info lacks 'control_hz', the control steps per second")
    _check(first)
    sizes = {}
    for camera, frames in first["images"].items():
        one = frames[0]
        sizes[camera] = images.size(one) if isinstance(one, bytes) else np.shape(one)[:2]
    return Info(
        cameras=sizes,
        proprio_dim=np.shape(first["proprio"])[1],
        action_dim=np.shape(first["actions"])[1],
        final_observation=len(first["proprio"]) > len(first["actions"]),
        outcomes=_has_outcome(first),
        **claim,
    )


def _check(values: Mapping[str, Any]) -> None:
    for key in values:
        if key not in KEYS:
            raise ValueError(f"there is no key {key!r}{did_you_mean(key, KEYS)}; there are {KEYS}")
    if lacks := [k for k in ("images", "proprio", "actions", "instruction") if k not in values]:
        raise ValueError(f"it lacks {lacks}")
    for key in ("proprio", "actions"):
        if np.ndim(values[key]) != 2:
            raise ValueError(f"{key} is {np.shape(values[key])}, it must be (steps, dimensions)")
    if not len(values["actions"]):
        raise ValueError("it has no steps")


def _has_outcome(values: Mapping[str, Any]) -> bool:
    return values.get("rewards") is not None or values.get("success") is not None


def _episode(
    values: Mapping[str, Any], info: Info, number: int, discount: float, pictures: str
) -> Episode:
    _check(values)
    actions, proprio = (np.asarray(values[k], np.float32) for k in ("actions", "proprio"))
    count, observations = len(actions), len(actions) + info.final_observation
    has = {"proprio": len(proprio)}
    has |= {f"images of {c}": len(x) for c, x in values["images"].items()}
    for key, n in has.items():
        if n != observations:
            raise ValueError(
                f"{n} {key}, but {count} actions need {observations}, as in the first episode"
            )
    if _has_outcome(values) != info.outcomes:
        raise ValueError("only some episodes have rewards or success: give them for all or for "
                         "none")  # fmt: skip
    if not info.final_observation:
        proprio = np.concatenate([proprio, proprio[-1:]])
    frames = {c: _encode(x, info.cameras.get(c), c, pictures) for c, x in values["images"].items()}
    rewards = _rewards(values, count)
    success = values.get("success")
    if success is None:
        success = rewards is None or bool(np.max(rewards, initial=0.0) > 0)
    return Episode(
        images={c: x if info.final_observation else [*x, x[-1]] for c, x in frames.items()},
        proprio=proprio,
        actions=actions,
        instruction=values["instruction"],
        success=bool(success),
        returns=np.zeros(0, np.float32) if rewards is None else returns_of(rewards, discount),
        task=values.get("task", values["instruction"]),
        seed=number,
    )


def _rewards(values: Mapping[str, Any], count: int) -> np.ndarray | None:
    if values.get("rewards") is not None:
        out = np.asarray(values["rewards"], np.float64)
        if out.shape != (count,):
            raise ValueError(f"rewards is {out.shape}, it must be ({count},)")
        return out
    if values.get("success") is None:
        return None
    out = np.zeros(count)
    out[-1:] = bool(values["success"])
    return out


def _encode(frames, size: tuple[int, int] | None, camera: str, kind: str) -> list[bytes]:
    out = []
    for x in frames:
        has = images.size(x) if isinstance(x, bytes) else np.shape(x)[:2]
        if size is not None and tuple(has) != tuple(size):
            raise ValueError(f"a picture of camera {camera!r} is {tuple(has)}, others are {size}")
        out.append(x if isinstance(x, bytes) else images.encode(x, kind))
    return out
