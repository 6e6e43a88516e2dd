"""Denoising pictures: class- and text-conditional images, and video in all its schemes.

A clip is split into groups of latent frames; a `Scheme` says which of them share a noise level,
which are given and who sees whom. An image is a clip of one frame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wamjax.diffusion.guidance import guide, interval
from wamjax.diffusion.process import Process, align
from wamjax.models.codec import Codec
from wamjax.models.dit import DiT
from wamjax.models.layers import at_least_float32, unconstrained, widest
from wamjax.models.transformer import unstack
from wamjax.models.visibility import Visibility
from wamjax.wam.losses import Draw, SlotLosses
from wamjax.wam.objectives import bind, bound_codec, check_batch, codec_params, start_noise
from wamjax.wam.sampling import Denoiser
from wamjax.wam.schemes import Scheme, groups_of, table_of
from wamjax.wam.slots import masked_mean

Batch = dict[str, Array]
Groups = dict[str, Array]
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Denoising:
    """Objective (`init`, `loss`) and sampler (`sample`) of a picture model.

    Attributes:
      network, codec, process: what is trained, on what, and how it is noised. A codec with
        parameters finds them in ``params["codec"]``, where they stay as they are.
      scheme: of the frames, see `wamjax.wam.schemes`.
      frames, picture: raw frames of a clip and their (height, width, colours).
      drop: share of examples trained without their condition, for guidance.
      instruction_length: tokens of a text condition.
      steps, solver: of sampling; the solver is a key of `SOLVERS`, or "ancestral".
      guidance, guidance_interval: scale, and the levels (low, high] that it is applied in.
      guidance_channels: of a latent that guidance reaches, the first ones; 0 for all. DiT's public
        sampler guides 3 of 4.
      use_cache: False recomputes everything at every step (the reference path).
    """

    network: DiT
    codec: Codec
    process: Process
    scheme: Scheme
    frames: int
    picture: tuple[int, int, int]
    drop: float = 0.1
    instruction_length: int = 0
    steps: int = 50
    solver: str = "euler"
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (-np.inf, np.inf)
    guidance_channels: int = 0
    use_cache: bool = True

    def __post_init__(self):
        channels = self.network.latent[-1]
        if not 0 <= self.guidance_channels <= channels:
            raise ValueError(
                f"objective.guidance_channels {self.guidance_channels} of latents of {channels} "
                f"channels: between 1 and {channels}, or 0 for all"
            )

    # ---- what the training framework sees ----

    def pictures(self) -> list[tuple[str, Visibility]]:
        """The visibility table."""
        return [(self.visibility.name, self.visibility)]

    @property
    def visibility(self) -> Visibility:
        return table_of(self.scheme, self.network)

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a training batch: what is denoised and what conditions it."""
        net, length = self.network, self.instruction_length
        if self.codec.key == "latents":
            frames = sum(self.slots.values())
            spec = {"latents": ((frames, *net.latent), jnp.bfloat16)}
        else:
            spec = {"video": ((self.frames, *self.picture), jnp.uint8)}
        if net.classes:
            spec["label"] = (), jnp.int32
        if net.vocabulary:
            spec["instruction"] = (length,), jnp.int32
        elif net.text != "none":
            spec["context"] = (length, net.context_width), jnp.bfloat16
        if net.pooled_width:
            spec["pooled"] = (net.pooled_width,), jnp.float32
        return {k: jax.ShapeDtypeStruct((batch_size, *s), d) for k, (s, d) in spec.items()}

    def init(self, rng: Array) -> Params:
        """Fresh float32 parameters, one plain nested dict."""
        batch = {k: jnp.zeros(s.shape, s.dtype) for k, s in self.batch_spec(1).items()}
        values = self.split(jnp.zeros((1, sum(self.slots.values()), *self.network.latent)))
        levels = {g: jnp.zeros((1, self._told(m))) for g, m in self.slots.items()}
        network = self.network.clone(constrain=unconstrained)
        condition = self.condition(batch)
        arguments = rng, values, levels, condition, self.visibility
        params = network.init(*arguments, method="evaluate")["params"]
        return params | codec_params(self.codec, jax.random.fold_in(rng, 1))

    def loss(self, params: Params, batch: Batch, rng: Array) -> tuple[Array, dict[str, Array]]:
        """Loss of a batch: the process's, over the frames that are not given.

        Returns:
          (loss, metrics), float32.
        """
        return self.loss_of(params, self.draw(params, batch, rng))

    def draw(self, params: Params, batch: Batch, rng: Array) -> Draw:
        """All that `loss` leaves to chance.

        Its `use` is bool (b, groups): which groups are given; its `condition` is what examples are
        left with that are trained without theirs.
        """
        check_batch(batch, self.batch_spec)
        purposes = "noise", "level", "role", "drop"
        keys = dict(zip(purposes, jax.random.split(rng, 4), strict=True))
        codec = bound_codec(self.codec, params)
        clean = self.split(codec.encode(batch[codec.key]))
        b = next(iter(clean.values())).shape[0]
        given, level = self._given(keys["role"], b), self._levels(keys["level"], b)
        noise = {g: jax.random.normal(jax.random.fold_in(keys["noise"], i), v.shape)
                 for i, (g, v) in enumerate(clean.items())}  # fmt: skip
        keep = jax.random.bernoulli(keys["drop"], 1 - self.drop, (b,))
        return Draw(clean, noise, level, given, self.condition(batch, keep), jnp.arange(b))

    def denoising_loss(self, params: Params, draw: Draw) -> dict[str, SlotLosses]:
        """Losses of the frames of each group, the process's own, without chance."""
        values, told = {}, {}
        for i, (g, x) in enumerate(draw.clean.items()):
            noised = self.process.corrupt(x, draw.noise[g], draw.level[g])
            noised = align(self.process.c_in(draw.level[g]), noised) * noised
            known = draw.use[:, i, None]
            values[g] = jnp.where(align(known, x), x, noised)
            told[g] = jnp.where(known, self._clean_level(), self.process.c_noise(draw.level[g]))
        network = bind(self.network, params, self.network.constrain)
        outputs = network("evaluate", values, told, draw.condition, self.visibility)
        losses = {}
        for i, (g, output) in enumerate(outputs.items()):
            of = draw.clean[g], draw.noise[g], draw.level[g]
            error = self.process.loss(at_least_float32(output), *of).mean(axis=(2, 3, 4))
            predicted = jnp.logical_not(draw.use[:, i, None])
            weight = jnp.ones(error.shape[0], error.dtype)  # the process's is in the error
            losses[g] = SlotLosses(error, jnp.broadcast_to(predicted, error.shape), weight)
        return losses

    def loss_of(self, params: Params, draw: Draw) -> tuple[Array, dict[str, Array]]:
        """The loss of a draw, and metrics: `loss` is that of `draw`."""
        total = count = 0.0
        for losses in self.denoising_loss(params, draw).values():
            predicted = losses.mask[:, 0]
            total += jnp.sum(losses.error.sum(axis=1) * predicted)
            count += jnp.sum(predicted) * losses.error.shape[1]
        loss = total / jnp.maximum(count, 1)
        return loss, {"loss_video": loss}

    def example_losses(self, params: Params, draw: Draw) -> dict[str, Array]:
        """"loss" of every example, (b,), whose mean is the loss; and "video", the mean over the
        frames that it predicts."""
        parts = self.denoising_loss(params, draw).values()
        error, mask = (
            jnp.concatenate([getattr(x, k) for x in parts], axis=1) for k in ("error", "mask")
        )
        share = mask.shape[0] / jnp.maximum(jnp.sum(mask), 1)
        return {"loss": jnp.sum(error * mask, axis=1) * share, "video": masked_mean(error, mask)}

    # ---- making pictures ----

    def prepare(self, params: Params) -> Params:
        """Parameters for fast sampling, see `transformer.unstack`; once, outside of jit loops."""
        layers = self.network.layers - bool(self.network.text_spec)
        return unstack(params, layers)

    def sample(
        self,
        params: Params,
        condition: Batch,
        rng: Array | None,
        given: Float[Array, "b t h w c"] | None = None,
        count: int | None = None,
        noise: Float[Array, "b m h w c"] | None = None,
        states: bool = False,
        fresh: Float[Array, "n b m h w c"] | None = None,
    ) -> Float[Array, "*n b t h w c"]:
        """Latents of clips, all frames that are not given from noise, in one jittable program.

        With shared levels all frames are denoised together; a causal scheme with levels of their
        own makes group after group, each from the cached keys and values of the ones before.

        Args:
          condition: the keys of a batch that condition ("label", "instruction", "context",
            "pooled"); {} for a model without, which then needs `count`.
          given: the first latent frames, whole groups of them; any number of them where every
            frame has a level of its own and all see all.
          noise: standard normals of the frames that are not given, instead of draws of `rng`.
          fresh: those that the solver "ancestral" adds at each of its steps, likewise.
          states: return the whole way, (steps + 1, ...), from the start at the first level; of
            groups that are made one after the other, each at the same step of its own.
        """
        forced = self.scheme.independent and not self.scheme.causal
        if given is not None and forced and not self.scheme.first:
            begun = self._begun(given.shape[1])
            return begun.sample(params, condition, rng, given, count, noise, states, fresh)
        b = count if count is not None else next(iter({**condition}.values())).shape[0]
        done = {} if given is None else self.split_given(given)
        rest = [g for g in self.slots if g not in done]
        one_by_one = self.scheme.causal and self.scheme.independent
        run = self._sampler(params, self.condition(condition), b, states)
        cache, way = None, {}
        starts = self._starts(noise, rest, (b,))
        added = self._starts(fresh, rest, (self.steps, b), "fresh")
        for i, part in enumerate([[g] for g in rest] if one_by_one else [rest]):
            key, stream = streams(rng, i)
            start = {}
            for j, g in enumerate(part):
                own = None if stream is None else jax.random.fold_in(stream, j)
                shape = b, self.slots[g], *self.network.latent
                start[g] = start_noise(starts.get(g), own, shape)
            own = {g: added[g] for g in part} if added else None
            made, cache = run(done, start, cache, key, own)
            way |= made
            done |= {g: x[-1] for g, x in made.items()} if states else made
        if states:
            n = self.process.schedule(self.steps).shape[0]
            way = {g: way.get(g, jnp.broadcast_to(x, (n, *x.shape))) for g, x in done.items()}
            return jnp.concatenate([way[g] for g in self.slots], axis=2)
        return jnp.concatenate([done[g] for g in self.slots], axis=1)

    # ---- parts ----

    def _starts(
        self, noise: Array | None, groups: list[str], lead: tuple[int, ...], what: str = "noise"
    ) -> Groups:
        """Given noise cut into the groups that it is of; {} where none is given.

        Raises:
          ValueError: it is of other frames.
        """
        if noise is None:
            return {}
        sizes = [self.slots[g] for g in groups]
        shape = *lead, sum(sizes), *self.network.latent
        if noise.shape != shape:
            raise ValueError(f"{what} is {noise.shape}, what is not given is {shape}")
        parts = jnp.split(noise, np.cumsum(sizes)[:-1], axis=len(lead))
        return dict(zip(groups, parts, strict=True))

    def _begun(self, frames: int) -> Denoising:
        """The same model with its first frames as a group of their own, so that they can be given.

        Groups have no parameters; with `forcing` all frames see all as before, and each is told
        its own level.
        """
        scheme = dataclasses.replace(self.scheme, first=frames)
        groups = groups_of(scheme, sum(self.slots.values()))
        return dataclasses.replace(self, scheme=scheme, network=self.network.clone(groups=groups))

    @property
    def slots(self) -> dict[str, int]:
        """Latent frames of each group."""
        return {g.name: len(g.positions) for g in self.network.groups}

    def split(self, latents: Float[Array, "b t h w c"]) -> Groups:
        """The frames of each group."""
        edges = np.cumsum(list(self.slots.values()))[:-1]
        return dict(zip(self.slots, jnp.split(latents, edges, axis=1), strict=True))

    def split_given(self, given: Float[Array, "b t h w c"]) -> Groups:
        """The frames of the leading groups; ValueError unless they are whole."""
        ends = np.cumsum([0, *self.slots.values()]).tolist()
        if given.shape[1] not in ends:
            sizes = list(self.slots.values())
            raise ValueError(f"{given.shape[1]} given frames are not whole groups of {sizes}")
        number = ends.index(given.shape[1])
        names = list(self.slots)[:number]
        return {g: given[:, ends[i] : ends[i + 1]] for i, g in enumerate(names)}

    def condition(self, batch: Batch, keep: Array | None = None) -> Groups:
        """What conditions, as the network takes it; without it where `keep` (b,) is False."""
        nothing = {"label": self.network.classes}  # text that is absent is all padding
        out = {}
        for key in self.batch_spec(1):
            if key == self.codec.key:
                continue
            if key not in batch:
                raise KeyError(f"the model is conditioned by {key!r}; got {sorted(batch)}")
            out[key] = value = batch[key]
            if keep is not None:
                out[key] = jnp.where(align(keep, value), value, nothing.get(key, 0))
        return out

    def _told(self, frames: int) -> int:
        """Levels that a group of frames is told: one for each frame, or one for all."""
        one = self.network.conditioning in ("cross_attention", "in_context")
        return 1 if one else frames

    def _levels(self, key: Array, b: int) -> Groups:
        """The noise level of every frame, (b, m) for each group."""
        if not self.scheme.independent:
            level = self.process.sample_level(key, (b, 1))
            return {g: jnp.broadcast_to(level, (b, self._told(m))) for g, m in self.slots.items()}
        size = self.scheme.chunk or 1  # frames of a chunk share their level
        out = {}
        for i, (g, m) in enumerate(self.slots.items()):
            draw = self.process.sample_level(jax.random.fold_in(key, i), (b, m // size))
            out[g] = jnp.repeat(draw, size, axis=1)
        return out

    def _given(self, key: Array, b: int) -> Array:
        """Which groups are given, (b, groups)."""
        number = len(self.slots)
        index = jnp.arange(number)
        given = jnp.broadcast_to(index < self.scheme.given, (b, number))
        if not self.scheme.history:
            return given
        coin, count = jax.random.split(key)
        has = jax.random.bernoulli(coin, self.scheme.history, (b, 1))
        count = jax.random.randint(count, (b, 1), 1, number)
        return given | (has & (index < count))

    def _clean_level(self) -> Array:
        return self.process.c_noise(jnp.asarray(self.process.schedule(1)[-1], widest()))

    def _sampler(
        self, params: Params, condition: Groups, b: int, states: bool = False
    ) -> Callable:
        """``run(given, noise, cache, key, fresh) -> (groups, cache)``: one denoising.

        Under a condition, guided where the scale asks for it, as a batch of twice the size.
        """
        guided = bool(condition) and self.guidance != 1.0
        if guided:
            none = self.condition(condition, jnp.zeros(b, bool))
            condition = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), condition, none)
        net = bind(self.network, params)
        vector, contexts, text = net("conditions", condition)
        table = self.visibility
        # Tokens of the condition see and are seen by all, so nothing stays constant beside them.
        own_tokens = text is not None or self.network.conditioning == "in_context"

        def network(values, times, contexts, restricted, scale=None, **options):
            if guided:
                values = {g: jnp.concatenate([v, v]) for g, v in values.items()}
            if text is not None:
                values["text"] = text
            seen = table if own_tokens else restricted
            out, cache = net("__call__", values, times, contexts, seen, **options)
            if scale is not None:
                out = {g: guide(*jnp.split(v, 2), scale, self._guided()) for g, v in out.items()}
            return out, cache

        def times(levels):
            return net("times", levels, vector)

        slots = {g: self._told(m) for g, m in self.slots.items()}
        cached = self.use_cache and not own_tokens
        denoiser = Denoiser(network, times, table, slots, cached, self.process)
        schedule = self.process.schedule(self.steps)
        scales = interval(schedule, self.guidance, *self.guidance_interval)
        extras = {"scale": jnp.asarray(scales, widest())} if guided else None
        first = jnp.asarray(schedule[0], widest())

        def run(given, noise, cache, key, fresh=None):
            start = {g: self.process.corrupt(jnp.zeros_like(n), n, first) for g, n in noise.items()}
            schedules = dict.fromkeys(noise, schedule)
            options = contexts, cache, self.solver, key, extras
            return denoiser.sample(given, start, schedules, *options, states, fresh)

        return run

    def _guided(self) -> int | None:
        """Channels that guidance reaches: not those of a learned variance."""
        channels = self.network.latent[-1]
        if self.guidance_channels:
            return self.guidance_channels
        return channels if self.network.outputs not in (0, channels) else None


def streams(rng: Array | None, i: int | Array) -> tuple[Array | None, Array | None]:
    """Keys of the solver and of the noise of part `i` of a clip; none of none."""
    if rng is None:
        return None, None
    key, stream = jax.random.split(jax.random.fold_in(rng, i))
    return key, stream
