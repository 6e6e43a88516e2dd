"""Selects the steps of an episode, and computes their actions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from wamjax.data.ingest.reader import PAIRINGS

ENDS = ("repeat", "drop")


@dataclasses.dataclass(frozen=True)
class Steps:
    """Pairs actions with observations.

    Attributes:
      observations: int (T,) or (T + 1,): indices into the source's observations; with T + 1, the
        last is the observation after the last action.
      actions: (T, a).
      reward: (T,) or None.
    """

    observations: np.ndarray
    actions: np.ndarray
    reward: np.ndarray | None = None

    @property
    def final(self) -> bool:
        """Returns whether there is an observation after the last action."""
        return len(self.observations) > len(self.actions)


def pair(actions: np.ndarray, reward: np.ndarray | None, pairing: str, final: bool) -> Steps:
    """Pairs actions with observations, see `About.pairing`.

    Raises:
      ValueError: unknown pairing, or "after" with a single step.
    """
    count = len(actions)
    if pairing not in PAIRINGS:
        raise ValueError(f"--pairing={pairing} is not one of {', '.join(PAIRINGS)}")
    if pairing == "after":
        if count < 2:
            raise ValueError("it needs at least 2 observations, because they were stored after the "
                         "actions")  # fmt: skip
        return Steps(np.arange(count), actions[1:], None if reward is None else reward[1:])
    if pairing == "late":
        actions = actions[np.maximum(np.arange(count) - 1, 0)]
    return Steps(np.arange(count + final), actions, reward)


def no_ops(actions: np.ndarray, threshold: float, gripper: int = -1) -> np.ndarray:
    """Returns which actions do something, bool (T,); the others are no-ops.

    As published for LIBERO (OpenVLA, Cosmos Policy): an action is a no-op if the norm of all
    dimensions but the gripper is below the threshold and its gripper command equals that of the
    last action that is not a no-op. Before the first such action, the norm alone decides.
    """
    others = np.delete(actions, gripper, axis=1)
    still = np.linalg.norm(others, axis=1) < threshold
    out, last = np.ones(len(actions), bool), None
    for t, command in enumerate(actions[:, gripper]):
        out[t] = not still[t] or (last is not None and command != last)
        last = command if out[t] else last
    return out


def keep(steps: Steps, mask: np.ndarray) -> Steps:
    """Keeps the actions under `mask`, with the observations before them and a final observation.

    Raises:
      ValueError: no action is left.
    """
    if not mask.any():
        raise ValueError("none of its actions moves anything, so --no_op would drop all of them")
    observations = steps.observations[: len(mask)][mask]
    if steps.final:
        observations = np.append(observations, steps.observations[-1])
    reward = None if steps.reward is None else _merged_reward(steps.reward, mask)
    return Steps(observations, steps.actions[mask], reward)


def _merged_reward(reward: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Adds the rewards of dropped actions to the last kept action before them."""
    groups = np.maximum(np.cumsum(mask) - 1, 0)
    return np.bincount(groups, weights=reward, minlength=int(mask.sum()))


def resample(
    steps: Steps, hz: float, fps: float, deltas: Sequence[int], velocities: Sequence[int] = ()
) -> tuple[Steps, float]:
    """Lowers the rate, taking the observations nearest to the new times.

    A new action spans several old ones: deltas are summed, velocities averaged; targets and
    grippers are those of the last. Rewards are summed.

    Args:
      hz, fps: old and new rate.
      deltas, velocities: dimensions of the actions that are deltas, and those that are velocities.

    Returns:
      (steps, largest distance of an observation from its new time, in seconds).

    Raises:
      ValueError: the new rate is higher than the old one.
    """
    if fps > hz:
        raise ValueError(
            f"--fps={fps:g} is above the source's {hz:g}: a conversion can only lower the rate"
        )
    count, ratio = len(steps.actions), hz / fps
    exact = np.arange(int(np.ceil(count / ratio - 1e-9)) + 1) * ratio
    edges = np.minimum(np.floor(exact + 0.5).astype(int), count)
    edges = edges[: np.searchsorted(edges, count) + 1]
    first, last = edges[:-1], edges[1:]
    totals = np.add.reduceat(steps.actions, first, axis=0)
    actions = steps.actions[last - 1].copy()
    actions[:, list(deltas)] = totals[:, list(deltas)]
    actions[:, list(velocities)] = (totals / (last - first)[:, None])[:, list(velocities)]
    reward = None if steps.reward is None else np.add.reduceat(steps.reward, first)
    off = float(np.abs(edges[:-1] - exact[: len(first)]).max() / hz)
    observations = steps.observations[edges] if steps.final else steps.observations[first]
    return Steps(observations, actions, reward), off


def finish(steps: Steps, end: str) -> Steps:
    """Returns steps with T + 1 observations for T actions; those that have them are unchanged.

    Args:
      end: "repeat" repeats the last observation as the one after the last action; "drop" drops the
        last action and adds its reward to the one before.

    Raises:
      ValueError: unknown `end`, or "drop" with a single action.
    """
    if end not in ENDS:
        raise ValueError(f"--end={end} is not one of {', '.join(ENDS)}")
    if steps.final:
        return steps
    if end == "repeat":
        twice = np.append(steps.observations, steps.observations[-1])
        return dataclasses.replace(steps, observations=twice)
    if len(steps.actions) < 2:
        raise ValueError("it has only one action, which --end=drop would drop")
    reward = steps.reward
    if reward is not None:
        reward = np.append(reward[:-2], reward[-2] + reward[-1])
    return Steps(steps.observations, steps.actions[:-1], reward)


def returns_of(reward: np.ndarray, discount: float) -> np.ndarray:
    """Returns the discounted sums of present and future rewards, f32 (T,)."""
    out, total = np.zeros(len(reward)), 0.0
    for t in range(len(reward) - 1, -1, -1):
        total = reward[t] + discount * total
        out[t] = total
    return out.astype(np.float32)
