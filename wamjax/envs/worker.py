"""Runs simulators in their own processes: starts them, steps whole plans, restarts crashed ones.

A worker imports numpy and the simulator, never JAX. It receives a plan of actions through a pipe
and returns everything that happened while executing it, so there is one exchange per plan, however
many steps the plan has.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

Observation = Mapping[str, Any]


class Environment(Protocol):
    """Simulates one robot; worlds of host environments consist of these.

    An observation is {"images": camera -> uint8 (h, w, 3), "proprio": float (p,)}. "images" may
    also be a function that renders them. It is called before the next step, and only if the
    pictures are needed: once per plan, or every step when the episode is recorded.
    """

    def reset(self, task: str, seed: int, shift: Mapping[str, float]) -> Observation:
        """Starts an episode; the same arguments must give the same episode."""

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """Executes one action (a,); returns the next observation and whether the task is achieved
        now."""

    def close(self) -> None:
        """Releases the simulator."""


class Expert(Protocol):
    """Adds the method of an environment with a scripted expert."""

    def intend(self) -> np.ndarray:
        """Returns the expert's action (a,) in the current state."""


class Described(Protocol):
    """Adds the method of a served environment, see `wamjax.envs.remote`."""

    def describe(self) -> Mapping[str, Any]:
        """Returns attributes of `wamjax.envs.host.HostWorld` by name: at least those without a
        default, except ``environment``."""


class Demonstration(NamedTuple):
    """Holds an episode of the expert, of n actions; see `wamjax.envs.world.Demonstrations`."""

    achieved: np.ndarray
    actions: np.ndarray
    intended: np.ndarray
    proprio: np.ndarray
    frames: Mapping[str, np.ndarray]


class Stretch(NamedTuple):
    """Holds what happened in an environment during a plan; of n <= j actions.

    Attributes:
      achieved: after each action.
      proprio: after each action.
      frames: camera -> pictures after each action, or after the last one only.
    """

    achieved: np.ndarray
    proprio: np.ndarray
    frames: Mapping[str, np.ndarray]


class Died(RuntimeError):
    """The process of a worker ended, or its environment raised."""


class Pipe(Protocol):
    """Passes values between two processes."""

    def send(self, value: Any) -> None:
        """Sends a value; raises OSError if the other side is gone."""

    def recv(self) -> Any:
        """Returns the next value; raises EOFError if the other side is gone."""


class Worker:
    """Manages a process with one environment."""

    def __init__(self, place: str, options: Mapping[str, Any], timeout: float):
        self._start = place, dict(options)
        self._timeout = timeout
        self._process: Any = None
        self.restart()

    def restart(self) -> None:
        """Starts the process, or replaces it."""
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
        """Requests a call of `_Loop`; `receive` returns the answer."""
        try:
            self._pipe.send((name, arguments))
        except (BrokenPipeError, OSError) as error:
            raise Died(self._ended()) from error

    def receive(self) -> Any:
        """Returns the answer to the last request.

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


def parts_of(name: str) -> tuple[str, dict[str, Any]]:
    """Parses ``NAME:option=value,option=value``, as after the file of a config, to (name, options).

    Values are JSON, such as 96, 0.5 and false; everything else is text.
    """
    match = re.fullmatch(r"(.*?)(?::(\w+=.*))?", name)
    options = {}
    for part in filter(None, (match[2] or "").split(",")):
        key, _, text = part.partition("=")
        try:
            options[key] = json.loads(text.lower() if text in ("True", "False") else text)
        except json.JSONDecodeError:
            options[key] = text
    return match[1], options


def with_option(name: str, option: str, value: Any) -> str:
    """Returns the name with another value of an option, so that `parts_of` gives it."""
    place, options = parts_of(name)
    options[option] = value
    texts = (f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in options.items())
    return f"{place}:{','.join(texts)}"


def versions_of(*packages: str, extra: str) -> dict[str, str]:
    """Returns package -> version.

    Raises:
      ImportError: a package is not installed; names the extra that has it.
    """
    try:
        return {name: importlib.metadata.version(name) for name in packages}
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"{error}: pip install 'wamjax[{extra}]'") from None


def resolve(place: str) -> Callable[..., Any]:
    """Imports "module:attribute"."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


class _Loop:
    """Executes a worker's calls; runs in its process."""

    def __init__(self, environment: Environment):
        self.environment = environment

    def describe(self) -> Mapping[str, Any]:
        return {"workers": os.cpu_count() or 1, **self.environment.describe()}

    def reset(self, task: str, seed: int, shift: Mapping[str, float]) -> Observation:
        return _plain(self.environment.reset(task, seed, shift))

    def play(self, actions: np.ndarray, record: bool, stop: bool) -> Stretch:
        """Executes a plan (j, a); `stop` ends it when the task is achieved."""
        achieved, proprio, frames = [], [], []
        for number, action in enumerate(actions):
            observation, done = self.environment.step(np.array(action))
            achieved.append(bool(done))
            proprio.append(_felt(observation))
            over = number + 1 == len(actions) or (stop and done)
            if record or over:
                frames.append(_shown(observation))
            if over:
                break
        pictures = {name: np.stack([f[name] for f in frames]) for name in frames[0]}
        return Stretch(np.array(achieved), np.stack(proprio), pictures)

    def demonstrate(
        self, task: str, seed: int, most: int, settle: int, noise: np.ndarray
    ) -> Demonstration:
        """Runs an episode of the expert, until `settle` actions after success.

        Args:
          most: maximum number of actions.
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
    return {"images": _shown(observation), "proprio": _felt(observation)}


def _felt(observation: Observation) -> np.ndarray:
    return np.array(observation["proprio"], np.float32)


def _shown(observation: Observation) -> Mapping[str, np.ndarray]:
    images = observation["images"]
    if callable(images):
        images = images()
    return {name: np.ascontiguousarray(image, np.uint8) for name, image in images.items()}


_PROGRAM = "from wamjax.envs.worker import serve; serve({})"


def serve(number: int) -> None:
    """Runs the process of a worker: answers on the pipe with this file descriptor."""
    pipe = multiprocessing.connection.Connection(number)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        name, start = pipe.recv()
        assert name == "make", name
        converse(pipe, *start)


def converse(pipe: Pipe, place: str, options: Mapping[str, Any]) -> None:
    """Creates an environment and answers calls of `_Loop` until the other side is gone.

    Args:
      pipe: receives (name, arguments), and sends ("done", answer) or ("error", a sentence).
      place, options: location and arguments of the environment. If it cannot be created, every
        answer says why.
    """
    loop, failure = None, ""
    try:
        loop = _Loop(resolve(place)(**options))
    except Exception as error:
        failure = _sentence(error)
    while True:
        try:
            name, arguments = pipe.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            if loop is not None:
                loop.environment.close()
            return
        if loop is None:
            pipe.send(("error", failure))
            continue
        try:
            answer = "done", getattr(loop, name)(*arguments)
        except Exception as error:
            answer = "error", _sentence(error)
        pipe.send(answer)


def _sentence(error: Exception) -> str:
    traceback.print_exc()
    return f"{type(error).__name__}: {error}"


def each(workers: Sequence[Worker], name: str, arguments: Sequence[tuple]) -> list[Any]:
    """Makes the same call on all workers at once; the answer of a failed one is a `Died`."""
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
