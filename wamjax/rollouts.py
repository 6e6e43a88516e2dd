"""Saves a trained policy's rollouts as a data set, for example to train a planner.

    python -m wamjax.rollouts --workdir=runs/cosmos --out=DIR --episodes=600

Keeps every episode, failures included, with the actions as sent and the achieved return: a source
with ``rollout=True`` of `wamjax.config.source`. The episodes differ from those that the run is
evaluated on. The same arguments give the same data set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags
from ml_collections import ConfigDict

from wamjax import cli, files
from wamjax.data import images
from wamjax.data.records import Episode, Writer
from wamjax.data.spec import Info
from wamjax.envs.world import SETTLE, Recording, World, open_world
from wamjax.runs import closed_loop, trained
from wamjax.training import state as states


def record(
    policy: trained.Policy,
    config: ConfigDict,
    out: str | os.PathLike,
    tasks: tuple[str, ...],
    episodes: int,
    seed: int,
    about: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the episodes of a policy.

    Args:
      policy: see `trained.load`.
      config: its ``eval`` part sets how episodes run; its seed is reserved for evaluation.
      out: folder of the data set; must not exist.
      tasks: tasks, in turn.
      episodes, seed: number of episodes, and their seed.
      about: stored in the data set, to recognize it by.

    Returns:
      {"episodes", "steps", "success_rate"}.

    Raises:
      ValueError: the seed is that of the evaluation.
    """
    if seed == config.eval.seed:
        raise ValueError(
            f"seed {seed} makes the episodes that config.eval.seed evaluates on: train on others"
        )
    world = open_world(config.eval.env)
    info = Info(
        cameras={name: world.cameras[name] for name in config.data.cameras or world.cameras},
        proprio_dim=len(world.proprio_names),
        action_dim=len(world.action_names),
        control_hz=world.control_hz,
        robot=world.name,
        action_names=world.action_names,
        proprio_names=world.proprio_names,
        collection={"tasks": list(tasks), "episodes": episodes, "seed": seed, **(about or {})},
    )
    steps = success = 0
    bar = tqdm.tqdm(total=episodes, unit="episode", desc="rollouts", disable=not progress)
    with Writer(out, info) as writer, bar:
        for episode in _episodes(policy, config, world, tasks, episodes, seed):
            writer.write(episode)
            steps, success = steps + episode.length, success + episode.success
            bar.update()
    return {"episodes": episodes, "steps": steps, "success_rate": success / episodes}


def _episodes(
    policy, config: ConfigDict, world: World, tasks, episodes: int, seed: int
) -> Iterator[Episode]:
    size = min(config.eval.batch_size, episodes)  # of one program; the last one is filled up
    key = jax.vmap(lambda i: states.key(seed, "evaluate", i))
    for start in range(0, episodes, size):
        numbers = np.arange(start, start + size)
        names = [tasks[i % len(tasks)] for i in numbers]
        keys = key(jnp.asarray(numbers))
        recording = closed_loop.play(policy, config, world, names, keys, {}, record=True)
        for row, number in enumerate(numbers[: episodes - start]):
            yield episode_of(recording, row, seed=int(number), cameras=tuple(config.data.cameras))


def episode_of(
    done: Recording, row: int, seed: int, cameras: Sequence[str], settle: int = SETTLE
) -> Episode:
    """Returns one episode of a recording, cut a few steps after success like demonstrations."""
    success, end = bool(done.success[row]), done.returns.shape[1]
    length = min(int(done.steps[row]) + settle, end) if success else end
    return Episode(
        images={name: [images.encode(p) for p in done.frames[name][row, : length + 1]]
                for name in cameras or done.frames},
        proprio=done.proprio[row, : length + 1],
        actions=done.actions[row, :length],
        instruction=done.instructions[row],
        success=success,
        returns=done.returns[row, :length],
        task=done.tasks[row],
        seed=seed,
    )  # fmt: skip


def define_flags() -> None:
    """Defines the flags; not on import, since several entry points share flag names."""
    flags.DEFINE_string("workdir", None, "run whose policy acts", required=True)
    flags.DEFINE_string("out", None, "folder of the data set; must not exist", required=True)
    flags.DEFINE_integer(
        "episodes", 600, "total number of episodes, cycling through the evaluation tasks"
    )
    flags.DEFINE_integer(
        "seed", 1000, "seed of the episodes; must differ from that of the evaluation"
    )
    flags.DEFINE_integer("step", None, "checkpoint; the newest by default")
    flags.DEFINE_string("mode", None, "mode of the policy; its own by default")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    options = flags.FLAGS
    policy, config, step = trained.load(options.workdir, options.step, options.mode)
    tasks = tuple(config.eval.tasks or open_world(config.eval.env).tasks)
    about = {"run": files.name(options.workdir), "step": int(step), "mode": options.mode}
    summary = record(policy, config, options.out, tasks, options.episodes, options.seed, about)
    print(", ".join(f"{k} {v:g}" for k, v in summary.items()))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    cli.run(main, define_flags, huge_pages=True)
