"""Returns one action per control step and requests the next chunk in the background."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from wamjax.serving import chunks
from wamjax.serving.chunks import ActionQueue, Question


class ActionChunks:
    """Turns the chunks of a server into single actions, for a control loop.

        robot = ActionChunks(client, joining="blend", execute=8)
        while True:
            robot_arm.do(robot.act(observation))

    Call it from one thread. Any client with ``infer(observation)`` works, also openpi's.

    Attributes:
      queue: the next actions, see `chunks.ActionQueue`.
    """

    def __init__(
        self,
        client: Any,
        joining: str = "switch",
        state: Callable[[Mapping[str, Any]], np.ndarray] | None = None,
        relative: Mapping[int, int] | None = None,
        executor: concurrent.futures.Executor | None = None,
        **options: Any,
    ):
        """Sends no request yet.

        Args:
          client: sends the requests.
          joining: how chunks are joined: synchronous, switch, ensemble, blend or prefix.
          state: returns the state of an observation; needed if actions are relative to it.
          relative: action index -> state index, see `ActionQueue`.
          executor: runs the requests; a thread of its own by default.
          options: for the way of joining: ``execute``, ``steps``, ``decay``.

        Raises:
          ValueError: unknown way of joining, or the policy was not trained for it.
        """
        self._client, self._state, self._relative = client, state, relative
        about = getattr(client, "metadata", {})
        if joining == "prefix":
            if not about.get("prefix"):
                raise ValueError("this policy takes no committed actions, which joining='prefix' "
                                 "needs: choose another joining")  # fmt: skip
            options = {"longest": about["prefix"]} | options
        self._way = chunks.joining(joining, **options)
        self._hold = about.get("actions", {}).get("hold")
        self._extras = "extras" in about  # other servers may not take them
        self._executor = executor or concurrent.futures.ThreadPoolExecutor(1, "chunks")
        self._asked: tuple[Question, concurrent.futures.Future] | None = None
        self.queue: ActionQueue | None = None

    def act(self, observation: Mapping[str, Any]) -> np.ndarray:
        """Returns the action (a,) for this control step.

        The first call waits for the server, as does the first call of each synchronous chunk. Other
        calls never wait: if no actions are left, the robot is told to hold still.

        Raises:
          Exception: that of the client's last request, once no actions are left.
        """
        if self.queue is None:
            first = self._client.infer(dict(observation))["actions"]
            self.queue = ActionQueue(self._way, *first.shape, self._hold, self._relative)
            self.queue.give(self._question(observation), first)
        self._receive(wait=False)
        question = self._question(observation) if self._asked is None else None
        if question is not None:
            asked = dict(observation, **(question.extras if self._extras else {}))
            self._asked = question, self._executor.submit(self._client.infer, asked)
        if not self.queue.left and (self._way.waits or not self.queue.begun):
            self._receive(wait=True)
        return self.queue.play()

    def reset(self) -> None:
        """Starts another episode; requests of the last one are discarded."""
        if self.queue is not None:
            self.queue.reset()
        self._asked = None

    def close(self) -> None:
        """Stops the thread; the client stays open."""
        self._executor.shutdown(wait=False)

    def _question(self, observation: Mapping[str, Any]) -> Question | None:
        return self.queue.ask(self._state(observation) if self._state else None)

    def _receive(self, wait: bool) -> None:
        """Takes the requested chunk if it has arrived."""
        if self._asked is None or not (wait or self._asked[1].done()):
            return
        (question, answer), self._asked = self._asked, None
        try:
            self.queue.give(question, answer.result()["actions"])
        except Exception:
            self.queue.lose(question)
            if not self.queue.left:
                raise
