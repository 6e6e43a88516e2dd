"""Denoises pictures: class- and text-conditional images, and video in all its schemes.

A clip is split into groups of latent frames. A `Scheme` says which of them share a noise level,
which are given and who sees whom. An image is a clip of one frame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wamjax.diffusion.guidance import guide, interval
from wamjax.diffusion.process import Process, align
from wamjax.models.codec import Codec
from wamjax.models.dit import DiT
from wamjax.models.layers import unconstrained, widest
from wamjax.models.transformer import unstack
from wamjax.models.visibility import Visibility
from wamjax.wam import noise as noises
from wamjax.wam import uses
from wamjax.wam.denoiser import Denoiser
from wamjax.wam.loss import Denoises, Draw, SlotLosses
from wamjax.wam.objectives import bind, bound_codec, check_batch, codec_params
from wamjax.wam.protocols import Pictures
from wamjax.wam.slots import Role, groups_of, masked_mean, names_of
from wamjax.wam.uses import Use
from wamjax.wam.video.schemes import Scheme, slots_of, use_of

Batch = dict[str, Array]
Groups = dict[str, Array]
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Denoising(Denoises, Pictures):
    """Provides the objective (`init`, `loss`) and sampler (`sample`) of a picture model.

    Attributes:
      network, codec, process: the network, and the codec and process with which it is trained. A
        codec with parameters reads them from ``params["codec"]`` and does not train them.
      scheme: scheme of the frames, see `video.schemes`.
      frames, picture: raw frames of a clip and their (height, width, colours).
      drop: share of examples trained without their condition, for guidance.
      instruction_length: tokens of a text condition.
      steps, solver: options of sampling; the solver is a key of `SOLVERS`, or "ancestral".
      guidance, guidance_interval: scale, and the levels (low, high] at which it is applied.
      guidance_channels: number of first latent channels that are guided; 0 for all. DiT's public
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
                f"objective.guidance_channels = {self.guidance_channels} must be between 1 and "
                f"{channels}, the channels of the latents, or 0 for all"
            )

    # ---- the interface for training ----

    @property
    def use(self) -> Use:
        """Returns the use that a clip trains."""
        return use_of(self.scheme, self.network)

    @property
    def tables(self) -> tuple[Visibility, ...]:
        """Returns the visibility table."""
        return (self.use.table,)

    @property
    def uses(self) -> tuple[Use, ...]:
        """Returns the only use."""
        return (self.use,)

    @property
    def slot_names(self) -> tuple[tuple[str, str], ...]:
        """Returns (name, group) of every latent frame."""
        return names_of(self.network.groups)

    def describe(self) -> str:
        """Returns the roles of all groups, as text."""
        return uses.describe([self.use], [(g, g) for g in self.slots])

    @property
    def always_given(self) -> int:
        """Returns the number of first frames that the scheme always gives, counted as in the
        data."""
        frames = sum(list(self.slots.values())[: self.scheme.given])
        if not frames or self.codec.key == "latents":
            return frames
        total = sum(self.slots.values())
        return 1 + (frames - 1) * max((self.frames - 1) // max(total - 1, 1), 1)

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of a training batch: pictures or latents, and their
        conditions."""
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
        """Returns new float32 parameters, one plain nested dict."""
        batch = {k: jnp.zeros(s.shape, s.dtype) for k, s in self.batch_spec(1).items()}
        values = self.split(jnp.zeros((1, sum(self.slots.values()), *self.network.latent)))
        levels = {g: jnp.zeros((1, rows)) for g, rows in self.rows.items()}
        network, condition = self.network.clone(constrain=unconstrained), self.condition(batch)
        variables = network.init(
            rng, values, levels, condition, self.use.table, method="evaluate"
        )
        return variables["params"] | codec_params(self.codec, jax.random.fold_in(rng, 1))

    # ---- the loss, see `wam.loss` ----

    def draw(self, params: Params, batch: Batch, rng: Array) -> tuple[Draw]:
        """Draws everything random in `loss`.

        Its `condition` is empty for examples that are trained without their condition.
        """
        check_batch(batch, self.batch_spec)
        purposes = "noise", "level", "role", "drop"
        keys = dict(zip(purposes, jax.random.split(rng, 4), strict=True))
        codec = bound_codec(self.codec, params)
        clean = self.split(codec.encode(batch[codec.key]))
        b = next(iter(clean.values())).shape[0]
        noise = {g: jax.random.normal(jax.random.fold_in(keys["noise"], i), v.shape)
                 for i, (g, v) in enumerate(clean.items())}  # fmt: skip
        keep = jax.random.bernoulli(keys["drop"], 1 - self.drop, (b,))
        role = self._roles(keys["role"], b)
        mask = {g: jnp.broadcast_to(x == Role.PREDICTED, (b, m))
                for (g, x), m in zip(role.items(), self.slots.values(), strict=True)}  # fmt: skip
        return (
            Draw(
                clean, noise, self._levels(keys["level"], b), role, mask,
                self.condition(batch, keep), jnp.zeros(b, int), jnp.arange(b), self.use.table,
            ),
        )  # fmt: skip

    def process_of(self, group: str) -> Process:
        """Returns the process of a group; all groups have the same."""
        del group
        return self.process

    def reduce(
        self, draws: Sequence[Draw], losses: Sequence[dict[str, SlotLosses]]
    ) -> tuple[Array, dict[str, Array]]:
        """Computes the mean over all frames that are not given."""
        error, mask = self._frames(losses)
        loss = jnp.sum(error * mask) / jnp.maximum(jnp.sum(mask), 1)
        return loss, {"loss_video": loss}

    def examples(
        self, draws: Sequence[Draw], losses: Sequence[dict[str, SlotLosses]]
    ) -> dict[str, Array]:
        """Computes "loss" of every example, and "video", the mean over the frames that it
        predicts."""
        error, mask = self._frames(losses)
        share = mask.shape[0] / jnp.maximum(jnp.sum(mask), 1)
        return {"loss": jnp.sum(error * mask, axis=1) * share, "video": masked_mean(error, mask)}

    def _frames(self, losses: Sequence[dict[str, SlotLosses]]) -> tuple[Array, Array]:
        """Returns errors and masks of all frames, (b, t)."""
        (parts,) = losses
        error = jnp.concatenate([part.error for part in parts.values()], axis=1)
        return error, jnp.concatenate([part.mask for part in parts.values()], axis=1)

    # ---- sampling pictures ----

    def prepare(self, params: Params) -> Params:
        """Returns parameters for fast sampling, see `transformer.unstack`; call it once, outside
        jit loops."""
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
        """Samples latents of clips: denoises all frames that are not given, in one jittable
        program.

        With shared levels all frames are denoised together. A causal scheme with independent levels
        samples group after group, each from the cached keys and values of the ones before.

        Args:
          condition: the conditioning keys of a batch ("label", "instruction", "context", "pooled");
            {} for an unconditional model, which then needs `count`.
          given: the first latent frames, in whole groups; any number of them if every frame has its
            own level and all frames see all.
          noise: standard normals of the frames that are not given, instead of draws from `rng`.
          fresh: standard normals that the solver "ancestral" adds at each of its steps, likewise.
          states: return all intermediate states, (steps + 1, ...), starting at the first level;
            groups that are sampled one after another are shown at equal steps.
        """
        forcing = self.scheme.independent and not self.scheme.causal
        if given is not None and forcing and not self.scheme.first:
            model = self._begun(given.shape[1])
            return model.sample(params, condition, rng, given, count, noise, states, fresh)
        b = count if count is not None else next(iter({**condition}.values())).shape[0]
        clean = {} if given is None else self.split_given(given)
        remaining = [g for g in self.slots if g not in clean]
        one_by_one = self.scheme.causal and self.scheme.independent
        run = self._sampler(params, self.condition(condition), b, states)
        cache, paths = None, {}
        starts = self._starts(noise, remaining, (b,))
        fresh_of = self._starts(fresh, remaining, (self.steps, b), "fresh")
        for i, part in enumerate([[g] for g in remaining] if one_by_one else [remaining]):
            key, stream = streams(rng, i)
            start = {}
            for j, g in enumerate(part):
                own = None if stream is None else jax.random.fold_in(stream, j)
                shape = b, self.slots[g], *self.network.latent
                start[g] = noises.start(starts.get(g), own, shape)
            own = {g: fresh_of[g] for g in part} if fresh_of else None
            samples, cache = run(clean, start, cache, key, own)
            paths |= samples
            clean |= {g: x[-1] for g, x in samples.items()} if states else samples
        if states:
            n = self.process.schedule(self.steps).shape[0]
            paths = {g: paths.get(g, jnp.broadcast_to(x, (n, *x.shape))) for g, x in clean.items()}
            return jnp.concatenate([paths[g] for g in self.slots], axis=2)
        return jnp.concatenate([clean[g] for g in self.slots], axis=1)

    def clips(
        self,
        params: Params,
        condition: Batch,
        rng: Array,
        given: Array | None = None,
        count: int | None = None,
        frames: int = 0,
    ) -> Array:
        """Samples clips in the format of the data; see `Pictures.clips`.

        With `frames`, schemes that sample chunk after chunk can exceed the training length:
        `video.rolling`.
        """
        from wamjax.wam.video import rolling

        codec = bound_codec(self.codec, params)
        given = None if given is None else codec.encode(given)
        if frames:
            length = codec.shape(frames, *self.picture[:2])[0]
            latents = rolling.roll(self, params, condition, rng, length, given, count)
        else:
            latents = self.sample(params, condition, rng, given, count)
        return latents if codec.key == "latents" else codec.decode(latents)

    def passes(self, given: int, frames: int) -> int:
        """Returns the network evaluations that a clip takes, in latent frames: steps and
        prefills."""
        if not self.scheme.causal:
            return self.steps
        if not self.scheme.independent:
            return self.steps + bool(given)
        # Every sampled group is prefilled once for the groups after it.
        groups = (frames - given) // self.scheme.chunk
        return groups * (self.steps + 1) - (not given)

    # ---- parts ----

    def _starts(
        self, noise: Array | None, groups: list[str], lead: tuple[int, ...], name: str = "noise"
    ) -> Groups:
        """Splits given noise into its groups; {} if there is none.

        Raises:
          ValueError: its shape does not fit the frames.
        """
        if noise is None:
            return {}
        sizes = [self.slots[g] for g in groups]
        shape = *lead, sum(sizes), *self.network.latent
        if noise.shape != shape:
            raise ValueError(f"{name} has shape {noise.shape}, the frames to sample have {shape}")
        parts = jnp.split(noise, np.cumsum(sizes)[:-1], axis=len(lead))
        return dict(zip(groups, parts, strict=True))

    def _begun(self, frames: int) -> Denoising:
        """Returns the same model with its first frames as a separate group, so that they can be
        given.

        Groups have no parameters; with `forcing` all frames see all as before, and each has its own
        level.
        """
        scheme = dataclasses.replace(self.scheme, first=frames)
        groups = groups_of(slots_of(scheme, sum(self.slots.values())))
        return dataclasses.replace(self, scheme=scheme, network=self.network.clone(groups=groups))

    @property
    def slots(self) -> dict[str, int]:
        """Returns the number of latent frames of each group."""
        return {g.name: len(g.positions) for g in self.network.groups}

    def split(self, latents: Float[Array, "b t h w c"]) -> Groups:
        """Splits latents into the frames of each group."""
        edges = np.cumsum(list(self.slots.values()))[:-1]
        return dict(zip(self.slots, jnp.split(latents, edges, axis=1), strict=True))

    def split_given(self, given: Float[Array, "b t h w c"]) -> Groups:
        """Splits given frames into the leading groups; raises ValueError unless the groups are
        whole."""
        ends = np.cumsum([0, *self.slots.values()]).tolist()
        if given.shape[1] not in ends:
            sizes = list(self.slots.values())
            raise ValueError(f"{given.shape[1]} given frames do not fill whole groups, which have "
                             f"{sizes} frames")  # fmt: skip
        number = ends.index(given.shape[1])
        names = list(self.slots)[:number]
        return {g: given[:, ends[i] : ends[i + 1]] for i, g in enumerate(names)}

    def condition(self, batch: Batch, keep: Array | None = None) -> Groups:
        """Returns the conditions in the form that the network takes; empty for examples where
        `keep` (b,) is False."""
        absent = {"label": self.network.classes}  # absent text is all padding
        out = {}
        for key in self.batch_spec(1):
            if key == self.codec.key:
                continue
            if key not in batch:
                raise KeyError(f"the condition {key!r} is missing; there is {sorted(batch)}")
            out[key] = value = batch[key]
            if keep is not None:
                out[key] = jnp.where(align(keep, value), value, absent.get(key, 0))
        return out

    @property
    def rows(self) -> dict[str, int]:
        """Returns the number of levels that the network receives for each group: one per frame, or
        one for all."""
        single_level = self.network.conditioning in ("cross_attention", "in_context")
        return {g: 1 if single_level else m for g, m in self.slots.items()}

    def _levels(self, key: Array, b: int) -> Groups:
        """Draws the noise level of every frame, (b, m) for each group."""
        if not self.scheme.independent:
            level = self.process.sample_level(key, (b, 1))
            return {g: jnp.broadcast_to(level, (b, rows)) for g, rows in self.rows.items()}
        size = self.scheme.chunk or 1  # frames of a chunk share their level
        out = {}
        for i, (g, m) in enumerate(self.slots.items()):
            draw = self.process.sample_level(jax.random.fold_in(key, i), (b, m // size))
            out[g] = jnp.repeat(draw, size, axis=1)
        return out

    def _roles(self, key: Array, b: int) -> Groups:
        """Draws the role of every group, (b, 1): that of the scheme, with history given at
        random."""
        number = len(self.slots)
        index = jnp.arange(number)
        given = jnp.broadcast_to(index < self.scheme.given, (b, number))
        if self.scheme.history:
            coin, count = jax.random.split(key)
            has_history = jax.random.bernoulli(coin, self.scheme.history, (b, 1))
            count = jax.random.randint(count, (b, 1), 1, number)
            given = given | (has_history & (index < count))
        roles = jnp.where(given, Role.GIVEN, Role.PREDICTED)
        return {
            g: jnp.broadcast_to(roles[:, i, None], (b, self.rows[g]))
            for i, g in enumerate(self.slots)
        }

    def _sampler(
        self, params: Params, condition: Groups, b: int, states: bool = False
    ) -> Callable:
        """Returns ``run(given, noise, cache, key, fresh) -> (groups, cache)``, which denoises once.

        It uses the condition, and guidance if the scale requires it, as a batch of twice the size.
        """
        guided = bool(condition) and self.guidance != 1.0
        if guided:
            unconditional = self.condition(condition, jnp.zeros(b, bool))
            condition = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), condition, unconditional)
        net = bind(self.network, params)
        vector, contexts, tokens = net("conditions", condition)
        # Tokens of the condition see everything and everything sees them, so nothing is constant.
        table, own_tokens = self.use.table, bool(self.network.own_tokens)

        def network(values, times, contexts, restricted, scale=None, **options):
            if guided:
                values = {g: jnp.concatenate([v, v]) for g, v in values.items()}
            visible = table if own_tokens else restricted
            out, cache = net("__call__", values | tokens, times, contexts, visible, **options)
            if scale is not None:
                out = {g: guide(*jnp.split(v, 2), scale, self._guided()) for g, v in out.items()}
            return out, cache

        def times(levels):
            return net("times", levels, vector)

        cached = self.use_cache and not own_tokens
        denoiser = Denoiser(network, times, table, self.rows, cached, self.process)
        schedule = self.process.schedule(self.steps)
        scales = interval(schedule, self.guidance, *self.guidance_interval)
        extras = {"scale": jnp.asarray(scales, widest())} if guided else None
        first = jnp.asarray(schedule[0], widest())

        def run(given, noise, cache, key, fresh=None):
            start = {g: self.process.corrupt(jnp.zeros_like(n), n, first) for g, n in noise.items()}
            schedules = dict.fromkeys(noise, schedule)
            return denoiser.sample(
                given, start, schedules, contexts, cache, solver=self.solver, rng=key,
                extras=extras, states=states, fresh=fresh,
            )  # fmt: skip

        return run

    def _guided(self) -> int | None:
        """Returns the number of guided channels: all but those of a learned variance."""
        channels = self.network.latent[-1]
        if self.guidance_channels:
            return self.guidance_channels
        return channels if self.network.outputs not in (0, channels) else None


def streams(rng: Array | None, i: int | Array) -> tuple[Array | None, Array | None]:
    """Returns the keys of the solver and of the noise of part `i` of a clip; (None, None) without a
    key."""
    if rng is None:
        return None, None
    key, stream = jax.random.split(jax.random.fold_in(rng, i))
    return key, stream
