"""Evaluates a served policy in a world, over the network, and reports its success rate.

    python -m wamjax.drive --server=ws://127.0.0.1:8000 --episodes=96
    python -m wamjax.drive --server=ws://127.0.0.1:8000 --tasks=pick_red --execute=4 --robots=16
    python -m wamjax.drive --server=ws://127.0.0.1:8000 --env=turntable --join=prefix --delay=4

The scenes are those of `wamjax.evaluate` with the same seed, so you can compare the two rates; only
the policy's sampling noise differs. A delay is counted in control steps, however long the server
takes. With --join=prefix the server is told the actions that are executed in the meantime. Prints
json.
"""

from __future__ import annotations

import json
import pathlib

import jax
from absl import app, flags

from wamjax import cli
from wamjax.config import did_you_mean
from wamjax.envs.joins import WAYS
from wamjax.envs.world import open_world


def define_flags() -> None:
    """Defines the flags; not on import, since several entry points share flag names."""
    flags.DEFINE_string("server", "ws://127.0.0.1:8000", "address of wamjax.serve")
    flags.DEFINE_string("key_file", "", "file with the server's API key")
    flags.DEFINE_string("env", "tabletop", "world, by name or as module:attribute")
    flags.DEFINE_list("tasks", [], "tasks; by default those whose instruction the policy knows")
    flags.DEFINE_integer("episodes", 96, "total number of episodes over all tasks", lower_bound=1)
    flags.DEFINE_integer("robots", 16, "episodes at once, one client each", lower_bound=1)
    flags.DEFINE_integer("execute", 2, "actions executed of each chunk", lower_bound=1)
    flags.DEFINE_enum("join", "sync", WAYS, "how one chunk follows another, as config.eval.join")
    flags.DEFINE_integer(
        "delay",
        0,
        "control steps between an observation and its chunk, as config.eval.delay",
        lower_bound=0,
    )
    flags.DEFINE_integer("max_steps", None, "control steps per episode; the world's by default")
    flags.DEFINE_integer("seed", 0, "seed of the scenes, as config.eval.seed")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    options = flags.FLAGS
    from wamjax.serving import remote

    # The program of the world waits for the server inside a step; it must not hold up our thread.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    world = open_world(options.env)
    if unknown := [task for task in options.tasks if task not in world.tasks]:
        raise app.UsageError(f"--tasks={','.join(unknown)}: no such task"
                             f"{did_you_mean(unknown[0], world.tasks)}")  # fmt: skip
    key = (
        pathlib.Path(options.key_file).expanduser().read_text().strip()
        if options.key_file
        else None
    )
    robots = remote.Robots(options.robots, options.server, None, key)
    join = robots.join(options.join, options.delay)
    late = {} if (join.way, join.delay) == ("sync", 0) else {"join": join}
    instructions = robots.metadata.get("instructions", ())
    tasks = options.tasks or [t for t, text in world.tasks.items() if text in instructions]
    report = remote.evaluate(
        robots, world, tasks or list(world.tasks), options.episodes, options.seed, options.robots,
        execute=options.execute, max_steps=options.max_steps or world.max_steps, **late,
    )  # fmt: skip
    robots.close()
    print(json.dumps(report | {"tasks": tasks, "join": options.join, "delay": options.delay}))


if __name__ == "__main__":
    cli.run(main, define_flags)
