"""Keeps pictures as compressed video: packets from a keyframe on, decoded on demand.

A group is what a decoder needs for some neighbouring frames: a keyframe and the packets up to the
next one. Decoding a frame costs the frames before it in its group; a packet has the bytes that the
camera's encoder produced, a fraction of a JPEG's. Nothing is encoded again.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from wamjax.data import images

Wanted = tuple["Group", list[int]]  # a group, and times of frames in it
_here = threading.local()  # a decoder and a converter per thread; creating one is slow


@dataclasses.dataclass(frozen=True)
class Group:
    """Holds packets that are decoded together.

    Attributes:
      codec, extradata: of the decoder, in PyAV's format.
      packets: (presentation time, bytes) in decoding order, a keyframe first.
      shown: presentation time of each of its frames; times may repeat.
    """

    codec: str
    extradata: bytes
    packets: tuple[tuple[int, bytes], ...]
    shown: tuple[int, ...]

    @property
    def size(self) -> int:
        """Total bytes of the packets."""
        return sum(len(data) for _, data in self.packets)

    @staticmethod
    def of_record(values: Mapping[str, Any]) -> Group:
        """Restores a group from the output of `Film.to_record`.

        Raises:
          ValueError: the values are not a group.
        """
        try:
            packets = tuple((int(time), bytes(data)) for time, data in values["packets"])
            shown = tuple(map(int, values["shown"]))
            return Group(str(values["codec"]), bytes(values["extradata"]), packets, shown)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"it holds no video: {error!r}") from error


@dataclasses.dataclass(frozen=True)
class Film(Sequence):
    """Holds neighbouring frames of a camera; as a sequence it yields encoded pictures on access."""

    groups: tuple[Group, ...]

    def __len__(self) -> int:
        return sum(len(group.shown) for group in self.groups)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        return images.encode(self.decoded([range(len(self))[i]])[0])

    @property
    def starts(self) -> list[int]:
        """First frame of each group."""
        counts = [len(group.shown) for group in self.groups]
        return list(itertools.accumulate([0, *counts[:-1]]))

    def decoded(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Decodes some frames, in ascending order; see `decode`."""
        return decode(self.wanted(indices))

    def wanted(self, indices: Sequence[int]) -> list[Wanted]:
        """Returns the groups that hold some frames, ascending, with the frames' times in each."""
        starts = self.starts
        at = np.searchsorted(np.asarray(starts), np.asarray(indices), side="right") - 1
        out: list[Wanted] = []
        for i, number in zip(indices, at, strict=True):
            group = self.groups[number]
            if not out or out[-1][0] is not group:
                out.append((group, []))
            out[-1][1].append(group.shown[i - starts[number]])
        return out

    def parts(self, limit: int) -> list[Film]:
        """Splits into runs of groups of at most `limit` bytes each, but at least one group."""
        out: list[list[Group]] = []
        size = 0
        for group in self.groups:
            if not out or size + group.size > limit:
                out.append([])
                size = 0
            out[-1].append(group)
            size += group.size
        return [Film(tuple(groups)) for groups in out]

    def to_record(self) -> dict[str, Any]:
        """Returns plain values for msgpack."""
        return {"groups": [vars(group) for group in self.groups]}

    @staticmethod
    def of_record(values: Mapping[str, Any]) -> Film:
        """Reverses `to_record`.

        Raises:
          ValueError: the values are not a film.
        """
        try:
            return Film(tuple(Group.of_record(x) for x in values["groups"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"it holds no video: {error!r}") from error


def decode(wanted: Sequence[Wanted]) -> list[np.ndarray]:
    """Decodes frames of some groups of one file in one pass of the decoder: uint8 (h, w, 3) each.

    Args:
      wanted: groups and the times of their frames, ascending. Within a group, nothing after the
        packet of its last frame is decoded.

    Raises:
      ValueError: the packets cannot be decoded, or lack a frame.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("pictures stored as video need PyAV: pip install 'wamjax[ingest]' (or "
                          "pip install av)") from error  # fmt: skip
    pictures: dict[int, np.ndarray] = {}
    times = {time for _, some in wanted for time in some}
    for kind, groups in itertools.groupby(wanted, lambda x: (x[0].codec, x[0].extradata)):
        decoder, converter = _tools(av, *kind)
        try:
            for packet in (*_packets(groups), None):  # None flushes the decoder
                for frame in decoder.decode(_packet(av, packet)):
                    # Repeated times belong to a group that leads into another one.
                    if frame.pts in times and frame.pts not in pictures:
                        picture = converter.reformat(frame, format="rgb24").to_ndarray()
                        pictures[frame.pts] = picture
            decoder.flush_buffers()
        except (av.FFmpegError, OSError) as error:
            _here.decoders.clear()  # its state is unknown
            raise ValueError(f"its video cannot be decoded: {error}") from error
    if missing := sorted(times - pictures.keys()):
        raise ValueError(f"its video has no frame at {missing}")
    return [pictures[time] for _, some in wanted for time in some]


def _packets(wanted: Iterable[Wanted]) -> Iterator[tuple[int, bytes]]:
    """Yields the packets of each group up to that of its last frame."""
    for group, times in wanted:
        some = set(times)
        last = max((i for i, (time, _) in enumerate(group.packets) if time in some), default=-1)
        yield from group.packets[: last + 1]


def _packet(av, packet: tuple[int, bytes] | None):
    if packet is None:
        return None
    out = av.Packet(packet[1])
    out.pts = packet[0]
    return out


def _tools(av, codec: str, extradata: bytes):
    """Returns the decoder and the converter of this thread, cached for the last few kinds of
    video."""
    from av.video.reformatter import VideoReformatter

    cached = vars(_here).setdefault("decoders", {})
    key = codec, extradata
    if key not in cached:
        while len(cached) > 8:
            cached.pop(next(iter(cached)))
        decoder = av.CodecContext.create(codec, "r")
        decoder.extradata = extradata or None
        decoder.thread_type = "SLICE"  # as in `ingest.video`
        cached[key] = decoder, VideoReformatter()
    return cached[key]
