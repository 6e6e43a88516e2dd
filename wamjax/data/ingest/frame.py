"""Makes actions relative to the state they are chosen in, or absolute, as ``--relative`` says.

    0:3            actions 0, 1, 2 minus states 0, 1, 2
    0:3=7:10       ... minus states 7, 8, 9
    0:3=0:3*0.05   ... in units of 0.05

Rotations are composed instead of subtracted, and need the same representation on both sides: the
relative one turns the state's rotation into the action's, about the robot's fixed axes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.spatial.transform import Rotation

from wamjax.data.ingest import rotations

_MOVE = re.compile(r"(\d+):(\d+)(?:=(\d+):(\d+))?(?:\*([\d.eE+-]+))?")


@dataclasses.dataclass(frozen=True)
class Move:
    """Pairs dimensions of the actions with those of the state that they are relative to.

    Attributes:
      action, state: (start, end).
      scale: unit of the relative action; for a rotation, of its angle.
      rotation: representation if it is a rotation, else ''.
    """

    action: tuple[int, int]
    state: tuple[int, int]
    scale: float = 1.0
    rotation: str = ""


def parse(
    text: str,
    flag: str,
    sizes: tuple[int, int],
    blocks: Mapping[tuple[int, int], str],
    state_blocks: Mapping[tuple[int, int], str],
) -> Move:
    """Parses a move.

    Args:
      sizes: dimensions of (action, state).
      blocks, state_blocks: the rotations among them, see `terms.rotation_blocks`.

    Raises:
      ValueError: the syntax is wrong, a dimension does not exist, or a rotation is cut or lacks an
        equal one on the other side.
    """
    match = _MOVE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{flag}: {text!r} is not A:B, A:B=C:D or A:B=C:D*SCALE")
    a, b, c, d = (None if x is None else int(x) for x in match.groups()[:4])
    action, state = (a, b), (a, b) if c is None else (c, d)
    if not (a < b <= sizes[0] and state[0] < state[1] <= sizes[1]) or b - a != state[1] - state[0]:
        raise ValueError(
            f"{flag}: {text!r} does not fit actions of size {sizes[0]} and states of size "
            f"{sizes[1]}"
        )
    kind = blocks.get(action, "")
    cut = [k for k in blocks if k != action and k[0] < b and a < k[1]]
    if cut or kind != state_blocks.get(state, ""):
        raise ValueError(f"{flag}: {text!r} cuts through a rotation, or is one on one side only: "
                         f"rotations are {dict(blocks)} of the actions, {dict(state_blocks)} of "
                         "the state")  # fmt: skip
    return Move(action, state, float(match[5] or 1.0), kind)


def relative(actions: np.ndarray, states: np.ndarray, moves: Sequence[Move]) -> np.ndarray:
    """Makes absolute actions (T, a) relative to states (T or T + 1, p)."""
    out = np.array(actions, np.float64)
    for move in moves:
        x, s = _blocks(actions, states, move)
        if move.rotation:
            turn = rotations.read(x, move.rotation) * rotations.read(s, move.rotation).inv()
            turn = Rotation.from_rotvec(turn.as_rotvec() / move.scale)
            out[:, slice(*move.action)] = rotations.write(turn, move.rotation)
        else:
            out[:, slice(*move.action)] = (x - s) / move.scale
    return out


def absolute(actions: np.ndarray, states: np.ndarray, moves: Sequence[Move]) -> np.ndarray:
    """Inverts `relative`."""
    out = np.array(actions, np.float64)
    for move in moves:
        x, s = _blocks(actions, states, move)
        if move.rotation:
            turn = rotations.read(x, move.rotation).as_rotvec() * move.scale
            result = Rotation.from_rotvec(turn) * rotations.read(s, move.rotation)
            out[:, slice(*move.action)] = rotations.write(result, move.rotation)
        else:
            out[:, slice(*move.action)] = x * move.scale + s
    return out


def _blocks(actions: np.ndarray, states: np.ndarray, move: Move) -> tuple[np.ndarray, np.ndarray]:
    return actions[:, slice(*move.action)], states[: len(actions), slice(*move.state)]
