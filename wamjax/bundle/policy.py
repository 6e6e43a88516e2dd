"""Loads a bundle as a function that acts."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from wamjax import files as storage
from wamjax import tree, wam
from wamjax.bundle import files
from wamjax.bundle.files import CODEC, PLANNER, TEXT, WEIGHTS, Manifest
from wamjax.bundle.observation import BadObservation, Observer, close
from wamjax.data.embeddings import EmbeddingCache
from wamjax.data.normalize import normalizers
from wamjax.models.codec import Codec
from wamjax.runs import trained
from wamjax.training import init_from, sharding
from wamjax.training import state as states
from wamjax.training.step import compute_cast
from wamjax.wam.prefix import Prefix
from wamjax.weights import store
from wamjax.weights.codecs import load_codec


class NotFinite(RuntimeError):
    """A policy produced actions that are not finite; a robot must not get them."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sets what a policy refuses; by default it only warns, once per kind of problem.

    Attributes:
      far: distance of a state from the demonstrations, in units of their range, beyond which it is
        an error; WARN_FAR warns.
      batch: maximum number of robots at once; 0 is any number, and WARN_BATCH warns.
      unknown: whether an instruction that is not in the demonstrations is an error.
    """

    far: float = math.inf
    batch: int = 0
    unknown: bool = False


WARN_FAR, WARN_BATCH = 10.0, 512
PREFIX = Prefix("prefix/actions", "prefix/count")  # keys of the prefix in `admit`'s arrays
BUDGET = "budget_ms"  # key of the budget there
WARNINGS = 100  # maximum per policy, since every instruction is a kind of its own


class Chunk(NamedTuple):
    """Holds the actions of a plan.

    Attributes:
      actions: (j, a), or (b, j, a) for b robots, in the units of the robot, float32.
      rung: index of the rung that the plan reached, () or (b,), in mode "adaptive"; None otherwise.
    """

    actions: np.ndarray
    rung: np.ndarray | None = None


class LoadedPolicy:
    """Acts on observations; `load_policy` creates it.

        actions = policy(observation, seed_or_key=0)

    The first call compiles (``policy(policy.example())`` compiles ahead of time), as does the first
    call with another batch size.

    Attributes:
      manifest: config, sizes, names and statistics, see `files.Manifest`.
      mode: how it acts.
      prefix_max: maximum number of committed first actions of a chunk; 0: it takes no prefix.
      observer: checks and converts observations.
      instructions: instructions of the demonstrations, if the run stored them.
      limits: what the policy refuses.
    """

    def __init__(
        self,
        manifest: Manifest,
        acting: trained.Policy,
        codec: Codec | None,
        observer: Observer,
        limits: Limits | None = None,
    ):
        self.limits, self._warned = limits or Limits(), set()
        self.instructions = tuple(manifest.statistics.get("instructions", ()))
        self.manifest, self.observer = manifest, observer
        self.mode = acting.mode or modes_of(acting.objective)[0]
        self.prefix_max = acting.prefix_max
        self._acting, self._codec = acting, codec

    @property
    def rung_ms(self) -> list[float]:
        """Milliseconds of each rung, measured when it was loaded; [] in other modes than
        "adaptive"."""
        return [] if self._acting.costs is None else np.asarray(self._acting.milliseconds).tolist()

    def __repr__(self) -> str:
        return f"LoadedPolicy({self.manifest.source!r}, step {self.manifest.step}, {self.mode!r})"

    def __call__(
        self,
        observation: dict[str, Any],
        seed_or_key: int | Array = 0,
        prefix: tuple[Any, Any] | None = None,
        budget_ms: float | None = None,
    ) -> Float[np.ndarray, "*b j a"]:
        """Returns the actions of `plan`."""
        return self.plan(observation, seed_or_key, prefix, budget_ms).actions

    def plan(
        self,
        observation: dict[str, Any],
        seed_or_key: int | Array = 0,
        prefix: tuple[Any, Any] | None = None,
        budget_ms: float | None = None,
    ) -> Chunk:
        """Returns a chunk of actions and, in mode "adaptive", how far the plan climbed.

        Args:
          observation: observation of one robot, or of b robots; see `Observer`.
          seed_or_key: determines the noise; the same value gives the same actions.
          prefix: (actions (d, a) or (b, d, a), how many of them count: a number or (b,)): the at
            most `prefix_max` actions that a robot will execute from this observation on, whatever
            is planned; the chunk begins with them. One program serves every prefix, and none.
          budget_ms: milliseconds that the plan may take, in mode "adaptive": rungs that took longer
            when the policy was loaded are not climbed. One program serves every budget.

        Raises:
          BadObservation: the observation, the prefix or the budget does not fit the policy, or
            exceeds its limits.
          NotFinite: the policy produced actions that are not finite.
        """
        if budget_ms is not None and not self._acting.adapts:
            raise BadObservation(f"{self!r} takes no budget_ms: load it with mode 'adaptive:PRICE'")
        arrays, batched = self._arrays(observation, prefix, budget_ms)
        is_seed = isinstance(seed_or_key, int | np.integer)
        key = jax.random.key(seed_or_key) if is_seed else seed_or_key
        chunk = self.act(arrays, key)
        if not np.isfinite(chunk.actions).all():
            row = int(np.argwhere(~np.isfinite(chunk.actions))[0][0])
            raise NotFinite(
                f"{self!r} produced actions that are not finite for observation {row} and returned "
                "none: check the observation and the checkpoint"
            )
        return chunk if batched else Chunk(*(None if x is None else x[0] for x in chunk))

    def admit(
        self,
        observation: dict[str, Any],
        prefix: Float[np.ndarray, "d a"] | None = None,
        budget_ms: float | None = None,
    ) -> dict[str, np.ndarray]:
        """Checks an observation like a call and returns the arrays for `act`.

        The shapes do not depend on prefix and budget, so the arrays of several robots can be
        concatenated.

        Args:
          observation: observation of one robot, if there is a prefix.
          prefix: the robot's committed actions, at most `prefix_max` of them.
          budget_ms: see `plan`; ignored in other modes than "adaptive".

        Raises:
          BadObservation: see `plan`.
        """
        if prefix is None:
            return self._arrays(observation, budget_ms=budget_ms)[0]
        longest, width = self.prefix_max, self.manifest.spec.action_dim
        if longest and (prefix.ndim != 2 or prefix.shape[1] != width or len(prefix) > longest):
            raise BadObservation(
                f"prefix is {prefix.dtype} {prefix.shape}, the policy takes (d, {width}): d "
                f"actions that are committed, at most {longest} (prefix in the metadata)"
            )
        return self._arrays(observation, (prefix, len(prefix)), budget_ms)[0]

    def act(self, arrays: dict[str, np.ndarray], key: Array) -> Chunk:
        """Acts on the arrays of `admit`, for any number of robots; the actions may be
        non-finite."""
        observation = {k: x for k, x in arrays.items() if k not in (*PREFIX, BUDGET)}
        prefix = Prefix(*(arrays[name] for name in PREFIX)) if self.prefix_max else None
        budget = arrays.get(BUDGET)
        chunk = _act(self._acting, self._codec, observation, key, prefix, budget)
        return Chunk(*(None if x is None else np.asarray(x) for x in chunk))

    def with_mode(self, mode: str | None) -> LoadedPolicy:
        """Returns the policy with the same parameters and another mode.

        Raises:
          ValueError: the policy has no such mode.
        """
        mode = check_mode(self._acting.objective, mode) or self.mode
        acting = trained.priced(dataclasses.replace(self._acting, mode=mode))
        return LoadedPolicy(self.manifest, acting, self._codec, self.observer, self.limits)

    def _arrays(
        self,
        observation: dict[str, Any],
        prefix: tuple[Any, Any] | None = None,
        budget_ms: float | None = None,
    ) -> tuple[dict[str, np.ndarray], bool]:
        arrays, batched = self.observer(observation)
        self._check(observation["instruction"], arrays["proprio"])
        size = len(arrays["proprio"])
        return arrays | self._prefix(prefix, size) | self._budget(budget_ms, size), batched

    def _budget(self, budget_ms: float | None, size: int) -> dict[str, np.ndarray]:
        """Checks a budget and returns it for each robot; {} if the policy does not adapt."""
        if not self._acting.adapts:
            return {}
        budget = math.inf if budget_ms is None else budget_ms
        number = isinstance(budget, int | float | np.number) and not isinstance(budget, bool)
        if not number or not budget > 0:
            raise BadObservation(f"budget_ms is {budget_ms!r}, it must be a number of milliseconds "
                                 "above 0")  # fmt: skip
        return {BUDGET: np.full(size, budget, np.float32)}

    def _prefix(self, prefix: tuple[Any, Any] | None, size: int) -> dict[str, np.ndarray]:
        """Checks a prefix and pads it to the width that all calls share; returns {} if the policy
        takes none."""
        longest, width = self.prefix_max, self.manifest.spec.action_dim
        if not longest:
            if prefix is not None:
                raise BadObservation(f"{self!r} takes no prefix: it was trained with "
                                     "objective.prefix_max = 0; leave it out")  # fmt: skip
            return {}
        prefix = (np.zeros((size, 0, width)), 0) if prefix is None else prefix
        actions, count = np.asarray(prefix[0], np.float32), np.asarray(prefix[1])
        actions = actions[None] if actions.ndim == 2 else actions
        if actions.ndim != 3 or actions.shape[::2] != (size, width):
            raise BadObservation(f"prefix: actions have shape {np.shape(prefix[0])}, they must be "
                                 f"({size}, at most {longest}, {width})")  # fmt: skip
        if count.shape not in ((), (size,)) or not np.issubdtype(count.dtype, np.integer):
            raise BadObservation(f"prefix: counts are {prefix[1]!r}, they must be {size} integers")
        limit = min(longest, actions.shape[1])
        if (count < 0).any() or (count > limit).any():
            raise BadObservation(f"prefix: counts {count.tolist()} must lie in 0 to {limit}")
        count = np.broadcast_to(count, size).astype(np.int32)
        padded = np.zeros((size, longest, width), np.float32)
        padded[:, : actions.shape[1]] = actions[:, :longest]
        padded[np.arange(longest) >= count[:, None]] = 0
        if not np.isfinite(padded).all():
            raise BadObservation("prefix: every action must be finite")
        return {PREFIX.actions: padded, PREFIX.count: count}

    def _check(self, texts, proprio: np.ndarray) -> None:
        """Warns about inputs unlike the demonstrations, or refuses them; see `Limits`."""
        count, limits = len(proprio), self.limits
        if count > (limits.batch or WARN_BATCH):
            self._doubt("batch", bool(limits.batch), f"a batch of {count} robots, at most "
                        f"{limits.batch or WARN_BATCH} are expected")  # fmt: skip
        instructions = set(self.instructions)
        for text in [texts] if isinstance(texts, str) else texts:
            if instructions and text not in instructions:
                reason = f"is not one of the {len(instructions)} demonstrated instructions"
                reason += close(text, sorted(instructions))
                self._doubt(f"unknown {text}", limits.unknown, f"instruction {text!r} {reason}")
        rows = self.manifest.statistics["proprio"]
        if "min" not in rows or "max" not in rows:
            return
        low, high = (np.asarray(rows[name], np.float64) for name in ("min", "max"))
        range_ = np.maximum(high - low, 1e-6 + 1e-3 * np.maximum(np.abs(low), np.abs(high)))
        distance = np.maximum(np.maximum(low - proprio, proprio - high) / range_, 0)
        row, dim = np.unravel_index(int(np.argmax(distance)), distance.shape)
        for far, error in ((limits.far, True), (WARN_FAR, False)):
            if distance[row, dim] > far:
                names = self.manifest.proprio_names
                name = f" ({names[dim]})" if names else ""
                self._doubt("far", error, f"proprio[{dim}]{name} is {proprio[row, dim]:g}, the "
                            f"demonstrations had {low[dim]:g} to {high[dim]:g}")  # fmt: skip

    def _doubt(self, kind: str, error: bool, text: str) -> None:
        if error:
            raise BadObservation(f"{text}: beyond the limits of this policy, {self.limits}")
        if kind not in self._warned and len(self._warned) < WARNINGS:
            self._warned.add(kind)
            warnings.warn(f"{text}; it still acts (reported once; `limits` makes it an error)",
                          stacklevel=5)  # fmt: skip

    def example(self, count: int = 0) -> dict[str, Any]:
        """Returns a blank observation, of `count` robots if that is not 0, within the
        demonstrations' range, so that compiling ahead of time uses up no warning."""
        out = self.observer.example(count)
        if self.instructions and self.observer.cache is None:
            out["instruction"] = self.instructions[0]
        rows = self.manifest.statistics["proprio"]
        low, high = (np.asarray(rows[name], np.float32) for name in ("min", "max"))
        out["proprio"] = np.clip(out["proprio"], low, high)
        return out


