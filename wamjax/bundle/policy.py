"""From the folder of a bundle to a function that acts."""

from __future__ import annotations

import functools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from wamjax import evaluate, init_from, sharding, tree, wam
from wamjax import state as states
from wamjax.bundle import files
from wamjax.bundle.files import CODEC, PLANNER, TEXT, WEIGHTS, Manifest
from wamjax.bundle.observation import Observer
from wamjax.config import did_you_mean
from wamjax.data.embeddings import EmbeddingCache
from wamjax.data.normalize import normalizers
from wamjax.models.codec import Codec
from wamjax.step import compute_cast
from wamjax.wam.programs import MODES
from wamjax.weights import store
from wamjax.weights.codecs import load_codec


class LoadedPolicy:
    """A policy that is ready to act; made by `load_policy`.

        actions = policy(observation, seed_or_key=0)

    The first call compiles (``policy(policy.example())`` does it ahead of time), and so does the
    first one of every other batch size.

    Attributes:
      manifest: config, sizes, names and statistics, see `files.Manifest`.
      mode: how it acts.
      observer: checks and turns observations.
    """

    def __init__(
        self, manifest: Manifest, acting: evaluate.Policy, codec: Codec | None, observer: Observer
    ):
        self.manifest, self.observer = manifest, observer
        self.mode = acting.mode or modes_of(acting.objective)[0]
        self._acting, self._codec = acting, codec

    def __repr__(self) -> str:
        return f"LoadedPolicy({self.manifest.source!r}, step {self.manifest.step}, {self.mode!r})"

    def __call__(
        self, observation: dict[str, Any], seed_or_key: int | Array = 0
    ) -> Float[np.ndarray, "*b j a"]:
        """A chunk of actions in the units of the robot, float32.

        Args:
          observation: of one robot, or of b of them; see `Observer`.
          seed_or_key: of the noise; the same one gives the same actions.

        Raises:
          BadObservation: the observation is not what this policy takes.
        """
        arrays, batched = self.observer(observation)
        is_seed = isinstance(seed_or_key, int | np.integer)
        key = jax.random.key(seed_or_key) if is_seed else seed_or_key
        actions = np.asarray(_act(self._acting, self._codec, arrays, key))
        return actions if batched else actions[0]

    def example(self, count: int = 0) -> dict[str, Any]:
        """A blank observation, of `count` robots if that is not 0."""
        return self.observer.example(count)


@jax.jit
def _act(acting: evaluate.Policy, codec: Codec | None, observation, key: Array) -> Array:
    """The one program: pictures and state to actions (b, j, a) in robot units."""
    if codec is not None:
        latents = codec.encode(observation["video"])
        # Cached latents are kept in this dtype.
        observation = {k: v for k, v in observation.items() if k != "video"}
        observation[acting.objective.codec.key] = latents.astype(jnp.bfloat16)
    return acting.actions(acting.params, observation, key)


def load_policy(
    path: str | os.PathLike, mode: str | None = None, mesh: Mesh | None = None
) -> LoadedPolicy:
    """Reads a bundle of `wamjax.export_policy`; also as ``wamjax.load_policy``.

    Args:
      path: its folder.
      mode: how to act; as it was exported by default.
      mesh: see `sharding.make_mesh`; parameters are spread over it by the rules of training. The
        first local device by default, of whatever kind it is.

    Raises:
      FileNotFoundError: there is no bundle, or a part of it is gone.
      ValueError: it does not fit this wamjax, or there is no such mode.
    """
    folder, manifest = pathlib.Path(path), files.read(path)
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
    acting = evaluate.Policy(objective, params, normalise, mode)
    return LoadedPolicy(manifest, acting, codec, Observer(manifest.spec, cache))


def modes_of(objective: Any) -> tuple[str, ...]:
    """The ways in which a policy can act, its own first.

    Raises:
      ValueError: the objective is no policy.
    """
    if not hasattr(objective, "policy"):
        raise ValueError(f"a {type(objective).__name__} is no policy: it does not act")
    return getattr(objective, "modes", None) or MODES[objective.variant]


def check_mode(objective: Any, mode: str | None) -> str | None:
    """`mode`, if there is such a one; else ValueError."""
    known = modes_of(objective)
    if mode is not None and mode not in known:
        raise ValueError(f"this policy acts in modes {', '.join(known)}, not {mode!r}"
                         f"{did_you_mean(mode, known)}")  # fmt: skip
    return mode


def _params(objective: Any, config, folder: pathlib.Path, mesh: Mesh | None) -> Any:
    """Parameters from disk, laid out for sampling."""
    stored = store.read(folder / store.PARAMS)
    abstract = jax.eval_shape(functools.partial(states.init_params, objective, config))
    init_from.check(stored.shapes, tree.flatten(abstract), what=f"{folder} does not fit the model")
    place = _places(abstract, mesh)
    want = tree.map_with_path(
        lambda p, x, s: jax.ShapeDtypeStruct(
            x.shape, stored.arrays[p].dtype.numpy_dtype, sharding=s
        ),
        abstract,
        place,
    )
    params = tree.map_with_path(lambda p, x: init_from.load(stored.arrays[p], x), want)
    cast = functools.partial(compute_cast, dtype=config.precision.compute)
    return jax.jit(lambda p: objective.prepare(cast(p)))(params)


def _places(params: Any, mesh: Mesh | None) -> Any:
    if mesh is not None:
        return sharding.params_shardings(params, mesh)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: place, params)
