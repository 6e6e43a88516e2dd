"""Frames of video files by time: from one keyframe on, every frame is decoded once."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from wamjax.data.ingest.reader import SourceError

TOLERANCE = 1e-4  # seconds between the time asked for and a frame's, as LeRobot checks it
GAP = 1.0  # seconds without a wanted frame that are worth a new seek
OPEN = 8  # files


class Videos:
    """Video files, the last few of them kept open.

    Args:
      tolerance: a frame farther from the time asked for is an error, in seconds.

    Attributes:
      off: largest distance of a frame from its time so far.
    """

    def __init__(self, tolerance: float = TOLERANCE):
        self._tolerance = tolerance
        self._converter = VideoReformatter()  # kept: making one costs more than a small frame
        self._open: collections.OrderedDict = collections.OrderedDict()
        self.off = 0.0

    def frames(self, path: pathlib.Path, times: Sequence[float]) -> Iterator[np.ndarray]:
        """The frames nearest to some times: uint8 (h, w, 3) each.

        Args:
          times: ascending, in seconds from the start of the file.

        Raises:
          SourceError: the file cannot be decoded, or has no frame near enough; names it.
        """
        if not len(times):
            return
        try:
            container, stream = self._file(path)
            yield from self._decode(path, container, stream, times)
        except (av.FFmpegError, OSError, IndexError) as error:
            self._open.pop(path, None)
            raise SourceError(f"{path} cannot be decoded: {error}") from error

    def shape(self, path: pathlib.Path) -> tuple[int, int, float]:
        """(height, width, frames per second).

        Raises:
          SourceError: the file cannot be opened; names it.
        """
        try:
            _, stream = self._file(path)
        except (av.FFmpegError, OSError, IndexError) as error:
            raise SourceError(f"{path} cannot be decoded: {error}") from error
        return stream.height, stream.width, float(stream.average_rate or 0)

    def _file(self, path: pathlib.Path):
        if path not in self._open:
            container = av.open(str(path))
            stream = container.streams.video[0]
            stream.thread_type = "SLICE"  # processes do the rest; frame threads add latency
            self._open[path] = container, stream
            while len(self._open) > OPEN:
                self._open.popitem(last=False)[1][0].close()
        self._open.move_to_end(path)
        return self._open[path]

    def _decode(self, path, container, stream, times: Sequence[float]) -> Iterator[np.ndarray]:
        """Merges two ascending lists: the times wanted, and those of the decoded frames."""
        decoded, last, this = iter(()), None, None
        for want in times:
            if this is None or want - this.time > GAP:
                decoded = _decoder(container, stream, want)
                last, this = None, next(decoded, None)
            while this is not None and this.time < want:
                last, this = this, next(decoded, None)
            near = [x for x in (last, this) if x is not None]
            if not near:
                raise SourceError(f"{path}: it has no frame at {want:.4f} s")
            best = min(near, key=lambda frame: abs(frame.time - want))
            off = abs(best.time - want)
            if off > self._tolerance:
                raise SourceError(f"{path}: the frame nearest to {want:.4f} s is {off:.4f} s off; "
                                  f"--option=tolerance={_above(off)} takes it")  # fmt: skip
            self.off = max(self.off, off)
            yield self._converter.reformat(best, format="rgb24").to_ndarray()


def _above(seconds: float) -> float:
    return float(f"{1.5 * seconds:.2g}")


def _decoder(container, stream, start: float) -> Iterator:
    """Frames in the order of their times, from the keyframe before `start` on."""
    offset = int(Fraction(max(start, 0.0)) / stream.time_base)
    container.seek(offset, stream=stream, backward=True, any_frame=False)
    for packet in container.demux(stream):
        yield from packet.decode()
