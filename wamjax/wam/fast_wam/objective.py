"""Defines Fast-WAM (arXiv 2603.16666): objective and policy of all its variants.

A video expert and an action expert share attention. Both are trained by flow matching, the video on
future latents and the actions on a chunk, with independent noise levels. What a variant trains and
how it acts is data: its uses (`fast_wam.uses`) and its mode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wamjax.config import did_you_mean
from wamjax.diffusion.flow import OneStep, RectifiedFlow
from wamjax.diffusion.process import align
from wamjax.models.codec import Codec
from wamjax.models.layers import at_least_float32, unconstrained
from wamjax.models.mot import MixtureOfTransformers
from wamjax.models.shell import ANTICIPATION
from wamjax.models.transformer import join, unstack
from wamjax.models.visibility import Visibility, bidirectional
from wamjax.wam import noise as noises
from wamjax.wam import prefix as prefixes
from wamjax.wam import shares, uses
from wamjax.wam.denoiser import Denoiser, pinned
from wamjax.wam.fast_wam import averages, expert_init, inputs
from wamjax.wam.fast_wam.uses import MODES, SEEN, uses_of
from wamjax.wam.loss import Denoises, Draw, SlotLosses
from wamjax.wam.objectives import bind, bound_codec, check_batch, codec_params
from wamjax.wam.prefix import Pin, Prefix
from wamjax.wam.protocols import Policy
from wamjax.wam.slots import Role, names_of
from wamjax.wam.uses import Use

Batch = dict[str, Array]
Params = dict[str, Any]
# Experts with so few tokens that q, k and v are joined into one matmul for acting.
JOINED = ("action", "value")


@dataclasses.dataclass(frozen=True)
class FastWAM(Denoises, Policy):
    """Provides the objective (`init`, `loss`) and policy (`policy`, `imagine`) of one variant.

    Attributes:
      network, codec: the network, and the codec that turns pictures into latents. A codec with
        parameters reads them from ``params["codec"]`` and does not train them.
      frames: raw frames of a training window, of `picture` = (height, width) pixels.
      chunk, action_dim, proprio_dim: sizes of actions (j, a) and state (p).
      video_flow, action_flow: processes with their shifts.
      video_weight, action_weight, anticipation_weight: weights of the losses.
      shares: shares of the variant's uses in a batch.
      cond_noise_prob: probability that the conditioning video of imagine-then-act is noised in
        training.
      action_from_video: whether `init` derives the action expert from the video expert.
      prefix_max: most first actions of a chunk that are given; training draws their number for each
        example, see `wam.prefix`.
      prefix_noise: standard deviation of the noise added to them in training, normalised.
      steps, solver: options of sampling.
    """

    variant: str
    network: MixtureOfTransformers
    codec: Codec
    frames: int
    picture: tuple[int, int]
    chunk: int
    action_dim: int
    proprio_dim: int
    video_flow: RectifiedFlow
    action_flow: RectifiedFlow
    video_weight: float = 1.0
    action_weight: float = 1.0
    anticipation_weight: float = 1.0
    shares: tuple[float, ...] = (1.0,)
    cond_noise_prob: float = 0.5
    action_from_video: bool = False
    prefix_max: int = 0
    prefix_noise: float = 0.0
    steps: int = 10
    solver: str = "euler"
    use_cache: bool = True

    def __post_init__(self):
        if len(self.shares) != len(self.uses):
            raise ValueError(f"{self.variant} has {len(self.uses)} uses and needs as many shares, "
                             f"not {self.shares}")  # fmt: skip

    # ---- the interface for training ----

    @property
    def uses(self) -> tuple[Use, ...]:
        """Returns the uses that examples of a batch train."""
        return uses_of(self.variant)

    @property
    def row(self) -> int:
        """Returns how many neighbours in a batch share the uses exactly."""
        return sum(shares.columns(self.shares))

    @property
    def tables(self) -> tuple[Visibility, ...]:
        """Returns the visibility tables under which this variant trains."""
        return tuple(u.table for u in self.uses)

    @property
    def slot_names(self) -> tuple[tuple[str, str], ...]:
        """Returns (name, group) of every latent frame and every step of actions."""
        return names_of(self.network.groups)

    def describe(self) -> str:
        """Returns the roles of all groups in every use, as text."""
        text = uses.describe(self.uses, [(g.name, g.name) for g in self.network.groups])
        return text + prefixes.describe(self.prefix_max)

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of a training batch."""
        return self._windows(batch_size)

    def _windows(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of windows of episodes, from which all slots are built."""
        sizes = self.chunk, self.action_dim, self.proprio_dim
        return inputs.windows(
            batch_size, self.network, self.codec, self.frames, self.picture, *sizes
        )

    def init(self, rng: Array) -> Params:
        """Returns new float32 parameters, one plain nested dict."""
        batch = {k: jnp.zeros(s.shape, s.dtype) for k, s in self._windows(1).items()}
        codec = codec_params(self.codec, jax.random.fold_in(rng, 1))
        clean = self._clean(codec, batch)
        values = {g.name: clean[g.name] for g in self.network.groups}
        level = {g: jnp.zeros((1, self.rows[g])) for g in values}
        variables = self.network.clone(constrain=unconstrained).init(
            rng, values, level, self._condition(batch), bidirectional(*values), method="evaluate"
        )
        return self.derive(variables["params"] | codec)

    def derive(self, params: Params) -> Params:
        """Returns parameters with the action expert interpolated from the video expert, if so
        configured."""
        return expert_init.action_from_video(params) if self.action_from_video else params

    # ---- the loss, see `wam.loss` ----

    def draw(self, params: Params, batch: Batch, rng: Array) -> tuple[Draw, ...]:
        """Draws everything random in `loss`, for each use.

        The group "cond" is the video on which imagine-then-act is conditioned, noised in a share of
        the examples. An example without a valid action (action-free video) counts only for the loss
        of the video.
        """
        check_batch(batch, self.batch_spec)
        size, counts = batch["action_valid"].shape[0], shares.columns(self.shares)
        order = shares.order(jax.random.fold_in(rng, 0), counts, size)
        parts = shares.split(batch | {"at": jnp.arange(size)}, order, counts)
        return tuple(
            self._draw(params, i, part, jax.random.fold_in(rng, i + 1))
            for i, part in enumerate(parts)
        )

    def process_of(self, group: str) -> RectifiedFlow:
        """Returns the process of a group."""
        flows = {"action": self.action_flow, ANTICIPATION: OneStep()}
        return flows.get(group, self.video_flow)

    def reduce(
        self, draws: Sequence[Draw], losses: Sequence[dict[str, SlotLosses]]
    ) -> tuple[Array, dict[str, Array]]:
        """Computes the weighted sum of all losses, each a mean over the examples that have it."""
        names = tuple(use.name for use in self.uses)
        return averages.reduce(draws, losses, self._weights, names)

    def examples(
        self, draws: Sequence[Draw], losses: Sequence[dict[str, SlotLosses]]
    ) -> dict[str, Array]:
        """Computes "video", "action" and "loss" of every example, see `averages.examples`."""
        return averages.examples(draws, losses, self._weights)

    @property
    def _weights(self) -> dict[str, float]:
        """Returns the weight of the loss of each group."""
        return {"future": self.video_weight, "action": self.action_weight,
                ANTICIPATION: self.anticipation_weight}  # fmt: skip

    def _draw(self, params: Params, number: int, batch: Batch, rng: Array) -> Draw:
        """Draws for the examples of one use."""
        use, size = self.uses[number], batch["at"].shape[0]
        purposes = "future", "action", "cond", "level"
        keys = dict(zip(purposes, jax.random.split(rng, 4), strict=True))
        latents, valid = self._clean(params, batch), self._valid(batch)
        clean = {g: latents[g] for g in use.present}
        role = {
            g: jnp.broadcast_to(x[0], (size, self.rows[g]))
            for g, x in uses.roles([use], {g: self.rows[g] for g in use.present}).items()
        }
        noise, level, mask = {}, {}, {}
        for i, group in enumerate(use.predicted):
            if group == ANTICIPATION:  # starts as learned tokens
                noise[group] = jnp.zeros_like(clean[group])
            else:
                noise[group] = jax.random.normal(keys[group], clean[group].shape)
            key = jax.random.fold_in(keys["level"], i)
            level[group] = self.process_of(group).sample_level(key, (size, 1))
            if group == "action":
                has_action = jnp.any(valid["action"], axis=1, keepdims=True)
                role[group] = jnp.where(has_action, role[group], Role.ABSENT)
                if self.prefix_max:
                    key = jax.random.fold_in(rng, len(purposes))
                    role[group] = prefixes.given(key, role[group], self.prefix_max)
                    if self.prefix_noise:  # the other actions learn to correct the given ones
                        x, key = clean[group], jax.random.fold_in(key, 1)
                        noisy = x + self.prefix_noise * jax.random.normal(key, x.shape)
                        clean[group] = jnp.where(align(role[group] == Role.GIVEN, x), noisy, x)
            mask[group] = (role[group] == Role.PREDICTED) & valid[group]
        if "cond" in use.present:
            coin_key, level_key, noise_key = jax.random.split(keys["cond"], 3)
            is_noised = jax.random.bernoulli(coin_key, self.cond_noise_prob, (size,))
            level["cond"] = self.video_flow.sample_level(level_key, (size,))[:, None]
            noise["cond"] = jax.random.normal(noise_key, clean["cond"].shape)
            role["cond"] = jnp.where(is_noised[:, None], Role.PREDICTED, role["cond"])
        use_index = jnp.full(size, number)
        condition = self._condition(batch)
        return Draw(clean, noise, level, role, mask, condition, use_index, batch["at"], use.table)

    # ---- acting and imagining ----

    @property
    def modes(self) -> tuple[str, ...]:
        """Returns the modes in which it can act, the default first."""
        return MODES[self.variant]

    def check_mode(self, mode: str | None) -> None:
        """Checks a mode, see `Policy.check_mode`; "imagine:K" acts on the future after K steps."""
        self.way(mode)

    def way(self, mode: str | None) -> tuple[str, int]:
        """Splits a mode into (the way of acting, number of steps for which it imagines the video).

        Raises:
          ValueError: there is no such mode; makes a suggestion.
        """
        way, colon, number = (mode or self.modes[0]).partition(":")
        count = int(number) if number.isdecimal() else self.steps
        valid_suffix = not colon or (way == "imagine" and number.isdecimal())
        if way not in MODES[self.variant] or not valid_suffix or not 0 < count <= self.steps:
            modes = ", ".join(self.modes)
            if "imagine" in self.modes:
                modes += f", imagine:K (K = 1 to {self.steps} steps of the video)"
            raise ValueError(f"{self.variant} acts in modes {modes}, not {mode!r}"
                             f"{did_you_mean(way, self.modes)}")  # fmt: skip
        return way, count

    def use_of(self, way: str) -> Use:
        """Returns the use that trains a way of acting."""
        group = SEEN.get(way)
        return next((u for u in self.uses if group in u.present), self.uses[-1])

    def _levels(self, way: str, count: int) -> dict[str, float]:
        """Returns the noise level of the future that actions see, after `count` steps of imagining
        it."""
        level = {"imagine": self.levels_of("future")[count], "anticipate": 1.0}
        return {SEEN[way]: float(level[way])} if way in SEEN else {}

    def _nothing(self, first: Array) -> Array:
        """Returns the zeros to which learned tokens are added."""
        b, _, *latent = first.shape
        return jnp.zeros((b, self.rows[ANTICIPATION], *latent), first.dtype)

    @property
    def imagines(self) -> bool:
        """Returns whether the variant was trained to predict video."""
        return any("future" in u.predicted for u in self.uses)

    def prepare(self, params: Params) -> Params:
        """Returns parameters for fast sampling: one tree per layer instead of stacked layers, with
        queries, keys and values joined in the experts with few tokens.

        Call it once, outside the jitted policy; `policy` and `imagine` accept either form.
        """
        return join(unstack(params, self.network.layers), JOINED)

    def policy(
        self,
        params: Params,
        normalizers,
        observation: Batch,
        rng: Array | None,
        mode: str | None = None,
        noise: Batch | None = None,
        prefix: Prefix | None = None,
    ) -> Float[Array, "b j a"]:
        """Returns a chunk of actions in robot units: encode, prefill, solve, un-normalise, in one
        program.

        Args:
          params: as trained, or through `prepare`; float32 or already cast for compute.
          normalizers: {"actions": ..., "proprio": ...}, see `wamjax.data.normalize`.
          observation: "video" (b, 1, H, W, 3) uint8 (or "latents"), "proprio" (b, p) in robot
            units, "instruction" (b, s) ids (or "context" embeddings).
          mode: one of `modes`; the first by default.
          noise: standard normals to start from, instead of draws from `rng`: "action" (b, j, a),
            and "future" (b, t - 1, h, w, c) if video is denoised too.
          prefix: actions to which the robot is committed, at most `prefix_max` of them: given,
            clean at every step of the solver, and returned unchanged.
        """
        samples = self.sample(params, normalizers, observation, rng, mode, noise, prefix=prefix)
        actions = normalizers["actions"].inverse(at_least_float32(samples["action"]))
        if prefix is None:
            return actions
        return pinned(prefixes.pin(prefix, self.prefix_max, self.chunk), actions)

    def sample(
        self,
        params: Params,
        normalizers,
        observation: Batch,
        rng: Array | None = None,
        mode: str | None = None,
        noise: Batch | None = None,
        states: bool = False,
        prefix: Prefix | None = None,
    ) -> Batch:
        """Returns what `policy` denoises, as normalised actions and latents; arguments as in
        `policy`.

        Args:
          mode: also "video", if the variant imagines: the future alone, as in `imagine`.
          states: return all intermediate states of each group, starting with its noise at the first
            level.

        Returns:
          "action", normalised, and the latents "future" if video is denoised; with `states`, (steps
            + 1, ...) of each.
        """
        if mode == "video":
            return self._imagined(params, normalizers, observation, rng, noise, states)[1]
        way, count = self.way(mode)
        pins = {}
        if prefix is not None:
            pin = prefixes.pin(prefix, self.prefix_max, self.chunk)
            pins["action"] = pin._replace(values=normalizers["actions"].forward(pin.values))
        first, contexts = self._observe(params, normalizers, observation)
        denoiser = self._denoiser(params, self.use_of(way))
        given, cache, video = {"first": first}, None, {}
        options = dict(contexts=contexts, rng=rng, noise=noise, states=states)
        if way == "imagine":
            video, cache = self._denoise(denoiser, ("future",), given, stop=count, **options)
            future = video["future"][-1] if states else video["future"]
        elif way == "anticipate":
            future = self._nothing(first)
        if way in SEEN:
            given[SEEN[way]] = future
        groups = ("future", "action") if way == "joint" else ("action",)
        levels = self._levels(way, count)
        samples, _ = self._denoise(
            denoiser, groups, given, cache=cache, pins=pins, levels=levels, **options
        )
        return video | samples

    def imagine(
        self,
        params: Params,
        normalizers,
        observation: Batch,
        rng: Array | None,
        noise: Batch | None = None,
    ) -> Array:
        """Returns the future that the video expert predicts as pictures, starting with the observed
        frame.

        To get its latents and the intermediate states, call `sample` with mode "video".
        """
        first, video = self._imagined(params, normalizers, observation, rng, noise)
        latents = jnp.concatenate([first, video["future"]], axis=1)
        codec = bound_codec(self.codec, params)
        return codec.decode_after(latents, observation[codec.key][:, :1])

    def _imagined(self, params, normalizers, observation, rng, noise, states: bool = False):
        """Returns the latent of the observed frame, and {"future": the latents after it}."""
        if not self.imagines:
            raise ValueError(f"variant {self.variant!r} was not trained to predict video")
        first, contexts = self._observe(params, normalizers, observation)
        denoiser = self._denoiser(params, self.use_of("imagine"))
        options = dict(contexts=contexts, rng=rng, noise=noise, states=states)
        return first, self._denoise(denoiser, ("future",), {"first": first}, **options)[0]

    # ---- parts ----

    @property
    def rows(self) -> dict[str, int]:
        """Returns the number of levels that the network receives for each group: one per latent
        frame, and one for all actions, which are equally noisy, unless the first ones may be
        given."""
        experts = "video", "action" if self.prefix_max else ""
        return {g.name: len(g.positions) if g.expert in experts else 1 for g in self.network.groups}

    def _clean(self, params: Params, batch: Batch) -> dict[str, Array]:
        latents = self._encode(params, batch)
        future = latents[:, 1:]
        actions = batch["actions"]
        groups = {"first": latents[:, :1], "future": future, "action": actions}
        return groups | {"cond": future, ANTICIPATION: future}

    def _valid(self, batch: Batch) -> dict[str, Array]:
        """Returns valid slots: a latent frame is invalid only if all of its source frames are
        padding."""
        steps = self.rows["future"]
        frames = batch["frame_valid"][:, 1:]
        frames = frames.reshape(frames.shape[0], steps, -1).any(axis=-1)
        return {"future": frames, ANTICIPATION: frames, "action": batch["action_valid"]}

    def _condition(self, batch: Batch) -> Batch:
        """Returns the network's inputs besides video and actions."""
        return {k: batch[k] for k in (self._told(), "proprio")}

    def _told(self) -> str:
        """Returns the key of the instruction."""
        return "instruction" if self.network.vocabulary else "context"

    def _encode(self, params: Params, batch: Batch) -> Array:
        """Returns the latents of the pictures of a batch."""
        return bound_codec(self.codec, params).encode(batch[self.codec.key])

    def _observe(self, params, normalizers, observation: Batch):
        """Returns the latent of the observed frame, and the contexts of the experts."""
        first = self._encode(params, observation)
        if first.shape[1] != 1:
            raise ValueError(f"a policy acts on one frame, {self.codec.key} has {first.shape[1]}: "
                             "pass the last one")  # fmt: skip
        proprio = normalizers["proprio"].forward(observation["proprio"])
        condition = self._condition({**observation, "proprio": proprio})
        return first, bind(self.network, params)("conditions", condition).contexts

    def _denoise(
        self,
        denoiser: Denoiser,
        groups: tuple[str, ...],
        given: Batch,
        *,
        contexts: Batch,
        rng: Array | None,
        noise: Batch | None,
        states: bool,
        cache=None,
        pins: dict[str, Pin] | None = None,
        levels: dict[str, float] | None = None,
        stop: int | None = None,
    ):
        """Samples `groups` along their schedules, or along the first `stop` steps."""
        for group in groups if noise is not None else ():
            if group not in noise:
                raise KeyError(
                    f"noise for {group!r} is missing, there is only noise for {sorted(noise)}: "
                    "add it, or give a key instead of noise"
                )
        initial = {g: self._noise(g, given["first"], rng, noise) for g in groups}
        end = None if stop is None else stop + 1
        schedules = {g: self.process_of(g).schedule(self.steps)[:end] for g in groups}
        return denoiser.sample(
            given, initial, schedules, contexts, cache, self.solver, states=states, pins=pins,
            levels=levels,
        )  # fmt: skip

    def _noise(self, group: str, first: Array, rng: Array | None, noise: Batch | None) -> Array:
        """Returns a group's starting point; it does not depend on which other groups are
        sampled."""
        b, _, *latent = first.shape
        stream, shape = {
            "action": (0, (b, self.chunk, self.action_dim)),
            "future": (1, (b, self.rows["future"], *latent)),
        }[group]
        key = None if rng is None else noises.fold_in(rng, stream)
        override = None if noise is None else noise[group]
        return noises.start(override, key, shape, f"noise[{group!r}]")

    def _denoiser(
        self, params: Params, use: Use, constrain: Callable = unconstrained
    ) -> Denoiser:
        net = bind(self.network, params, constrain)
        return Denoiser(
            lambda *args, **kwargs: net("__call__", *args, **kwargs),
            lambda levels: net("times", levels),
            use.visibility,
            self.rows,
            self.use_cache,
        )
