"""Turns action chunks into one action per control step; needs only Python 3.9 and NumPy.

Time is counted in control steps, never in seconds. A chunk requested at step s holds the actions
of steps s, s + 1, ...; if it is late, its first actions are obsolete. So simulations are exact and
tests need no clock. Six rules learned from robots (threads of LeRobot and others):

1. Drop as many actions of a new chunk as were really executed since its observation, never as many
   as some latency suggests. Before the first chunk nothing is executed, so nothing is dropped.
2. A delay is the difference of two indices of the queue.
3. The first answer includes compilation, so statistics leave it out; and statistics forget.
4. When no actions are left, hold the last command. Zero in normalized units is the mean of the data
   and would pull the arm there; motions become 0 in robot units, so they stop.
5. A chunk later than announced is executed anyway if there is no other.
6. Actions relative to the state of their observation are re-anchored to the new state.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

WINDOW = 20  # answers that a delay is estimated from


class Delays:
    """Estimates the steps of an answer: the maximum of recent ones, without the first (rule 3)."""

    def __init__(self, window: int = WINDOW, expected: int = 0):
        self._expected, self._first = expected, True
        self._steps: collections.deque = collections.deque(maxlen=window)

    def add(self, steps: int) -> None:
        """Records how many steps an answer took after its observation."""
        if self._first:
            self._first = False
            return
        self._steps.append(steps)

    @property
    def estimate(self) -> int:
        """Expected steps of the next answer."""
        return max(self._steps, default=self._expected)


class Switch:
    """Executes the newest chunk from the current step on and drops the rest of older ones.

    The naive way, and the base of the other ways of joining chunks.

    Attributes:
      waits: whether the robot stands still until a chunk arrives.
      prefix: whether requests include the committed actions.
      execute: actions after which the next chunk should follow; None: a whole chunk.
    """

    waits, prefix = False, False

    def __init__(self, execute: int | None = None):
        if execute is not None and execute < 1:
            raise ValueError(f"execute = {execute} must be at least 1")
        self.execute = execute

    def join(self, old: np.ndarray, chunks: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the actions (i, a) to execute from now on.

        Args:
          old: (i, a) actions that would be executed otherwise; possibly none.
          chunks: the rest, from now on, of each chunk that covers this step; newest last.
        """
        return chunks[-1]

    def asks(self, left: int, played: int, delay: int, horizon: int) -> bool:
        """Returns whether it is time to request the next chunk.

        Args:
          left: actions available.
          played: actions since the observation of the newest chunk.
          delay: steps that an answer takes.
          horizon: actions of a chunk.
        """
        return left <= delay or played + delay >= min(self.execute or horizon, horizon)


class Synchronous(Switch):
    """Executes `execute` actions of a chunk, then stands still until the next one arrives."""

    waits = True

    def join(self, old, chunks):
        """See `Switch.join`."""
        return chunks[-1][: self.execute]

    def asks(self, left, played, delay, horizon):
        """See `Switch.asks`."""
        return left == 0


class Blend(Switch):
    """Blends linearly from the old chunk to the new one over `steps` actions."""

    def __init__(self, execute: int | None = None, steps: int = 4):
        super().__init__(execute)
        if steps < 1:
            raise ValueError(f"steps = {steps} of a blend must be at least 1")
        self.steps = steps

    def join(self, old, chunks):
        """See `Switch.join`."""
        out = np.array(chunks[-1])
        count = min(self.steps, len(old), len(out))
        weight = (np.arange(1, count + 1) / (count + 1))[:, None].astype(out.dtype)
        out[:count] = (1 - weight) * old[:count] + weight * out[:count]
        return out


