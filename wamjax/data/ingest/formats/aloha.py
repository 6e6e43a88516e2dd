"""HDF5 of ALOHA and ACT: ``episode_<i>.hdf5`` with observations/qpos, images and action, 50 Hz.

Pictures are raw, or JPEG in zero-padded rows. Actions are absolute positions of 14 joints. The
files name no task: give the instruction with ``--instruction``, or in an attribute
``task_description`` or ``language``. For real episodes (``sim`` is false) ACT trains with the
action one step earlier: ``--pairing=late``.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence

import h5py
import numpy as np

from wamjax.data.ingest import hdf5
from wamjax.data.ingest.reader import About, Entry, SourceError, files_of, first_good, relative

_ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
JOINTS = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in _ARM)
HZ = 50.0


def open(source: pathlib.Path, bgr: bool = False) -> Aloha:
    """Opens a file, or a folder of files.

    Args:
      bgr: whether the red and blue channels of encoded pictures are swapped in the files.
    """
    return Aloha(source, bgr)


class Aloha:
    """See `wamjax.data.ingest.reader.Reader`."""

    late = 0.0

    def __init__(self, source: pathlib.Path, bgr: bool):
        self._bgr, self._files = bgr, hdf5.Files()
        self._paths = files_of(source, "*.hdf5", "*.h5")
        self._paths.sort(key=lambda path: (path.parent, hdf5.number(path.stem), path.name))
        self._entries = [self._entry(path, relative(path, source)) for path in self._paths]
        self.about = self._describe(source)

    def episodes(self) -> Sequence[Entry]:
        """See `Reader.episodes`."""
        return self._entries

    def arrays(self, i: int) -> Mapping[str, np.ndarray]:
        """See `Reader.arrays`."""
        count = self._entries[i].length
        with self._files.open(self._paths[i]) as file:
            return hdf5.vectors(file, count) | hdf5.vectors(file["observations"], count)

    def frames(
        self, i: int, camera: str, steps: Sequence[int]
    ) -> Iterator[bytes | np.ndarray]:
        """See `Reader.frames`."""
        with self._files.open(self._paths[i]) as file:
            yield from hdf5.pictures(file["observations/images"][camera], steps, bgr=self._bgr)

    def _entry(self, path: pathlib.Path, name: str) -> Entry:
        try:
            with self._files.open(path) as file:
                count, states = len(file["action"]), len(file["observations/qpos"])
                if count != states or not count:
                    raise SourceError(
                        f"it has {count} actions and {states} states, which must be equal and not 0"
                    )
                claims = [hdf5.text_of(file.attrs, k) for k in ("task_description", "language")]
                return Entry(name=name, file=str(path), length=count,
                             instruction=next(filter(None, claims), ""), task=path.parent.name,
                             success=_success(file))  # fmt: skip
        except SourceError as error:
            return Entry(name=name, file=str(path), error=str(error))

    def _describe(self, source: pathlib.Path) -> About:
        good = first_good(self._entries, source)
        count = self._entries[good].length
        with self._files.open(self._paths[good]) as file:
            real = "sim" in file.attrs and not file.attrs["sim"]
            pictures = file.get("observations/images", {})
            arrays = hdf5.widths(file, count) | hdf5.widths(file["observations"], count)
            note = "a real robot: ACT trains with --pairing=late" if real else ""
            return About(
                hz=HZ,
                cameras={name: hdf5.size(x) for name, x in pictures.items()},
                arrays=arrays,
                state=("qpos",),
                action=("action",),
                names={key: JOINTS for key, n in arrays.items() if n == len(JOINTS)},
                robot="aloha",
                notes=(note,) if note else (),
            )


def _success(file: h5py.File) -> bool | None:
    """Returns the success of a rollout by its attribute, if it has one."""
    for name in ("success", "success_score"):
        if name in file.attrs:
            return bool(float(file.attrs[name]) > 0.5)
    return None