@jax.jit
def _act(
    acting: trained.Policy,
    codec: Codec | None,
    observation: dict[str, Array],
    key: Array,
    prefix: Prefix | None = None,
    budget: Array | None = None,
) -> tuple[Array, Array | None]:
    """Maps pictures and state to actions (b, j, a) in robot units and rungs, in a single
    program."""
    if codec is not None:
        latents = codec.encode(observation["video"])
        # Cached latents are stored in this dtype.
        observation = {k: v for k, v in observation.items() if k != "video"}
        observation[acting.objective.codec.key] = latents.astype(jnp.bfloat16)
    return acting.plan(acting.params, observation, key, prefix, budget)


def load_policy(
    path: str | os.PathLike,
    mode: str | None = None,
    mesh: Mesh | None = None,
    limits: Limits | None = None,
) -> LoadedPolicy:
    """Loads a bundle of `wamjax.export_policy`; also available as ``wamjax.load_policy``.

    Args:
      path: folder of the bundle.
      mode: how to act; the exported mode by default.
      mesh: mesh, see `sharding.make_mesh`, over which the rules of training shard the parameters;
        by default the first local device, of any kind.
      limits: what the policy refuses.

    Raises:
      FileNotFoundError: the bundle or a part of it is missing.
      ValueError: the bundle does not fit this wamjax, or the mode does not exist; `files.BadBundle`
        or `integrity.Damaged` if its contents changed after it was written.
    """
    folder, manifest = storage.path(path), files.read(path)
    config = manifest.config
    objective = wam.build(config, manifest.spec)
    mode = check_mode(objective, mode or manifest.mode)
    params = _params(objective, config, folder / WEIGHTS, mesh)
    if manifest.planner is not None:
        planner = wam.build(manifest.planner, manifest.spec)
        # Same sizes, same layout, and cast and prepared alike.
        params = params | {"planner": _params(planner, config, folder / PLANNER, mesh)}
        objective = objective.with_planner(planner)
    codec = load_codec(folder / CODEC, mesh) if (folder / CODEC).is_dir() else None
    constants = files.constants_of(codec or objective.codec)
    if constants != manifest.constants:
        raise ValueError(f"{folder}: its latents have mean and std {manifest.constants}, those of "
                         f"this wamjax {constants}; export the policy again")  # fmt: skip
    scaling = normalizers(manifest.statistics, config.data.normalization)
    cache = EmbeddingCache(folder / TEXT) if config.model.text.kind == "context" else None
    acting = trained.priced(trained.Policy(objective, params, scaling, mode))
    return LoadedPolicy(manifest, acting, codec, Observer(manifest.spec, cache), limits)


