"""Chunks of actions as one action a control step; Python 3.9 and NumPy are enough.

Time is counted in control steps, never in seconds: a chunk that was asked for at step s holds the
actions of steps s, s + 1, ..., and what is late is what was played meanwhile. So a simulation is
exact and a test needs no clock. Six rules that robots taught (threads of LeRobot and others):

1. Of a new chunk as many actions are dropped as were really played since its observation, never as
   many as some latency lets expect: before the first chunk nothing is played, nothing is dropped.
2. A delay is the difference of two indices of the queue.
3. The first answer compiled something: it is in no statistic, and the statistic forgets.
4. Where there is nothing more to play, the last command is held. Zero in normalised units is the
   mean of the data and would pull the arm there; motions stand still at 0 in robot units.
5. A chunk that is later than it was asked to expect is played all the same if there is no other.
6. Actions relative to the state of their observation are re-anchored to the new one.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

WINDOW = 20  # answers that a delay is estimated from


class Delays:
    """How many steps an answer takes: the most of the last ones, without the first (rule 3)."""

    def __init__(self, window: int = WINDOW, expected: int = 0):
        self._expected, self._first = expected, True
        self._steps: collections.deque = collections.deque(maxlen=window)

    def add(self, steps: int) -> None:
        """Notes an answer that came so many steps after its observation."""
        if self._first:
            self._first = False
            return
        self._steps.append(steps)

    @property
    def estimate(self) -> int:
        """Steps that the next answer is expected to take."""
        return max(self._steps, default=self._expected)


class Switch:
    """Plays the newest chunk from where it is now; what is left of the older ones is dropped.

    The naive way, and what the other ways of joining chunks have in common.

    Attributes:
      waits: whether the robot stands still until a chunk is there.
      prefix: whether a chunk is asked for with the actions that are committed.
      execute: actions after which there should be a new chunk; None: all of one.
    """

    waits, prefix = False, False

    def __init__(self, execute: int | None = None):
        if execute is not None and execute < 1:
            raise ValueError(f"execute = {execute} actions of a chunk: at least one")
        self.execute = execute

    def join(self, old: np.ndarray, chunks: Sequence[np.ndarray]) -> np.ndarray:
        """The actions (i, a) to play from now on.

        Args:
          old: (i, a) those that would be played else; there may be none.
          chunks: what each chunk that says something of now says from now on, the newest last.
        """
        return chunks[-1]

    def asks(self, left: int, played: int, delay: int, horizon: int) -> bool:
        """Whether it is time for the next chunk.

        Args:
          left: actions that are there.
          played: those since the observation of the newest chunk.
          delay: steps that an answer takes.
          horizon: actions of a chunk.
        """
        return left <= delay or played + delay >= min(self.execute or horizon, horizon)


class Synchronous(Switch):
    """Plays `execute` actions of a chunk, then stands still until the next one is there."""

    waits = True

    def join(self, old, chunks):
        """See `Switch.join`."""
        return chunks[-1][: self.execute]

    def asks(self, left, played, delay, horizon):
        """See `Switch.asks`."""
        return left == 0


class Blend(Switch):
    """Goes from the old chunk to the new one over `steps` actions, linearly."""

    def __init__(self, execute: int | None = None, steps: int = 4):
        super().__init__(execute)
        if steps < 1:
            raise ValueError(f"blend over {steps} steps: at least one")
        self.steps = steps

    def join(self, old, chunks):
        """See `Switch.join`."""
        out = np.array(chunks[-1])
        count = min(self.steps, len(old), len(out))
        weight = (np.arange(1, count + 1) / (count + 1))[:, None].astype(out.dtype)
        out[:count] = (1 - weight) * old[:count] + weight * out[:count]
        return out


class Ensemble(Switch):
    """Plays the mean of all chunks that say something of a step, as ALOHA's does.

    The i-th oldest of them weighs exp(-decay i): the oldest most. Published decay 0.01, and there
    a chunk is asked for at every step.
    """

    def __init__(self, execute: int | None = 1, decay: float = 0.01):
        super().__init__(execute)
        self.decay = decay

    def join(self, old, chunks):
        """See `Switch.join`."""
        out = np.array(chunks[-1])
        for step in range(len(out)):
            said = np.stack([chunk[step] for chunk in chunks if step < len(chunk)])
            weight = np.exp(-self.decay * np.arange(len(said)))
            out[step] = weight @ said / weight.sum()
        return out


class Prefix(Switch):
    """Asks with the actions that are committed, so that the new chunk begins with them.

    Of a policy that was trained so. A chunk that took longer than it had been told does not go on
    from what was played: it is played only if there is nothing else (rule 5). Where more actions
    are played meanwhile than the policy can be told, it is told the first of them, and behind
    those the new chunk is switched to.

    Attributes:
      longest: actions that the policy can be told; None: as many as a chunk has.
    """

    prefix = True

    def __init__(self, execute: int | None = None, longest: int | None = None):
        super().__init__(execute)
        if longest is not None and longest < 1:
            raise ValueError(f"longest = {longest} committed actions: at least one")
        self.longest = longest


JOININGS: dict[str, Callable[..., Switch]] = {
    "synchronous": Synchronous, "switch": Switch, "ensemble": Ensemble, "blend": Blend,
    "prefix": Prefix,
}  # fmt: skip


def joining(name: str, **options: Any) -> Switch:
    """A way to join chunks by its name, one of `JOININGS`.

    Raises:
      ValueError: there is no such one.
    """
    if name not in JOININGS:
        raise ValueError(f"chunks are joined by {', '.join(JOININGS)}, not by {name!r}")
    return JOININGS[name](**options)


@dataclasses.dataclass(frozen=True)
class Question:
    """A chunk that was asked for.

    Attributes:
      played: index of its first action.
      step: index of its control step.
      delay: steps that it is expected to take.
      anchor: (a,) what its actions are relative to; 0 where they are not.
      prefix: (d, a) the actions that are played meanwhile, relative to `anchor`: `delay` of
        them, or the first that the policy can be told; or None.
    """

    played: int
    step: int
    delay: int
    anchor: np.ndarray | float
    prefix: np.ndarray | None

    @property
    def extras(self) -> dict[str, Any]:
        """What the server is told of it."""
        out = {"executed_actions": self.played, "inference_delay": self.delay}
        return out if self.prefix is None else dict(out, prefix=self.prefix)


class ActionQueue:
    """Actions by control step, from chunks that come when they come. Knows no clock.

        if (question := queue.ask(state)): ... send it; later queue.give(question, chunk)
        action = queue.play()

    Attributes:
      horizon: actions of a chunk.
      played: actions played: the index of the next one.
      step: control steps, those held included.
      left: actions that are there.
    """

    def __init__(
        self,
        way: Switch,
        horizon: int,
        size: int,
        hold: Sequence[bool] | None = None,
        relative: Mapping[int, int] | None = None,
        delays: Delays | None = None,
    ):
        """Makes an empty one.

        Args:
          way: how chunks are joined, see `joining`.
          horizon, size: of a chunk (j, a).
          hold: which actions keep their last command when there are no more; the others are
            motions and become 0, in the units of the robot. All are held by default.
          relative: action -> entry of the state that it is relative to, in the observation of its
            chunk. Such actions are played, held and joined as absolute ones.
          delays: statistics to go on with; half a chunk is expected of a first answer.
        """
        self.way, self.horizon, self._relative = way, horizon, dict(relative or {})
        self._hold = np.ones(size, bool) if hold is None else np.array(hold, bool)
        if self._hold.shape != (size,):
            raise ValueError(f"hold says something of {self._hold.shape} actions, not ({size},)")
        self._hold[list(self._relative)] = True  # absolute by the time that they are played
        self.delays = Delays(expected=horizon // 2) if delays is None else delays
        self.reset()

    def reset(self) -> None:
        """Forgets all actions, as at the start of an episode; the statistics stay."""
        self.played, self.step, self._newest = 0, 0, 0
        self._plan = np.empty((0, len(self._hold)), np.float32)  # from now on
        self._chunks: list[tuple[int, np.ndarray]] = []
        self._last: np.ndarray | None = None
        self._asked: Question | None = None

    @property
    def left(self) -> int:
        """See the class."""
        return len(self._plan)

    @property
    def begun(self) -> bool:
        """Whether anything was played yet, so that there is something to hold."""
        return self._last is not None

    def ask(self, state: np.ndarray | None = None) -> Question | None:
        """What to ask for now, if it is time and nothing is being asked for.

        Args:
          state: of the observation that goes with it; needed if actions are relative to it.
        """
        delay = min(self.delays.estimate, self.horizon)
        since = self.played - self._newest
        if self._asked is not None or (
            self.left and not self.way.asks(self.left, since, delay, self.horizon)
        ):
            return None
        anchor, prefix = self._anchor(state), None
        if self.way.prefix and (self.left or self.begun):
            longest = self.way.longest
            count = delay if longest is None else min(delay, longest)
            prefix = self._committed(count) - anchor
        self._asked = Question(self.played, self.step, delay, anchor, prefix)
        return self._asked

    def give(self, question: Question, actions: np.ndarray) -> bool:
        """Takes a chunk (j, a); False: it was not of use."""
        if question is not self._asked:
            return False  # of before a reset
        self._asked = None
        late = self.step - question.step
        self.delays.add(late)
        if self.way.prefix and late > question.delay and self.left:
            return False
        chunk = np.asarray(actions) + question.anchor
        self._chunks.append((question.played, chunk))
        self._chunks = [(at, x) for at, x in self._chunks if self.played - at < len(x)]
        if self.played - question.played >= len(chunk):
            return False  # all of it is over
        self._plan = self.way.join(self._plan, [x[self.played - at :] for at, x in self._chunks])
        self._newest = question.played
        return True

    def lose(self, question: Question) -> None:
        """No answer will come to a question."""
        if question is self._asked:
            self._asked = None

    def play(self) -> np.ndarray | None:
        """The action (a,) of this control step: the next one, else what holds still; None if
        nothing was played yet."""
        if not self.left:
            if self._last is None:
                return None
            self.step += 1
            return self._still(self._last)
        self._last, self._plan = self._plan[0], self._plan[1:]
        self.played, self.step = self.played + 1, self.step + 1
        return np.array(self._last)

    def _still(self, last: np.ndarray) -> np.ndarray:
        """The last command, where it is one; a motion does not go on."""
        return np.where(self._hold, last, np.zeros_like(last))

    def _committed(self, count: int) -> np.ndarray:
        """The next `count` actions, padded by holding still (rule 4)."""
        plan = self._plan[:count]
        still = self._still(plan[-1] if len(plan) else self._last)
        return np.concatenate([plan, np.repeat(still[None], count - len(plan), 0)])

    def _anchor(self, state: np.ndarray | None) -> np.ndarray | float:
        if not self._relative:
            return 0.0
        if state is None:
            raise ValueError("actions are relative to the state: give it with the observation")
        out = np.zeros(len(self._hold), np.float32)
        for action, entry in self._relative.items():
            out[action] = state[entry]
        return out
