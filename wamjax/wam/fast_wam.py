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
import numpy as np
from jaxtyping import Array, Float

from wamjax.config import did_you_mean
from wamjax.diffusion.flow import RectifiedFlow
from wamjax.models.codec import Codec
from wamjax.models.layers import at_least_float32, unconstrained
from wamjax.models.mot import MixtureOfTransformers
from wamjax.models.transformer import unstack
from wamjax.models.visibility import Visibility, bidirectional
from wamjax.wam import draws, expert_init, segments
from wamjax.wam.objectives import bind, bound_codec, check_batch, codec_params
from wamjax.wam.programs import MODES, TRAINING, tables
from wamjax.wam.sampling import Denoiser
from wamjax.wam.slots import Program, Role, levels, loss_mask, masked_mean

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
        video, action, labelled, metrics = [], [], [], {}
        for i, (program, part) in enumerate(zip(self.programs, parts, strict=True)):
            v, a = self._program_losses(params, program, part, jax.random.fold_in(rng, i + 1))
            has_action = jnp.any(part["action_valid"], axis=1)
            video.append(v)
            action.append(a)
            labelled.append(has_action)
            if len(parts) > 1:
                name = program.factorization.name
                metrics[f"loss_action/{name}"] = jnp.sum(a) / jnp.maximum(jnp.sum(has_action), 1)
        labelled = jnp.concatenate(labelled)
        video_loss = jnp.mean(jnp.concatenate(video))
        action_loss = jnp.sum(jnp.concatenate(action)) / jnp.maximum(jnp.sum(labelled), 1)
        metrics |= {"loss_video": video_loss, "loss_action": action_loss}
        return self.lambda_video * video_loss + self.lambda_action * action_loss, metrics

    # ---- acting and imagining ----

    def prepare(self, params: Params) -> Params:
        """Parameters for fast sampling: one tree for each layer instead of stacked layers.

        Do it once, outside of the jitted policy; `policy` and `imagine` take either form.
        """
        return unstack(params, self.network.layers)

    def policy(
        self, params: Params, normalizers, observation: Batch, rng: Array, mode: str | None = None
    ) -> Float[Array, "b j a"]:
        """A chunk of actions in robot units: encode, prefill, solve, un-normalise, in one program.

        Args:
          params: as trained, or through `prepare`; float32 or already cast for compute.
          normalizers: {"actions": ..., "proprio": ...}, see `wamjax.data.normalize`.
          observation: "video" (b, 1, H, W, 3) uint8 (or "latents"), "proprio" (b, p) in robot
            units, "instruction" (b, s) ids (or "context" embeddings).
          mode: one of `MODES` of the variant; its first by default.
        """
        mode = mode or MODES[self.variant][0]
        if mode not in MODES[self.variant]:
            known = MODES[self.variant]
            raise ValueError(
                f"{self.variant} acts in modes {known}, not {mode!r}{did_you_mean(mode, known)}"
            )
        first, contexts = self._observe(params, normalizers, observation)
        given, cache = {"first": first}, None
        if mode == "imagine":
            denoiser = self._denoiser(params, self.programs[0])
            video, cache = self._denoise(denoiser, ("future",), given, contexts, rng)
            given["cond"] = video["future"]
        else:
            denoiser = self._denoiser(params, self.programs[-1])
        groups = ("future", "action") if mode == "joint" else ("action",)
        done, _ = self._denoise(denoiser, groups, given, contexts, rng, cache)
        return normalizers["actions"].inverse(at_least_float32(done["action"]))

    @property
    def imagines(self) -> bool:
        """Whether the variant was trained to predict video."""
        return any("future" in p.factorization.groups(Role.PREDICTED) for p in self.programs)

    def imagine(self, params: Params, normalizers, observation: Batch, rng: Array) -> Array:
        """The future that the video expert predicts, the observed frame first; decoded pictures."""
        if not self.imagines:
            raise ValueError(f"variant {self.variant!r} was not trained to predict video")
        first, contexts = self._observe(params, normalizers, observation)
        denoiser = self._denoiser(params, self.programs[0])
        video, _ = self._denoise(denoiser, ("future",), {"first": first}, contexts, rng)
        latents = jnp.concatenate([first, video["future"]], axis=1)
        return bound_codec(self.codec, params).decode(latents)

    # ---- parts ----

    @property
    def slots(self) -> dict[str, int]:
        """Modulation slots of each group: its latent frames; one for a chunk of equal level."""
        specs = self.network.groups
        return {g.name: len(g.positions) if g.expert == "video" else 1 for g in specs}

    def _program_losses(self, params, program: Program, batch: Batch, rng):
        """Weighted losses (b,) of video and actions for the examples of one program."""
        purposes = "future", "action", "cond", "level"
        keys = dict(zip(purposes, jax.random.split(rng, 4), strict=True))
        clean, valid = self._clean(params, batch), self._valid(batch)
        roles = self._roles(program, batch)
        flows = {"future": self.video_flow, "action": self.action_flow}
        size = batch["action_valid"].shape[0]
        values = {g: clean[g] for g in roles}
        level = {g: jnp.zeros(r.shape) for g, r in roles.items()}
        draw, target = {}, {}
        predicted = program.factorization.groups(Role.PREDICTED)
        for i, group in enumerate(predicted):
            flow, noise = flows[group], jax.random.normal(keys[group], clean[group].shape)
            draw[group] = flow.sample_level(jax.random.fold_in(keys["level"], i), (size, 1))
            level[group] = levels(roles[group], draw[group])
            values[group] = flow.corrupt(clean[group], noise, level[group])
            target[group] = flow.target(clean[group], noise, level[group])
        if "cond" in roles:
            values["cond"], level["cond"] = self._conditioning(clean["cond"], keys["cond"])
        outputs = self._velocities(params, program, batch, values, level, predicted)
        losses = {"future": jnp.zeros(size), "action": jnp.zeros(size)}
        for group in predicted:
            error = jnp.square(at_least_float32(outputs[group]) - target[group])
            error = error.mean(axis=tuple(range(2, error.ndim)))
            mask = loss_mask(roles[group], valid[group])
            losses[group] = masked_mean(error, mask) * flows[group].weight(draw[group][:, 0])
        return losses["future"], losses["action"]

    def _roles(self, program: Program, batch: Batch) -> dict[str, Array]:
        """The role of every slot of every example, (b, slots) for each group that is present."""
        factorization = program.factorization
        slots = {g: self.slots[g] for g in factorization.present}
        row = factorization.array(slots)
        size = batch["action_valid"].shape[0]
        edges = np.cumsum(list(slots.values()))[:-1]
        roles = {
            group: jnp.broadcast_to(part, (size, part.size))
            for group, part in zip(slots, np.split(row, edges), strict=True)
        }
        labelled = jnp.any(batch["action_valid"], axis=1, keepdims=True)
        return roles | {"action": jnp.where(labelled, roles["action"], Role.ABSENT)}

    def _velocities(self, params, program, batch, values, level, predicted):
        net = bind(self.network, params, self.network.constrain)
        contexts = net("contexts", self._text(batch), batch["proprio"])
        times = net("times", level)
        return net("__call__", values, times, contexts, program.table, predict=predicted)[0]

    def _conditioning(self, video: Array, key: Array) -> tuple[Array, Array]:
        """The conditioning video of teacher forcing: clean, or noised with its level told."""
        coin, level, noise = jax.random.split(key, 3)
        b = video.shape[0]
        noised = jax.random.bernoulli(coin, self.cond_noise_prob, (b,))
        level = jnp.where(noised, self.video_flow.sample_level(level, (b,)), 0.0)
        video = self.video_flow.corrupt(video, jax.random.normal(noise, video.shape), level)
        return video, jnp.broadcast_to(level[:, None], (b, self.slots["cond"]))

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

    def _denoise(self, denoiser: Denoiser, groups, given: Batch, contexts, rng, cache=None):
        """Samples `groups` from noise along their schedules."""
        flows = {"action": self.action_flow, "future": self.video_flow}
        noise = {g: self._noise(g, given["first"], rng) for g in groups}
        schedules = {g: flows[g].schedule(self.steps) for g in groups}
        return denoiser.sample(given, noise, schedules, contexts, cache, self.solver)

    def _noise(self, group: str, first: Array, rng: Array) -> Array:
        """Where a group starts; it does not depend on which others are sampled."""
        b, _, *latent = first.shape
        if group == "action":
            return draws.normal(draws.fold_in(rng, 0), (b, self.chunk, self.action_dim))
        return draws.normal(draws.fold_in(rng, 1), (b, self.slots["future"], *latent))

    def _denoiser(self, params, program: Program) -> Denoiser:
        net = bind(self.network, params)
        return Denoiser(
            lambda *args, **kwargs: net("__call__", *args, **kwargs),
            lambda levels: net("times", levels),
            program.visibility,
            self.slots,
            self.use_cache,
        )
