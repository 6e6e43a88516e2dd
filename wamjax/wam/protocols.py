"""Defines what the framework may ask of a method: to train, to act, to make pictures.

A method is a class with these members, and a `Method` that builds it from a config; nothing else is
asked of it, and there are no `hasattr` checks. There are three kinds:

    Objective   can be trained
    Policy      acts: evaluation, export, serving, foresight
    Pictures    makes images or video: sampling

Sub-classes inherit the defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wamjax.config import did_you_mean
from wamjax.models.visibility import Visibility
from wamjax.wam import noise as noises
from wamjax.wam.ladder import Decision
from wamjax.wam.prefix import Prefix
from wamjax.wam.uses import Use

Batch = dict[str, Array]
Params = dict[str, Any]


class Objective(Protocol):
    """Defines what can be trained; frozen and hashable, so that it is static under `jax.jit`.

    Attributes:
      kind: what it trains: "policy", "pictures" or "codec" (or something that no command handles).
      codec: turns pictures into latents, `models.codec.Codec`; None if the objective reads
        pictures.
    """

    kind: ClassVar[str]
    codec: Any

    @property
    def row(self) -> int:
        """Returns how many neighbours in a batch share the uses exactly; they stay together."""
        return 1

    @property
    def tables(self) -> tuple[Visibility, ...]:
        """Returns the visibility tables used in training; empty without attention over groups."""
        return ()

    @property
    def uses(self) -> tuple[Use, ...]:
        """Returns the uses that examples of a batch train; empty without slots."""
        return ()

    @property
    def slot_names(self) -> tuple[tuple[str, str], ...]:
        """Returns (name, group) of every slot, in order."""
        return ()

    def describe(self) -> str:
        """Returns the slots of every use as text; "" if there are none."""
        return ""

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of a training batch; further entries of a batch are ignored."""
        raise NotImplementedError

    def init(self, rng: Array) -> Params:
        """Returns new float32 parameters, one plain nested dict."""
        raise NotImplementedError

    def derive(self, params: Params) -> Params:
        """Returns parameters after updating those that are derived from others, which may have been
        loaded; pure."""
        return params

    def loss(
        self, params: Params, batch: Batch, rng: Array, average: Params | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Computes the loss of a batch.

        Args:
          params: in the dtype of computation.
          average: their moving average, in the same dtype; None if there is none.

        Returns:
          (loss, metrics): float32 scalars; a metric is NaN if no example counts for it.
        """
        raise NotImplementedError


class Policy(Objective, Protocol):
    """Defines what can act.

    Attributes:
      discount: discount of the return that it predicts, per control step.
      prefix_max: most first actions of a chunk that `policy` may be given; 0: it takes no prefix.
      judges: whether it can predict the return of its actions.
      denoises: whether `by_level` can compute its loss at noise levels.
      rungs: proposals on each rung of the ladder of mode "adaptive"; () without a ladder.
    """

    kind: ClassVar[str] = "policy"
    discount: float = 1.0
    prefix_max: int = 0
    judges: ClassVar[bool] = False
    denoises: ClassVar[bool] = False
    rungs: tuple[int, ...] = ()

    @property
    def modes(self) -> tuple[str, ...]:
        """Returns the modes in which it can act, the default first."""
        return ("direct",)

    def check_mode(self, mode: str | None) -> None:
        """Checks that it can act in a mode; None is the default mode.

        Raises:
          ValueError: there is no such mode; makes a suggestion.
        """
        if mode is not None and mode not in self.modes:
            raise ValueError(f"this policy acts in modes {', '.join(self.modes)}, not {mode!r}"
                             f"{did_you_mean(mode, self.modes)}")  # fmt: skip

    @property
    def imagines(self) -> bool:
        """Returns whether it predicts pictures."""
        return False

    def observation_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of an observation: the entries of a batch that can be sensed or
        instructed, with a single frame."""
        batch = self.batch_spec(batch_size)
        keys = ("video", "latents", "proprio", "instruction", "context")
        spec = {k: batch[k] for k in keys if k in batch}
        for key in ("video", "latents"):
            if key in spec:
                shape = (batch_size, 1, *spec[key].shape[2:])
                spec[key] = jax.ShapeDtypeStruct(shape, spec[key].dtype)
        return spec

    def prepare(self, params: Params) -> Params:
        """Returns parameters laid out for acting; called once, outside jitted programs.

        A subtree gives the same subtree of the result: a loader holds one array at a time in both
        layouts, and prepares the parts once more after joining them.
        """
        return params

    def policy(
        self,
        params: Params,
        normalizers: dict[str, Any],
        observation: Batch,
        rng: Array | None,
        mode: str | None = None,
        noise: Any = None,
        prefix: Prefix | None = None,
    ) -> Float[Array, "b j a"]:
        """Returns a chunk of actions in robot units.

        Args:
          params: as trained or prepared.
          normalizers: {"actions": ..., "proprio": ...}, see `wamjax.data.normalize`.
          observation: one frame and state, in robot units, and the instruction.
          rng: one key, or one per example.
          mode: one of `modes`; the first by default.
          noise: starting point, instead of draws from `rng`.
          prefix: first actions of the chunk to which the robot is committed, at most `prefix_max`;
            they are returned unchanged.

        Raises:
          ValueError: it takes no prefix, and there is one.
        """
        raise NotImplementedError

    def decide(
        self,
        params: Params,
        normalizers: dict[str, Any],
        observation: Batch,
        rng: Array,
        mode: str | None = None,
        costs: Float[Array, " r"] | Float[Array, "b r"] | None = None,
    ) -> Decision:
        """Returns the decision behind the actions of `policy`, see `ladder.Decision`; actions in
        robot units.

        Args:
          costs: cost of each rung of the ladder, in units of the return, the same for all examples
            or one row each; for mode "adaptive".
        """
        raise ValueError(f"a {type(self).__name__} does not weigh ways to act: train a judge")

    def value(
        self,
        params: Params,
        normalizers: dict[str, Any],
        observation: Batch,
        proposals: Float[Array, "b n j a"],
    ) -> Float[Array, "b n"]:
        """Returns the predicted return of chunks that are given in robot units; available with a
        ladder."""
        raise ValueError(f"a {type(self).__name__} does not judge proposals: train a judge")

    def benefits(
        self,
        params: Params,
        normalizers: dict[str, Any],
        observation: Batch,
        proposals: Float[Array, "b n j a"],
    ) -> Float[Array, "b h r"]:
        """Returns the predicted benefit, on each rung h of its ladder but the last, of being on
        rung r instead; for given chunks in this order, in robot units."""
        raise ValueError(f"a {type(self).__name__} does not weigh ways to act: train a judge")

    def propose(
        self,
        params: Params,
        normalizers: dict[str, Any],
        observation: Batch,
        rng: Array,
        count: int,
        mode: str | None = None,
    ) -> Float[Array, "b n j a"]:
        """Returns several chunks for each observation; the first one is that of `policy`.

        Args:
          rng: one key per example.
        """
        size = observation["proprio"].shape[0]
        keys = jnp.stack([noises.proposal(rng, i) for i in range(count)], axis=1).reshape(-1)
        copies = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), observation)
        chunks = self.policy(params, normalizers, copies, keys, mode)
        return chunks.reshape(size, count, *chunks.shape[1:])

    def imagine(
        self,
        params: Params,
        normalizers: dict[str, Any],
        observation: Batch,
        rng: Array | None,
        noise: Any = None,
    ) -> Array:
        """Returns the predicted future, uint8 (b, f, H, W, 3), starting with the observed frame."""
        raise ValueError(f"a {type(self).__name__} does not imagine")

    def expect(
        self,
        params: Params,
        normalizers: dict[str, Any],
        observation: Batch,
        rng: Array | None,
        mode: str | None = None,
        noise: Any = None,
    ) -> Float[Array, " b"]:
        """Returns the predicted return in [0, 1] of the actions of `policy`."""
        raise ValueError(f"a {type(self).__name__} does not judge")

    def by_level(
        self, params: Params, batch: Batch, rng: Array, ratios: Float[Array, " n"]
    ) -> dict[str, Array]:
        """Computes the metrics of `loss` at noise-to-signal ratios, each (n,)."""
        raise ValueError(f"a {type(self).__name__} does not denoise")

    def with_planner(self, other: Any) -> Any:
        """Returns the same policy, planning with the training of `other`.

        Raises:
          ValueError: it does not plan, or the other does not fit it.
        """
        raise ValueError(f"a {type(self).__name__} does not plan: --planner is for Cosmos Policy")


