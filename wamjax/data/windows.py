"""Windows of episodes: every step of every episode is the start of one.

A window is f frames at offsets 0, stride, 2 stride, ... and the j actions from its start on. What
lies past the end of the episode is masked padding: the last frame repeated, actions of zero. A
window never reaches into the next episode.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from wamjax.data.records import Reader, RecordError
from wamjax.data.spec import DataSpec


class Windows:
    """Random access to the windows of a data set; planned from the index alone.

    An element is a dict of images {camera: uint8 (f, h, w, 3)}, proprio f32 (p,), actions f32
    (j, a), instruction str, frame_valid bool (f,), action_valid bool (j,), episode int32; units are
    those of the robot.

    Args:
      reader: the episodes.
      spec: the shape of a window.
      action_free: never looks at the actions; action_valid is False throughout.
      offset: added to the number of the episode, to tell sources apart.
    """

    def __init__(self, reader: Reader, spec: DataSpec, action_free: bool = False, offset: int = 0):
        self.reader, self.spec = reader, spec
        self.action_free, self.offset = action_free, offset
        self._ends = np.cumsum(reader.lengths)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        return f"Windows({self.reader!r}, {self.spec!r}, action_free={self.action_free})"

    def locate(self, i: int) -> tuple[int, int]:
        """(episode, step) that window `i` starts at."""
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        episode = int(np.searchsorted(self._ends, i, side="right"))
        return episode, int(i - self._ends[episode] + self.reader.lengths[episode])

    def __getitem__(self, i: int) -> dict[str, Any]:
        number, start = self.locate(int(i))
        spec, episode = self.spec, self.reader[number]
        at = start + spec.frame_stride * np.arange(spec.frames)
        shown = np.minimum(at, episode.length)
        try:
            images = {camera: episode.frames(camera, shown) for camera in spec.cameras}
        except ValueError as error:
            raise RecordError(
                f"{self.reader.path}, episode {number}: {error}. Correct config.data.cameras, or "
                "collect the data set again"
            ) from error
        actions = np.zeros((spec.chunk, spec.action_dim), np.float32)
        valid = np.zeros(spec.chunk, bool)
        if not self.action_free:
            known = episode.actions[start : start + spec.chunk]
            actions[: len(known)] = known
            valid[: len(known)] = True
        return {
            "images": images,
            "proprio": episode.proprio[start].astype(np.float32),
            "actions": actions,
            "instruction": episode.instruction,
            "frame_valid": at <= episode.length,
            "action_valid": valid,
            "episode": np.int32(self.offset + number),
        }
