"""Converts one episode of a source to an episode of wamjax."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from wamjax.data import images
from wamjax.data.episodes import Episode
from wamjax.data.film import Film
from wamjax.data.ingest import frame, signals, steps, terms
from wamjax.data.ingest.reader import Entry, Reader, SourceError, VideoReader
from wamjax.data.ingest.terms import Term

PICTURES = ("auto", "png", "jpeg", "video")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Holds all choices of a conversion, with nothing left to detect.

    Attributes:
      cameras: new name -> name in the source.
      sizes: new name -> (height, width).
      resize: whether to resize pictures of other sizes; otherwise they are an error.
      fit: "pad" or "stretch", see `images.resize`.
      pictures: "auto" leaves encoded pictures as they are and stores others losslessly; "png" or
        "jpeg" encodes all; "video" keeps the packets of video.
      state, action: terms.
      hz, fps: rate of the source and of the data set.
      pairing, end: see `steps`.
      no_op: threshold of `steps.no_ops`; 0 = keep all actions.
      grippers: dimensions of the actions.
      old_gripper, new_gripper: conventions; if equal, commands do not change.
      deltas, velocities: dimensions of the actions to sum, or to average, at a lower rate.
      relative, absolute: see `frame`.
      instruction: the same for all episodes, with {file} and {folder} replaced by their names; '' =
        the source's.
      discount: discount of the returns.
      outcomes: whether the source records how episodes ended; otherwise they count as successful
        demonstrations and have no returns.
    """

    cameras: Mapping[str, str]
    sizes: Mapping[str, tuple[int, int]]
    resize: bool
    fit: str
    pictures: str
    state: tuple[Term, ...]
    action: tuple[Term, ...]
    hz: float
    fps: float
    pairing: str
    end: str
    no_op: float
    grippers: tuple[int, ...]
    old_gripper: str
    new_gripper: str
    deltas: tuple[int, ...]
    velocities: tuple[int, ...]
    relative: tuple[frame.Move, ...]
    absolute: tuple[frame.Move, ...]
    instruction: str
    discount: float
    outcomes: bool


def convert(
    reader: Reader, i: int, entry: Entry, settings: Settings
) -> tuple[Episode, dict[str, Any]]:
    """Converts an episode.

    Returns:
      (episode, facts for the report): "steps" and "no_ops" are counts; "off" is the largest
      distance of an observation from its time at the new rate, in seconds; "largest" the largest
      summed action; "late" see `Reader`; "rate" the rate by the timestamps, 0 without; "gaps" the
      number of steps that took more than 1.5 times the median.

    Raises:
      SourceError: the episode cannot be read, or no step is left; names the file.
    """
    try:
        state, track, about = numbers(reader, i, settings)
        if settings.pictures == "video":
            shown = {new: _film(reader, i, old, track.observations.tolist(), new, settings)
                     for new, old in settings.cameras.items()}  # fmt: skip
            about["late"] = reader.late
            episode = numbered(state, track, i, entry, settings)
            return dataclasses.replace(episode, images=shown), about
        observations = np.unique(track.observations).tolist()
        pictures = {
            new: list(_pictures(reader.frames(i, old, observations), new, settings))
            for new, old in settings.cameras.items()
        }
    except SourceError:
        raise
    except (ValueError, KeyError, IndexError) as error:
        raise SourceError(f"{entry.file} ({entry.name}): {error}") from error
    about["late"] = reader.late
    _, back = np.unique(track.observations, return_inverse=True)
    for camera, frames in pictures.items():
        if len(frames) != back.max() + 1:
            raise SourceError(f"{entry.file} ({entry.name}): camera {camera!r} has "
                              f"{len(frames)} pictures, not {back.max() + 1}")  # fmt: skip
    shown = {camera: [frames[j] for j in back] for camera, frames in pictures.items()}
    return dataclasses.replace(numbered(state, track, i, entry, settings), images=shown), about


def numbered(
    state: np.ndarray, track: steps.Steps, i: int, entry: Entry, settings: Settings
) -> Episode:
    """Builds an episode without pictures from the results of `numbers`."""
    return Episode(
        images={},
        proprio=state[track.observations].astype(np.float32),
        actions=track.actions.astype(np.float32),
        instruction=instruction(entry, settings),
        success=entry.success is not False,
        returns=_returns(track, entry, settings),
        task=entry.task or entry.instruction,
        seed=i,
    )


