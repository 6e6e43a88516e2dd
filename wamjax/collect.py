"""Collects demonstrations of the tabletop world's scripted expert as a data set.

    python -m wamjax.collect --out=DIR --episodes=600 --tasks=pick_red,reach_red --noise=0.1

The same settings give the identical data set. An interrupted collection leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from absl import app, flags

from wamjax.data import images
from wamjax.data.records import Episode, Reader, Writer, turn
from wamjax.data.spec import FORMAT_VERSION, Info
from wamjax.envs import tabletop
from wamjax.metrics import say

CANDIDATES = 128  # episodes simulated by one call; part of what makes a data set reproducible
FRAMES = 512  # frames drawn by one call
MIN_SUCCESS = 0.02  # the collection gives up below this success rate
ACTION_NAMES = ("dx", "dy", "dz", "grip")
PROPRIO_NAMES = ("x", "y", "z", "opening", "holding")


class Settings(NamedTuple):
    """What decides the content of a data set.

    Attributes:
      tasks: names; equally many episodes of each (to within one).
      episodes: in total.
      noise: standard deviation of the noise on the expert's actions, in action units.
      seed: of everything.
      action_free: store video and proprio only.
      keep_failures: keep episodes that fail, too.
      intended: label a step with what the expert meant to do there, not with what noise made of it:
        noise then shows how to recover (as in DART, arXiv 1703.09327) and is not itself imitated.
    """

    tasks: tuple[str, ...] = tabletop.TASKS
    episodes: int = 600
    noise: float = 0.0
    seed: int = 0
    action_free: bool = False
    keep_failures: bool = False
    intended: bool = False

    def to_json(self) -> dict[str, Any]:
        """As stored in ``spec.json``."""
        return {"env": "tabletop", **self._asdict(), "tasks": list(self.tasks)}


def collect(out, settings: Settings, progress: bool = True) -> dict[str, Any]:
    """Simulates, draws and writes a data set.

    Args:
      out: its folder; must not exist.
      settings: what to collect.
      progress: whether to show a bar.

    Returns:
      A summary: episodes, steps, simulated episodes, success rate, bytes, seconds.

    Raises:
      KeyError: an unknown task.
      RuntimeError: hardly any episode succeeds.
    """
    _check(settings)
    begin = time.perf_counter()
    tried: Counter = Counter()
    info = Info(
        cameras=tabletop.CAMERAS,
        proprio_dim=tabletop.PROPRIO_DIM,
        action_dim=tabletop.ACTION_DIM,
        control_hz=tabletop.CONTROL_HZ,
        robot="tabletop",
        action_names=ACTION_NAMES,
        proprio_names=PROPRIO_NAMES,
        action_free=settings.action_free,
        collection=settings.to_json(),
    )
    steps = 0
    bar = tqdm.tqdm(total=settings.episodes, unit="episode", desc="collect", disable=not progress)
    with Writer(out, info) as writer, ThreadPoolExecutor() as pool, bar:
        for batch in _rounds(settings, tried):
            for episode in _episodes(batch, settings, pool):
                writer.write(episode)
                steps += episode.length
                bar.update()
    size = sum(f.stat().st_size for f in pathlib.Path(out).iterdir())
    return {
        "episodes": settings.episodes,
        "steps": steps,
        "simulated": tried["all"],
        "success_rate": round(tried["success"] / tried["all"], 4),
        "bytes": size,
        "seconds": round(time.perf_counter() - begin, 2),
    }


def ensure_collected(source, root) -> pathlib.Path:
    """The folder of a source's data set, collected now unless it was before.

    Args:
      source: entry of ``config.data.sources``. Without a path, the folder is named by a hash of the
        settings, the format and the code of the world, so that a change of any makes a new one.
      root: what the folder is below.

    Raises:
      ValueError: at the source's path is a data set that was collected with other settings.
    """
    ask = source.collect
    settings = Settings(
        tasks=tuple(ask.tasks) or tabletop.TASKS,
        episodes=ask.episodes,
        noise=ask.noise,
        seed=ask.seed,
        action_free=source.action_free,
        keep_failures=ask.keep_failures,
        intended=ask.intended,
    )
    _check(settings)
    path = pathlib.Path(root) / (source.path or f"tabletop-{_fingerprint(settings)}")
    if not path.exists():
        with turn(path):
            if not path.exists():  # another process may have been faster
                _collect_into(path, settings)
    have, want = dict(Reader(path).info.collection), settings.to_json()
    if have != want:
        differ = {k: (have.get(k), v) for k, v in want.items() if have.get(k) != v}
        raise ValueError(
            f"{path} was collected with other settings than config.data.sources asks for: "
            f"{differ} (there, asked). Remove the folder, or use another path"
        )
    return path


def _collect_into(path: pathlib.Path, settings: Settings) -> None:
    say(f"collecting {settings.episodes} episodes into {path}")
    try:
        collect(path, settings)
    except OSError:  # on a file system without locks two processes may collect the same
        if not (path / "spec.json").exists():
            raise


def _check(settings: Settings) -> None:
    for name in settings.tasks:
        tabletop.task_id(name)  # an unknown task raises, with a suggestion
    if settings.episodes < 1 or settings.noise < 0:
        raise ValueError(f"episodes must be positive and noise not negative: {settings}")


def _fingerprint(settings: Settings) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, settings.to_json()]).encode())
    here = pathlib.Path(__file__)
    for file in (here, *sorted(pathlib.Path(tabletop.__file__).parent.glob("*.py"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


class _Batch(NamedTuple):
    """Episodes of one call of the simulator that are to be kept."""

    numbers: list[int]  # of the candidates, over the whole collection
    rows: list[int]  # within `record`
    record: tabletop.Episodes  # numpy


def _rounds(settings: Settings, tried: Counter) -> Iterator[_Batch]:
    """Simulates candidates until every task has its share; counts them in `tried`."""
    names = settings.tasks
    share = [len(range(i, settings.episodes, len(names))) for i in range(len(names))]
    missing = dict(zip(names, share, strict=True))
    key = jax.random.key(settings.seed)
    while any(missing.values()):
        wanted = [name for name, n in missing.items() if n > 0]
        tasks = [wanted[i % len(wanted)] for i in range(CANDIDATES)]
        numbers = range(tried["all"], tried["all"] + CANDIDATES)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.array(numbers, np.uint32))
        ids = np.array([tabletop.task_id(name) for name in tasks], np.int32)
        record = jax.tree.map(np.asarray, tabletop.expert_episodes(keys, ids, settings.noise))
        rows = []
        for row, name in enumerate(tasks):
            if missing[name] > 0 and (record.success[row] or settings.keep_failures):
                missing[name] -= 1
                rows.append(row)
        tried["all"] += CANDIDATES
        tried["success"] += int(record.success.sum())
        if tried["success"] < MIN_SUCCESS * tried["all"] and not settings.keep_failures:
            raise RuntimeError(
                f"{tried['success']} of {tried['all']} episodes of {wanted} succeed with noise "
                f"{settings.noise}; lower the noise or keep failures"
            )
        yield _Batch([numbers[row] for row in rows], rows, record)


def _episodes(batch: _Batch, settings: Settings, pool: ThreadPoolExecutor) -> Iterator[Episode]:
    """Draws, encodes and packs what is kept of a batch."""
    record = batch.record
    lengths = record.length[batch.rows]
    where = [(row, t) for row, n in zip(batch.rows, lengths, strict=True) for t in range(n + 1)]
    pictures = _pictures(record.states, where, pool)
    start = 0
    for number, row, length in zip(batch.numbers, batch.rows, lengths, strict=True):
        task = tabletop.TASKS[record.states.task[row, 0]]
        actions = (record.intended if settings.intended else record.actions)[row, :length]
        yield Episode(
            images={name: all_[start : start + length + 1] for name, all_ in pictures.items()},
            proprio=record.proprio[row, : length + 1],
            actions=actions[:, :0] if settings.action_free else actions,
            instruction=tabletop.instruction(task),
            success=bool(record.success[row]),
            returns=record.returns[row, :length],
            task=task,
            seed=number,
        )
        start += length + 1


def _pictures(
    states: tabletop.State, where: Sequence[tuple[int, int]], pool: ThreadPoolExecutor
) -> Mapping[str, list[bytes]]:
    """Encoded pictures of the states at (row, time): only these are drawn, FRAMES at a time."""
    rows, times = np.array(where).T
    encoded: dict[str, list] = {name: [] for name in tabletop.CAMERAS}
    for start in range(0, len(rows), FRAMES):
        # The last call is filled up, so that there is one shape and one compilation.
        at = np.minimum(np.arange(start, start + FRAMES), len(rows) - 1)
        some = jax.tree.map(lambda x: x[rows[at], times[at]], states)  # noqa: B023
        drawn = tabletop.render_episode(some, tabletop.Shift.none())
        for name, out in encoded.items():
            frames = np.asarray(drawn[name])[: len(rows) - start]
            # Submitting leaves the pool encoding while the next frames are drawn.
            out.extend(pool.submit(images.encode, frame) for frame in frames)
    return {name: [future.result() for future in out] for name, out in encoded.items()}


def define_flags() -> None:
    """Not on import: several entry points define flags of the same names."""
    flags.DEFINE_string("out", None, "folder of the data set; must not exist")
    flags.DEFINE_alias("workdir", "out")
    flags.DEFINE_list("tasks", [], f"tasks, all by default: {', '.join(tabletop.TASKS)}")
    flags.DEFINE_integer("episodes", 600, "episodes in total, equally many of each task")
    flags.DEFINE_float("noise", 0.0, "standard deviation of the noise on the expert's actions")
    flags.DEFINE_integer("seed", 0, "the same seed gives the identical data set")
    flags.DEFINE_bool("intended", False, "label steps with the expert's intention, not the noise")
    flags.DEFINE_bool("action_free", False, "store video and proprio, but no actions")
    flags.DEFINE_bool("keep_failures", False, "keep episodes that fail, too")
    flags.mark_flag_as_required("out")


def main(argv: list[str]) -> None:
    """Entry point for absl."""
    values = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; did you forget a '--'?")
    settings = Settings(
        tasks=tuple(values.tasks) or tabletop.TASKS,
        episodes=values.episodes,
        noise=values.noise,
        seed=values.seed,
        action_free=values.action_free,
        keep_failures=values.keep_failures,
        intended=values.intended,
    )
    summary = collect(values.out, settings)
    index = Reader(values.out).index
    for task, count in sorted(Counter(index["tasks"]).items()):
        print(f"  {task:32} {count:6} episodes")
    print(", ".join(f"{k} {v}" for k, v in summary.items()))
    print(f"wrote {values.out}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