def modes_of(objective: Any) -> tuple[str, ...]:
    """Returns the modes that a policy can act in, its default first.

    Raises:
      ValueError: the objective is not a policy.
    """
    if objective.kind != "policy":
        raise ValueError(f"a {type(objective).__name__} is not a policy: it does not act")
    return objective.modes


def check_mode(objective: Any, mode: str | None) -> str | None:
    """Returns `mode` if the objective has it, else raises ValueError."""
    modes_of(objective)
    objective.check_mode(mode)
    return mode


def _params(objective: Any, config, folder: storage.Path, mesh: Mesh | None) -> Any:
    """Loads parameters from disk, laid out for sampling."""
    stored = store.read(folder / store.PARAMS)
    abstract = jax.eval_shape(functools.partial(states.init_params, objective, config))
    init_from.check(stored.shapes, tree.flatten(abstract), what=f"{folder} does not fit the model")
    shardings = _places(abstract, mesh)
    cast = jax.eval_shape(
        functools.partial(compute_cast, dtype=config.precision.compute), abstract
    )
    expected = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        for (path, x), s in zip(tree.flatten(cast).items(), jax.tree.leaves(shardings), strict=True)
    }
    # Load one by one in the compute dtype, so only one is in memory in its stored dtype.
    params = {}
    for path, x in expected.items():
        params |= tree.flatten(objective.prepare(tree.unflatten(stored.load({path: x}))))
    return objective.prepare(tree.unflatten(params))


def _places(params: Any, mesh: Mesh | None) -> Any:
    if mesh is not None:
        return sharding.params_shardings(params, mesh)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: place, params)