class Ensemble(Switch):
    """Executes the mean of all chunks that cover a step, as ALOHA does.

    The i-th oldest has weight exp(-decay i), so the oldest has the most. ALOHA uses decay 0.01 and
    requests a chunk at every step.
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
    """Sends the committed actions with a request, so that the new chunk starts with them.

    For policies trained this way. A chunk that takes longer than announced does not continue the
    executed actions, so it is used only if there is no other (rule 5). If more actions will be
    executed than the policy accepts, it gets the first of them, and the robot switches to the new
    chunk after the last one.

    Attributes:
      longest: actions that the policy accepts; None: as many as a chunk has.
    """

    prefix = True

    def __init__(self, execute: int | None = None, longest: int | None = None):
        super().__init__(execute)
        if longest is not None and longest < 1:
            raise ValueError(f"longest = {longest} must be at least 1")
        self.longest = longest


JOININGS: dict[str, Callable[..., Switch]] = {
    "synchronous": Synchronous, "switch": Switch, "ensemble": Ensemble, "blend": Blend,
    "prefix": Prefix,
}  # fmt: skip


def joining(name: str, **options: Any) -> Switch:
    """Returns the way of joining chunks with this name, one of `JOININGS`.

    Raises:
      ValueError: unknown name.
    """
    if name not in JOININGS:
        raise ValueError(f"joining = {name!r} must be one of {', '.join(JOININGS)}")
    return JOININGS[name](**options)


@dataclasses.dataclass(frozen=True)
class Question:
    """A request for a chunk.

    Attributes:
      played: index of its first action.
      step: index of its control step.
      delay: steps that the answer is expected to take.
      anchor: (a,) what its actions are relative to; 0 for absolute ones.
      prefix: (d, a) actions executed in the meantime, relative to `anchor`: `delay` of them, or
        as many as the policy accepts; or None.
    """

    played: int
    step: int
    delay: int
    anchor: np.ndarray | float
    prefix: np.ndarray | None

    @property
    def extras(self) -> dict[str, Any]:
        """Extra observation keys that describe this request to the server."""
        out = {"executed_actions": self.played, "inference_delay": self.delay}
        return out if self.prefix is None else dict(out, prefix=self.prefix)


class ActionQueue:
    """A queue of actions, filled by chunks that arrive at any time. Uses no clock.

        if (question := queue.ask(state)): ... send it; later queue.give(question, chunk)
        action = queue.play()

    Attributes:
      horizon: actions of a chunk.
      played: actions executed so far, the index of the next one.
      step: control steps, including those held.
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
        """Creates an empty queue.

        Args:
          way: how chunks are joined, see `joining`.
          horizon, size: of a chunk (j, a).
          hold: which actions keep their last command when none are left; the others are motions
            and become 0 in robot units. By default all hold.
          relative: action index -> index of the state that it is relative to, in the observation
            of its chunk. Such actions are executed, held and joined as absolute ones.
          delays: earlier statistics; the first answer is expected to take half a chunk.
        """
        self.way, self.horizon, self._relative = way, horizon, dict(relative or {})
        self._hold = np.ones(size, bool) if hold is None else np.array(hold, bool)
        if self._hold.shape != (size,):
            raise ValueError(f"hold has shape {self._hold.shape}, it must be ({size},)")
        self._hold[list(self._relative)] = True  # absolute by the time that they are played
        self.delays = Delays(expected=horizon // 2) if delays is None else delays
        self.reset()

    def reset(self) -> None:
        """Clears all actions for a new episode; keeps the statistics."""
        self.played, self.step, self._newest = 0, 0, 0
        self._plan = np.empty((0, len(self._hold)), np.float32)  # from now on
        self._chunks: list[tuple[int, np.ndarray]] = []
        self._last: np.ndarray | None = None
        self._asked: Question | None = None

    @property
    def left(self) -> int:
        """Actions available."""
        return len(self._plan)

    @property
    def begun(self) -> bool:
        """Whether any action was executed yet, so that there is a command to hold."""
        return self._last is not None

    def ask(self, state: np.ndarray | None = None) -> Question | None:
        """Returns the request to send now, or None if it is not time or one is pending.

        Args:
          state: state of the observation sent with it; needed if actions are relative to it.
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
        """Takes a chunk (j, a); returns False if it was of no use."""
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
        """Notes that a request will get no answer."""
        if question is self._asked:
            self._asked = None

    def play(self) -> np.ndarray | None:
        """Returns the action (a,) for this control step: the next one, or one that holds still;
        None before the first chunk."""
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
            raise ValueError("actions are relative to the state: add it to the observation")
        out = np.zeros(len(self._hold), np.float32)
        for action, entry in self._relative.items():
            out[action] = state[entry]
        return out
