"""Packs an episode into a record and checks it on reading."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

from wamjax.data import images
from wamjax.data.film import Film
from wamjax.data.frames import Frames
from wamjax.data.shards import RecordError
from wamjax.data.spec import Info

ARRAYS = ("proprio", "actions", "returns")
STORED = np.dtype("<f4")
LARGEST = 1e6  # no robot's units give a larger number; float32 resolves it to 1/16


_OBSERVATIONS = (
    ": an observation after the last action, too. Where there is none, wamjax.data.write_episodes "
    "stores the last one twice and says so (Info.final_observation)"
)


@dataclasses.dataclass(frozen=True)
class Episode:
    """Holds one episode of T actions and T + 1 observations.

    Attributes:
      images: camera -> T + 1 encoded pictures; `film.Film` and `frames.Frames` provide them.
      proprio: f32 (T + 1, p), robot units.
      actions: f32 (T, a), robot units; (T, 0) if they are not recorded.
      instruction: text.
      success: whether the task was completed.
      returns: f32 (T,), discounted sum of future rewards; (0,) if neither rewards nor success were
        recorded.
      task: name of the task.
      seed: seed that generated the episode.
    """

    images: Mapping[str, Sequence[bytes]]
    proprio: np.ndarray
    actions: np.ndarray
    instruction: str
    success: bool
    returns: np.ndarray
    task: str = ""
    seed: int = 0

    @property
    def length(self) -> int:
        """Number of actions T."""
        return len(self.actions)

    def frames(
        self, camera: str, indices: Sequence[int], size: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Decodes some frames of a camera, each once: uint8 (len(indices), h, w, 3).

        Args:
          size: required (h, w), compared before decoding; None = any.

        Raises:
          ValueError: the camera does not exist, or a picture cannot be decoded or has another size.
        """
        if camera not in self.images:
            raise ValueError(f"there is no camera {camera!r}; the cameras are {list(self.images)}")
        unique, back = np.unique(indices, return_inverse=True)
        if isinstance(self.images[camera], Film) or (
            isinstance(self.images[camera], Frames) and self.images[camera].is_video
        ):
            return self._of_video(camera, unique, size)[back]
        pictures = []
        for i in unique:
            try:
                data = self.images[camera][i]
                if size is not None and (has := images.size(data)) != tuple(size):
                    raise ValueError(f"it is {has[0]} x {has[1]}, not {size[0]} x {size[1]}")
                pictures.append(images.decode(data))
            except RecordError:
                raise
            except (ValueError, IndexError) as error:
                raise ValueError(f"camera {camera!r}, frame {i}: {error}") from error
        if len({x.shape for x in pictures}) > 1:
            raise ValueError(f"camera {camera!r}: frames {unique.tolist()} differ in size")
        return np.stack(pictures)[back]


    def _of_video(
        self, camera: str, indices: np.ndarray, size: tuple[int, int] | None
    ) -> np.ndarray:
        if not 0 <= indices[0] <= indices[-1] < len(self.images[camera]):
            raise ValueError(f"camera {camera!r} has no frame {indices[-1]}, only "
                             f"{len(self.images[camera])} frames")  # fmt: skip
        try:
            out = np.stack(self.images[camera].decoded(indices.tolist()))
        except RecordError:
            raise
        except ValueError as error:
            raise ValueError(f"camera {camera!r}, frames {indices.tolist()}: {error}") from error
        if size is not None and out.shape[1:3] != tuple(size):
            raise ValueError(f"camera {camera!r}: it is {out.shape[1]} x {out.shape[2]}, not "
                             f"{size[0]} x {size[1]}")  # fmt: skip
        return out


def pack(episode: Episode, pictures: Mapping[str, Any] | None = None) -> bytes:
    """Packs an episode as a msgpack record.

    Args:
      pictures: location of the pictures if they have records of their own; see
        `wamjax.data.frames`.
    """
    record = {f.name: getattr(episode, f.name) for f in dataclasses.fields(episode)}
    record["images"] = pictures or {k: v.to_record() if isinstance(v, Film) else list(v)
                                    for k, v in episode.images.items()}  # fmt: skip
    for key in ARRAYS:
        x = np.ascontiguousarray(record[key], STORED)
        record[key] = {"dtype": x.dtype.str, "shape": x.shape, "data": x.tobytes()}
    return msgpack.packb(record)


def unpack(data: bytes) -> Episode:
    """Reverses `pack`; for pictures with records of their own it returns their location.

    Raises:
      ValueError: the bytes are not such a record.
    """
    try:
        record = msgpack.unpackb(data)
        for key in ARRAYS:
            stored = record[key]
            if stored["dtype"] != STORED.str:
                raise ValueError(f"{key} is {stored['dtype']!r}, records hold {STORED.str!r}")
            record[key] = np.frombuffer(stored["data"], STORED).reshape(stored["shape"])
        record["images"] = {k: Film.of_record(v) if isinstance(v, Mapping) and "groups" in v else v
                            for k, v in record["images"].items()}  # fmt: skip
        return Episode(**record)
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as error:
        raise ValueError(f"not an episode: {error!r}") from error


def check(episode: Episode, info: Info) -> None:
    """Compares an episode with its data set's `Info`; pictures are counted, not decoded.

    Raises:
      ValueError: names the key, its value and the expected one.
    """
    steps = len(episode.actions) if np.ndim(episode.actions) else 0
    if not steps:
        raise ValueError(f"it has no steps: actions is {np.shape(episode.actions)}")
    expected = {
        "actions": (steps, 0 if info.action_free else info.action_dim),
        "proprio": (steps + 1, info.proprio_dim),
        "returns": (steps if info.outcomes else 0,),
    }
    for key, shape in expected.items():
        value = np.asarray(getattr(episode, key))
        if value.shape != shape:
            hint = _OBSERVATIONS if key == "proprio" and len(value) == steps else ""
            raise ValueError(f"{key} is {value.shape}, the data set takes {shape}{hint}")
        if value.dtype.kind not in "fiub":
            raise ValueError(f"{key} is {value.dtype}, it must be numbers")
        _check_numbers(key, value)
    for key, kind in {"instruction": str, "task": str}.items():
        if not isinstance(getattr(episode, key), kind):
            raise ValueError(f"{key} is {getattr(episode, key)!r}, it must be text")
    if not isinstance(episode.images, Mapping) or set(episode.images) != set(info.cameras):
        raise ValueError(
            f"it has cameras {sorted(episode.images)}, the data set has {sorted(info.cameras)}"
        )
    for camera, pictures in episode.images.items():
        if len(pictures) != steps + 1:
            raise ValueError(
                f"{len(pictures)} pictures of camera {camera!r}, but {steps} actions need "
                f"{steps + 1}"
            )


def _check_numbers(key: str, value: np.ndarray) -> None:
    fine = np.abs(value) <= LARGEST  # false for NaN
    if not fine.all():
        at = np.argwhere(~fine)[0]
        step, dim = at[0], f"[{at[1]}]" if len(at) > 1 else ""
        number = value[tuple(at)]
        what = "non-finite numbers" if not np.isfinite(value).all() else "impossible numbers"
        raise ValueError(f"{key} holds {what}: {key}{dim} is {number:g} at step {step}, the "
                         f"largest allowed magnitude is {LARGEST:g}")  # fmt: skip
