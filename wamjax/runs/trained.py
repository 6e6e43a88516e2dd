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
    data_fields=("params", "normalizers"),
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
        return self.objective.policy(
            params, self.normalizers, observation, key, self.mode, **more
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
    acting = Policy(
        objective, params, normalise, mode, cameras=tuple(spec.cameras), sizes=sizes,
        resize=spec.resize, layout=spec.layout, words=spec.words,
    )  # fmt: skip
    return acting, config, step


def untrained(policy: Policy, config: ConfigDict) -> Policy:
    """The same policy before training: fresh parameters."""
    params = jax.jit(policy.objective.init)(states.key(config.seed, "init"))
    return dataclasses.replace(policy, params=_for_acting(policy.objective, params, config))


def latency(policy: Policy, config: ConfigDict, calls: int = LATENCY_CALLS) -> dict[str, float]:
    """Milliseconds of one jitted call of the policy at batch 1, input to actions on the host."""
    observation = observe_example(policy, 1)
    act = jax.jit(policy.actions)
    key = jax.random.key(0)
    np.asarray(act(policy.params, observation, key))
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        np.asarray(act(policy.params, observation, key))
        times.append(1e3 * (time.perf_counter() - start))
    return {"p50": float(np.percentile(times, 50)), "p99": float(np.percentile(times, 99))}


def observe_example(policy: Policy, size: int) -> dict[str, jax.Array]:
    """A blank observation in the shapes that the policy takes."""
    spec = policy.objective.observation_spec(size)
    return {k: jnp.zeros(s.shape, s.dtype) for k, s in spec.items()}


def _for_acting(objective, params, config: ConfigDict):
    """Parameters cast for compute and laid out for sampling, once, outside of any loop."""
    cast = functools.partial(compute_cast, dtype=config.precision.compute)
    params = jax.device_put(params, jax.local_devices()[0])  # fresh ones as restored ones
    return jax.jit(lambda p: objective.prepare(cast(p)))(params)
