"""DROID as recorded: one folder per episode with trajectory.h5, recordings/MP4 and metadata.

``trajectory.h5`` has action/*, observation/robot_state/*, observation/camera_type/<serial> (0 is
the wrist's) and observation/controller_info/movement_enabled: steps where it is false are skipped,
with their frames. Videos have one frame per step. The instructions of all episodes are in one
annotation file, under the id in the name of ``metadata_<id>.json``. Names are as in the format
droid.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from wamjax.data.ingest import hdf5
from wamjax.data.ingest.formats.droid import ACTION, NAMES, STATE
from wamjax.data.ingest.reader import About, Entry, SourceError, files_of, first_good, relative
from wamjax.data.ingest.video import Videos

HZ = 15.0
WRIST, OUTSIDE = "wrist_image_left", ("exterior_image_1_left", "exterior_image_2_left")
ANNOTATIONS = "aggregated-annotations*.json"
SERIALS = {"wrist_cam_serial": WRIST, "ext1_cam_serial": OUTSIDE[0], "ext2_cam_serial": OUTSIDE[1]}
RENAMED = {"joint_positions": "joint_position"}


def open(source: pathlib.Path, files: str = ".*success.*", annotations: str = "") -> DroidRaw:
    """Opens a folder of episodes.

    Args:
      files: a regular expression that the path of an episode below the source matches.
      annotations: JSON file {id: {"language_instruction1": ...}}; '' = the one in the source.
    """
    return DroidRaw(source, files, annotations)


class DroidRaw:
    """See `wamjax.data.ingest.reader.Reader`."""

    def __init__(self, source: pathlib.Path, files: str, annotations: str):
        self._files, self._videos = hdf5.Files(), Videos(0.5 / HZ)
        tables = [pathlib.Path(annotations)] if annotations else sorted(source.glob(ANNOTATIONS))
        self._words = json.loads(tables[0].read_text()) if tables else {}
        paths = files_of(source, "trajectory.h5")
        self._paths = [p for p in paths if re.match(files, relative(p, source))]
        if not self._paths:
            raise ValueError(f"none of {len(paths)} episodes in {source} matches "
                             f"--option=files={files}")  # fmt: skip
        self._moving: dict[int, np.ndarray] = {}
        self._entries = [self._entry(i, source) for i in range(len(self._paths))]
        self.about = self._describe(source)

    @property
    def late(self) -> float:
        """See `Reader`."""
        return self._videos.off

    def episodes(self) -> Sequence[Entry]:
        """See `Reader.episodes`."""
        return self._entries

    def arrays(self, i: int) -> Mapping[str, np.ndarray]:
        """See `Reader.arrays`."""
        with self._files.open(self._paths[i]) as file:
            return {key: x[:].reshape(len(x), -1)[self._moving[i]]
                    for key, x in _arrays(file).items()}  # fmt: skip

    def frames(self, i: int, camera: str, steps: Sequence[int]) -> Iterator[np.ndarray]:
        """See `Reader.frames`."""
        with self._files.open(self._paths[i]) as file:
            path = self._video(i, file, camera)
        times = self._moving[i][np.asarray(steps)] / self._videos.shape(path)[2]
        yield from self._videos.frames(path, times.tolist())

    def _entry(self, i: int, source: pathlib.Path) -> Entry:
        path = self._paths[i]
        name = relative(path.parent, source)
        try:
            with self._files.open(path) as file:
                count = len(file["action/gripper_position"])
                flags = file.get("observation/controller_info/movement_enabled")
                on = np.ones(count, bool) if flags is None else flags[:].astype(bool).ravel()
                self._moving[i] = np.flatnonzero(on)
                if not on.any():
                    raise SourceError("the movement is not enabled at any step")
            metadata, number = self._metadata(path)
            claims = self._words.get(number, {})
            words = [claims[k] for k in sorted(claims) if k.startswith("language_instruction")]
            return Entry(
                name=name,
                file=str(path),
                length=int(on.sum()),
                instruction=next((w.strip() for w in words if w and w.strip()),
                                 metadata.get("current_task", "") if not words else ""),
                success="success" in name or bool(metadata.get("success", False)),
            )  # fmt: skip
        except SourceError as error:
            return Entry(name=name, file=str(path), error=str(error))

    def _metadata(self, path: pathlib.Path) -> tuple[dict[str, Any], str]:
        """Returns (metadata, id) of an episode."""
        file = next(iter(sorted(path.parent.glob("metadata_*.json"))), None)
        if file is None:
            return {}, ""
        try:
            return json.loads(file.read_text()), file.stem.removeprefix("metadata_")
        except ValueError as error:
            raise SourceError(f"{file} is not JSON: {error}") from error

    def _video(self, i: int, file: h5py.File, camera: str) -> pathlib.Path:
        serial = self._serials(i, file).get(camera)
        path = self._paths[i].parent / "recordings" / "MP4" / f"{serial}.mp4"
        if serial is None or not path.exists():
            raise SourceError(f"there is no video of {camera}: {path}")
        return path

    def _serials(self, i: int, file: h5py.File) -> dict[str, str]:
        """Returns camera -> serial number, from the metadata or else the types in the file."""
        metadata, _ = self._metadata(self._paths[i])
        serials = {camera: str(metadata[k]) for k, camera in SERIALS.items() if metadata.get(k)}
        if serials:
            return serials
        kinds = {s: int(x[0]) for s, x in file.get("observation/camera_type", {}).items()}
        outside = sorted(serial for serial, kind in kinds.items() if kind != 0)
        out = dict(zip(OUTSIDE, outside, strict=False))
        wrist = sorted(set(kinds) - set(outside))
        return {WRIST: wrist[0]} | out if wrist else out

    def _describe(self, source: pathlib.Path) -> About:
        good = first_good(self._entries, source)
        with self._files.open(self._paths[good]) as file:
            arrays = {key: int(np.prod(x.shape[1:])) for key, x in _arrays(file).items()}
            videos = {c: self._video(good, file, c) for c in self._serials(good, file)}
        return About(
            hz=HZ,
            cameras={camera: self._videos.shape(path)[:2] for camera, path in videos.items()},
            arrays=arrays,
            state=STATE,
            action=ACTION,
            names=NAMES,
            kind="velocity",
            robot="droid",
            notes=("steps in which the movement was not enabled are left out",),
        )


def _arrays(file: h5py.File) -> dict[str, h5py.Dataset]:
    """Returns the numeric arrays by their names in the format droid."""
    out = {}
    for path, prefix in {"observation/robot_state": "", "action": "action_dict/"}.items():
        for key, x in file[path].items():
            if isinstance(x, h5py.Dataset) and x.dtype.kind in "fiub" and x.ndim in (1, 2):
                out[prefix + RENAMED.get(key, key)] = x
    return out
