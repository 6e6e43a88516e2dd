"""Worlds of host environments: simulators in lockstep, one batched policy call for each plan.

An environment is a small class (`wamjax.envs.worker.Environment`); a world is its description and
its location. E environments run in E processes. Each plan is one policy call for all of them, then
one message with actions to each. A successful episode is not stepped further. A crashed environment
is restarted and brought back to its state by replaying its actions; an episode in which this
happens `RESTARTS` times has failed.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from wamjax.config import did_you_mean
from wamjax.envs import worker as workers
from wamjax.envs.joins import SYNC, Ahead, Join
from wamjax.envs.remote import Connection
from wamjax.envs.world import SETTLE, Demonstrations, Dials, Recording, outcome, recorded

RESTARTS = 3
_IDLE: dict[str, list[Any]] = {}  # idle workers or connections, by what they run


@atexit.register
def close_idle() -> None:
    """Ends the workers that wait for a call."""
    for pool in _IDLE.values():
        while pool:
            pool.pop().close()


DISCOUNT = 0.98


@dataclasses.dataclass(frozen=True)
class HostWorld:
    """Runs policies in a host environment; see `wamjax.envs.world.World`.

    Attributes:
      environment: "module:attribute" of a function or class that creates an `Environment` in its
        own process.
      options: arguments of the environment.
      address: "HOST:PORT" of served environments, see `wamjax.envs.remote`; `environment` and
        `options` are then the server's. "" = they run here.
      workers: processes at once; 0: one per processor.
      timeout: seconds for a plan or a reset before the process is killed.
      discount: discount of the returns.
      expert: whether the environment has `intend`.
      noisy: scale of the noise on each dimension of the expert's actions.
    """

    name: str
    tasks: Mapping[str, str]
    cameras: Mapping[str, tuple[int, int]]
    proprio_names: tuple[str, ...]
    action_names: tuple[str, ...]
    control_hz: float
    max_steps: int
    environment: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    address: str = ""
    shifts: Mapping[str, Dials] = dataclasses.field(default_factory=lambda: {"none": {}})
    dials: tuple[str, ...] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    workers: int = 0
    timeout: float = 300.0
    discount: float = DISCOUNT
    expert: bool = False
    restores: bool = False
    jitted: bool = False
    noisy: tuple[float, ...] = ()
    batch: int = 16

    def roll_out(
        self,
        policy: Callable,
        tasks: Sequence[str],
        keys: Array,
        *,
        shift: Dials,
        told: Mapping[str, Array],
        cameras: tuple[str, ...] = (),
        max_steps: int = 0,
        execute: int = 8,
        record: bool | int = False,
        join: Join = SYNC,
    ) -> Recording:
        """Implements `World.roll_out`; runs in rounds if there are more episodes than workers."""
        most, cameras = max_steps or self.max_steps, cameras or tuple(self.cameras)
        if not isinstance(policy, jax.tree_util.Partial):
            policy = jax.tree_util.Partial(policy)
        size = min(self.workers or os.cpu_count() or 1, len(tasks))
        parts, count = [], recorded(record, len(tasks))
        with self._pool(size) as pool:
            for start in range(0, len(tasks), size):
                rows = np.arange(start, min(start + size, len(tasks)))
                # The last round is filled up with its own first episodes, so that the policy is
                # compiled for one batch; they are not simulated.
                filled = rows[np.arange(size) % len(rows)]
                some = {k: np.asarray(v)[filled] for k, v in told.items()}
                round_ = _Round(
                    self, pool[: len(rows)], [tasks[r] for r in rows], keys[filled], shift,
                    cameras, most, start < count,
                )  # fmt: skip
                parts.append(round_.run(policy, some, execute, join))
        return _joined(parts, count)

    def demonstrate(
        self, tasks: Sequence[str], keys: Array, *, noise: float, draw: Callable | None = None
    ) -> Demonstrations:
        """Implements `World.demonstrate`; renders the frames of all episodes while simulating."""
        if not self.expert:
            raise NotImplementedError(f"{self.name} has no scripted expert")
        size = min(self.workers or os.cpu_count() or 1, len(tasks))
        scale = np.array(self.noisy or [1.0] * len(self.action_names)) * noise
        asked = [(task, seed, self.max_steps, SETTLE, scale)
                 for task, seed in zip(tasks, _seeds(keys), strict=True)]  # fmt: skip
        found: list[workers.Demonstration] = []
        with self._pool(size) as pool:
            for start in range(0, len(asked), size):
                some = asked[start : start + size]
                for worker, arguments, answer in zip(
                    pool, some, workers.each(pool[: len(some)], "demonstrate", some), strict=False
                ):
                    if isinstance(answer, workers.Died):
                        worker.restart()
                        answer = workers.each([worker], "demonstrate", [arguments])[0]
                    if isinstance(answer, workers.Died):
                        raise RuntimeError(
                            f"{self.name}: the expert of task {arguments[0]!r}, seed "
                            f"{arguments[1]}, died twice: {answer}"
                        ) from answer
                    found.append(answer)
        done = self._demonstrations(tuple(tasks), found)
        if draw is not None:
            draw(done)
        return done

    def _demonstrations(self, tasks, found: Sequence[workers.Demonstration]) -> Demonstrations:
        """Pads episodes of different lengths to arrays of one length."""
        most = max(len(d.actions) for d in found)

        def padded(x: np.ndarray, length: int) -> np.ndarray:
            return np.concatenate([x, np.repeat(x[-1:], length - len(x), axis=0)])

        success, steps, rewards, returns = outcome(
            np.stack([padded(d.achieved, most) for d in found]), self.discount
        )
        record = Recording(
            tasks=tasks,
            instructions=tuple(self.tasks[task] for task in tasks),
            success=success,
            steps=steps,
            rewards=rewards,
            returns=returns,
            actions=np.stack([padded(d.actions, most) for d in found]),
            proprio=np.stack([padded(d.proprio, most + 1) for d in found]),
            frames={name: np.stack([padded(d.frames[name], most + 1) for d in found])
                    for name in self.cameras},
            extras=None,
            crashes=np.zeros(len(tasks), int),
        )  # fmt: skip
        intended = np.stack([padded(d.intended, most) for d in found])
        return Demonstrations(record, intended, np.array([len(d.actions) for d in found]))

    def _pool(self, size: int) -> contextlib.AbstractContextManager[list[Any]]:
        if self.address:
            return connections(self.address, self.timeout, size)
        key = json.dumps([self.environment, dict(self.options), self.timeout], sort_keys=True)
        start = self.environment, self.options, self.timeout
        return borrowed(key, size, lambda: workers.Worker(*start))


@contextlib.contextmanager
def borrowed(key: str, size: int, start: Callable[[], Any]) -> Iterator[list[Any]]:
    """Lends workers that are kept for the next call afterwards, since simulators take seconds to
    start.

    Args:
      key: identifies what the workers run.
      start: starts another worker.
    """
    idle, pool = _IDLE.setdefault(key, []), []
    try:
        for _ in range(size):
            pool.append(idle.pop() if idle else start())
        yield pool
    except BaseException:  # their state is unknown
        for worker in pool:
            worker.close()
        raise
    idle.extend(pool)


def connections(
    address: str, timeout: float, size: int
) -> contextlib.AbstractContextManager[list[Connection]]:
    """Lends connections to served environments; they are kept for the next call, too."""
    key = json.dumps([address, timeout])
    return borrowed(key, size, lambda: Connection(address, timeout))


def local(environment: type, options: Mapping[str, Any], **more: Any) -> HostWorld:
    """Returns the world that an environment describes, simulated in local processes.

    Args:
      environment: a class, see `wamjax.envs.worker.Described`.
      options: arguments of the environment.
      **more: attributes of `HostWorld` that the description lacks, such as workers.
    """
    place = f"{environment.__module__}:{environment.__qualname__}"
    about = environment(**options).describe()
    return HostWorld(environment=place, options=options, **{**about, **more})


def described(about: Mapping[str, Any]) -> HostWorld:
    """Returns the world of a description received over a connection.

    Args:
      about: attributes of `HostWorld` by name; lists stand for tuples.

    Raises:
      ValueError: an attribute is missing or unknown; names it.
    """
    fields = {field.name: field for field in dataclasses.fields(HostWorld)}
    if unknown := sorted(set(about) - set(fields)):
        hint = did_you_mean(unknown[0], fields)
        raise ValueError(
            f"the description of a world has an unknown key {unknown[0]!r}{hint}; there are "
            f"{sorted(fields)}"
        )
    needed = {name for name, field in fields.items()
              if field.default is field.default_factory is dataclasses.MISSING}  # fmt: skip
    about = {"environment": "", **about}
    if missing := sorted(needed - set(about)):
        raise ValueError(f"the description of a world lacks {', '.join(map(repr, missing))}")
    about = {k: tuple(v) if isinstance(v, list) else v for k, v in about.items()}
    about["cameras"] = {name: tuple(size) for name, size in about["cameras"].items()}
    return HostWorld(**about)


class _Round:
    """Runs episodes at the same time, one per worker."""

    def __init__(self, world, pool, tasks, keys, shift, cameras, most, record):
        self.world, self.pool, self.tasks, self.shift = world, pool, tasks, dict(shift)
        self.cameras, self.most, self.record, self.keys = cameras, most, record, keys
        count, p, a = len(tasks), len(world.proprio_names), len(world.action_names)
        self.seeds = _seeds(keys)[:count]
        self.achieved = np.zeros((count, most), bool)
        self.actions = np.zeros((count, most, a), np.float32)
        self.proprio = np.zeros((count, most + 1, p), np.float32)
        self.crashes = np.zeros(count, int)
        self.open = np.ones(count, bool)  # neither successful nor failed yet
        self.at = np.zeros(count, int)  # executed actions
        self.now: dict[str, np.ndarray] = {}
        self.frames: dict[str, np.ndarray] = {}

    def run(
        self, policy: Callable, told: Mapping[str, Any], execute: int, join: Join
    ) -> Recording:
        self._reset()
        size, extras, span = len(self.keys), [], join.span(execute)
        ahead = join.begin(size, join.delay, self.actions.shape[2])  # until the first plan
        fill = np.arange(size) % len(self.tasks)
        for number in range(-(-self.most // span)):
            now = {name: picture[fill] for name, picture in self.now.items()}
            at = self.proprio[np.arange(len(self.tasks)), self.at][fill]
            observation = {"images": now, "proprio": at, **told}
            committed = join.committed(ahead)
            chunk, extra = _call(policy, observation, self.keys, number, committed)
            chunk = self._checked(np.asarray(chunk), execute)
            if number == 0:
                join.check(execute, chunk.shape[1])
                ahead = join.begin(*chunk.shape)
            actions, ahead = _joined_to(join, ahead, chunk, execute)
            if extra is not None:
                extras.append(jax.tree.map(lambda x: np.asarray(x)[: len(self.tasks)], extra))
            actions = np.asarray(actions)[: len(self.tasks), : self.most - number * span]
            self._play(actions)
            if not self.open.any() and not extras:
                break
        success, steps, rewards, returns = outcome(self.achieved, self.world.discount)
        words = tuple(self.world.tasks[task] for task in self.tasks)
        return Recording(
            tuple(self.tasks), words, success, steps, rewards, returns, self.actions, self.proprio,
            self.frames if self.record else None,
            jax.tree.map(lambda *x: np.stack(x), *extras) if extras else None, self.crashes,
        )  # fmt: skip

    def _reset(self) -> None:
        arguments = list(zip(self.tasks, self.seeds, [self.shift] * len(self.tasks), strict=True))
        answers = workers.each(self.pool, "reset", arguments)
        for i, answer in enumerate(answers):
            while isinstance(answer, workers.Died):
                self._crashed(i, answer)
                if self.crashes[i] >= RESTARTS:
                    raise RuntimeError(
                        f"{self.world.name}: task {self.tasks[i]!r} cannot be reset with seed "
                        f"{self.seeds[i]}: {answer}"
                    ) from answer
                answer = workers.each([self.pool[i]], "reset", [arguments[i]])[0]
            self._store(i, 0, answer["proprio"], answer["images"])

    def _play(self, chunk: np.ndarray) -> None:
        rows = [i for i in range(len(self.tasks)) if self.open[i]]
        stop = not self.record
        arguments = [(chunk[i], self.record, stop) for i in rows]
        answers = workers.each([self.pool[i] for i in rows], "play", arguments)
        for i, argument, answer in zip(rows, arguments, answers, strict=True):
            start, length = self.at[i], len(chunk[i])
            self.actions[i, start : start + length] = chunk[i]
            while isinstance(answer, workers.Died):
                self._crashed(i, answer)
                if self.crashes[i] >= RESTARTS:
                    self.open[i] = False
                    break
                answer = self._again(i, start, argument)
            else:
                self._took(i, start, answer)

    def _again(self, i: int, start: int, argument: tuple) -> Any:
        """Brings a new process to the state of the old one and executes the plan there."""
        begin = (self.tasks[i], self.seeds[i], self.shift)
        answer = workers.each([self.pool[i]], "reset", [begin])[0]
        if start and not isinstance(answer, workers.Died):
            past = self.actions[i, :start], False, False
            answer = workers.each([self.pool[i]], "play", [past])[0]
        if isinstance(answer, workers.Died):
            return answer
        return workers.each([self.pool[i]], "play", [argument])[0]

    def _took(self, i: int, start: int, stretch: workers.Stretch) -> None:
        count = len(stretch.achieved)
        self.achieved[i, start : start + count] = stretch.achieved
        self.proprio[i, start + 1 : start + 1 + count] = stretch.proprio
        self.proprio[i, start + 1 + count :] = stretch.proprio[-1]
        for name in self.cameras:
            pictures = stretch.frames[name]
            self.now[name][i] = pictures[-1]
            if self.record:
                self.frames[name][i, start + 1 : start + 1 + count] = pictures
        self.at[i] = start + count
        if stretch.achieved.any() and not self.record:
            self.open[i] = False
            self.actions[i, self.at[i] :] = self.actions[i, self.at[i] - 1]

    def _store(self, i: int, time: int, proprio: np.ndarray, images) -> None:
        """Stores an observation after checking it against the world's description."""
        if missing := [name for name in self.cameras if name not in images]:
            raise ValueError(
                f"{self.world.name} has no camera {missing[0]!r}, only {sorted(images)}"
            )
        if proprio.shape != self.proprio.shape[2:]:
            raise ValueError(
                f"{self.world.name} returned proprio of shape {proprio.shape}, but its "
                f"proprio_names have {self.proprio.shape[2:]}"
            )
        self.proprio[i, time:] = proprio
        for name in self.cameras:
            picture, expected = images[name], (*self.world.cameras[name], 3)
            if picture.shape != expected:
                raise ValueError(f"{self.world.name}: camera {name!r} returned a picture of shape "
                                 f"{picture.shape}, but its cameras say {expected}")  # fmt: skip
            self.now.setdefault(name, np.zeros((len(self.tasks), *expected), np.uint8))[i] = picture
            if self.record:
                shape = len(self.tasks), self.most + 1, *expected
                self.frames.setdefault(name, np.zeros(shape, np.uint8))[i, time] = picture

    def _crashed(self, i: int, error: workers.Died) -> None:
        self.crashes[i] += 1
        logging.getLogger(__name__).warning(
            "%s: the environment of task %r, seed %d, died and is started again (%d of %d): %s",
            self.world.name, self.tasks[i], self.seeds[i], self.crashes[i], RESTARTS, error,
        )  # fmt: skip
        self.pool[i].restart()

    def _checked(self, actions: np.ndarray, execute: int) -> np.ndarray:
        shape, width = actions.shape, self.actions.shape[2]
        if len(shape) != 3 or shape[0] != len(self.keys) or shape[2] != width:
            raise ValueError(f"the policy returned actions of shape {shape}; {self.world.name} "
                             f"needs ({len(self.keys)}, chunk, {width})")  # fmt: skip
        if shape[1] < execute:
            raise ValueError(
                f"execute={execute} is more than the {shape[1]} actions that the policy plans: "
                "lower config.eval.execute, or train with a longer config.data.chunk"
            )
        return actions


