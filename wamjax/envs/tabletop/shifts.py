"""Defines shifts between training and test: one dial per kind of difference.

A shift is data, not code: its dials are numbers under jit and vmap, so one compiled program serves
every shift at every strength. Zero on every dial is the training distribution.
"""

from __future__ import annotations

import dataclasses
import functools

import jax


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "camera_offset",
        "colours",
        "lighting",
        "distractors",
        "unseen_positions",
        "action_delay",
    ),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Shift:
    """Holds the dials. The direction or tint that a dial scales is drawn once per episode, at
    reset.

    Attributes:
      camera_offset: how far both cameras are displaced, in table units (the table is 2 wide), in a
        random direction. Pictures only.
      colours: largest random change of each colour channel (of 1) of every block, zone and the
        table: hue and brightness move together. Pictures only.
      lighting: strength of a random dimming or brightening and of a brightness gradient across
        the view (0.5: from half to half again as bright, and as much between the edges of the
        view). Pictures only.
      distractors: 0, 1 or 2 extra blocks, in colours that training never shows.
      unseen_positions: probability that the blocks start in the strip of the table that is
        reserved, that is, never used at dial 0.
      action_delay: control steps between an action being sent and being executed (0 to 4).
    """

    camera_offset: float | jax.Array = 0.0
    colours: float | jax.Array = 0.0
    lighting: float | jax.Array = 0.0
    distractors: int | jax.Array = 0
    unseen_positions: float | jax.Array = 0.0
    action_delay: int | jax.Array = 0

    @staticmethod
    def none() -> Shift:
        """Returns zero dials: the training distribution."""
        return Shift()


SHIFTS: dict[str, Shift] = {
    "none": Shift.none(),
    "camera_offset": Shift(camera_offset=0.12),
    "colours": Shift(colours=0.25),
    "lighting": Shift(lighting=0.5),
    "distractors": Shift(distractors=2),
    "unseen_positions": Shift(unseen_positions=1.0),
    "action_delay": Shift(action_delay=1),
}
"""Every dial alone, at a strength at which the expert still solves the tasks."""
