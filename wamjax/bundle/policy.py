"""From the folder of a bundle to a function that acts."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import warnings
from typing import Any

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
    """A policy came to actions that are no numbers; a robot must not get them."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a policy refuses; by default it warns, once for each kind of thing.

    Attributes:
      far: ranges of the demonstrations beyond which a state is an error; WARN_FAR ones warn.
      batch: robots at once; 0 is any number, of which WARN_BATCH warn.
      unknown: whether an instruction that the demonstrations do not have is an error.
    """

    far: float = math.inf
    batch: int = 0
    unknown: bool = False


WARN_FAR, WARN_BATCH = 10.0, 512
PREFIX = Prefix("prefix/actions", "prefix/count")  # its names among the arrays of `admit`
WARNINGS = 100  # of one policy, at most: an instruction is a kind of its own


class LoadedPolicy:
    """A policy that is ready to act; made by `load_policy`.

        actions = policy(observation, seed_or_key=0)

    The first call compiles (``policy(policy.example())`` does it ahead of time), and so does the
    first one of every other batch size.

    Attributes:
      manifest: config, sizes, names and statistics, see `files.Manifest`.
      mode: how it acts.
      prefix_max: most first actions of a chunk that it may be given; 0: it takes no prefix.
      observer: checks and turns observations.
      instructions: those of the demonstrations, if the run kept them.
      limits: what it refuses.
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

    def __repr__(self) -> str:
        return f"LoadedPolicy({self.manifest.source!r}, step {self.manifest.step}, {self.mode!r})"

    def __call__(
        self,
        observation: dict[str, Any],
        seed_or_key: int | Array = 0,
        prefix: tuple[Any, Any] | None = None,
    ) -> Float[np.ndarray, "*b j a"]:
        """A chunk of actions in the units of the robot, float32.

        Args:
          observation: of one robot, or of b of them; see `Observer`.
          seed_or_key: of the noise; the same one gives the same actions.
          prefix: (actions (d, a) or (b, d, a), how many of them count: a number or (b,)): those
            that a robot will carry out from this observation on, whatever is planned, at most
            `prefix_max`; the chunk begins with them. One program serves every prefix, and none.

        Raises:
          BadObservation: the observation or the prefix is not what this policy takes, or beyond
            its limits.
          NotFinite: the policy came to no numbers.
        """
        arrays, batched = self._arrays(observation, prefix)
        is_seed = isinstance(seed_or_key, int | np.integer)
        key = jax.random.key(seed_or_key) if is_seed else seed_or_key
        actions = self.act(arrays, key)
        if not np.isfinite(actions).all():
            row = int(np.argwhere(~np.isfinite(actions))[0][0])
            raise NotFinite(
                f"{self!r} came to actions that are not finite for observation {row}; nothing was "
                "returned. Look at what it was shown, and at the checkpoint"
            )
        return actions if batched else actions[0]

    def admit(
        self, observation: dict[str, Any], prefix: Float[np.ndarray, "d a"] | None = None
    ) -> dict[str, np.ndarray]:
        """Checks an observation as a call does, and gives the arrays that `act` takes.

        They have the same shapes with any prefix and without, so that those of several robots can
        be put together.

        Args:
          observation: of one robot, if there is a prefix.
          prefix: the actions that it is committed to, at most `prefix_max` of them.

        Raises:
          BadObservation: see `__call__`.
        """
        if prefix is None:
            return self._arrays(observation)[0]
        most, width = self.prefix_max, self.manifest.spec.action_dim
        if most and (prefix.ndim != 2 or prefix.shape[1] != width or len(prefix) > most):
            raise BadObservation(
                f"prefix is {prefix.dtype} {prefix.shape}, the policy takes (d, {width}): d "
                f"actions that are committed, at most {most} (prefix in the metadata)"
            )
        return self._arrays(observation, (prefix, len(prefix)))[0]

    def act(self, arrays: dict[str, np.ndarray], key: Array) -> Float[np.ndarray, "b j a"]:
        """Acts on what `admit` gave, of any number of robots; may come to no numbers."""
        seen = {name: x for name, x in arrays.items() if name not in PREFIX}
        prefix = Prefix(*(arrays[name] for name in PREFIX)) if self.prefix_max else None
        return np.asarray(_act(self._acting, self._codec, seen, key, prefix))

    def with_mode(self, mode: str | None) -> LoadedPolicy:
        """The same policy, with the same parameters, acting in another way.

        Raises:
          ValueError: it has no such way.
        """
        mode = check_mode(self._acting.objective, mode) or self.mode
        acting = trained.priced(dataclasses.replace(self._acting, mode=mode))
        return LoadedPolicy(self.manifest, acting, self._codec, self.observer, self.limits)

    def _arrays(
        self, observation: dict[str, Any], prefix: tuple[Any, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], bool]:
        arrays, batched = self.observer(observation)
        self._check(observation["instruction"], arrays["proprio"])
        return arrays | self._prefix(prefix, len(arrays["proprio"])), batched

    def _prefix(self, prefix: tuple[Any, Any] | None, size: int) -> dict[str, np.ndarray]:
        """Checked, and as long as any: of the width that all calls share; {} if none is taken."""
        most, width = self.prefix_max, self.manifest.spec.action_dim
        if not most:
            if prefix is not None:
                raise BadObservation(f"{self!r} takes no prefix: it was trained with "
                                     "objective.prefix_max = 0")  # fmt: skip
            return {}
        prefix = (np.zeros((size, 0, width)), 0) if prefix is None else prefix
        actions, count = np.asarray(prefix[0], np.float32), np.asarray(prefix[1])
        actions = actions[None] if actions.ndim == 2 else actions
        if actions.ndim != 3 or actions.shape[::2] != (size, width):
            raise BadObservation(f"prefix: actions have shape {np.shape(prefix[0])}, they must be "
                                 f"({size}, at most {most}, {width})")  # fmt: skip
        if count.shape not in ((), (size,)) or not np.issubdtype(count.dtype, np.integer):
            raise BadObservation(f"prefix: counts are {prefix[1]!r}, they must be {size} integers")
        longest = min(most, actions.shape[1])
        if (count < 0).any() or (count > longest).any():
            raise BadObservation(f"prefix: counts {count.tolist()} must lie in 0 to {longest}")
        count = np.broadcast_to(count, size).astype(np.int32)
        own = np.zeros((size, most, width), np.float32)
        own[:, : actions.shape[1]] = actions[:, :most]
        own[np.arange(most) >= count[:, None]] = 0
        if not np.isfinite(own).all():
            raise BadObservation("prefix: there are actions that are not finite")
        return {PREFIX.actions: own, PREFIX.count: count}

    def _check(self, texts, proprio: np.ndarray) -> None:
        """Says what is unlike the demonstrations, or refuses it; see `Limits`."""
        count, limits = len(proprio), self.limits
        if count > (limits.batch or WARN_BATCH):
            self._doubt("batch", bool(limits.batch), f"a batch of {count} robots, at most "
                        f"{limits.batch or WARN_BATCH} are expected")  # fmt: skip
        known = set(self.instructions)
        for text in [texts] if isinstance(texts, str) else texts:
            if known and text not in known:
                such = f"is none of the {len(known)} of the demonstrations"
                such += close(text, sorted(known))
                self._doubt(f"unknown {text}", limits.unknown, f"instruction {text!r} {such}")
        rows = self.manifest.statistics["proprio"]
        if "min" not in rows or "max" not in rows:
            return
        low, high = (np.asarray(rows[name], np.float64) for name in ("min", "max"))
        range_ = np.maximum(high - low, 1e-6 + 1e-3 * np.maximum(np.abs(low), np.abs(high)))
        away = np.maximum(np.maximum(low - proprio, proprio - high) / range_, 0)
        row, at = np.unravel_index(int(np.argmax(away)), away.shape)
        for far, error in ((limits.far, True), (WARN_FAR, False)):
            if away[row, at] > far:
                names = self.manifest.proprio_names
                name = f" ({names[at]})" if names else ""
                self._doubt("far", error, f"proprio[{at}]{name} is {proprio[row, at]:g}, the "
                            f"demonstrations had {low[at]:g} to {high[at]:g}")  # fmt: skip

    def _doubt(self, kind: str, error: bool, text: str) -> None:
        if error:
            raise BadObservation(f"{text}: beyond the limits of this policy, {self.limits}")
        if kind not in self._warned and len(self._warned) < WARNINGS:
            self._warned.add(kind)
            warnings.warn(f"{text}; it acts all the same (said once; `limits` makes it an error)",
                          stacklevel=5)  # fmt: skip

    def example(self, count: int = 0) -> dict[str, Any]:
        """A blank observation, of `count` robots if that is not 0; like the demonstrations, so
        that acting on it ahead of time spends no warning."""
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
) -> Array:
    """The one program: pictures and state to actions (b, j, a) in robot units."""
    if codec is not None:
        latents = codec.encode(observation["video"])
        # Cached latents are kept in this dtype.
        observation = {k: v for k, v in observation.items() if k != "video"}
        observation[acting.objective.codec.key] = latents.astype(jnp.bfloat16)
    return acting.actions(acting.params, observation, key, prefix)


