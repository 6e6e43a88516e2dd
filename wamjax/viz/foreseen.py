"""Makes videos of episodes with predicted frames next to the real ones."""

from __future__ import annotations

import jax
import numpy as np
from ml_collections import ConfigDict

from wamjax import files
from wamjax.envs.world import Recording
from wamjax.viz import video


def save(policy, config: ConfigDict, done: Recording, path: files.Path) -> None:
    """Writes a video of the episodes, next to the frames that each new plan predicted.

    Variants that do not predict video show only the real frames.

    Args:
      policy: a `wamjax.runs.trained.Policy`.
      config: its ``eval`` part describes how the episodes ran.
      done: recorded episodes.
    """
    real = policy.see(done.frames)  # (e, steps, H, W, 3)
    predicted = _predictions(policy, config, done, real)
    clips = []
    for episode in range(len(done.tasks)):
        end = min(int(done.steps[episode]) + 5, real.shape[1])
        clip = real[episode, :end]
        if predicted is not None:
            clip = video.side_by_side(predicted[episode, :end], clip)
        clips.append(clip)
    success = [bool(s) for s in done.success]
    video.save_mp4(video.grid(clips, success=success, titles=list(done.tasks)), path, fps=8)


def _predictions(
    policy, config: ConfigDict, done: Recording, frames: np.ndarray
) -> np.ndarray | None:
    """Returns the frame predicted for each step at least ``frame_stride`` steps earlier.

    (e, steps, H, W, 3), from the newest plan that is old enough, held until the next one.
    """
    from wamjax.runs.closed_loop import told

    objective = policy.objective
    if not objective.imagines:
        return None
    steps = frames.shape[1]
    words = told(config, policy, done.instructions)
    stride = config.data.frame_stride
    shown = np.full_like(frames, 127)  # grey until the first prediction is due
    for start in range(0, steps, config.eval.execute):
        observation = {
            "video": frames[:, start : start + 1], "proprio": done.proprio[:, start], **words
        }  # fmt: skip
        future = np.asarray(_imagine(policy, observation, jax.random.key(start)))
        for offset in range(min(config.eval.execute, steps - stride - start)):
            index = min(1 + offset // stride, future.shape[1] - 1)
            shown[:, start + stride + offset] = future[:, index]
    return shown


@jax.jit  # compiled once for all checkpoints of a variant
def _imagine(policy, observation, key):
    return policy.objective.imagine(policy.params, policy.normalizers, observation, key)
