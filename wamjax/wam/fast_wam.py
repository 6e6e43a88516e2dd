"""Fast-WAM (arXiv 2603.16666): objective and policy of all its variants.

A video expert and an action expert share attention. Both are trained by flow matching, the video
on future latents and the actions on a chunk, with independent noise levels. What a variant trains
and how it acts is data: its programs (`wam.programs`) and its mode.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wamjax.config import did_you_mean
from wamjax.diffusion.flow import RectifiedFlow
from wamjax.models.codec import Codec
from wamjax.models.layers import at_least_float32, unconstrained
from wamjax.models.mot import MixtureOfTransformers
from wamjax.models.transformer import unstack
from wamjax.models.visibility import Visibility, bidirectional
from wamjax.wam import draws, expert_init, fast_wam_loss, segments
from wamjax.wam.losses import Draw, SlotLosses
from wamjax.wam.objectives import bind, bound_codec, check_batch, codec_params, start_noise
from wamjax.wam.programs import MODES, TRAINING, tables
from wamjax.wam.sampling import Denoiser
from wamjax.wam.slots import Program, Role

Batch = dict[str, Array]
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class FastWAM:
    """Objective (`init`, `loss`) and policy (`policy`, `imagine`) of one variant.

    Attributes:
      network, codec: what is trained, and what makes latents of pictures. A codec with parameters
        finds them in ``params["codec"]``, where they stay as they are.
      frames: raw frames of a training window, of `picture` = (height, width) pixels.
      chunk, action_dim, proprio_dim: sizes of actions (j, a) and state (p).
      video_flow, action_flow: processes with their shifts.
      shares: of the variant's programs in a batch.
      cond_noise_prob: how often the conditioning video of imagine-then-act is noised in training.
      action_from_video: whether `init` derives the action expert from the video expert.
      steps, solver: of sampling.
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
    lambda_video: float = 1.0
    lambda_action: float = 1.0
    shares: tuple[float, ...] = (1.0,)
    cond_noise_prob: float = 0.5
    action_from_video: bool = False
    steps: int = 10
    solver: str = "euler"
    use_cache: bool = True

    def __post_init__(self):
        if len(self.shares) != len(TRAINING[self.variant]):
            raise ValueError(f"{self.variant} has {len(TRAINING[self.variant])} programs, "
                             f"shares are {self.shares}")  # fmt: skip

    # ---- what the training framework sees ----

    @property
    def programs(self) -> tuple[Program, ...]:
        return TRAINING[self.variant]

    @property
    def row(self) -> int:
        """Neighbours in a batch that share the programs exactly."""
        return sum(segments.columns(self.shares))

    def pictures(self) -> list[tuple[str, Visibility]]:
        """The visibility tables that this variant trains under."""
        return [(t.name, t) for t in tables(self.variant)]

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a training batch."""
        b = batch_size

        def array(dtype, *shape):
            return jax.ShapeDtypeStruct((b, *shape), dtype)

        spec = {
            "proprio": array(jnp.float32, self.proprio_dim),
            "actions": array(jnp.float32, self.chunk, self.action_dim),
            "frame_valid": array(jnp.bool_, self.frames),
            "action_valid": array(jnp.bool_, self.chunk),
        }
        length, width = self.network.instruction_length, self.network.context_width
        if self.network.vocabulary:
            spec["instruction"] = array(jnp.int32, length)
        else:
            spec["context"] = array(jnp.bfloat16, length, width)
        if self.codec.key == "video":
            spec["video"] = array(jnp.uint8, self.frames, *self.picture, 3)
        else:
            shape = self.codec.shape(self.frames, *self.picture)
            spec[self.codec.key] = array(jnp.bfloat16, *shape)
        return spec

    def init(self, rng: Array) -> Params:
        """Fresh float32 parameters, one plain nested dict."""
        batch = {k: jnp.zeros(s.shape, s.dtype) for k, s in self.batch_spec(1).items()}
        frozen = codec_params(self.codec, jax.random.fold_in(rng, 1))
        clean = self._clean(frozen, batch)
        values = {g.name: clean[g.name] for g in self.network.groups}
        level = {g: jnp.zeros((1, self.slots[g])) for g in values}
        text, table = self._text(batch), bidirectional(*values)
        variables = self.network.clone(constrain=unconstrained).init(
            rng, values, level, text, batch["proprio"], table, method="initialise"
        )
        return self.derive(variables["params"] | frozen)

    def derive(self, params: Params) -> Params:
        """Parameters that follow from others: the action expert, if it starts as the video's."""
        return expert_init.action_from_video(params) if self.action_from_video else params

    def loss(self, params: Params, batch: Batch, rng: Array) -> tuple[Array, dict[str, Array]]:
        """Flow-matching loss of a batch.

        Examples without a valid action (action-free video) count for the video loss only; each
        loss is a mean over the examples that have it.

        Returns:
          (loss, metrics), float32.
        """
        check_batch(batch, self.batch_spec)
        counts = segments.columns(self.shares)
        parts = segments.split(batch, counts, jax.random.fold_in(rng, 0))
        losses = []
        for i, (program, part) in enumerate(zip(self.programs, parts, strict=True)):
            v, a = self._program_losses(params, program, part, jax.random.fold_in(rng, i + 1))
            losses.append((v, a, jnp.any(part["action_valid"], axis=1)))
        return fast_wam_loss.total(self, losses)

    def draw(self, params: Params, batch: Batch, rng: Array) -> tuple[Draw, ...]:
        """All that `loss` leaves to chance, for each program; see `fast_wam_loss`."""
        check_batch(batch, self.batch_spec)
        return fast_wam_loss.draws(self, params, batch, rng)

    def denoising_loss(
        self, params: Params, program: Program, draw: Draw
    ) -> dict[str, SlotLosses]:
        """Losses of the slots of each predicted group ("future", "action"), without chance."""
        return fast_wam_loss.denoising_loss(self, params, program, draw)

    def loss_of(
        self, params: Params, draws: tuple[Draw, ...]
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of draws, one for each program: `loss` is that of `draw`."""
        return fast_wam_loss.total(self, self._parts(params, draws))

    def example_losses(self, params: Params, draws: tuple[Draw, ...]) -> dict[str, Array]:
        """"video", "action" and "loss" of every example, (b,); the mean of the last is the loss."""
        at = jnp.concatenate([d.at for d in draws])
        return fast_wam_loss.example_losses(self, self._parts(params, draws), at)

    # ---- acting and imagining ----

    def prepare(self, params: Params) -> Params:
        """Parameters for fast sampling: one tree for each layer instead of stacked layers.

        Do it once, outside of the jitted policy; `policy` and `imagine` take either form.
        """
        return unstack(params, self.network.layers)

    def policy(
        self,
        params: Params,
        normalizers,
        observation: Batch,
        rng: Array | None,
        mode: str | None = None,
        noise: Batch | None = None,
    ) -> Float[Array, "b j a"]:
        """A chunk of actions in robot units: encode, prefill, solve, un-normalise, in one program.

        Args:
          params: as trained, or through `prepare`; float32 or already cast for compute.
          normalizers: {"actions": ..., "proprio": ...}, see `wamjax.data.normalize`.
          observation: "video" (b, 1, H, W, 3) uint8 (or "latents"), "proprio" (b, p) in robot
            units, "instruction" (b, s) ids (or "context" embeddings).
          mode: one of `MODES` of the variant; its first by default.
          noise: standard normals to start from, instead of draws of `rng`: "action" (b, j, a), and
            "future" (b, t - 1, h, w, c) where video is denoised too.
        """
        done = self.sample(params, normalizers, observation, rng, mode, noise)
        return normalizers["actions"].inverse(at_least_float32(done["action"]))

    def sample(
        self,
        params: Params,
        normalizers,
        observation: Batch,
        rng: Array | None = None,
        mode: str | None = None,
        noise: Batch | None = None,
        states: bool = False,
    ) -> Batch:
        """What `policy` denoises, as the networks hold it; arguments as there.

        Args:
          mode: also "video", where the variant imagines: the future alone, as in `imagine`.
          states: return the whole way of each group, from its noise at the first level.

        Returns:
          "action", normalised, and the latents "future" where video is denoised; with `states`,
          (steps + 1, ...) of each.
        """
        if mode == "video":
            return self._imagined(params, normalizers, observation, rng, noise, states)[1]
        mode = mode or MODES[self.variant][0]
        if mode not in MODES[self.variant]:
            known = MODES[self.variant]
            raise ValueError(
                f"{self.variant} acts in modes {known}, not {mode!r}{did_you_mean(mode, known)}"
            )
        first, contexts = self._observe(params, normalizers, observation)
        given, cache, video = {"first": first}, None, {}
        start = rng, noise, states
        if mode == "imagine":
            denoiser = self._denoiser(params, self.programs[0])
            video, cache = self._denoise(denoiser, ("future",), given, contexts, start)
            given["cond"] = video["future"][-1] if states else video["future"]
        else:
            denoiser = self._denoiser(params, self.programs[-1])
        groups = ("future", "action") if mode == "joint" else ("action",)
        done, _ = self._denoise(denoiser, groups, given, contexts, start, cache)
        return video | done

    @property
    def imagines(self) -> bool:
        """Whether the variant was trained to predict video."""
        return any("future" in p.factorization.groups(Role.PREDICTED) for p in self.programs)

    def imagine(
        self,
        params: Params,
        normalizers,
        observation: Batch,
        rng: Array | None,
        noise: Batch | None = None,
    ) -> Array:
        """The future that the video expert predicts, the observed frame first; decoded pictures.

        Its latents, and the way there, are in `sample` with mode "video".
        """
        first, video = self._imagined(params, normalizers, observation, rng, noise)
        latents = jnp.concatenate([first, video["future"]], axis=1)
        return bound_codec(self.codec, params).decode(latents)

    def _imagined(self, params, normalizers, observation, rng, noise, states: bool = False):
        """The latent of the observed frame, and {"future": those after it}."""
        if not self.imagines:
            raise ValueError(f"variant {self.variant!r} was not trained to predict video")
        first, contexts = self._observe(params, normalizers, observation)
        denoiser = self._denoiser(params, self.programs[0])
        start = rng, noise, states
        return first, self._denoise(denoiser, ("future",), {"first": first}, contexts, start)[0]

    # ---- parts ----

    @property
    def slots(self) -> dict[str, int]:
        """Modulation slots of each group: its latent frames; one for a chunk of equal level."""
        specs = self.network.groups
        return {g.name: len(g.positions) if g.expert == "video" else 1 for g in specs}

    def _program_losses(self, params, program: Program, batch: Batch, rng):
        """Weighted losses (b,) of video and actions for the examples of one program."""
        draw = fast_wam_loss.draw(self, params, program, batch, rng)
        losses = self.denoising_loss(params, program, draw)
        return fast_wam_loss.examples(losses, batch["action_valid"].shape[0])

    def _parts(self, params: Params, draws: tuple[Draw, ...]) -> list[tuple[Array, Array, Array]]:
        parts = []
        for program, draw in zip(self.programs, draws, strict=True):
            losses = self.denoising_loss(params, program, draw)
            has_action = jnp.any(draw.use["action"], axis=1)
            parts.append((*fast_wam_loss.examples(losses, has_action.shape[0]), has_action))
        return parts

    def _conditioning(self, video: Array, key: Array) -> tuple[Array, Array]:
        """The conditioning video of teacher forcing: clean, or noised with its level told."""
        noise, level = self._cond_draw(video, key)
        video = self.video_flow.corrupt(video, noise, level)
        return video, jnp.broadcast_to(level[:, None], (video.shape[0], self.slots["cond"]))

    def _cond_draw(self, video: Array, key: Array) -> tuple[Array, Array]:
        """Its noise, and its level (b,), which is 0 where it stays clean."""
        coin, level, noise = jax.random.split(key, 3)
        b = video.shape[0]
        noised = jax.random.bernoulli(coin, self.cond_noise_prob, (b,))
        level = jnp.where(noised, self.video_flow.sample_level(level, (b,)), 0.0)
        return jax.random.normal(noise, video.shape), level

    def _clean(self, params: Params, batch: Batch) -> dict[str, Array]:
        latents = bound_codec(self.codec, params).encode(batch[self.codec.key])
        future = latents[:, 1:]
        actions = batch["actions"]
        return {"first": latents[:, :1], "future": future, "cond": future, "action": actions}

    def _valid(self, batch: Batch) -> dict[str, Array]:
        """Valid slots: a latent frame is invalid only if all of its source frames are padding."""
        steps = self.slots["future"]
        frames = batch["frame_valid"][:, 1:]
        frames = frames.reshape(frames.shape[0], steps, -1).any(axis=-1)
        return {"future": frames, "action": batch["action_valid"]}

    def _text(self, batch: Batch) -> Array:
        return batch["instruction" if self.network.vocabulary else "context"]

    def _observe(self, params, normalizers, observation: Batch):
        first = bound_codec(self.codec, params).encode(observation[self.codec.key])
        if first.shape[1] != 1:
            raise ValueError(f"a policy acts on one frame, {self.codec.key} has {first.shape[1]}")
        proprio = normalizers["proprio"].forward(observation["proprio"])
        return first, bind(self.network, params)("contexts", self._text(observation), proprio)

    def _denoise(self, denoiser: Denoiser, groups, given: Batch, contexts, start, cache=None):
        """Samples `groups` along their schedules; `start` is (key, noise instead, whole way?)."""
        rng, noise, states = start
        flows = {"action": self.action_flow, "future": self.video_flow}
        noise = {g: self._noise(g, given["first"], rng, **_given(noise, g)) for g in groups}
        schedules = {g: flows[g].schedule(self.steps) for g in groups}
        return denoiser.sample(
            given, noise, schedules, contexts, cache, self.solver, states=states
        )

    def _noise(
        self, group: str, first: Array, rng: Array | None, noise: Array | None = None
    ) -> Array:
        """Where a group starts; it does not depend on which others are sampled."""
        b, _, *latent = first.shape
        stream, shape = {
            "action": (0, (b, self.chunk, self.action_dim)),
            "future": (1, (b, self.slots["future"], *latent)),
        }[group]
        key = None if rng is None else draws.fold_in(rng, stream)
        return start_noise(noise, key, shape, f"noise[{group!r}]")

    def _denoiser(self, params, program: Program) -> Denoiser:
        net = bind(self.network, params)
        return Denoiser(
            lambda *args, **kwargs: net("__call__", *args, **kwargs),
            lambda levels: net("times", levels),
            program.visibility,
            self.slots,
            self.use_cache,
        )


def _given(noise: Batch | None, group: str) -> Batch:
    """The noise of a group as an argument, where noise is given.

    Raises:
      KeyError: it is given, and not for this group.
    """
    if noise is None:
        return {}
    if group not in noise:
        raise KeyError(f"noise is given for {sorted(noise)}, and {group!r} is denoised as well")
    return {"noise": noise[group]}