def load_policy(
    path: str | os.PathLike,
    mode: str | None = None,
    mesh: Mesh | None = None,
    limits: Limits | None = None,
) -> LoadedPolicy:
    """Reads a bundle of `wamjax.export_policy`; also as ``wamjax.load_policy``.

    Args:
      path: its folder.
      mode: how to act; as it was exported by default.
      mesh: see `sharding.make_mesh`; parameters are spread over it by the rules of training. The
        first local device by default, of whatever kind it is.
      limits: what it refuses to act on.

    Raises:
      FileNotFoundError: there is no bundle, or a part of it is gone.
      ValueError: it does not fit this wamjax, or there is no such mode; `files.BadBundle` or
        `integrity.Damaged` where it is not what was written.
    """
    folder, manifest = storage.path(path), files.read(path)
    config = manifest.config
    objective = wam.build(config, manifest.spec)
    mode = check_mode(objective, mode or manifest.mode)
    params = _params(objective, config, folder / WEIGHTS, mesh)
    if manifest.planner is not None:
        other = wam.build(manifest.planner, manifest.spec)
        # Same sizes, same layout, and cast and prepared alike.
        params = params | {"planner": _params(other, config, folder / PLANNER, mesh)}
        objective = objective.with_planner(other)
    codec = load_codec(folder / CODEC, mesh) if (folder / CODEC).is_dir() else None
    constants = files.constants_of(codec or objective.codec)
    if constants != manifest.constants:
        raise ValueError(f"{folder}: its latents have mean and std {manifest.constants}, those of "
                         f"this wamjax {constants}; export the policy again")  # fmt: skip
    normalise = normalizers(manifest.statistics, config.data.normalization)
    cache = EmbeddingCache(folder / TEXT) if config.model.text.kind == "context" else None
    acting = trained.priced(trained.Policy(objective, params, normalise, mode))
    return LoadedPolicy(manifest, acting, codec, Observer(manifest.spec, cache), limits)


