"""DROID as RLDS: three cameras, joints and gripper, 15 Hz; successes only, as openpi reads it.

State: seven joints and the gripper. Actions: joint velocities and the position of the gripper
(1 = closed), as in openpi. Of up to three instructions, takes the first that is not blank.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping

from wamjax.data.ingest.formats.rlds import Part, Rlds
from wamjax.data.ingest.reader import About, Entry

JOINTS = tuple(f"joint_{i}" for i in range(7))
STATE = ("joint_position", "gripper_position")
ACTION = ("action_dict/joint_velocity", "action_dict/gripper_position")
NAMES = {
    "joint_position": JOINTS,
    "gripper_position": ("gripper_closed",),
    "action_dict/joint_velocity": tuple(f"{joint}_velocity" for joint in JOINTS),
    "action_dict/gripper_position": ("gripper",),
}


def open(
    source: pathlib.Path,
    split: str = "train",
    language: str = "",
    files: str = ".*success.*",
    ranges: str = "",
) -> Droid:
    """Opens a data set.

    Args:
      split, language: as for the format rlds.
      files: a regular expression that episode_metadata/file_path matches.
      ranges: JSON file {"<recording_folderpath>--<file_path>": [[start, end], ...]} of the steps in
        which something moves. Each range becomes an episode; episodes without one are skipped.
    """
    return Droid(source, split, language, files, ranges)


class Droid(Rlds):
    """See `wamjax.data.ingest.reader.Reader`."""

    def __init__(
        self, source: pathlib.Path, split: str, language: str, files: str, ranges: str
    ):
        super().__init__(source, split, language)
        spans = json.loads(pathlib.Path(ranges).read_text()) if ranges else None
        parts, bad = [], {}
        for i, part in enumerate(self._parts):
            if i in self._bad:
                bad[len(parts)] = self._bad[i]
                parts.append(part)
                continue
            parts += self._select(i, part, files, spans)
        self._left_out = len(self._parts) - len({p[:2] for p in parts})
        self._parts, self._bad, self._last = parts, bad, (-1, {})
        if not parts:
            raise ValueError(f"no episode of {source} matches --option=files={files}"
                             + " and is in --option=ranges" * bool(ranges))  # fmt: skip
        self.about = self.describe()

    def describe(self) -> About:
        """See `Reader.about`."""
        about = super().describe()
        out = getattr(self, "_left_out", 0)
        return dataclasses.replace(
            about,
            hz=15.0,
            state=STATE,
            action=ACTION,
            names=NAMES,
            kind="velocity",
            robot="droid",
            notes=(f"{out} records are left out: their file_path says no success, or nothing "
                   "moves",) * bool(out),
        )  # fmt: skip

    def entry(self, i: int, values: Mapping[str, memoryview], entry: Entry) -> Entry:
        """Returns the entry as `Rlds` does, but with the success that the file name states."""
        entry = super().entry(i, values, entry)
        path = self.text(values, "file_path")
        success = "/success/" in path or ("/failure/" not in path and "success" in path)
        return dataclasses.replace(entry, success=success)

    def _select(self, i: int, part: Part, files: str, ranges) -> list[Part]:
        with self._where(i):
            values = self._features(i)
            path = self.text(values, "file_path")
            if not re.match(files, path):
                return []
            if ranges is None:
                return [part]
            key = f"{self.text(values, 'recording_folderpath')}--{path}"
            return [part._replace(start=a, end=b) for a, b in ranges.get(key, ()) if b > a]
