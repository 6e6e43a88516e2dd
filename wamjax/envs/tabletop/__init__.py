"""Implements the embedded world: a gripper, coloured blocks and two zones on a table, in pure JAX.

The robot sees two 64x64 cameras (one above the table, one above the gripper that moves with it) and
its proprioception (x, y, z, finger opening, holding), and is instructed in words: reach, push, pick
or place, with the object chosen by colour and the place by colour or position. It acts at 10 Hz
with (dx, dy, dz, grip) in [-1, 1].

    state = reset(key, task_id("pick_red"), Shift.none())
    state = step(state, expert(state, key, 0.0), Shift.none())
    observe(state, Shift.none()), success(state)

Everything is a pure function of arrays: vmap it over episodes, scan it over time, jit it with a
policy inside. `rollout` does so for a policy, `expert_episodes` for the scripted expert; `SHIFTS`
are differences between training and test.

Files, in reading order: world (physics), tasks (scenes, success), render (cameras), expert,
shifts, rollout.
"""

from wamjax.envs.tabletop.expert import expert
from wamjax.envs.tabletop.render import (
    CAMERAS,
    composite,
    observe,
    render,
    render_episode,
    render_episodes,
)
from wamjax.envs.tabletop.rollout import MAX_STEPS, Episodes, Rollout, expert_episodes, rollout
from wamjax.envs.tabletop.shifts import SHIFTS, Shift
from wamjax.envs.tabletop.tasks import (
    LABELLED,
    TASKS,
    TURNING,
    VIDEO_ONLY,
    instruction,
    instruction_tokens,
    reset,
    step,
    success,
    task_id,
)
from wamjax.envs.tabletop.world import ACTION_DIM, CONTROL_HZ, PROPRIO_DIM, State

__all__ = [
    "ACTION_DIM",
    "CAMERAS",
    "CONTROL_HZ",
    "LABELLED",
    "MAX_STEPS",
    "PROPRIO_DIM",
    "SHIFTS",
    "TASKS",
    "TURNING",
    "VIDEO_ONLY",
    "Episodes",
    "Rollout",
    "Shift",
    "State",
    "composite",
    "expert",
    "expert_episodes",
    "instruction",
    "instruction_tokens",
    "observe",
    "render",
    "render_episode",
    "render_episodes",
    "reset",
    "rollout",
    "step",
    "success",
    "task_id",
]
