"""Guesses the format of files from their content."""

from __future__ import annotations

import itertools
import json
import pathlib

LOOKED_AT = 10_000  # maximum files examined in a folder


def guess(source: str | pathlib.Path) -> str:
    """Returns the likely format of a file or folder; '' if it is none of the formats."""
    path = pathlib.Path(source).expanduser()
    if path.is_file():
        return _of_hdf5(path) if path.suffix in (".hdf5", ".h5") else ""
    if (path / "meta" / "info.json").exists():
        return "lerobot"
    for file in itertools.islice(path.rglob("*"), LOOKED_AT):
        if file.name == "features.json":
            return _of_features(file)
        if file.name == "trajectory.h5":
            return "droid_raw"
        if file.suffix in (".hdf5", ".h5"):
            return _of_hdf5(file)
    return ""


def _of_features(file: pathlib.Path) -> str:
    try:
        steps = json.loads(file.read_text())["featuresDict"]["features"]["steps"]
        inner = steps["sequence"]["feature"]["featuresDict"]["features"]
    except (OSError, ValueError, KeyError):
        return ""
    observation = inner.get("observation", {}).get("featuresDict", {}).get("features", {})
    return "droid" if "action_dict" in inner and "wrist_image_left" in observation else "rlds"


def _of_hdf5(path: pathlib.Path) -> str:
    try:
        import h5py

        with h5py.File(path, "r") as file:
            if "observations" in file:
                videos = "video_paths" in file["observations"]
                return "cosmos_policy" if videos else "aloha"
            if "data" not in file:
                pictures = any("_images" in key for key in file)
                return "cosmos_policy" if pictures and "actions" in file else ""
            data = file["data"]
            first = next(iter(data.values()), None)
            if first is None or "actions" not in first:
                return ""
            if "ep_meta" in first.attrs:
                return "robocasa"
            names = set(first.get("obs", {}))
            robosuite = any(name.startswith("robot0_") for name in names)
            return "robomimic" if robosuite and "problem_info" not in data.attrs else "libero"
    except (ImportError, OSError, AttributeError):
        return ""


def advice(path: str | pathlib.Path) -> str:
    """Returns how to convert a path that holds files of a foreign format; '' if it does not."""
    if not pathlib.Path(path).exists() or not (name := guess(path)):
        return ""
    return (f"it looks like {name}: convert it by `python -m wamjax.ingest "
            f"--format={name} --source={path} --out=DIR`")  # fmt: skip
