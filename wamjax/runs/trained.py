"""Loads a trained policy: a run's objective, parameters and normalizers as one pytree."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from wamjax.console import say
from wamjax.data import layout as layouts
from wamjax.data.transforms import Resize
from wamjax.envs.world import composite
from wamjax.training import state as states
from wamjax.training.checkpoint import find, restore_params
from wamjax.training.step import compute_cast
from wamjax.wam import ladder

LATENCY_CALLS = 50


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "normalizers", "costs", "milliseconds"),
    meta_fields=("objective", "mode", "cameras", "sizes", "resize", "layout", "words"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """Holds a policy that is ready to act: objective, parameters in compute precision, normalizers.

    It is a pytree, so one compiled program rolls out every checkpoint of a variant.

    Attributes:
      mode: how it acts; None: its default.
      cameras: cameras that it uses in a world, in the order of its pictures.
      sizes, resize: size of each camera's pictures, and how other sizes are resized, see
        `transforms.Resize`; '' = they have these sizes already.
      layout: arrangement of the cameras in the picture, see `data.layout`; '' = side by side.
      words: words with ids of their own, see `tokens.Vocabulary`.
      costs, milliseconds: cost of each rung of the ladder, in units of the return, and its time; in
        mode "adaptive" only, see `priced`.
    """

    objective: Any
    params: Any
    normalizers: dict[str, Any]
    mode: str | None = None
    cameras: tuple[str, ...] = ()
    sizes: tuple[tuple[str, tuple[int, int]], ...] = ()
    resize: str = ""
    layout: str = ""
    words: tuple[str, ...] = ()
    costs: Any = None
    milliseconds: Any = None

    @property
    def adapts(self) -> bool:
        """Whether it decides in every state anew how to act."""
        return (self.mode or "").partition(":")[0] == "adaptive"

    @property
    def prefix_max(self) -> int:
        """Maximum number of committed first actions of a chunk; 0: it takes no prefix."""
        return self.objective.prefix_max

    def actions(self, params, observation, key, prefix=None, budget=None):
        """Returns the actions of `plan`; traceable."""
        return self.plan(params, observation, key, prefix, budget)[0]

    def plan(self, params, observation, key, prefix=None, budget=None):
        """Returns actions (b, j, a) in robot units, and the rung that each plan reached (b,), None
        if the policy does not adapt; traceable.

        Args:
          prefix: see `protocols.Policy.policy`.
          budget: milliseconds that each plan may take, (b,), if the policy adapts; those of its
            mode apply as well.
        """
        arguments = params, self.normalizers, observation, key, self.mode
        if not self.adapts:
            options = {} if prefix is None else {"prefix": prefix}
            return self.objective.policy(*arguments, **options), None
        if prefix is not None:
            raise ValueError(f"mode {self.mode!r} takes no prefix")
        costs = self.costs
        if budget is not None:
            costs = ladder.affordable(costs, self.milliseconds, budget)
        decision = self.objective.decide(*arguments, costs)
        return decision.actions, decision.rung

    def decide(self, observation, key):
        """Returns the actions and the rung that each example reached: (actions, {"rung": (b,)})."""
        decision = self.objective.decide(
            self.params, self.normalizers, observation, key, self.mode, self.costs
        )
        return decision.actions, {"rung": decision.rung}

    def propose(self, observation, key, count: int, mode: str | None = None):
        """Returns several chunks for each observation, (b, n, j, a); see
        `protocols.Policy.propose`.

        Args:
          mode: the policy's own mode by default.
        """
        return self.objective.propose(
            self.params, self.normalizers, observation, key, count, mode or self.mode
        )

    def see(self, images):
        """Joins the pictures of a world's cameras into one, in the sizes that the policy takes."""
        if self.resize:
            images = Resize(dict(self.sizes), self.resize).forward({"images": images})["images"]
        if self.layout:
            return layouts.parse(self.layout).join(images)
        return composite(images, self.cameras)

    def act(self, observation, key, prefix=None):
        """Returns `actions` with the policy's own parameters."""
        return self.actions(self.params, observation, key, prefix)


