"""Cuts episodes into windows: every step of every episode starts one.

If pictures were encoded ahead of time, the window starts are those whose latents are stored.

A window is f frames at offsets 0, stride, 2 stride, ... and the j actions from its start on. Past
the end of the episode is masked padding: the last frame repeated, and actions as `padding` says. A
window never reaches into the next episode.

An episode of T actions has T + 1 observations, and success shows in the last one. If a source has
only T, either the last action is dropped, or the last observation is stored twice and the data set
records it (`Info.final_observation`); in both cases the frames and the steps to go are those that
public readers of T observations label them with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wamjax.data.latents import Latents, frames_of, starts
from wamjax.data.readers import Reader
from wamjax.data.records import Episode, RecordError
from wamjax.data.skips import TRIES, Skips, instead
from wamjax.data.spec import DataSpec

GRIPPER = "grip"  # held by default; may be missing


class Windows:
    """Gives the windows of a data set by random access, planned from the index alone.

    An element is a dict of images {camera: uint8 (f, h, w, 3)} or latents bfloat16 (t, h, w, c),
    proprio f32 (p,), actions f32 (j, a), instruction str, frame_valid bool (f,), action_valid bool
    (j,), episode int32; units are those of the robot. It also has the outcome: future_proprio f32
    (p,), the state at the end of the chunk or of the episode; score f32 and to_go f32, see
    `outcome`, from that state on; rollout bool.

    Args:
      reader: reads the episodes.
      spec: the shape of a window.
      action_free: never read the actions; action_valid is False throughout.
      offset: added to the number of the episode, to tell sources apart.
      latents: latents to read instead of pictures.
      rollout: whether a policy made the episodes, so they are not imitated.
      successes: treat episodes without a recorded outcome as successful.
      ended: "success" or "failure": only windows of episodes with this outcome; "": all.
      hold: see `held`; () if all actions after the end are 0.
      bounds: of states and actions, see `wamjax.data.normalize.bounds`; an episode that leaves them
        is a bad record.
      skips: counts bad records that may be skipped; the window is then another one of the source,
        chosen by its number alone. None by default.
    """

    def __init__(
        self,
        reader: Reader,
        spec: DataSpec,
        action_free: bool = False,
        offset: int = 0,
        latents: Latents | None = None,
        rollout: bool = False,
        ended: str = "",
        hold: Sequence[str] = (),
        bounds: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
        skips: Skips | None = None,
        successes: bool = False,
    ):
        self._bounds, self._skips = bounds or {}, skips or Skips()
        self.reader, self.spec, self.latents = reader, spec, latents
        self.action_free, self.offset = action_free, offset
        self.rollout, self.ended, self.successes = rollout, ended, successes
        self._held = held(hold, reader.info.action_names, spec.action_dim)
        self._stride = latents.info.stride if latents else 1
        self._counts = np.array([len(starts(n, self._stride)) for n in reader.lengths], np.int64)
        self._counts[~chosen(reader, ended)] = 0
        self._ends = np.cumsum(self._counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        options = f", latents={self.latents!r}" if self.latents else ""
        options += ", rollout=True" * self.rollout + f", ended={self.ended!r}" * bool(self.ended)
        return f"Windows({self.reader!r}, {self.spec!r}, action_free={self.action_free}{options})"

    def locate(self, i: int) -> tuple[int, int]:
        """Returns the (episode, step) that window `i` starts at."""
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        episode = int(np.searchsorted(self._ends, i, side="right"))
        return episode, int(i - self._ends[episode] + self._counts[episode]) * self._stride

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = int(i)
        for tries in range(TRIES):
            number, start = self.locate(instead(i, tries, len(self)))
            try:
                return self._read(number, start)
            except RecordError as error:
                self._skips.add(self.reader.path, number, error)
        raise RecordError(f"{self.reader.path}: {TRIES} windows in a row could not be read")

    def _read(self, number: int, start: int) -> dict[str, Any]:
        """Returns the window of an episode that starts at a step."""
        spec, episode = self.spec, self._episode(number)
        actions = np.zeros((spec.chunk, spec.action_dim), np.float32)
        valid = np.zeros(spec.chunk, bool)
        if not self.action_free:
            known = episode.actions[start : start + spec.chunk]
            actions[: len(known)] = known
            valid[: len(known)] = True
            actions[len(known) :, self._held] = known[-1, self._held]
        end, final = min(start + spec.chunk, episode.length), self.reader.info.final_observation
        last = episode.length - (not final)
        returns, score, to_go = episode.returns, 0.0, 0
        if not self.reader.info.outcomes and self.successes:
            returns = np.ones(episode.length, np.float32)
        if len(returns):
            score, to_go = outcome(returns, end, final)
        return {
            **self._seen(number, start, episode),
            "proprio": episode.proprio[start].astype(np.float32),
            "actions": actions,
            "instruction": episode.instruction,
            "frame_valid": start + spec.frame_stride * np.arange(spec.frames) <= last,
            "action_valid": valid,
            "episode": np.int32(self.offset + number),
            "future_proprio": episode.proprio[end].astype(np.float32),
            "score": np.float32(score),
            "to_go": np.float32(to_go),
            "rollout": np.bool_(self.rollout),
        }

    def _episode(self, number: int) -> Episode:
        """Returns an episode whose numbers lie within the bounds."""
        episode = self.reader[number]
        for key, (low, high) in self._bounds.items():
            if key == "actions" and self.action_free:
                continue
            x = getattr(episode, key)
            far = (x < low) | (x > high)
            if far.any():
                step, dim = np.argwhere(far)[0]
                raise RecordError(
                    f"{self.reader.where(number)}: {key}[{dim}] is {x[step, dim]:g} at step "
                    f"{step}, far from all that the statistics hold. {self.reader.advice}"
                )
        return episode

    def _seen(self, number: int, start: int, episode: Episode) -> dict[str, Any]:
        """Returns the latents of a window, or its pictures."""
        if self.latents:
            return {"latents": self.latents.read(number, start)}
        reader, sizes = self.reader, self.reader.info.cameras
        shown = frames_of(start, episode.length, self.spec.frames, self.spec.frame_stride)
        try:
            return {"images": {c: episode.frames(c, shown, sizes.get(c))
                               for c in self.spec.cameras}}  # fmt: skip
        except RecordError:
            raise
        except ValueError as error:
            where, advice = reader.where(number), reader.advice
            if set(self.spec.cameras) - set(episode.images):
                where, advice = f"{reader.path}, episode {number}", "Correct config.data.cameras"
            raise RecordError(f"{where}: {error}. {advice}") from error


def padding(text: str) -> tuple[str, ...] | None:
    """Parses ``config.data.padding``, which sets the actions after the end of an episode.

    Returns:
      The words for `held`, with all other actions 0 in robot units; or None for "normalized": all
      actions are 0 in normalized units, as in runs older than this setting.

    Raises:
      ValueError: the text is neither.
    """
    kind, _, words = text.partition(":")
    if text == "normalized":
        return None
    if kind != "hold":
        raise ValueError(
            f"config.data.padding = {text!r} is neither 'normalized' nor 'hold:' and the names or "
            "numbers of the actions that keep their last command"
        )
    return tuple(word for word in words.split(",") if word)


def held(words: Sequence[str], names: Sequence[str], dim: int) -> np.ndarray:
    """Returns which dimensions of the actions keep their last command after the end: bool (dim,).

    As published for Fast-WAM, motions are 0 there in robot units, and a gripper keeps its command.

    Args:
      words: numbers of the dimensions, or regexes that are searched in `names`.
      names: names of the dimensions if known; without names no gripper is found.

    Raises:
      ValueError: a word matches no dimension; a missing gripper is not an error.
    """
    out = np.zeros(dim, bool)
    for word in words:
        if word.isdigit():
            matches = [int(word)] if int(word) < dim else []
        else:
            matches = [i for i, name in enumerate(names[:dim]) if re.search(word, name)]
            matches = list(range(dim)) if word == ".*" else matches
        if not matches and word != GRIPPER:
            raise ValueError(
                f"config.data.padding: {word!r} matches none of the {dim} actions, which are "
                f"{list(names) or 'not named: give their numbers'}"
            )
        out[matches] = True
    return out


def outcome(returns: np.ndarray, at: int, final: bool = True) -> tuple[float, int]:
    """Returns the task's future reward at observation `at` and the steps until it.

    Args:
      returns: f32 (T,), discounted sums of one reward, given for the action that ends the task; the
        reward may be partial, and 0 for failure. The discount does not matter; it may also be 1, as
        long as returns are 0 once the reward has been given.
      at: an observation, 0 to T.
      final: whether there is an observation after the last action; if not, observation T repeats T
        - 1, and success counts as observed where its action was chosen.

    Returns:
      (the reward; control steps from `at` until it is given, 0 from then on).
    """
    reward = np.max(returns)
    rewarded = int(
        np.flatnonzero(returns == reward)[-1]
    )  # undiscounted, all returns before equal it
    return float(reward), max(rewarded + final - at, 0)


def chosen(reader: Reader, ended: str) -> np.ndarray:
    """Returns which episodes have the outcome `ended`, see `Windows`: bool (episodes,).

    Raises:
      ValueError: `ended` is not an outcome, or no episode has it.
    """
    if ended not in ("", "success", "failure"):
        raise ValueError(f"ended {ended!r} is not 'success', 'failure' or ''")
    if not ended:
        return np.ones(len(reader), bool)
    success = np.array(reader.index["success"][: len(reader)], bool)
    out = success if ended == "success" else ~success
    if not out.any():
        raise ValueError(f"{reader.path}: no episode ended in {ended}; leave out the source")
    return out
