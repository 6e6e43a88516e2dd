"""One action a control step, while the next chunk is asked for in the background."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from wamjax.serving import chunks
from wamjax.serving.chunks import ActionQueue, Question


class ActionChunks:
    """What a control loop calls; chunks of a server become single actions.

        robot = ActionChunks(client, joining="blend", execute=8)
        while True:
            robot_arm.do(robot.act(observation))

    Of one thread. The client may be any object with ``infer(observation)``, openpi's too.

    Attributes:
      queue: what is played next, see `chunks.ActionQueue`.
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
        """Asks for nothing yet.

        Args:
          client: asks the server.
          joining: how chunks are joined: synchronous, switch, ensemble, blend or prefix.
          state: of an observation; needed if actions are relative to it.
          relative: action -> entry of the state, see `ActionQueue`.
          executor: in which the client is asked; a thread of its own by default.
          options: of the way of joining: ``execute``, ``steps``, ``decay``.

        Raises:
          ValueError: there is no such way, or the policy was not trained for it.
        """
        self._client, self._state, self._relative = client, state, relative
        about = getattr(client, "metadata", {})
        if joining == "prefix":
            if not about.get("prefix"):
                raise ValueError("this policy takes no committed actions: joining='prefix' is for "
                                 "one that was trained with them; choose another way")  # fmt: skip
            options = {"longest": about["prefix"]} | options
        self._way = chunks.joining(joining, **options)
        self._hold = about.get("actions", {}).get("hold")
        self._extras = "extras" in about  # other servers may not take them
        self._executor = executor or concurrent.futures.ThreadPoolExecutor(1, "chunks")
        self._asked: tuple[Question, concurrent.futures.Future] | None = None
        self.queue: ActionQueue | None = None

    def act(self, observation: Mapping[str, Any]) -> np.ndarray:
        """The action (a,) of this control step.

        The first one waits for the server, and so does each first one of a synchronous chunk;
        others never do: with nothing left to play, the robot is told to hold still.

        Raises:
          what the client raises: of the last question, once there is nothing left to play.
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
        """Begins another episode: what was asked for in the last one is not played."""
        if self.queue is not None:
            self.queue.reset()
        self._asked = None

    def close(self) -> None:
        """Ends the thread; the client stays open."""
        self._executor.shutdown(wait=False)

    def _question(self, observation: Mapping[str, Any]) -> Question | None:
        return self.queue.ask(self._state(observation) if self._state else None)

    def _receive(self, wait: bool) -> None:
        """Takes the chunk that was asked for, if it is there."""
        if self._asked is None or not (wait or self._asked[1].done()):
            return
        (question, answer), self._asked = self._asked, None
        try:
            self.queue.give(question, answer.result()["actions"])
        except Exception:
            self.queue.lose(question)
            if not self.queue.left:
                raise