def load(
    workdir,
    step: int | None = None,
    mode: str | None = None,
    planner: str | None = None,
    ema: bool | None = None,
):
    """Restores the policy of a run.

    Args:
      workdir: folder of the run.
      step: checkpoint; the newest by default.
      mode: how the policy acts; its default mode by default.
      ema: whether to use the moving average; by default if the run has one.
      planner: another run, of the same sizes, whose world model and value function plan for this
        one.

    Returns:
      (`Policy`, the config of the run, the step of its checkpoint).

    Raises:
      FileNotFoundError, ValueError: there is no checkpoint, or the planner does not match.
    """
    from wamjax import wam
    from wamjax.data import tokens
    from wamjax.data.normalize import check_same, normalizers

    checkpoint = find(workdir, step)
    spec = wam.spec_of(checkpoint.statistics["spec"])
    objective = wam.build(checkpoint.config, spec)
    wam.check_kind(objective, checkpoint.config.objective.name, workdir, wanted="policy")
    params, config, statistics, step = restore_params(workdir, step, ema)
    config.data.cameras = tuple(spec.cameras)  # the config may name none
    params = _for_acting(objective, params, config)
    normalise = normalizers(statistics, config.data.normalization)
    if planner:
        planning, _, _ = load(planner)
        objective = objective.with_planner(planning.objective)
        check_same(normalise, planning.normalizers, f"the planner {planner}")
        tokens.check_same(spec.words, planning.words, f"the planner {planner}")
        params = params | {"planner": planning.params}
    sizes = tuple(spec.cameras.items())
    objective.check_mode(mode)
    policy = Policy(
        objective, params, normalise, mode, cameras=tuple(spec.cameras), sizes=sizes,
        resize=spec.resize, layout=spec.layout, words=spec.words,
    )  # fmt: skip
    return priced(policy), config, step


@functools.partial(jax.jit, static_argnums=0)
def _init(objective, key):
    return objective.init(key)


def untrained(policy: Policy, config: ConfigDict) -> Policy:
    """Returns the same policy with fresh parameters, as before training."""
    params = _init(policy.objective, states.key(config.seed, "init"))
    return dataclasses.replace(policy, params=_for_acting(policy.objective, params, config))


def priced(policy: Policy) -> Policy:
    """Adds the costs of the rungs to a policy of mode "adaptive:PRICE" or "adaptive:PRICE:BUDGET";
    returns others unchanged.

    The cost of a rung is the price of a millisecond, in units of the return, times the median
    milliseconds that the rung takes on this machine for one robot. Rungs beyond the budget are
    never climbed; it warns if even the first rung takes longer.

    Raises:
      ValueError: the policy has no ladder, or the mode names no price.
    """
    if not policy.adapts:
        return policy
    if not (rungs := len(policy.objective.rungs)):
        raise ValueError(f"mode {policy.mode!r}: this policy has no ladder to climb; train a "
                         "judge, see experiments/configs/judge.py")  # fmt: skip
    terms = ladder.terms(policy.mode)
    observation, key = observe_example(policy, 1), jax.random.key(0)

    def timed(rung: int) -> float:
        forced = np.where(np.arange(rungs) <= rung, -1e6 * np.arange(rungs), 1e9)
        forced = dataclasses.replace(policy, costs=jnp.asarray(forced, jnp.float32))
        return 1e3 * _seconds(lambda: _act(forced, observation, key))

    milliseconds = np.array([timed(rung) for rung in range(rungs)], np.float32)
    if milliseconds[0] > terms.budget:
        say(f"the first rung alone takes {milliseconds[0]:.1f} ms here, more than the budget of "
            f"{terms.budget:g} ms in mode {policy.mode!r}")  # fmt: skip
    costs = ladder.affordable(terms.price * milliseconds, milliseconds, terms.budget)
    return dataclasses.replace(policy, costs=costs, milliseconds=milliseconds)


@jax.jit  # one compiled program for all checkpoints of a variant
def _act(policy: Policy, observation, key):
    return policy.act(observation, key)


def _seconds(call, calls: int = LATENCY_CALLS) -> float:
    """Returns the median seconds of a call, until its array is on the host; a first call
    compiles."""
    np.asarray(call())
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        np.asarray(call())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def latency(policy: Policy, config: ConfigDict, calls: int = LATENCY_CALLS) -> dict[str, float]:
    """Returns milliseconds of one jitted call at batch 1, from input to actions on the host."""
    observation = observe_example(policy, 1)
    key = jax.random.key(0)
    np.asarray(_act(policy, observation, key))
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        np.asarray(_act(policy, observation, key))
        times.append(1e3 * (time.perf_counter() - start))
    return {"p50": float(np.percentile(times, 50)), "p99": float(np.percentile(times, 99))}


def observe_example(policy: Policy, size: int) -> dict[str, jax.Array]:
    """Returns a blank observation in the policy's shapes."""
    spec = policy.objective.observation_spec(size)
    return {k: jnp.zeros(s.shape, s.dtype) for k, s in spec.items()}


def _for_acting(objective, params, config: ConfigDict):
    """Casts parameters for compute and lays them out for sampling, once, outside of any loop."""
    params = jax.device_put(params, jax.local_devices()[0])  # also fresh parameters
    return prepare(params, objective, config.precision.compute)


@functools.partial(jax.jit, static_argnames=("objective", "dtype"))
def prepare(params, objective, dtype: str):
    """Casts parameters for compute and lays them out for sampling, in one program per kind of run;
    an evaluation loads many checkpoints."""
    return objective.prepare(compute_cast(params, dtype))
