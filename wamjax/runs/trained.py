"""What was trained, ready to act: a run's objective, parameters and normalisers as one pytree."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from wamjax.data import layout as layouts
from wamjax.data.transforms import Resize
from wamjax.envs.world import composite
from wamjax.training import state as states
from wamjax.training.checkpoint import find, restore_params
from wamjax.training.step import compute_cast

LATENCY_CALLS = 50


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "normalizers", "costs", "milliseconds"),
    meta_fields=("objective", "mode", "cameras", "sizes", "resize", "layout", "words"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """A policy that is ready to act: objective, parameters in compute precision, normalisers.

    A pytree, so that one compiled program rolls out every checkpoint of a variant.

    Attributes:
      mode: how it acts; None: its own way.
      cameras: that it looks through in a world, in the order of its pictures.
      sizes, resize: of each camera's pictures, and how others become such; see
        `transforms.Resize`. '' = they are.
      layout: how they make the picture, see `data.layout`; '' = side by side.
      words: that have ids of their own, see `tokens.Vocabulary`.
      costs, milliseconds: of being on each rung of the ladder, in units of the return and in time;
        of mode "adaptive", see `priced`.
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
        """Whether it chooses anew in every state how to act."""
        return (self.mode or "").partition(":")[0] == "adaptive"

    @property
    def prefix_max(self) -> int:
        """Most first actions of a chunk that it may be given; 0: it takes no prefix."""
        return self.objective.prefix_max

    def actions(self, params, observation, key, prefix=None):
        """(b, j, a) in robot units; traceable.

        Args:
          prefix: see `protocols.Policy.policy`.
        """
        more = {} if prefix is None else {"prefix": prefix}
        if self.adapts:
            more["costs"] = self.costs
        return self.objective.policy(
            params, self.normalizers, observation, key, self.mode, **more
        )

    def decide(self, observation, key):
        """The actions, and how far up the ladder each example went: (actions, {"rung": (b,)})."""
        done = self.objective.decide(
            self.params, self.normalizers, observation, key, self.mode, self.costs
        )
        return done.actions, {"rung": done.rung}

    def propose(self, observation, key, count: int, mode: str | None = None):
        """Several chunks for each observation, (b, n, j, a); see `protocols.Policy.propose`.

        Args:
          mode: its own by default.
        """
        return self.objective.propose(
            self.params, self.normalizers, observation, key, count, mode or self.mode
        )

    def see(self, images):
        """Pictures of a world's cameras as one picture, in the sizes that the policy takes."""
        if self.resize:
            images = Resize(dict(self.sizes), self.resize).forward({"images": images})["images"]
        if self.layout:
            return layouts.parse(self.layout).join(images)
        return composite(images, self.cameras)

    def act(self, observation, key, prefix=None):
        """The same with its own parameters."""
        return self.actions(self.params, observation, key, prefix)


def load(
    workdir,
    step: int | None = None,
    mode: str | None = None,
    planner: str | None = None,
    ema: bool | None = None,
):
    """Restores a run.

    Args:
      ema: the moving average, or not; by default if the run has one.
      planner: another run, of the same sizes, whose world model and value function plan for it.

    Returns:
      (`Policy`, the config it was trained with, the step of its checkpoint).

    Raises:
      FileNotFoundError, ValueError: there is no checkpoint, or the planner does not go with it.
    """
    from wamjax import wam
    from wamjax.data import tokens
    from wamjax.data.normalize import check_same, normalizers

    found = find(workdir, step)
    spec = wam.spec_of(found.statistics["spec"])
    objective = wam.build(found.config, spec)
    wam.check_kind(objective, found.config.objective.name, workdir, wanted="policy")
    params, config, statistics, step = restore_params(workdir, step, ema)
    config.data.cameras = tuple(spec.cameras)  # those of the data, if the config names none
    params = _for_acting(objective, params, config)
    normalise = normalizers(statistics, config.data.normalization)
    if planner:
        other, _, _ = load(planner)
        objective = objective.with_planner(other.objective)
        check_same(normalise, other.normalizers, f"the planner {planner}")
        tokens.check_same(spec.words, other.words, f"the planner {planner}")
        params = params | {"planner": other.params}
    sizes = tuple(spec.cameras.items())
    objective.check_mode(mode)
    acting = Policy(
        objective, params, normalise, mode, cameras=tuple(spec.cameras), sizes=sizes,
        resize=spec.resize, layout=spec.layout, words=spec.words,
    )  # fmt: skip
    return priced(acting), config, step


@functools.partial(jax.jit, static_argnums=0)
def _init(objective, key):
    return objective.init(key)


def untrained(policy: Policy, config: ConfigDict) -> Policy:
    """The same policy before training: fresh parameters."""
    params = _init(policy.objective, states.key(config.seed, "init"))
    return dataclasses.replace(policy, params=_for_acting(policy.objective, params, config))


def priced(policy: Policy) -> Policy:
    """A policy of mode "adaptive:PRICE" with the costs of its rungs: the price of a millisecond, in
    units of the return, times the median milliseconds that each rung takes here for one robot. One
    of another mode is as it was.

    Raises:
      ValueError: it has no ladder.
    """
    kind, _, price = (policy.mode or "").partition(":")
    if kind != "adaptive":
        return policy
    if not (rungs := len(policy.objective.rungs)):
        raise ValueError(f"mode {policy.mode!r}: this policy has no ladder to climb; train a "
                         "judge, see experiments/configs/judge.py")  # fmt: skip
    if not price:
        raise ValueError("mode 'adaptive' needs the price of a millisecond in units of the return, "
                         "as adaptive:0.01")  # fmt: skip
    observation, key = observe_example(policy, 1), jax.random.key(0)

    def timed(rung: int) -> float:
        forced = np.where(np.arange(rungs) <= rung, -1e6 * np.arange(rungs), 1e9)
        forced = dataclasses.replace(policy, costs=jnp.asarray(forced, jnp.float32))
        return 1e3 * _seconds(lambda: _act(forced, observation, key))

    milliseconds = np.array([timed(rung) for rung in range(rungs)], np.float32)
    return dataclasses.replace(
        policy, costs=jnp.asarray(float(price) * milliseconds), milliseconds=milliseconds
    )


@jax.jit  # compiled once for all checkpoints of a variant
def _act(policy: Policy, observation, key):
    return policy.act(observation, key)


def _seconds(call, calls: int = LATENCY_CALLS) -> float:
    """Median of a call that returns an array, until it is on the host; after one that compiles."""
    np.asarray(call())
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        np.asarray(call())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def latency(policy: Policy, config: ConfigDict, calls: int = LATENCY_CALLS) -> dict[str, float]:
    """Milliseconds of one jitted call of the policy at batch 1, input to actions on the host."""
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
    """A blank observation in the shapes that the policy takes."""
    spec = policy.objective.observation_spec(size)
    return {k: jnp.zeros(s.shape, s.dtype) for k, s in spec.items()}


def _for_acting(objective, params, config: ConfigDict):
    """Parameters cast for compute and laid out for sampling, once, outside of any loop."""
    params = jax.device_put(params, jax.local_devices()[0])  # fresh ones as restored ones
    return prepare(params, objective, config.precision.compute)


@functools.partial(jax.jit, static_argnames=("objective", "dtype"))
def prepare(params, objective, dtype: str):
    """Parameters cast for compute and laid out for sampling: one program for every run of one
    kind, as an evaluation of many checkpoints loads them."""
    return objective.prepare(compute_cast(params, dtype))
