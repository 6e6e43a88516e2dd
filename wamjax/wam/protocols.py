"""What the framework may ask of a method: to train it, to act, to make pictures.

A method is a class with these members, and a `Method` that builds it from a config; nothing else is
asked of it, and nothing is probed for. The three kinds:

    Objective   can be trained
    Policy      acts: evaluation, export, serving, foresight
    Pictures    makes images or video: sampling

Who inherits from one of them has its defaults.
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
    """What can be trained; frozen and hashable, so that it is static under `jax.jit`.

    Attributes:
      kind: what it trains: "policy", "pictures" or "codec" (or what no command is for).
      codec: what makes latents of pictures, `models.codec.Codec`; None for who reads pictures.
    """

    kind: ClassVar[str]
    codec: Any

    @property
    def row(self) -> int:
        """Neighbours in a batch that share what it trains exactly; they stay together."""
        return 1

    @property
    def tables(self) -> tuple[Visibility, ...]:
        """The visibility tables that it trains under; none without attention over groups."""
        return ()

    @property
    def uses(self) -> tuple[Use, ...]:
        """What examples of a batch train; none without slots."""
        return ()

    @property
    def slot_names(self) -> tuple[tuple[str, str], ...]:
        """(name, group) of every slot, in order."""
        return ()

    def describe(self) -> str:
        """What the slots are in every use, as text; "" if there is nothing to say."""
        return ""

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a training batch; further entries of one do not matter."""
        raise NotImplementedError

    def init(self, rng: Array) -> Params:
        """Fresh float32 parameters, one plain nested dict."""
        raise NotImplementedError

    def derive(self, params: Params) -> Params:
        """Parameters that follow from others, when those come from elsewhere; pure."""
        return params

    def loss(
        self, params: Params, batch: Batch, rng: Array, average: Params | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of a batch.

        Args:
          params: in the dtype of computation.
          average: their moving average, in that dtype too; None without one.

        Returns:
          (loss, metrics): float32 scalars; a metric is NaN where it is of nothing.
        """
        raise NotImplementedError


class Policy(Objective, Protocol):
    """What acts.

    Attributes:
      discount: of the return that it predicts, for each control step.
      prefix_max: most first actions of a chunk that `policy` may be given; 0: it takes no prefix.
      judges: whether it can say what it expects of its actions.
      denoises: whether `by_level` knows what its loss is at noise levels.
      rungs: proposals on each rung of the ladder of mode "adaptive"; () where there is none.
    """

    kind: ClassVar[str] = "policy"
    discount: float = 1.0
    prefix_max: int = 0
    judges: ClassVar[bool] = False
    denoises: ClassVar[bool] = False
    rungs: tuple[int, ...] = ()

    @property
    def modes(self) -> tuple[str, ...]:
        """The ways it can act, its own first."""
        return ("direct",)

    def check_mode(self, mode: str | None) -> None:
        """That it can act in a mode; None is its own.

        Raises:
          ValueError: there is no such mode, with a suggestion.
        """
        if mode is not None and mode not in self.modes:
            raise ValueError(f"this policy acts in modes {', '.join(self.modes)}, not {mode!r}"
                             f"{did_you_mean(mode, self.modes)}")  # fmt: skip

    @property
    def imagines(self) -> bool:
        """Whether it predicts pictures."""
        return False

    def observation_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of an observation: of a batch what can be sensed and told, one frame
        of it."""
        batch = self.batch_spec(batch_size)
        told = ("video", "latents", "proprio", "instruction", "context")
        spec = {k: batch[k] for k in told if k in batch}
        for key in ("video", "latents"):
            if key in spec:
                shape = (batch_size, 1, *spec[key].shape[2:])
                spec[key] = jax.ShapeDtypeStruct(shape, spec[key].dtype)
        return spec

    def prepare(self, params: Params) -> Params:
        """Parameters laid out for acting; once, outside of jitted programs.

        Of a part of the tree, its part: a loader holds one array at a time in both layouts, and
        prepares the parts once more when it has put them together.
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
        """A chunk of actions in robot units.

        Args:
          params: as trained or prepared.
          normalizers: {"actions": ..., "proprio": ...}, see `wamjax.data.normalize`.
          observation: one frame and state, in robot units, and what instructs.
          rng: one key, or one for each example.
          mode: one of `modes`; the first by default.
          noise: to start from instead of draws of `rng`.
          prefix: first actions of the chunk that the robot is committed to, at most `prefix_max`;
            they come back unchanged.

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
        costs: Float[Array, " r"] | None = None,
    ) -> Decision:
        """What `policy` does and why, see `ladder.Decision`; actions in robot units.

        Args:
          costs: of being on each rung of the ladder, in units of the return; of mode "adaptive".
        """
        raise ValueError(f"a {type(self).__name__} does not weigh ways to act: train a judge")

    def value(
        self,
        params: Params,
        normalizers: dict[str, Any],
        observation: Batch,
        proposals: Float[Array, "b n j a"],
    ) -> Float[Array, "b n"]:
        """The return that it expects of given chunks, in robot units; who has a ladder can say."""
        raise ValueError(f"a {type(self).__name__} does not judge proposals: train a judge")

    def benefits(
        self,
        params: Params,
        normalizers: dict[str, Any],
        observation: Batch,
        proposals: Float[Array, "b n j a"],
    ) -> Float[Array, "b h r"]:
        """What it expects, on each rung h of its ladder but the last, of being on rung r instead;
        of given chunks in this order, in robot units."""
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
        """Several chunks for each observation, of which the first is that of `policy`.

        Args:
          rng: one key for each example.
        """
        size = observation["proprio"].shape[0]
        keys = jnp.stack([noises.proposal(rng, i) for i in range(count)], axis=1).reshape(-1)
        many = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), observation)
        chunks = self.policy(params, normalizers, many, keys, mode)
        return chunks.reshape(size, count, *chunks.shape[1:])

    def imagine(
        self,
        params: Params,
        normalizers: dict[str, Any],
        observation: Batch,
        rng: Array | None,
        noise: Any = None,
    ) -> Array:
        """The future that it predicts, uint8 (b, f, H, W, 3), the observed frame first."""
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
        """The return in [0, 1] that it expects of what `policy` does."""
        raise ValueError(f"a {type(self).__name__} does not judge")

    def by_level(
        self, params: Params, batch: Batch, rng: Array, ratios: Float[Array, " n"]
    ) -> dict[str, Array]:
        """The metrics of `loss` at noise-to-signal ratios, each (n,)."""
        raise ValueError(f"a {type(self).__name__} does not denoise")

    def with_planner(self, other: Any) -> Any:
        """The same policy, planning as `other` was trained.

        Raises:
          ValueError: it does not plan, or the other does not fit it.
        """
        raise ValueError(f"a {type(self).__name__} does not plan: --planner is for Cosmos Policy")


