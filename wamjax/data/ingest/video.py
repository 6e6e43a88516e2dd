"""Reads frames of video files by time, decoding each frame after a keyframe once."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from wamjax.data.film import Film, Group, decode
from wamjax.data.ingest.reader import SourceError

Packets = tuple[tuple[int, bytes], ...]
TOLERANCE = 1e-4  # seconds between the requested time and the frame's, as in LeRobot
GAP = 1.0  # seconds without a requested frame after which seeking is faster than decoding on
OPEN = 8  # files kept open


class Videos:
    """Reads video files and keeps the last few open.

    Args:
      tolerance: maximum distance of a frame from the requested time, in seconds.

    Attributes:
      off: largest such distance so far, in seconds.
    """

    def __init__(self, tolerance: float = TOLERANCE):
        self._tolerance = tolerance
        self._converter = VideoReformatter()  # creating one costs more than a small frame
        self._open: collections.OrderedDict = collections.OrderedDict()
        self.off = 0.0

    def frames(self, path: pathlib.Path, times: Sequence[float]) -> Iterator[np.ndarray]:
        """Yields the frames nearest to some times, uint8 (h, w, 3) each.

        Args:
          times: ascending, in seconds from the start of the file.

        Raises:
          SourceError: the file cannot be decoded, or no frame is close enough; names it.
        """
        if not len(times):
            return
        try:
            container, stream = self._file(path)
            yield from self._decode(path, container, stream, times)
        except (av.FFmpegError, OSError, IndexError) as error:
            self._open.pop(path, None)
            raise SourceError(f"{path} cannot be decoded: {error}") from error

    def film(self, path: pathlib.Path, times: Sequence[float]) -> Film:
        """Returns the packets of the frames nearest to some times, in groups that decode alone.

        Each group is decoded and compared with the frames of the file. A group that needs packets
        before its keyframe (an open group) also gets the one or two groups before it.

        Args:
          times: ascending, in seconds from the start of the file; duplicates are allowed.

        Raises:
          SourceError: as for `frames`; or a group still does not decode to the same frames.
        """
        try:
            container, stream = self._file(path)
            runs = _runs(container, stream, times[0], times[-1])
            codec = stream.codec_context
            kind = codec.codec.name, bytes(codec.extradata or b"")
            shown = self._nearest(path, runs, float(stream.time_base), times)
        except (av.FFmpegError, OSError, IndexError) as error:
            self._open.pop(path, None)
            raise SourceError(f"{path} cannot be decoded: {error}") from error
        wanted = iter(self.frames(path, times))
        groups = []
        for number, mine in shown:
            want = [next(wanted) for _ in mine]
            for lead in range(min(number, 2) + 1):  # how many groups before it it needs
                packets = sum(runs[number - lead : number + 1], ())
                group = Group(*kind, packets, tuple(mine))
                if _decodes_to(group, want):
                    groups.append(group)
                    break
            else:
                raise SourceError(f"{path}: the frames at {mine} do not decode from their "
                                  "keyframe: give --pictures=jpeg")  # fmt: skip
        return Film(tuple(groups))

    def _nearest(
        self, path: pathlib.Path, runs: Sequence[Packets], unit: float, times: Sequence[float]
    ) -> list[tuple[int, list[int]]]:
        """Returns (number of the run, times of its requested frames) for each run that has any."""
        stamps = sorted((time, number) for number, run in enumerate(runs) for time, _ in run)
        seconds = np.array([time for time, _ in stamps]) * unit
        out: list[tuple[int, list[int]]] = []
        for want in times:
            best = int(np.argmin(np.abs(seconds - want)))
            off = abs(float(seconds[best]) - want)
            if off > self._tolerance:
                raise SourceError(f"{path}: the frame nearest to {want:.4f} s is {off:.4f} s off; "
                                  f"give --option=tolerance={_above(off)} to use it")  # fmt: skip
            time, number = stamps[best]
            if not out or out[-1][0] != number:
                out.append((number, []))
            out[-1][1].append(time)
        return out

    def shape(self, path: pathlib.Path) -> tuple[int, int, float]:
        """Returns (height, width, frames per second) of a file.

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
            stream.thread_type = "SLICE"  # processes run in parallel; frame threads add latency
            self._open[path] = container, stream
            while len(self._open) > OPEN:
                self._open.popitem(last=False)[1][0].close()
        self._open.move_to_end(path)
        return self._open[path]

    def _decode(self, path, container, stream, times: Sequence[float]) -> Iterator[np.ndarray]:
        """Yields the nearest frames by merging two ascending sequences: the requested times and the
        decoded frames."""
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
                                  f"give --option=tolerance={_above(off)} to use it")  # fmt: skip
            self.off = max(self.off, off)
            yield self._converter.reformat(best, format="rgb24").to_ndarray()


def _runs(container, stream, start: float, end: float) -> list[Packets]:
    """Returns (time, bytes) of the packets from the keyframe before `start` to beyond `end`,
    grouped by keyframe."""
    offset = int(Fraction(max(start, 0.0)) / stream.time_base)
    container.seek(offset, stream=stream, backward=True, any_frame=False)
    runs: list[list[tuple[int, bytes]]] = []
    for packet in container.demux(stream):
        if packet.pts is None:
            continue  # the end
        if packet.is_keyframe:
            if runs and packet.pts * stream.time_base > end + GAP:
                break
            runs.append([])
        if runs:
            runs[-1].append((packet.pts, bytes(packet)))
    return [tuple(run) for run in runs]


def _decodes_to(group: Group, want: Sequence[np.ndarray]) -> bool:
    try:
        got = decode([(group, group.shown)])
    except ValueError:
        return False
    return all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def _above(seconds: float) -> float:
    return float(f"{1.5 * seconds:.2g}")


def _decoder(container, stream, start: float) -> Iterator:
    """Yields frames in order of time, from the keyframe before `start`."""
    offset = int(Fraction(max(start, 0.0)) / stream.time_base)
    container.seek(offset, stream=stream, backward=True, any_frame=False)
    for packet in container.demux(stream):
        yield from packet.decode()
