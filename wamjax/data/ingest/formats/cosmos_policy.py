"""HDF5 of Cosmos Policy rollouts: ``episode_data--suite=...--success=....hdf5``, one file each.

Pictures are raw or JPEG, upright; for ALOHA they are MP4 files next to the HDF5 file, one frame per
step, at the paths in observations/video_paths. Failures are included; a score is the final reward.
Episodes with fewer than five steps are bad, as published. (Its demonstrations, data/demo_i
with successes only, on which it trains first, have the format libero.)
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import h5py
import numpy as np

from wamjax.data.ingest import hdf5
from wamjax.data.ingest.formats.aloha import HZ, JOINTS
from wamjax.data.ingest.reader import About, Entry, SourceError, files_of, first_good, relative
from wamjax.data.ingest.video import Videos

SHORTEST = 5
_CAMERA = re.compile(r"(\w+)_images(_jpeg)?")
NAMES = {
    "proprio": ("finger_left", "finger_right", "x", "y", "z", "qx", "qy", "qz", "qw"),
    "actions": ("dx", "dy", "dz", "drx", "dry", "drz", "gripper"),
} | dict.fromkeys(("qpos", "qvel", "effort", "action", "relative_action"), JOINTS)


def open(source: pathlib.Path) -> RollOuts:
    """Opens a file, or a folder of files."""
    return RollOuts(source)


class RollOuts:
    """See `wamjax.data.ingest.reader.Reader`."""

    def __init__(self, source: pathlib.Path):
        self._files, self._videos = hdf5.Files(), Videos(0.5 / HZ)
        self._paths = files_of(source, "*.hdf5")
        self._entries = [self._entry(path, relative(path, source)) for path in self._paths]
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
        count = self._entries[i].length
        with self._files.open(self._paths[i]) as file:
            out = hdf5.vectors(file, count) | hdf5.vectors(file.get("observations", {}), count)
            if "success_score" in file.attrs:
                out["reward"] = np.zeros(count)
                out["reward"][-1] = file.attrs["success_score"]
            return out

    def frames(
        self, i: int, camera: str, steps: Sequence[int]
    ) -> Iterator[bytes | np.ndarray]:
        """See `Reader.frames`."""
        with self._files.open(self._paths[i]) as file:
            if key := _cameras(file).get(camera):
                yield from hdf5.pictures(file[key], steps)
                return
            path = self._video(i, file, camera)
        rate = self._videos.shape(path)[2]
        yield from self._videos.frames(path, (np.asarray(steps) / rate).tolist())

    def _video(self, i: int, file: h5py.File, camera: str) -> pathlib.Path:
        """Returns the video beside the file, since the stored path may be of another machine."""
        claims = file["observations/video_paths"][camera][()]
        claims = claims.decode() if isinstance(claims, bytes) else str(claims)
        folder = self._paths[i].parent
        return folder / claims if (folder / claims).exists() else folder / pathlib.Path(claims).name

    def _entry(self, path: pathlib.Path, name: str) -> Entry:
        try:
            with self._files.open(path) as file:
                count = len(file["actions"] if "actions" in file else file["action"])
                if count < SHORTEST:
                    raise SourceError(
                        f"it has {count} steps, fewer than the {SHORTEST} that are needed"
                    )
                claims = dict(part.partition("=")[::2] for part in path.stem.split("--"))
                success = file.attrs.get("success", file.attrs.get("success_score"))
                if success is None and "success" in claims:
                    success = claims["success"] == "True"
                return Entry(
                    name=name,
                    file=str(path),
                    length=count,
                    instruction=hdf5.text_of(file.attrs, "task_description"),
                    task=claims.get("task", ""),
                    success=None if success is None else bool(float(success) > 0.5),
                )
        except SourceError as error:
            return Entry(name=name, file=str(path), error=str(error))

    def _describe(self, source: pathlib.Path) -> About:
        good = first_good(self._entries, source)
        count = self._entries[good].length
        with self._files.open(self._paths[good]) as file:
            observations = file.get("observations", {})
            arrays = hdf5.widths(file, count) | hdf5.widths(observations, count)
            arrays = {k: n for k, n in arrays.items() if not _CAMERA.fullmatch(k)}
            cameras = {name: hdf5.size(file[key]) for name, key in _cameras(file).items()}
            arm, hz = "actions" in arrays, HZ
            for camera in observations.get("video_paths", {}):
                height, width, hz = self._videos.shape(self._video(good, file, camera))
                cameras[camera] = height, width
            return About(
                hz=20.0 if arm else hz,
                cameras=cameras,
                arrays=arrays,
                state=_proprio(arrays) if arm else ("qpos",),
                action=("actions",) if arm else ("action",),
                names={k: names for k, names in NAMES.items() if arrays.get(k) == len(names)},
                robot="" if arm else "aloha",
            )


def _proprio(arrays: Mapping[str, int]) -> tuple[str, ...]:
    if arrays.get("proprio") == 9:
        return "proprio[0:5]", "proprio[5:9]:quat_xyzw"
    return ("proprio",)


def _cameras(file: h5py.File) -> dict[str, str]:
    """Returns camera -> dataset."""
    return {m[1]: key for key in file if (m := _CAMERA.fullmatch(key))}
