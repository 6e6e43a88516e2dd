"""Trains and samples autoregressive video over discrete tokens: cross-entropy, and a cached scan.

A discrete codec turns pictures into tokens (`models.vae` with a finite-scalar or vector-quantised
bottleneck, or `models.palette`, which needs no training). It has

  vocabulary, shape(frames, height, width)
  tokens(video) -> ids (b, t, h, w)     from_tokens(ids) -> latents, for `decode`

The network predicts each token from those before it; a clip without given frames starts from the
prefix alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from wamjax.models.autoregressive import CAUSAL, STEP, AutoregressiveTransformer
from wamjax.models.layers import unconstrained
from wamjax.models.transformer import Cache, unstack
from wamjax.models.vae.bottleneck import health
from wamjax.models.visibility import Visibility
from wamjax.wam.objectives import bind, bound_codec, check_batch, codec_params
from wamjax.wam.protocols import Pictures
from wamjax.wam.video.rolling import moved

Batch = dict[str, Array]
Params = dict[str, Any]


def pick(
    logits: Float[Array, "b v"],
    key: Array | None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    uniform: Float[Array, " b"] | None = None,
) -> Int[Array, " b"]:
    """Samples a token.

    Args:
      key: random key of the draw.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keep only this many of the most likely tokens (and those that tie with the last); 0 =
        all.
      top_p: keep only the most likely tokens that together have this probability, at least one
        (Holtzman et al., arXiv 1904.09751); applied after `top_k` and the temperature.
      uniform: numbers in [0, 1) instead of the key: takes the first token, in order of the ids, at
        which the cumulative probability exceeds the number.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    if top_k:
        threshold = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    if top_p < 1:
        order = jnp.sort(logits, axis=-1, descending=True)
        p = jax.nn.softmax(order, axis=-1)
        # A token stays if those before it do not reach top_p; the first one always stays.
        keep = (jnp.cumsum(p, axis=-1) - p < top_p).at[:, 0].set(True)
        threshold = jnp.min(jnp.where(keep, order, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    if uniform is None:
        return jax.random.categorical(key, logits)
    total = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
    below = jnp.sum(total <= uniform[:, None] * total[:, -1:], axis=-1)
    possible = jnp.where(logits > -jnp.inf, jnp.arange(logits.shape[-1]), 0)
    return jnp.minimum(below, jnp.max(possible, axis=-1))


@dataclasses.dataclass(frozen=True)
class Autoregressive(Pictures):
    """Provides the objective (`init`, `loss`) and sampler (`sample`) of an autoregressive video
    model.

    Attributes:
      network, codec: the network, and the codec that turns pictures into tokens. A codec with
        parameters reads them from ``params["codec"]`` and does not train them.
      frames, picture: raw frames of a clip and their (height, width, colours).
      temperature, top_k, top_p: options of sampling, see `pick`.
    """

    network: AutoregressiveTransformer
    codec: Any
    frames: int
    picture: tuple[int, int, int]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        grid = self.codec.shape(self.frames, *self.picture[:2])[:3]
        if grid != self.network.grid or self.codec.vocabulary != self.network.codes:
            raise ValueError(
                f"the codec gives a grid of {grid} tokens from {self.codec.vocabulary} codes, the "
                f"network takes {self.network.grid} from {self.network.codes}"
            )

    # ---- the interface for training ----

    @property
    def tables(self) -> tuple[Visibility, ...]:
        """Returns the visibility table."""
        return (CAUSAL,)

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of a training batch."""
        b, net = batch_size, self.network
        shape = (b, self.frames, *self.picture)
        spec = {self.codec.key: jax.ShapeDtypeStruct(shape, jnp.uint8)}
        if net.classes:
            spec["label"] = jax.ShapeDtypeStruct((b,), jnp.int32)
        if net.vocabulary:
            spec["instruction"] = jax.ShapeDtypeStruct((b, net.instruction_length), jnp.int32)
        return spec

    def init(self, rng: Array) -> Params:
        """Returns new float32 parameters, one plain nested dict."""
        batch = {k: jnp.zeros(s.shape, s.dtype) for k, s in self.batch_spec(1).items()}
        ids = jnp.zeros((1, self.network.length), jnp.int32)
        network = self.network.clone(constrain=unconstrained)
        params = network.init(rng, batch, ids, method="initialise")["params"]
        return params | codec_params(self.codec, jax.random.fold_in(rng, 1))

    def loss(
        self, params: Params, batch: Batch, rng: Array, average: Params | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Computes the cross-entropy of the tokens of a batch, each given those before it.

        Returns:
          (loss in nats per token, metrics), float32: loss_video (the same), accuracy (how often the
            most likely token is right), usage and perplexity of the code book in this batch.
        """
        del rng, average
        check_batch(batch, self.batch_spec)
        codec = bound_codec(self.codec, params)
        ids = codec.tokens(batch[codec.key]).reshape(len(batch[codec.key]), -1)
        logits = self.logits(params, batch, ids)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean()
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == ids)
        metrics = {"loss_video": loss, "accuracy": accuracy}
        return loss, metrics | health(ids, self.codec.vocabulary)

    def logits(
        self, params: Params, condition: Batch, ids: Int[Array, "b l"]
    ) -> Float[Array, "b l v"]:
        """Returns the logits of each token given those before it, in one pass."""
        net = bind(self.network, params, self.network.constrain)
        prefix = net("prefix", condition, len(ids))
        tokens, _ = net("__call__", prefix, ids[:, :-1])
        return net("logits", tokens[:, prefix.shape[1] - 1 :])

    # ---- sampling video ----

    def prepare(self, params: Params) -> Params:
        """Returns parameters for fast sampling, see `transformer.unstack`; call it once, outside
        jit loops."""
        return unstack(params, self.network.layers)

    def sample(
        self,
        params: Params,
        condition: Batch,
        rng: Array | None,
        given: Int[Array, "b t h w"] | None = None,
        count: int | None = None,
        frames: int = 0,
        uniforms: Float[Array, "b m h w"] | None = None,
    ) -> Int[Array, "b t h w"]:
        """Samples tokens of clips, in one jittable program: a prefill and a scan over tokens.

        Keys and values of the clip are in buffers of its training length. A longer clip drops the
        oldest frame whenever they are full and moves the others back in time, see `rolling.moved`.

        Args:
          condition: the conditioning keys of a batch; {} for an unconditional model, which then
            needs `count` or `given`.
          given: tokens of the first frames.
          frames: t of the result; 0 is the training length.
          uniforms: numbers in [0, 1) for each sampled token, instead of draws from `rng`, see
            `pick`.

        Raises:
          ValueError: too many frames or no frames to sample, or neither a key nor uniforms.
        """
        t, h, w = self.network.grid
        frames = frames or t
        given_frames = 0 if given is None else given.shape[1]
        if frames > t and self.network.positions != "rope":
            raise ValueError(
                f"{frames} frames are more than the {t} of a training clip: sample fewer, or train "
                "with model.positions='rope'"
            )
        if given_frames > t or given_frames >= frames:
            raise ValueError(
                f"{given_frames} given frames must be fewer than the {frames} in all, and at most "
                f"{t}, the frames of a training clip"
            )
        b = self._count(condition, given, count)
        ids = jnp.zeros((b, 0), jnp.int32) if given is None else given.reshape(b, -1)
        net = bind(self.network, params)
        buffers, logits = self._prefill(net, condition, ids)
        before, room = self.network.prefix_length, self.network.length

        keys, chance = self._chance(rng, uniforms, (b, frames - given_frames, h, w))

        def step(carry, draw):
            buffers, at, logits = carry
            key, uniform = draw
            token = pick(logits, key, self.temperature, self.top_k, self.top_p, uniform)
            if frames > t:
                full = at == room
                buffers = jax.lax.cond(full, self._drop_frame, lambda x: x, buffers)
                at = jnp.where(full, at - h * w, at)
            valid = jnp.arange(before + room)[None] < before + at
            x, new = net(
                "__call__", None, token[:, None], at, STEP, Cache({"past": buffers}, {}),
                ("now",), {"past": valid},
            )  # fmt: skip
            buffers = jax.tree.map(
                lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, before + at, -2),
                buffers, new.tokens["now"],
            )  # fmt: skip
            return (buffers, at + 1, net("logits", x)[:, 0]), token

        start = buffers, jnp.int32(ids.shape[1]), logits
        tokens = jax.lax.scan(step, start, (keys, chance))[1]
        return jnp.concatenate([ids, tokens.T.astype(ids.dtype)], axis=1).reshape(b, frames, h, w)

    def clips(
        self,
        params: Params,
        condition: Batch,
        rng: Array,
        given: Array | None = None,
        count: int | None = None,
        frames: int = 0,
    ) -> Array:
        """Samples clips of any length, in the format of the data; see `Pictures.clips`."""
        codec = bound_codec(self.codec, params)
        given = None if given is None else codec.tokens(given)
        length = codec.shape(frames, *self.picture[:2])[0] if frames else 0
        ids = self.sample(params, condition, rng, given, count, length)
        return codec.decode(codec.from_tokens(ids))

    def passes(self, given: int, frames: int) -> int:
        """Returns the network evaluations that a clip takes: a prefill, and one per token."""
        _, height, width = self.network.grid
        return 1 + (frames - given) * height * width

    # ---- parts ----

    def _chance(self, rng: Array | None, uniforms: Array | None, shape: tuple[int, ...]):
        """Returns the keys of all tokens, or their uniforms (l, b)."""
        if uniforms is None:
            if rng is None:
                raise ValueError(f"sampling draws tokens: give a key, or uniforms of shape {shape}")
            return jax.random.split(rng, shape[1] * shape[2] * shape[3]), None
        if uniforms.shape != shape:
            raise ValueError(f"uniforms has shape {uniforms.shape}, the new tokens have {shape}")
        return None, uniforms.reshape(shape[0], -1).T

    def _prefill(self, net, condition: Batch, ids: Array):
        """Returns keys and values of the prefix and of given tokens, padded to the length of the
        clip, and the logits of the next token."""
        prefix = net("prefix", condition, len(ids))
        groups = ("prefix", "video") if ids.shape[1] else ("prefix",)
        tokens, cache = net("__call__", prefix, ids, emit=groups)
        room = self.network.length - ids.shape[1]
        # The same code serves stacked layers and lists of layers: (keys, values) of each group.
        parts = [cache.tokens[g] for g in groups]

        def join(*parts):
            padding = [(0, 0)] * parts[0].ndim
            padding[-2] = (0, room)
            return jnp.pad(jnp.concatenate(parts, axis=-2), padding)

        return jax.tree.map(join, *parts), net("logits", tokens[:, -1:])[:, 0]

    def _drop_frame(self, buffers):
        """Drops the oldest frame, to make room for one more."""
        t, h, w = self.network.grid
        before, cells = self.network.prefix_length, h * w

        def drop(x, back: bool):
            tail = x[..., before + cells :, :]
            if back:
                tail = moved(tail, -1, self.network.spec.rotary)
            empty = jnp.zeros_like(x[..., :cells, :])
            return jnp.concatenate([x[..., :before, :], tail, empty], axis=-2)

        keys, values = buffers
        keys = jax.tree.map(lambda x: drop(x, True), keys)
        return keys, jax.tree.map(lambda x: drop(x, False), values)

    def _count(self, condition: Batch, given: Array | None, count: int | None) -> int:
        if count is not None:
            return count
        arrays = [given, *condition.values()]
        sizes = [len(x) for x in arrays if x is not None]
        if not sizes:
            raise ValueError("sample needs a condition, given frames or a count")
        return sizes[0]
