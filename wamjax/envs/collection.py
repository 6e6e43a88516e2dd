"""Collects demonstrations of a world's scripted expert as a data set."""

from __future__ import annotations

import hashlib
import inspect
import json
import pathlib
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from wamjax import files
from wamjax.config import did_you_mean
from wamjax.console import say
from wamjax.data import images
from wamjax.data.records import SPEC, Episode, Reader, Writer, turn
from wamjax.data.spec import FORMAT_VERSION, Info
from wamjax.envs.world import Demonstrations, World, open_world

MIN_SUCCESS = 0.02  # the collection gives up below this success rate


class Settings(NamedTuple):
    """Determines the content of a data set.

    Attributes:
      env: the world, see `wamjax.envs.world.open_world`.
      tasks: names; the same number of episodes of each (to within one). () = all of the world.
      episodes: total number.
      noise: standard deviation of the noise on the expert's actions, in action units.
      seed: seed of everything.
      action_free: store video and proprio only.
      keep_failures: also keep episodes that fail.
      intended: label a step with the expert's intended action instead of the noisy one: noise then
        shows how to recover (as in DART, arXiv 1703.09327) and is not imitated itself.
      confusion: share of episodes in which the expert goes for the wrong target, in worlds with
        such an expert; they are demonstrations too, and most of them fail.
    """

    env: str = "tabletop"
    tasks: tuple[str, ...] = ()
    episodes: int = 600
    noise: float = 0.0
    seed: int = 0
    action_free: bool = False
    keep_failures: bool = False
    intended: bool = False
    confusion: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns the values for ``spec.json``; without `confusion` if it is 0, as in older data
        sets."""
        values = {**self._asdict(), "tasks": list(self.tasks)}
        return values if self.confusion else {k: v for k, v in values.items() if k != "confusion"}


def collect(out, settings: Settings, progress: bool = True) -> dict[str, Any]:
    """Simulates, renders and writes a data set.

    Args:
      out: folder of the data set; must not exist.
      settings: what to collect.
      progress: whether to show a bar.

    Returns:
      A summary: episodes, steps, simulated episodes, success rate, bytes, seconds.

    Raises:
      ValueError: the task is unknown, or the world has no expert.
      RuntimeError: hardly any episode succeeds.
    """
    world, settings = _checked(settings)
    start = time.perf_counter()
    tried: Counter = Counter()
    info = Info(
        cameras=world.cameras,
        proprio_dim=len(world.proprio_names),
        action_dim=len(world.action_names),
        control_hz=world.control_hz,
        robot=world.name,
        action_names=world.action_names,
        proprio_names=world.proprio_names,
        action_free=settings.action_free,
        collection=settings.to_json(),
    )
    steps = 0
    bar = tqdm.tqdm(total=settings.episodes, unit="episode", desc="collect", disable=not progress)
    with Writer(out, info) as writer, ThreadPoolExecutor() as pool, bar:
        for batch in _rounds(world, settings, tried):
            for episode in _episodes(batch, settings, pool):
                writer.write(episode)
                steps += episode.length
                bar.update()
    size = files.size(out)
    return {
        "episodes": settings.episodes,
        "steps": steps,
        "simulated": tried["all"],
        "success_rate": round(tried["success"] / tried["all"], 4),
        "bytes": size,
        "seconds": round(time.perf_counter() - start, 2),
    }


def ensure_collected(source, root) -> files.Path:
    """Returns the folder of a source's data set and collects it if it does not exist.

    Args:
      source: entry of ``config.data.sources``. Without a path, the name of the folder hashes the
        settings, the format and the code of the world, so a change of any of them makes a new one.
      root: parent folder.

    Raises:
      ValueError: the source's path holds a data set that was collected with other settings.
    """
    options = source.collect
    world, settings = _checked(
        Settings(
            env=options.env,
            tasks=tuple(options.tasks),
            episodes=options.episodes,
            noise=options.noise,
            seed=options.seed,
            action_free=source.action_free,
            keep_failures=options.keep_failures,
            intended=options.intended,
            confusion=options.confusion,
        )
    )
    name = f"{world.name}-{_fingerprint(world, settings)}"
    path = files.below(files.path(root), source.path or name)
    if not files.is_there(path, SPEC):
        with turn(path):
            if not files.is_there(path, SPEC):  # another process may have been faster
                _collect_into(path, settings)
    actual, expected = dict(Reader(path).info.collection), settings.to_json()
    if not actual:
        raise ValueError(
            f"{path} holds demonstrations that wamjax did not collect: to use them, set "
            "collect.episodes of this source in config.data.sources to 0; to collect new ones, "
            "give it another path"
        )
    if actual != expected:
        differ = {k: (actual.get(k), v) for k, v in expected.items() if actual.get(k) != v}
        raise ValueError(
            f"{path} was collected with other settings than those of config.data.sources: "
            f"{differ} (there, now). Use another path, or the same settings"
        )
    return path


def _collect_into(path: files.Path, settings: Settings) -> None:
    say(f"collecting {settings.episodes} episodes into {path}")
    try:
        collect(path, settings)
    except OSError:  # on a file system without locks two processes may collect the same
        if not (path / SPEC).exists():
            raise


def _checked(settings: Settings) -> tuple[World, Settings]:
    """Returns the world, and the settings with all tasks named."""
    world = open_world(settings.env)
    settings = settings._replace(tasks=tuple(settings.tasks) or tuple(world.tasks))
    for name in settings.tasks:
        if name not in world.tasks:
            raise ValueError(f"{world.name} has no task {name!r}{did_you_mean(name, world.tasks)}; "
                             f"there are {', '.join(world.tasks)}")  # fmt: skip
    if not world.expert:
        raise ValueError(f"{world.name} has no scripted expert to collect from")
    if settings.episodes < 1 or settings.noise < 0:
        raise ValueError(f"episodes must be positive and noise must not be negative: {settings}")
    if settings.confusion and not settings.keep_failures:
        raise ValueError(f"confusion = {settings.confusion} produces failed demonstrations, which "
                         "would be dropped: set keep_failures, or confusion = 0")  # fmt: skip
    if not 0 <= settings.confusion <= 1:
        raise ValueError(f"confusion = {settings.confusion} must be in [0, 1]")
    return world, settings


def _fingerprint(world: World, settings: Settings) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, settings.to_json()]).encode())
    code = pathlib.Path(inspect.getfile(type(world))).parent.glob("*.py")
    for file in (pathlib.Path(__file__), *sorted(code)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


class _Batch(NamedTuple):
    """Holds the episodes to keep of one call of the simulator."""

    numbers: list[int]  # numbers of the candidates in the whole collection
    rows: list[int]  # within `done`
    done: Demonstrations


def _rounds(world: World, settings: Settings, tried: Counter) -> Iterator[_Batch]:
    """Simulates candidates until every task has its share; counts them in `tried`."""
    names, count = settings.tasks, world.batch
    share = [len(range(i, settings.episodes, len(names))) for i in range(len(names))]
    missing = dict(zip(names, share, strict=True))
    key = jax.random.key(settings.seed)
    habits = {"confusion": settings.confusion} if settings.confusion else {}

    def keep(demonstrations: Demonstrations) -> list[int]:
        rows = []
        for row, name in enumerate(demonstrations.recording.tasks):
            if missing[name] > 0 and (
                demonstrations.recording.success[row] or settings.keep_failures
            ):
                missing[name] -= 1
                rows.append(row)
        return rows

    while any(missing.values()):
        unfinished = [name for name, n in missing.items() if n > 0]
        tasks = [unfinished[i % len(unfinished)] for i in range(count)]
        numbers = range(tried["all"], tried["all"] + count)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.array(numbers, np.uint32))
        rows: list[int] = []

        def draw(demonstrations: Demonstrations, rows=rows) -> list[int]:
            rows.extend(keep(demonstrations))
            return rows

        demonstrations = world.demonstrate(tasks, keys, noise=settings.noise, draw=draw, **habits)
        tried["all"] += count
        tried["success"] += int(demonstrations.recording.success.sum())
        if tried["success"] < MIN_SUCCESS * tried["all"] and not settings.keep_failures:
            raise RuntimeError(
                f"{tried['success']} of {tried['all']} episodes of {unfinished} succeed with noise "
                f"{settings.noise}; lower the noise or keep failures"
            )
        yield _Batch([numbers[row] for row in rows], rows, demonstrations)


def _episodes(batch: _Batch, settings: Settings, pool: ThreadPoolExecutor) -> Iterator[Episode]:
    """Encodes and packs the kept episodes of a batch."""
    record = batch.done.recording
    for number, row in zip(batch.numbers, batch.rows, strict=True):
        length = int(batch.done.length[row])
        actions = (batch.done.intended if settings.intended else record.actions)[row, :length]
        yield Episode(
            images={name: list(pool.map(images.encode, frames[row, : length + 1]))
                    for name, frames in record.frames.items()},
            proprio=record.proprio[row, : length + 1],
            actions=actions[:, :0] if settings.action_free else actions,
            instruction=record.instructions[row],
            success=bool(record.success[row]),
            returns=record.returns[row, :length],
            task=record.tasks[row],
            seed=number,
        )  # fmt: skip