def _seeds(keys: Array) -> list[int]:
    """Returns the seeds of environments for keys."""
    return [int(x) for x in np.asarray(jax.random.key_data(keys))[:, -1]]


@jax.jit
def _call(policy: Callable, observation, keys: Array, number, committed) -> tuple[Array, Any]:
    """Calls the policy once for all episodes; keys as in the jitted world."""
    own = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, 1), number))(keys)
    prefix = () if committed is None else (committed,)
    result = policy(observation, own, *prefix)
    return result if isinstance(result, tuple) else (result, None)


@functools.partial(jax.jit, static_argnames=("join", "execute"))
def _joined_to(join: Join, ahead: Ahead, chunk: Array, execute: int) -> tuple[Array, Ahead]:
    return join(ahead, chunk, execute)


def _joined(parts: Sequence[Recording], count: int) -> Recording:
    """Concatenates rounds, with the frames of the first `count` episodes."""
    first = parts[0]

    def join(*x):
        return np.concatenate(x)

    extras = None
    if first.extras is not None:
        extras = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *(p.extras for p in parts))
    frames = None
    if first.frames is not None:
        rounds = [p.frames for p in parts if p.frames is not None]
        frames = {name: join(*(r[name] for r in rounds))[:count] for name in first.frames}
    arrays = {
        name: join(*(getattr(p, name) for p in parts))
        for name in ("success", "steps", "rewards", "returns", "actions", "proprio", "crashes")
    }
    return Recording(
        tasks=sum((p.tasks for p in parts), ()),
        instructions=sum((p.instructions for p in parts), ()),
        frames=frames,
        extras=extras,
        **arrays,
    )
