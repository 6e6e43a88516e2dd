"""Runs the tabletop as a `World`, with the policy inside its compiled program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from wamjax.envs.joins import SYNC, Join
from wamjax.envs.tabletop.render import CAMERAS, render_episode
from wamjax.envs.tabletop.rollout import MAX_STEPS, NO_SHIFT, Rollout, expert_episodes, rollout
from wamjax.envs.tabletop.shifts import SHIFTS, Shift
from wamjax.envs.tabletop.tasks import (
    LABELLED,
    TASKS,
    TURNING,
    VIDEO_ONLY,
    instruction,
    task_id,
)
from wamjax.envs.tabletop.world import CONTROL_HZ, State
from wamjax.envs.world import Demonstrations, Dials, Recording, recorded

FRAMES = 512  # frames rendered per call


class Tabletop:
    """Implements `wamjax.envs.world.World` for `wamjax.envs.tabletop`."""

    name = "tabletop"
    tasks = {task: instruction(task) for task in TASKS}
    cameras = CAMERAS
    proprio_names = ("x", "y", "z", "opening", "holding")
    action_names = ("dx", "dy", "dz", "grip")
    control_hz = CONTROL_HZ
    max_steps = MAX_STEPS
    dials = tuple(field.name for field in dataclasses.fields(Shift))
    shifts = {name: {d: v for d, v in vars(shift).items() if v} for name, shift in SHIFTS.items()}
    expert = True
    restores = True
    jitted = True
    batch = 128
    versions: Mapping[str, str] = {"jax": jax.__version__}

    def roll_out(
        self,
        policy: Callable,
        tasks: Sequence[str],
        keys: Array,
        *,
        shift: Dials,
        told: Mapping[str, Array],
        cameras: tuple[str, ...] = tuple(CAMERAS),
        max_steps: int = MAX_STEPS,
        execute: int = 8,
        record: bool | int = False,
        join: Join = SYNC,
        start: State | None = None,
        save: bool = False,
    ) -> Recording:
        """Implements `World.roll_out` as one jitted program.

        Frames are rendered afterwards from the states, so recording needs no other program.
        """
        del cameras  # cameras that the policy ignores are not rendered
        ids, dials = _ids(tasks), Shift(**shift)
        done = rollout(policy, keys, ids, dials, told, max_steps, execute, join, start)
        done = jax.tree.map(np.asarray, done)
        count, frames = recorded(record, len(tasks)), None
        if count:
            everywhere = list(np.ndindex(count, max_steps + 1))
            frames = _draw(done.states, everywhere, count, dials)
        done = done if save else done._replace(states=None)
        return _recording(tasks, done)._replace(frames=frames)

    def demonstrate(
        self,
        tasks: Sequence[str],
        keys: Array,
        *,
        noise: float,
        draw: Callable | None = None,
        confusion: float = 0.0,
    ) -> Demonstrations:
        """Implements `World.demonstrate`; renders no frame after the end of an episode."""
        wrong = None
        if confusion:
            dice = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 2)))(keys)
            wrong = dice < confusion
        episodes = expert_episodes(keys, _ids(tasks), noise, mistaken=wrong)
        episodes = jax.tree.map(np.asarray, episodes)
        record = _recording(
            tasks,
            Rollout(
                success=episodes.success,
                steps=episodes.steps,
                rewards=episodes.rewards,
                returns=episodes.returns,
                actions=episodes.actions,
                proprio=episodes.proprio,
                states=None,
                extras=None,
            ),
        )
        expert_runs = Demonstrations(record, episodes.intended, episodes.length)
        rows = np.arange(len(tasks)) if draw is None else np.asarray(draw(expert_runs), int)
        where = [(row, t) for row in rows for t in range(episodes.length[row] + 1)]
        frames = _draw(episodes.states, where, len(tasks))
        return expert_runs._replace(recording=record._replace(frames=frames))


class Turntable(Tabletop):
    """Puts the robot at a table that turns under the blocks, so observations become outdated."""

    name = "turntable"
    tasks = {task: instruction(task) for task in TURNING}


class Recombined(Tabletop):
    """The tabletop with three tasks more, whose instructions recombine the words of five others."""

    name = "recombined"
    tasks = {task: instruction(task) for task in (*LABELLED, *VIDEO_ONLY)}


def _ids(tasks: Sequence[str]) -> np.ndarray:
    return np.array([task_id(name) for name in tasks], np.int32)


def _recording(tasks: Sequence[str], done: Rollout) -> Recording:
    return Recording(
        tasks=tuple(tasks),
        instructions=tuple(instruction(task) for task in tasks),
        success=done.success,
        steps=done.steps,
        rewards=done.rewards,
        returns=done.returns,
        actions=done.actions,
        proprio=done.proprio,
        frames=None,
        extras=done.extras,
        crashes=np.zeros(len(tasks), int),
        states=done.states,
    )


def _draw(
    states: State, where: Sequence[tuple[int, int]], count: int, shift: Shift = NO_SHIFT
) -> dict[str, np.ndarray]:
    """Renders frames (count, t, h, w, 3) of the first `count` episodes where (row, time) says,
    FRAMES at a time; black elsewhere."""
    shape = count, states.task.shape[1]
    frames = {name: np.zeros((*shape, *size, 3), np.uint8) for name, size in CAMERAS.items()}
    if not where:
        return frames
    rows, times = np.array(where).T
    for start in range(0, len(rows), FRAMES):
        # The last call is padded, for one shape and one compilation.
        at = np.minimum(np.arange(start, start + FRAMES), len(rows) - 1)
        chosen: Any = jax.tree.map(lambda x: jnp.asarray(x[rows[at], times[at]]), states)  # noqa: B023
        for name, drawn in render_episode(chosen, shift).items():
            frames[name][rows[at], times[at]] = np.asarray(drawn)
    return frames