def modes_of(objective: Any) -> tuple[str, ...]:
    """The ways in which a policy can act, its own first.

    Raises:
      ValueError: the objective is no policy.
    """
    if objective.kind != "policy":
        raise ValueError(f"a {type(objective).__name__} is no policy: it does not act")
    return objective.modes


def check_mode(objective: Any, mode: str | None) -> str | None:
    """`mode`, if there is such a one; else ValueError."""
    modes_of(objective)
    objective.check_mode(mode)
    return mode


def _params(objective: Any, config, folder: storage.Path, mesh: Mesh | None) -> Any:
    """Parameters from disk, laid out for sampling."""
    stored = store.read(folder / store.PARAMS)
    abstract = jax.eval_shape(functools.partial(states.init_params, objective, config))
    init_from.check(stored.shapes, tree.flatten(abstract), what=f"{folder} does not fit the model")
    place = _places(abstract, mesh)
    kept = jax.eval_shape(
        functools.partial(compute_cast, dtype=config.precision.compute), abstract
    )
    want = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        for (path, x), s in zip(tree.flatten(kept).items(), jax.tree.leaves(place), strict=True)
    }
    # One after the other, in the dtype of computation: only one is in memory as it is stored.
    params = {}
    for path, x in want.items():
        params |= tree.flatten(objective.prepare(tree.unflatten(stored.load({path: x}))))
    return objective.prepare(tree.unflatten(params))


def _places(params: Any, mesh: Mesh | None) -> Any:
    if mesh is not None:
        return sharding.params_shardings(params, mesh)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: place, params)
