"""One episode of a source becomes one of wamjax, as settings say."""

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
    """What is made of a source; everything is decided.

    Attributes:
      cameras: new name -> name in the source.
      sizes: new name -> (height, width).
      resize: whether pictures of other sizes become so; else they are an error.
      fit: "pad" or "stretch", see `images.resize`.
      pictures: "auto" leaves encoded ones as they are and stores others without loss; or "png" or
        "jpeg" for all; "video" keeps the packets of sources that are video.
      state, action: terms.
      hz, fps: rate of the source and of the data set.
      pairing, end: see `steps`.
      no_op: threshold of `steps.no_ops`; 0 = all actions stay.
      grippers: dimensions of the actions.
      old_gripper, new_gripper: conventions; equal = as they are.
      deltas, velocities: dimensions of the actions that add up, or average, at another rate.
      relative, absolute: see `frame`.
      instruction: for all episodes, {file} and {folder} in it are their names; '' = the source's.
      discount: of the returns.
      outcomes: whether the source says how episodes ended; else they count as successful
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
      (episode, what happened to it: {"steps", "no_ops", "off": seconds that observations are off
      the new rate's times, "largest": of the summed actions, "late": see `Reader`, "rate": that the
      time stamps say, 0 without, "gaps": steps that took half as long again}).

    Raises:
      SourceError: it cannot be read, or nothing of it is left; names the file.
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
            raise SourceError(f"{entry.file} ({entry.name}): {len(frames)} pictures of camera "
                              f"{camera!r}, {back.max() + 1} are wanted")  # fmt: skip
    shown = {camera: [frames[j] for j in back] for camera, frames in pictures.items()}
    return dataclasses.replace(numbered(state, track, i, entry, settings), images=shown), about


def numbered(
    state: np.ndarray, track: steps.Steps, i: int, entry: Entry, settings: Settings
) -> Episode:
    """Makes an episode of `numbers`, without pictures."""
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
    """All of an episode but its pictures: (states of the source, steps, what happened)."""
    arrays = reader.arrays(i)
    state = terms.assemble(settings.state, arrays)
    actions = terms.assemble(settings.action, arrays)
    if len(state) != len(actions) + reader.about.final:
        raise ValueError(f"{len(state)} states of {len(actions)} actions")
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
    """What an episode is told to do."""
    if not settings.instruction:
        return entry.instruction
    path = pathlib.Path(entry.file)
    names = {"{file}": path.stem.removesuffix("_demo"), "{folder}": path.parent.name}
    text = settings.instruction
    for hole, name in names.items():
        text = text.replace(hole, re.sub(r"[_\s]+", " ", name).strip())
    return text


def _times(stamps: np.ndarray | None) -> tuple[float, int]:
    """(steps per second, steps that took half as long again as usual) of time stamps in seconds."""
    if stamps is None or len(stamps) < 2:
        return 0.0, 0
    durations = np.diff(np.asarray(stamps, np.float64))
    usual = float(np.median(durations))
    return (1 / usual, int(np.sum(durations > 1.5 * usual))) if usual > 0 else (0.0, 0)


def _returns(track: steps.Steps, entry: Entry, settings: Settings) -> np.ndarray:
    """Of the rewards, or of one for success at the end; none where nothing says either."""
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
    """The packets of a camera, if their frames have the size that is wanted.

    Raises:
      ValueError: they have another one.
    """
    film = reader.film(i, old, observations)
    size, want = film.decoded([0])[0].shape[:2], tuple(settings.sizes[new])
    if size != want:
        raise ValueError(f"a picture of camera {new!r} is {size}, the source says {want}")
    return film


def _pictures(
    frames: Iterable[bytes | np.ndarray], camera: str, settings: Settings
) -> Iterable[bytes]:
    """Encoded pictures of the size that is asked for; those that need no change stay as they are.

    Raises:
      ValueError: damaged, or of another size.
    """
    size, kind = tuple(settings.sizes[camera]), settings.pictures
    for x in frames:
        is_file = isinstance(x, bytes)
        picture = images.decode(x) if is_file else np.asarray(x)  # damaged ones are found now
        same = picture.shape[:2] == size
        if not (same or settings.resize):
            raise ValueError(f"a picture of camera {camera!r} is {picture.shape[:2]}, others are "
                             f"{size}: give --resize")  # fmt: skip
        if is_file and same and kind == "auto":
            yield x
            continue
        if not same:
            picture = images.resize(picture, size, settings.fit)
        like = "jpeg" if is_file and x[:2] == b"\xff\xd8" else "png"
        yield images.encode(picture, like if kind == "auto" else kind)
