"""Infers from the numbers the gripper's convention, and whether actions are deltas."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

GRIPPER = re.compile(r"grip|finger|\bclaw", re.I)
CLOSED = re.compile(r"clos", re.I)  # names of values that grow when the gripper closes
# name -> (command that opens, command that closes)
CONVENTIONS = {
    "minus_opens": (-1.0, 1.0),  # robosuite, LIBERO
    "plus_opens": (1.0, -1.0),
    "one_opens": (1.0, 0.0),  # Open X-Embodiment, OpenVLA
    "zero_opens": (0.0, 1.0),  # DROID
}
SURE, DOUBT = 0.9, 0.5  # correlations: certain above the first, unclear below the second


def grippers(names: Sequence[str], actions: Sequence[np.ndarray]) -> list[int]:
    """Returns which dimensions of the actions are grippers.

    They are found by name; if no name matches, they are those with exactly two values.
    """
    by_name = [i for i, name in enumerate(names) if GRIPPER.search(name)]
    if by_name or not len(actions):
        return by_name
    x = np.concatenate(actions)
    return [i for i in range(x.shape[1]) if len(np.unique(x[:, i])) == 2]


def convention(
    states: Sequence[np.ndarray], actions: Sequence[np.ndarray], dim: int, names: Sequence[str]
) -> str:
    """Infers the convention of a gripper's commands.

    Args:
      states, actions: (T or T + 1, p) and (T, a) of some episodes.
      dim: the gripper's dimension of the actions.
      names: names of the state's dimensions. Fingers move apart when the gripper opens; a value
        whose name contains "clos" grows when it closes.

    Returns:
      a name of `CONVENTIONS`; "continuous" if the gripper has more than two commands; "unclear" if
      it has two, but the fingers do not show which one opens.
    """
    commands = np.concatenate([a[:, dim] for a in actions])
    low, high = commands.min(), commands.max()
    ends = np.isclose(commands, low, atol=0.05) | np.isclose(commands, high, atol=0.05)
    if np.mean(ends) < 0.9 or high - low < 0.5:
        return "continuous"
    signed = low < -0.5
    side = opens(states, actions, dim, names)
    if side == 0:
        return "unclear"
    if signed:
        return "plus_opens" if side > 0 else "minus_opens"
    return "one_opens" if side > 0 else "zero_opens"


def opens(
    states: Sequence[np.ndarray], actions: Sequence[np.ndarray], dim: int, names: Sequence[str]
) -> int:
    """Returns which commands open a gripper: 1 = the larger ones, -1 = the smaller ones, 0 =
    unclear. Arguments as for `convention`."""
    fingers = [i for i, name in enumerate(names) if GRIPPER.search(name)]
    if not fingers:
        return 0
    # Two fingers are mirror images with opposite signs, so add up their distances from the middle.
    signs = np.array([-1.0 if CLOSED.search(names[i]) else 1.0 for i in fingers])
    widths = [np.abs(s[: len(a), fingers]) @ signs
              for s, a in zip(states, actions, strict=True)]  # fmt: skip
    moves = np.concatenate([np.diff(w) for w in widths])
    commands = np.concatenate([a[: len(w) - 1, dim] for w, a in zip(widths, actions, strict=True)])
    motion = np.abs(moves) > max(0.05 * np.abs(moves).max(initial=0.0), 1e-9)
    if not motion.any():
        return 0
    middle = (commands.min() + commands.max()) / 2
    agreement = np.mean(np.sign(moves[motion]) * np.sign(commands[motion] - middle))
    return int(np.sign(agreement)) if abs(agreement) > DOUBT else 0


def switch(x: np.ndarray, old: str, new: str) -> np.ndarray:
    """Converts commands of a gripper to another convention."""
    opens, closes = CONVENTIONS[old]
    to_open, to_close = CONVENTIONS[new]
    return to_close + (x - closes) / (opens - closes) * (to_open - to_close)


def action_kind(
    states: Sequence[np.ndarray], actions: Sequence[np.ndarray], leave_out: Sequence[int] = ()
) -> str:
    """Returns whether actions are targets in the units of the state, or changes of it.

    An absolute action is near the next state; a delta correlates with the change to it.

    Args:
      states, actions: (T or T + 1, p) and (T, a) of some episodes.
      leave_out: dimensions of the actions to ignore, such as grippers.

    Returns:
      "absolute", "delta" or "unclear".
    """
    n = [min(len(a), len(s) - 1) for s, a in zip(states, actions, strict=True)]
    if not sum(n):
        return "unclear"
    after = np.concatenate([s[1 : k + 1] for s, k in zip(states, n, strict=True)])
    change = np.concatenate([np.diff(s, axis=0)[:k] for s, k in zip(states, n, strict=True)])
    x = np.concatenate([a[:k] for a, k in zip(actions, n, strict=True)])
    dims = [i for i in range(x.shape[1]) if i not in leave_out and np.ptp(x[:, i]) > 1e-6]
    if not dims or len(x) < 8:
        return "unclear"
    near = np.mean([_best(x[:, i], after, True) for i in dims])
    moves = np.mean([_best(x[:, i], change, False) for i in dims])
    if near > SURE and near > moves:
        return "absolute"
    return "delta" if moves > max(DOUBT, near) or (moves > near and near < DOUBT) else "unclear"


def _best(x: np.ndarray, columns: np.ndarray, same_units: bool) -> float:
    """Returns the largest correlation with a column, optionally only with those of like values."""
    best = 0.0
    for column in columns.T:
        if same_units and abs(x.mean() - column.mean()) > 0.5 * max(np.ptp(column), np.ptp(x)):
            continue
        best = max(best, correlation(x, column))
    return best


def together(
    states: Sequence[np.ndarray], actions: Sequence[np.ndarray], lag: int, leave_out: Sequence[int]
) -> float:
    """Returns how well actions correlate with the change of the state `lag` steps later.

    The correlation is averaged over the dimensions of the actions, each paired with the dimension
    of the state that fits it best at any of the three lags -1, 0, 1.
    """
    best = []
    for shift in (-1, 0, 1):
        pairs = [_shifted(np.diff(s, axis=0)[: len(a)], a, shift)
                 for s, a in zip(states, actions, strict=True)]  # fmt: skip
        change, x = (np.concatenate(part) for part in zip(*pairs, strict=True))
        dims = [i for i in range(x.shape[1]) if i not in leave_out]
        rows = [[abs(correlation(x[:, i], column)) for column in change.T] for i in dims]
        best.append(np.array(rows))
    if not best[0].size:
        return 0.0
    partner = np.max(best, axis=0).argmax(axis=1)
    return float(np.mean(best[lag + 1][np.arange(len(partner)), partner]))


def _shifted(change: np.ndarray, x: np.ndarray, lag: int) -> tuple[np.ndarray, np.ndarray]:
    n = min(len(change), len(x))
    first, last = max(0, -lag), n - max(0, lag)
    return change[first + lag : last + lag], x[first:last]


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Returns Pearson's correlation, or 0 if one of the two is constant."""
    if len(x) < 3 or np.ptp(x) < 1e-9 or np.ptp(y) < 1e-9:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
