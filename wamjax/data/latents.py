"""Reads latents that a frozen video codec computed ahead of time, as published models need.

A causal video codec encodes frame k of a window together with all earlier frames of the window, so
latents belong to a window and not to the episode: two overlapping windows share pictures but no
latents. So there is one record for each window start, at every step of an episode or at every
`stride`-th. Nothing is augmented, so the latents equal those that encoding online would give.

The output is a data set of its own, and training needs nothing else:

    spec.json index.json statistics.json     as in `wamjax.data.records`
    episodes-00000-of-0000N.arrayrecord      its episodes without pictures
    latents.json                             `LatentInfo`
    latents-00000-of-0000N.arrayrecord       bfloat16 (t, h, w, c) of each window, in order

`wamjax.data.precompute` writes these files.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
from jaxtyping import BFloat16

from wamjax import files
from wamjax.data.records import RecordError
from wamjax.data.shards import Shards

FORMAT_VERSION = 1
FILE = "latents.json"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class LatentInfo:
    """Holds the contents of ``latents.json``.

    Attributes:
      codec: name of the codec and its weights, e.g. "wan2.2".
      layout: arrangement of the cameras in the encoded picture, see `wamjax.data.layout`.
      cameras: name -> (height, width) of the cameras side by side in it.
      frames: raw frames in a window (f).
      frame_stride: control steps between them.
      stride: control steps between window starts.
      shape: (t, h, w, c) of the latents of a window.
    """

    codec: str
    layout: str
    cameras: Mapping[str, tuple[int, int]]
    frames: int
    frame_stride: int
    stride: int
    shape: tuple[int, int, int, int]

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values. The cameras are a list, because their order matters."""
        cameras = [[name, *size] for name, size in self.cameras.items()]
        return {"format": FORMAT_VERSION, **dataclasses.asdict(self), "cameras": cameras}

    @staticmethod
    def from_json(values: Mapping[str, Any], where: str) -> LatentInfo:
        """Reverses `to_json`; `where` names the file in errors."""
        values = dict(values)
        version = values.pop("format", None)
        fields = {field.name for field in dataclasses.fields(LatentInfo)}
        if version != FORMAT_VERSION or set(values) != fields:
            raise ValueError(
                f"{where} has format {version!r} and {sorted(values)}, this wamjax reads format "
                f"{FORMAT_VERSION} with {sorted(fields)}; write the latents again"
            )
        cameras = {name: (h, w) for name, h, w in values["cameras"]}
        return LatentInfo(**values | {"cameras": cameras, "shape": tuple(values["shape"])})


def starts(length: int, stride: int) -> range:
    """Returns the window starts of an episode of `length` actions."""
    return range(0, length, stride)


def frames_of(start: int, length: int, frames: int, frame_stride: int) -> np.ndarray:
    """Returns the indices of a window's raw frames; the last frame repeats past the end of the
    episode."""
    return np.minimum(start + frame_stride * np.arange(frames), length)


def pack(episode: int, start: int, latents: np.ndarray) -> bytes:
    """Packs a record."""
    data = np.ascontiguousarray(latents, BFLOAT16).tobytes()
    return msgpack.packb({"episode": episode, "start": start, "latents": data})


class Latents:
    """Reads the latents of a data set by random access; safe to read from several threads.

    Args:
      path: folder of the data set.
      lengths: number of actions of each episode, from its index.

    Raises:
      FileNotFoundError: the data set has no latents; says how to make them.
      ValueError: ``latents.json`` has another format.
    """

    def __init__(self, path: str | os.PathLike, lengths: Sequence[int]):
        self.path = files.path(path)
        file = self.path / FILE
        require(self.path)
        try:
            values = json.loads(file.read_text())
            windows = values.pop("windows")
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{file} cannot be read ({error!r}); write the latents again"
            ) from error
        self.info = LatentInfo.from_json(values, str(file))
        counts = [len(starts(n, self.info.stride)) for n in lengths]
        if sum(windows) != sum(counts):
            raise ValueError(
                f"{file} counts {sum(windows)} windows, the episodes have {sum(counts)}; copy the "
                "data set again"
            )
        self._first = np.cumsum([0, *counts])
        self._shards = Shards(self.path, windows, "latents")

    def __repr__(self) -> str:
        return f"Latents({str(self.path)!r}, {self.info})"

    def read(self, episode: int, start: int) -> BFloat16[np.ndarray, "t h w c"]:
        """Returns the latents of the window of an episode that starts at step `start`.

        Raises:
          RecordError: the latents cannot be read.
        """
        i = int(self._first[episode]) + start // self.info.stride
        try:
            record = msgpack.unpackb(self._shards.read(i))
            at = record["episode"], record["start"]
            if at != (episode, start):
                raise ValueError(f"it belongs to episode {at[0]}, step {at[1]}")
            out = np.frombuffer(record["latents"], BFLOAT16).reshape(self.info.shape)
            if (out.view(np.uint16) & 0x7F80 == 0x7F80).any():  # the exponent of inf and NaN
                raise ValueError("latents holds non-finite numbers")
            return out
        except (RuntimeError, ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
            file, position = self._shards.locate(i)
            raise RecordError(
                f"{file}: record {position} (episode {episode}, step {start}) cannot be read: "
                f"{error!r}. Copy the file again from where it came, or write the latents again"
            ) from error


def require(path: files.Path) -> None:
    """Raises FileNotFoundError unless `path` is a data set with latents; says how to make it."""
    if not (path / FILE).exists():
        raise FileNotFoundError(
            f"there are no latents in {path} (no {FILE}), and config.model.codec.kind is 'cached'; "
            f"write them from a data set with pictures by\n  {command(path)}\nor correct the "
            "source's path or config.data.root"
        )


def command(path: str | os.PathLike) -> str:
    """Returns the command that writes the data set in `path`."""
    return (
        f"python -m wamjax.data.precompute --config=FILE --data=DATASET --out={path} "
        "--layout=NAME:HEIGHTxWIDTH+... --encode=MODULE:FUNCTION --weights=PATH"
    )
