"""Computes schedules that do not belong to one process: arrays of levels, noise first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def karras(steps: int, first: float, last: float, rho: float = 7.0) -> np.ndarray:
    """Returns EDM's grid: `steps` noise-to-signal ratios, even in ratio^(1/rho), and then 0.

    A solver makes `steps` network calls on it, the last one at `last`, and returns its x0. EDM goes
    from 80 to 0.002; Cosmos Policy's `last` is 4.

    Returns:
      (steps + 1,) float64. For a flow, see `RectifiedFlow.level_of`.
    """
    if steps < 1 or not first > last > 0:
        raise ValueError(
            f"{steps} steps from {first} to {last}: needs steps and a positive descent"
        )
    ends = first ** (1 / rho), last ** (1 / rho)
    return np.append(np.linspace(*ends, steps) ** rho, 0.0)


def churned(ratios: np.ndarray, churn: float, low: float = 0.0, high: float = np.inf) -> np.ndarray:
    """Returns the grid of EDM's stochastic sampler (Algorithm 2): noise is added before each step.

    Args:
      ratios: (n + 1,) grid.
      churn: S_churn of the paper, shared by the n steps.
      low, high: S_tmin and S_tmax; no noise is added outside this range.

    Returns:
      (2 n + 1,): each level of `ratios` but the last is followed by the higher one that noise is
      added up to.
    """
    ratios = np.asarray(ratios, np.float64)
    starts = ratios[:-1]
    gamma = np.where((low <= starts) & (starts <= high), min(churn / len(starts), 2**0.5 - 1), 0.0)
    return np.append(np.stack([starts, starts * (1 + gamma)], axis=1).ravel(), ratios[-1])


def space_timesteps(timesteps: int, sections: str | Sequence[int]) -> np.ndarray:
    """Returns which timesteps a respaced DDPM keeps, as in OpenAI's and DiT's public code.

    Args:
      timesteps: length of the full chain.
      sections: how many to keep in each of equally long sections, as numbers or as "10,15,20"; or
        "ddimN" for every k-th timestep from 0, with k such that there are N.

    Returns:
      ascending integers.
    """
    if isinstance(sections, str) and sections.startswith("ddim"):
        want = int(sections.removeprefix("ddim"))
        for stride in range(1, timesteps + 1):
            if len(kept := np.arange(0, timesteps, stride)) == want:
                return kept
        raise ValueError(f"no stride takes {want} of {timesteps} timesteps ({sections!r})")
    if isinstance(sections, str):
        sections = [int(part) for part in sections.split(",")]
    kept, start = [], 0
    for i, count in enumerate(sections):
        size = timesteps // len(sections) + (i < timesteps % len(sections))
        if not 1 <= count <= size:
            raise ValueError(f"a section of {size} timesteps cannot keep {count} ({sections!r})")
        stride = (size - 1) / (count - 1) if count > 1 else 0.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride  # summed, not multiplied, since rounding decides ties
        start += size
    return np.array(kept)
