"""Simulators in processes of their own: started, stepped by the plan, started again when they die.

A worker imports numpy and the simulator, never JAX. What goes through a pipe is a plan of actions
for each of its environments, and what comes back is all that happened while it was carried out, so
that there is one exchange for a plan, however many steps it has.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

Observation = Mapping[str, Any]


class Environment(Protocol):
    """One simulator with one robot in it; what a world of host environments is made of.

    An observation is {"images": camera -> uint8 (h, w, 3), "proprio": float (p,)}.
    """

    def reset(self, task: str, seed: int, shift: Mapping[str, float]) -> Observation:
        """Starts an episode; the same arguments give the same one."""

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """Carries out one action (a,); returns what is seen then and whether the task is achieved
        now."""

    def close(self) -> None:
        """Lets go of the simulator."""


class Expert(Protocol):
    """What an environment with a scripted expert has besides."""

    def intend(self) -> np.ndarray:
        """What the expert does now, (a,)."""


class Demonstration(NamedTuple):
    """An episode of the expert, of n actions; see `wamjax.envs.world.Demonstrations`."""

    achieved: np.ndarray
    actions: np.ndarray
    intended: np.ndarray
    proprio: np.ndarray
    frames: Mapping[str, np.ndarray]


class Stretch(NamedTuple):
    """What happened in an environment while a plan was carried out; of n <= j actions.

    Attributes:
      achieved: after each action.
      proprio: after each action.
      frames: camera -> after each action, or after the last one alone.
    """

    achieved: np.ndarray
    proprio: np.ndarray
    frames: Mapping[str, np.ndarray]


class Died(RuntimeError):
    """The process of a worker ended, or its environment raised."""


class Worker:
    """A process with one environment."""

    def __init__(self, place: str, options: Mapping[str, Any], timeout: float):
        self._start = place, dict(options)
        self._timeout = timeout
        self._process: Any = None
        self.restart()

    def restart(self) -> None:
        """Starts the process, anew if there is one."""
        self.close()
        self._pipe, other = multiprocessing.Pipe()
        # A new program, since threads of JAX do not survive a fork, and not multiprocessing's,
        # which would import the main module of this one, and JAX with it.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM.format(other.fileno())],
            pass_fds=[other.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        other.close()
        self.send("make", *self._start)

    def send(self, name: str, *arguments: Any) -> None:
        """Asks for a call of `_Loop`; `receive` has the answer."""
        try:
            self._pipe.send((name, arguments))
        except (BrokenPipeError, OSError) as error:
            raise Died(self._ended()) from error

    def receive(self) -> Any:
        """The answer to what was sent.

        Raises:
          Died: the environment raised, the process ended, or it took too long.
        """
        try:
            if not self._pipe.poll(self._timeout):
                raise Died(f"no answer within {self._timeout:.0f} s")
            kind, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise Died(self._ended()) from error
        if kind == "error":
            raise Died(answer)
        return answer

    def close(self) -> None:
        """Ends the process."""
        if self._process is None:
            return
        self._pipe.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        return f"its process ended with status {self._process.returncode}"


def resolve(place: str) -> Callable[..., Any]:
    """What "module:attribute" names."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


class _Loop:
    """What a worker does; runs in its process."""

    def __init__(self, environment: Environment):
        self.environment = environment

    def reset(self, task: str, seed: int, shift: Mapping[str, float]) -> Observation:
        return _plain(self.environment.reset(task, seed, shift))

    def play(self, actions: np.ndarray, record: bool, stop: bool) -> Stretch:
        """Carries out a plan (j, a); `stop` ends it where the task is achieved."""
        achieved, proprio, frames = [], [], []
        for action in actions:
            observation, done = self.environment.step(action)
            observation = _plain(observation)
            achieved.append(bool(done))
            proprio.append(observation["proprio"])
            frames.append(observation["images"])
            if not record:
                frames = frames[-1:]
            if stop and done:
                break
        pictures = {name: np.stack([f[name] for f in frames]) for name in frames[0]}
        return Stretch(np.array(achieved), np.stack(proprio), pictures)


    def demonstrate(
        self, task: str, seed: int, most: int, settle: int, noise: np.ndarray
    ) -> Demonstration:
        """An episode of the expert, until `settle` actions after success.

        Args:
          most: actions.
          noise: standard deviation of the noise on each dimension of its actions.
        """
        rng = np.random.default_rng(seed)
        seen = [self.reset(task, seed, {})]
        achieved, actions, intended = [], [], []
        while len(actions) < most and sum(achieved) <= settle:
            intended.append(np.asarray(self.environment.intend(), np.float32))
            actions.append(intended[-1] + (rng.normal(size=noise.shape) * noise).astype("f4"))
            observation, done = self.environment.step(actions[-1])
            seen.append(_plain(observation))
            achieved.append(bool(done) or any(achieved))
        frames = {name: np.stack([s["images"][name] for s in seen]) for name in seen[0]["images"]}
        proprio = np.stack([s["proprio"] for s in seen])
        return Demonstration(
            np.array(achieved), np.stack(actions), np.stack(intended), proprio, frames
        )


def _plain(observation: Observation) -> Observation:
    images = {k: np.ascontiguousarray(v, np.uint8) for k, v in observation["images"].items()}
    return {"images": images, "proprio": np.asarray(observation["proprio"], np.float32)}


_PROGRAM = "from wamjax.envs.worker import serve; serve({})"


def serve(number: int) -> None:
    """What the process of a worker runs: answers on the pipe with this file descriptor."""
    pipe, loop, failure = multiprocessing.connection.Connection(number), None, ""
    while True:
        try:
            name, arguments = pipe.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            if loop is not None:
                loop.environment.close()
            return
        try:
            if name == "make":  # nobody waits for an answer; the first call tells what went wrong
                place, options = arguments
                loop = _Loop(resolve(place)(**options))
                continue
            if loop is None:
                pipe.send(("error", failure))
                continue
            pipe.send(("done", getattr(loop, name)(*arguments)))
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            traceback.print_exc()
            if name != "make":
                pipe.send(("error", failure))


def each(workers: Sequence[Worker], name: str, arguments: Sequence[tuple]) -> list[Any]:
    """The same call on all workers at once; an answer is a `Died` where one did."""
    answers: list[Any] = [None] * len(workers)
    for i, (worker, given) in enumerate(zip(workers, arguments, strict=True)):
        try:
            worker.send(name, *given)
        except Died as error:
            answers[i] = error
    for i, worker in enumerate(workers):
        if answers[i] is None:
            try:
                answers[i] = worker.receive()
            except Died as error:
                answers[i] = error
    return answers
