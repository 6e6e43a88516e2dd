"""A video of episodes, with the frames that were predicted beside the real ones."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from wamjax.envs.tabletop import Rollout, instruction_tokens, task_id
from wamjax.envs.tabletop.world import proprio
from wamjax.viz import video


def save(
    policy, config: ConfigDict, done: Rollout, tasks: Sequence[str], path: pathlib.Path
) -> None:
    """What happened, and beside it what was predicted at each new plan.

    Variants that do not predict video get the real frames only.

    Args:
      policy: a `wamjax.evaluate.Policy`.
      config: its ``eval`` part says how the episodes went.
      done: the episodes, recorded.
      tasks: of each episode.
    """
    real = np.asarray(done.frames)  # (e, steps, H, W, 3)
    predicted = _predictions(policy, config, done, jnp.asarray([task_id(t) for t in tasks]))
    clips = []
    for episode in range(len(tasks)):
        end = min(int(done.steps[episode]) + 5, real.shape[1])
        clip = real[episode, :end]
        if predicted is not None:
            clip = video.side_by_side(predicted[episode, :end], clip)
        clips.append(clip)
    success = [bool(s) for s in np.asarray(done.success)]
    video.save_mp4(video.grid(clips, success=success, titles=list(tasks)), path, fps=8)


def _predictions(policy, config: ConfigDict, done: Rollout, ids) -> np.ndarray | None:
    """For each step the frame that was predicted for it, at least ``frame_stride`` steps earlier.

    (e, steps, H, W, 3), from the newest plan that is old enough, held until the next one is.
    """
    objective = policy.objective
    if not objective.imagines:
        return None
    frames = np.asarray(done.frames)
    episodes, steps = frames.shape[:2]
    tokens = jnp.asarray(instruction_tokens(config.data.instruction_length))[ids]
    imagine = jax.jit(
        lambda params, observation, key: objective.imagine(
            params, policy.normalizers, observation, key
        )
    )
    stride = config.data.frame_stride
    shown = np.full_like(frames, 127)  # grey until the first prediction is due
    for start in range(0, steps, config.eval.execute):
        observation = {
            "video": jnp.asarray(frames[:, start : start + 1]),
            "proprio": jax.vmap(proprio)(jax.tree.map(lambda x, t=start: x[:, t], done.states)),
            "instruction": tokens,
        }
        future = np.asarray(imagine(policy.params, observation, jax.random.key(start)))
        for offset in range(min(config.eval.execute, steps - stride - start)):
            index = min(1 + offset // stride, future.shape[1] - 1)
            shown[:, start + stride + offset] = future[:, index]
    return shown