class Pictures(Objective, Protocol):
    """Defines what can make images or video.

    Attributes:
      frames: raw frames of a training clip.
      picture: their (height, width, colours).
    """

    kind: ClassVar[str] = "pictures"
    frames: int
    picture: tuple[int, int, int]

    @property
    def always_given(self) -> int:
        """Returns the number of first frames that it never makes, counted as in the data."""
        return 0

    def prepare(self, params: Params) -> Params:
        """Returns parameters laid out for sampling; called once, outside jitted programs.

        A subtree gives the same subtree of the result: a loader holds one array at a time in both
        layouts.
        """
        return params

    def clips(
        self,
        params: Params,
        condition: Batch,
        rng: Array,
        given: Array | None = None,
        count: int | None = None,
        frames: int = 0,
    ) -> Array:
        """Makes clips, in one jittable program.

        Args:
          condition: the conditioning keys of a batch; {} if there are none.
          given: the first frames, as in the data.
          count: number of clips, if nothing else determines it.
          frames: raw frames of the result; 0 is the length of training.

        Returns:
          uint8 (b, f, H, W, colours), or latents if the codec has no decoder.
        """
        raise NotImplementedError

    def passes(self, given: int, frames: int) -> int:
        """Returns the network evaluations that a clip takes; arguments in latent frames of the
        codec."""
        raise NotImplementedError


def _every(config: Any) -> tuple[str, ...]:
    del config
    return ("*",)


def _fine(config: Any) -> None:
    del config


@dataclasses.dataclass(frozen=True)
class Method:
    """Describes how a method is built from a config.

    Attributes:
      build: ``build(config, spec)`` returns the objective; raises ValueError naming the key if data
        and config do not fit.
      keys: ``keys(config)`` returns patterns of the keys of ``config.objective`` and
        ``config.model`` that matter; setting any other key is an error.
      check: checks what a config needs to train but not to act; builds nothing.
    """

    build: Callable[[Any, Any], Any]
    keys: Callable[[Any], tuple[str, ...]] = _every
    check: Callable[[Any], None] = _fine
