"""Runs a served policy in a world: each episode is a robot with its own connection."""

from __future__ import annotations

import concurrent.futures
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from wamjax.envs.joins import Join, jerk
from wamjax.envs.world import World
from wamjax.serving.client import Client
from wamjax.training import state as states
from wamjax.viz.intervals import wilson
from wamjax.wam.prefix import Prefix


class Robots:
    """Holds clients that act for all episodes of a world at once.

    Attributes:
      round_trips: milliseconds of each request.
    """

    def __init__(self, count: int, host: str, port: int | None, api_key: str | None = None):
        self._clients = [Client(host, port, api_key) for _ in range(count)]
        self._pool = concurrent.futures.ThreadPoolExecutor(count)
        self._instructions: Sequence[str] = ()
        about = self._clients[0].metadata
        self._shape = about["horizon"], about["actions"]["size"]
        self.metadata, self.round_trips = about, []
        self._function = functools.partial(_ask, self)

    def join(self, way: str, delay: int) -> Join:
        """Returns a way to join the chunks of this server's policy under a delay, see `joins.Join`.

        Raises:
          ValueError: the policy accepts fewer committed actions than "prefix" needs.
        """
        longest = int(self.metadata.get("prefix", 0))
        if way == "prefix" and delay > longest:
            raise ValueError(
                f"--join=prefix --delay={delay}: the policy takes at most {longest} committed "
                "actions (prefix in its metadata): lower --delay"
            )
        return Join(way, delay, tuple(self.metadata["actions"].get("hold", ())))

    def roll_out(self, world: World, tasks: Sequence[str], keys: Any, **options: Any):
        """Calls `World.roll_out` with the server's actions; each robot runs one episode."""
        self._instructions = [world.tasks[task] for task in tasks]
        cameras = tuple(self.metadata["cameras"])
        policy = jax.tree_util.Partial(self._function)
        told = {"episode": np.arange(len(tasks))}  # a world may run only some episodes at a time
        return world.roll_out(policy, tasks, keys, shift={}, told=told, cameras=cameras, **options)

    def close(self) -> None:
        """Closes the connections."""
        self._pool.shutdown()
        for client in self._clients:
            client.close()

    def act(
        self,
        images: dict[str, np.ndarray],
        proprio: np.ndarray,
        episodes: np.ndarray,
        prefix: Prefix | None = None,
    ) -> np.ndarray:
        """Returns actions (e, j, a) for each robot's observation, after its committed ones.

        Args:
          episodes: episode numbers: indices into the tasks of `roll_out`.
        """

        def ask(i: int) -> np.ndarray:
            pictures = {name: np.asarray(x[i]) for name, x in images.items()}
            request = {"images": pictures, "proprio": np.asarray(proprio[i]),
                       "instruction": self._instructions[int(episodes[i])]}  # fmt: skip
            if prefix is not None:
                request["prefix"] = np.asarray(prefix.actions[i])[: int(prefix.count[i])]
            start = time.perf_counter()
            actions = self._clients[i].infer(request)["actions"]
            self.round_trips.append(1e3 * (time.perf_counter() - start))
            return actions

        return np.stack(list(self._pool.map(ask, range(len(proprio)))))


def evaluate(
    robots: Robots, world: World, tasks: Sequence[str], episodes: int, seed: int, batch: int,
    **options: Any,
) -> dict[str, Any]:
    """Returns success over the episodes of `wamjax.evaluate`, with the tasks in equal shares.

    Args:
      robots: at least `batch` robots.
      seed: seed of the scenes: ``config.eval.seed``.
      batch: number of episodes at once.
      options: ``execute``, ``max_steps`` and ``join`` of `World.roll_out`.
    """  # fmt: skip
    total = -(-episodes // len(tasks)) * len(tasks)
    outcomes: list[int] = []
    jerks: list[float] = []
    hold = tuple(robots.metadata["actions"].get("hold", ()))
    for start in range(0, total, batch):
        numbers = np.arange(start, start + batch)
        keys = jax.vmap(functools.partial(states.key, seed, "evaluate"))(numbers)
        names = [tasks[i % len(tasks)] for i in numbers]
        recording = robots.roll_out(world, names, keys, **options)
        outcomes += np.asarray(recording.success, int).tolist()
        jerks += jerk(recording.actions, recording.steps, hold).tolist()
    outcomes = outcomes[:total]
    p50, p99 = np.percentile(robots.round_trips, (50, 99))
    interval = wilson(sum(outcomes), total)
    return {
        "success_rate": sum(outcomes) / total, "interval": [interval.low, interval.high],
        "episodes": total, "outcomes": "".join(map(str, outcomes)),
        "jerk": float(np.mean(jerks[:total])),
        "round_trip_ms": {"p50": float(p50), "p99": float(p99)},
        "bundle": robots.metadata.get("bundle"),
    }  # fmt: skip


def _ask(robots: Robots, observation: dict[str, Any], keys: Any, prefix: Any = None) -> Any:
    del keys  # the server draws the noise
    prefixes = () if prefix is None else (Prefix(*prefix),)
    size = len(observation["proprio"])
    shape = jax.ShapeDtypeStruct((size, *robots._shape), np.float32)
    images = observation["images"]
    pictures = {name: images[name] for name in robots.metadata["cameras"]}
    return jax.experimental.io_callback(
        robots.act, shape, pictures, observation["proprio"], observation["episode"], *prefixes,
        ordered=True,
    )  # fmt: skip