def numbers(
    reader: Reader, i: int, settings: Settings
) -> tuple[np.ndarray, steps.Steps, dict[str, Any]]:
    """Converts all of an episode but its pictures: (states of the source, steps, facts)."""
    arrays = reader.arrays(i)
    state = terms.assemble(settings.state, arrays)
    actions = terms.assemble(settings.action, arrays)
    if len(state) != len(actions) + reader.about.final:
        raise ValueError(f"it has {len(state)} states and {len(actions)} actions, which must be "
                         f"{len(actions) + reader.about.final} and {len(actions)}")  # fmt: skip
    track = steps.pair(actions, arrays.get("reward"), settings.pairing, reader.about.final)
    about = {"steps": len(actions), "no_ops": 0, "off": 0.0, "largest": 0.0}
    about["rate"], about["gaps"] = _times(arrays.get("time"))
    if settings.no_op:
        mask = steps.no_ops(track.actions, settings.no_op, (*settings.grippers, -1)[0])
        track, about["no_ops"] = steps.keep(track, mask), int(np.sum(~mask))
    actions = frame.absolute(track.actions, state[track.observations], settings.absolute)
    track = dataclasses.replace(track, actions=actions)
    if settings.fps != settings.hz:
        deltas, velocities = list(settings.deltas), list(settings.velocities)
        track, about["off"] = steps.resample(track, settings.hz, settings.fps, deltas, velocities)
        about["largest"] = float(np.abs(track.actions[:, deltas]).max(initial=0.0))
    track = steps.finish(track, settings.end)
    actions = frame.relative(track.actions, state[track.observations], settings.relative).copy()
    if settings.old_gripper != settings.new_gripper:
        for dim in settings.grippers:
            actions[:, dim] = signals.switch(
                actions[:, dim], settings.old_gripper, settings.new_gripper
            )
    return state, dataclasses.replace(track, actions=actions), about


def instruction(entry: Entry, settings: Settings) -> str:
    """Returns the instruction of an episode."""
    if not settings.instruction:
        return entry.instruction
    path = pathlib.Path(entry.file)
    names = {"{file}": path.stem.removesuffix("_demo"), "{folder}": path.parent.name}
    text = settings.instruction
    for hole, name in names.items():
        text = text.replace(hole, re.sub(r"[_\s]+", " ", name).strip())
    return text


def _times(stamps: np.ndarray | None) -> tuple[float, int]:
    """Returns (steps per second, number of steps that took more than 1.5 times the median) from
    timestamps in seconds."""
    if stamps is None or len(stamps) < 2:
        return 0.0, 0
    durations = np.diff(np.asarray(stamps, np.float64))
    usual = float(np.median(durations))
    return (1 / usual, int(np.sum(durations > 1.5 * usual))) if usual > 0 else (0.0, 0)


def _returns(track: steps.Steps, entry: Entry, settings: Settings) -> np.ndarray:
    """Returns the returns: of the rewards, or of a final reward of 1 for success; empty if outcomes
    are unknown."""
    if not settings.outcomes:
        return np.zeros(0, np.float32)
    reward = track.reward
    if reward is None:
        reward = np.zeros(len(track.actions))
        reward[-1] = entry.success is not False
    return steps.returns_of(reward, settings.discount)


def _film(
    reader: VideoReader, i: int, old: str, observations: list[int], new: str, settings: Settings
) -> Film:
    """Returns the video packets of a camera.

    Raises:
      ValueError: the frames have another size than the source states.
    """
    film = reader.film(i, old, observations)
    size, want = film.decoded([0])[0].shape[:2], tuple(settings.sizes[new])
    if size != want:
        raise ValueError(
            f"a picture of camera {new!r} is {size}, the header of the source says {want}"
        )
    return film


def _pictures(
    frames: Iterable[bytes | np.ndarray], camera: str, settings: Settings
) -> Iterable[bytes]:
    """Yields encoded pictures of the requested size; those that need no change are not re-encoded.

    Raises:
      ValueError: a picture is damaged, or has another size and may not be resized.
    """
    size, kind = tuple(settings.sizes[camera]), settings.pictures
    for x in frames:
        is_file = isinstance(x, bytes)
        picture = images.decode(x) if is_file else np.asarray(x)  # detects damage
        same = picture.shape[:2] == size
        if not (same or settings.resize):
            raise ValueError(f"a picture of camera {camera!r} is {picture.shape[:2]}, others are "
                             f"{size}: give --resize=HEIGHT,WIDTH")  # fmt: skip
        if is_file and same and kind == "auto":
            yield x
            continue
        if not same:
            picture = images.resize(picture, size, settings.fit)
        like = "jpeg" if is_file and x[:2] == b"\xff\xd8" else "png"
        yield images.encode(picture, like if kind == "auto" else kind)
