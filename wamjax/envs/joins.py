"""Joins consecutive chunks of actions when planning takes time, counted in control steps.

A plan made from the observation at step t arrives at step t + delay. The ways to continue are:

    sync      stand still until the plan arrives, then execute `execute` actions of it
    switch    continue with the old plan and switch to the new one at the current step
    blend     the same, but with a linear transition while both plans have actions
    ensemble  average all plans that cover a step, with slightly more weight on older ones
              (temporal ensembling of ACT, arXiv 2304.13705)
    prefix    tell the policy which actions will be executed in the meantime, so that it continues
              from them (training-time real-time chunking, arXiv 2608.01880)

All but the first observe every `execute` steps and never stop. Before the first plan the robot
waits, and the plan starts at its first action. Delays are counted in steps, not seconds, so results
do not depend on the machine.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wamjax.config import did_you_mean

WAYS = ("sync", "switch", "blend", "ensemble", "prefix")
AGE = 0.01  # ACT: the i-th oldest plan has weight exp(-AGE i)


class Ahead(NamedTuple):
    """Holds the next actions of a robot in case no new plan arrives.

    Attributes:
      actions: actions of the next steps.
      plans: number of plans averaged in each step; 0 where the robot would stand still.
    """

    actions: Float[Array, "e h a"]
    plans: Int[Array, " h"]


@dataclasses.dataclass(frozen=True)
class Join:
    """Defines how chunks are joined under a delay; hashable.

    Attributes:
      way: one of `WAYS`.
      delay: control steps from an observation to the first action of its plan.
      hold: action dimensions that keep their last command while the robot stands still; the
        others are 0, as are all before the first plan.
    """

    way: str = "sync"
    delay: int = 0
    hold: tuple[bool, ...] = ()

    def span(self, execute: int) -> int:
        """Returns the control steps from one observation to the next."""
        return execute + self.delay if self.way == "sync" else execute

    def check(self, execute: int, chunk: int) -> None:
        """Checks that chunks can be joined in this way.

        Raises:
          ValueError: the way does not exist, or chunks are too short; names the key of the config.
        """
        if self.way not in WAYS:
            raise ValueError(f"config.eval.join = {self.way!r} must be one of {WAYS}"
                             f"{did_you_mean(self.way, WAYS)}")  # fmt: skip
        if self.delay < 0:
            raise ValueError(f"config.eval.delay = {self.delay} must not be negative")
        least, most = (1, chunk) if self.way == "sync" else (self.delay, chunk - self.delay)
        if not least <= execute <= most:
            raise ValueError(
                f"config.eval.execute = {execute} must lie in {least} to {most}: plans of {chunk} "
                f"actions (data.chunk) are joined by {self.way!r} {self.delay} steps late"
            )

    def begin(self, episodes: int, chunk: int, width: int) -> Ahead:
        """Returns the state before the first plan; "sync" ignores `chunk`."""
        steps = 1 if self.way == "sync" else chunk
        return Ahead(jnp.zeros((episodes, steps, width)), jnp.zeros(steps, jnp.int32))

    def committed(self, ahead: Ahead) -> tuple[Array, Array] | None:
        """Returns the actions (e, delay, a) executed while the next plan is made, and their counts
        (e,), for policies that continue from them; see `wamjax.wam.prefix.Prefix`."""
        if self.way != "prefix" or not self.delay:
            return None
        count = jnp.where(ahead.plans[0] > 0, self.delay, 0)
        actions = ahead.actions[:, : self.delay]
        return actions, jnp.broadcast_to(count, actions.shape[:1])

    def __call__(
        self, ahead: Ahead, chunk: Float[Array, "e j a"], execute: int
    ) -> tuple[Float[Array, "e s a"], Ahead]:
        """Joins a plan made from the current observation, which arrives `delay` steps later.

        Returns:
          (the `span` actions until the next observation; the actions ahead after them).
        """
        if self.way == "sync":
            actions = chunk[:, :execute]
            if self.delay:
                wait = jnp.repeat(ahead.actions, self.delay, axis=1)
                actions = jnp.concatenate([wait.astype(actions.dtype), actions], axis=1)
            return actions, Ahead(self._still(actions), ahead.plans)
        old, plans = ahead.actions.astype(chunk.dtype), ahead.plans
        start = plans[0] == 0  # nothing was executed meanwhile, so the whole plan is still ahead
        late = jnp.roll(chunk, self.delay, axis=1)
        chunk = jnp.where(start, late, chunk)
        index = jnp.arange(chunk.shape[1])
        share = jnp.where(index < self.delay, 0.0, self._share(plans, index))
        merged = jnp.where(share[:, None] == 1, chunk, old + share[:, None] * (chunk - old))
        still = jnp.repeat(self._still(merged), execute, axis=1)
        count = jnp.concatenate([plans + 1, jnp.zeros(execute, jnp.int32)])[execute:]
        rest = jnp.concatenate([merged[:, execute:], still], axis=1)
        return merged[:, :execute], Ahead(rest, count)

    def _share(self, plans: Int[Array, " h"], index: Int[Array, " h"]) -> Float[Array, " h"]:
        """Returns the share of the new plan in each step; 1 where there is no other plan."""
        if self.way == "blend":
            overlap = jnp.sum(plans > 0) - self.delay
            share = (index - self.delay + 1) / (overlap + 1)
        elif self.way == "ensemble":
            weight = jnp.exp(-AGE * plans)  # weight of a plan after this many others
            share = weight / ((1 - weight * np.exp(-AGE)) / (1 - np.exp(-AGE)))
        else:
            return jnp.ones(index.shape)
        return jnp.where(plans > 0, share, 1.0)

    def _still(self, actions: Float[Array, "e s a"]) -> Float[Array, "e 1 a"]:
        """Returns actions that stand still after the given ones."""
        hold = np.array(self.hold or [False] * actions.shape[2])
        return jnp.where(hold, actions[:, -1:], 0.0)


SYNC = Join()


def jerk(
    actions: Float[np.ndarray, "e t a"], steps: Int[np.ndarray, " e"], hold: tuple[bool, ...]
) -> Float[np.ndarray, " e"]:
    """Returns the jerk of the first `steps` actions of each episode: 0 for too few actions.

    It is the mean length of the second difference of motions, which are displacements per step, so
    it is proportional to the jerk of the commanded path. Dimensions that hold are not motions; if
    all do, the actions are positions, and it is the mean length of their third difference.
    """
    moves = ~np.array(hold or [False] * actions.shape[2])
    order = 2 if moves.any() else 3
    path = np.asarray(actions)[..., moves] if moves.any() else np.asarray(actions)
    change = np.linalg.norm(np.diff(path, n=order, axis=1), axis=2)
    counted = np.arange(change.shape[1]) < np.asarray(steps)[:, None] - order
    return (change * counted).sum(axis=1) / np.maximum(counted.sum(axis=1), 1)