class Pictures(Objective, Protocol):
    """What makes images or video.

    Attributes:
      frames: raw frames of a clip of training.
      picture: their (height, width, colours).
    """

    kind: ClassVar[str] = "pictures"
    frames: int
    picture: tuple[int, int, int]

    @property
    def always_given(self) -> int:
        """First frames that it never makes, counted as the data has them."""
        return 0

    def prepare(self, params: Params) -> Params:
        """Parameters laid out for sampling; once, outside of jitted programs.

        Of a part of the tree, its part: a loader holds one array at a time in both layouts.
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
          condition: the keys of a batch that condition; {} without.
          given: the first frames, as the data has them.
          count: of clips, where nothing else says it.
          frames: raw frames of the result; 0 is the length of training.

        Returns:
          uint8 (b, f, H, W, colours), or latents where the codec has no decoder.
        """
        raise NotImplementedError

    def passes(self, given: int, frames: int) -> int:
        """Evaluations of the network that a clip takes, in latent frames as of the codec."""
        raise NotImplementedError


def _every(config: Any) -> tuple[str, ...]:
    del config
    return ("*",)


def _fine(config: Any) -> None:
    del config


@dataclasses.dataclass(frozen=True)
class Method:
    """How a method comes from a config.

    Attributes:
      build: ``build(config, spec)`` makes the objective; raises ValueError where data and config do
        not fit, naming the key.
      keys: ``keys(config)`` of ``config.objective`` and ``config.model``, patterns of those that
        matter; one that is set and does not matter is an error.
      check: what a config must have right to train, and need not have to act; builds nothing.
    """

    build: Callable[[Any, Any], Any]
    keys: Callable[[Any], tuple[str, ...]] = _every
    check: Callable[[Any], None] = _fine
