"""Defines Cosmos Policy (arXiv 2601.16163): one video DiT as policy, world model and value
function.

Everything that a robot senses, does and learns about its success is a latent frame of one clip
(`layouts`), and all frames are denoised together. The given frames decide whether it is a policy, a
world model or a value function (`cosmos_policy.uses`); a batch trains all three. Levels, loss and
sampler follow the specification, sections 5 and 6: rectified flow in EDM's levels, one level per
sample, and an exponential multistep solver from sigma 80 to 4 whose last x0 is the answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wamjax.config import did_you_mean
from wamjax.diffusion.flow import RectifiedFlow
from wamjax.models.codec import Codec
from wamjax.models.dit import DiT
from wamjax.models.layers import unconstrained
from wamjax.models.transformer import Cache, unstack
from wamjax.models.visibility import Visibility, bidirectional
from wamjax.wam import noise as noises
from wamjax.wam import shares, uses
from wamjax.wam.cosmos_policy import averages, checks, clips, injection, targets
from wamjax.wam.cosmos_policy import uses as cosmos_uses
from wamjax.wam.cosmos_policy.augment import STRENGTHS, centre_crop
from wamjax.wam.cosmos_policy.layouts import Layout, name_of
from wamjax.wam.cosmos_policy.planning import Planning, plan
from wamjax.wam.cosmos_policy.sampling import HalfToldFlow, Sampler, marked, split
from wamjax.wam.loss import Denoises, Draw, SlotLosses
from wamjax.wam.objectives import bound_codec, check_batch, codec_params
from wamjax.wam.protocols import Policy
from wamjax.wam.slots import Role
from wamjax.wam.uses import Use

Batch = dict[str, Array]
Groups = dict[str, Array]
Params = dict[str, Any]

MODES = ("direct", "frozen", "plan")


class Seen(NamedTuple):
    """Holds an observation in the form that the network takes.

    Attributes:
      latents: (b, t, h, w, c) of all slots; zero for unknown slots.
      text: keys and values of the instruction, computed once.
    """

    latents: Float[Array, "b t h w c"]
    text: Cache


@dataclasses.dataclass(frozen=True)
class CosmosPolicy(Denoises, Policy):
    """Provides the objective (`init`, `loss`) and policy (`policy`, `act`, `predict`, `value`,
    `imagine`).

    Attributes:
      network, codec, process, layout: the network, and the codec, process and slots with which it
        is trained. A codec with parameters reads them from ``params["codec"]`` and does not train
        them.
      views: camera -> (height, width), in the order of the composite picture.
      judge, visibility, auxiliary: options of its uses, see `cosmos_policy.uses.uses`.
      mix: examples of each use in a row of a batch.
      action_weight: weight of the action's slot in the loss, the public code's
        action_loss_multiplier.
      discount: discount of the return per control step.
      augment: a key of `augment.STRENGTHS`, or "" for unchanged pictures.
      compat: names of `checks.COMPAT`.
      instruction_length: tokens, or rows of the text embeddings.
      steps, sigma_max, sigma_min, solver: options of sampling.
      planning: options of mode "plan".
    """

    network: DiT
    codec: Codec
    process: RectifiedFlow
    layout: Layout
    views: tuple[tuple[str, tuple[int, int]], ...]
    instruction_length: int
    judge: str = "value"
    mix: tuple[int, ...] = (2, 1, 1)
    visibility: str = "bidirectional"
    auxiliary: bool = True
    action_weight: float = 1.0
    discount: float = 0.99
    augment: str = ""
    compat: tuple[str, ...] = ()
    steps: int = 5
    sigma_max: float = 80.0
    sigma_min: float = 4.0
    solver: str = "exponential"
    planning: Planning = Planning()

    def __post_init__(self):
        checks.check(self)

    # ---- the interface for training ----

    modes = MODES
    imagines = True
    judges = True
    encode = staticmethod(marked)

    @property
    def uses(self) -> tuple[Use, ...]:
        """Returns policy, world model and value function."""
        return cosmos_uses.uses(self.judge, self.visibility, self.auxiliary)

    @property
    def row(self) -> int:
        """Returns how many neighbours in a batch share the uses exactly."""
        return 1 if "tossed_mix" in self.compat else sum(self.mix)

    @property
    def tables(self) -> tuple[Visibility, ...]:
        """Returns the visibility tables, one for all uses or one per use."""
        return tuple(dict.fromkeys(u.table for u in self.uses))

    @property
    def slot_names(self) -> tuple[tuple[str, str], ...]:
        """Returns (name, group) of every slot."""
        return tuple((name_of(s), s.group) for s in self.layout.slots)

    def describe(self) -> str:
        """Returns the roles of all slots in every use, as text."""
        return uses.describe(self.uses, self.slot_names)

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of a training batch."""
        net, layout, f32 = self.network, self.layout, jnp.float32
        chunk, action_dim = layout.numbers["action"].shape
        shapes = {
            "actions": (f32, chunk, action_dim),
            "action_valid": (jnp.bool_, chunk),
            "score": (f32,),
            "to_go": (f32,),
            "rollout": (jnp.bool_,),
            **{n: (f32, *layout.numbers[n].shape)
               for n in ("proprio", "future_proprio") if n in layout.numbers},
        }  # fmt: skip
        if net.vocabulary:
            shapes["instruction"] = jnp.int32, self.instruction_length
        else:
            shapes["context"] = jnp.bfloat16, self.instruction_length, net.context_width
        height, width = self.views[0][1][0], sum(w for _, (_, w) in self.views)
        shapes["video"] = jnp.uint8, 2, height, width, 3
        return {
            k: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
            for k, (dtype, *shape) in shapes.items()
        }

    def init(self, rng: Array) -> Params:
        """Returns new float32 parameters, one plain nested dict."""
        sizes = self.layout.sizes
        values = {g: jnp.zeros((1, m, *self.network.latent)) for g, m in sizes.items()}
        levels = {g: jnp.zeros((1, m)) for g, m in sizes.items()}
        text = {k: jnp.zeros(s.shape, s.dtype) for k, s in self.batch_spec(1).items()
                if k in ("instruction", "context")}  # fmt: skip
        network, table = self.network.clone(constrain=unconstrained), bidirectional(*sizes)
        params = network.init(rng, values, levels, text, table, method="evaluate")["params"]
        return params | codec_params(self.codec, jax.random.fold_in(rng, 1))

    # ---- the loss, see `wam.loss` ----

    def draw(self, params: Params, batch: Batch, rng: Array) -> tuple[Draw, ...]:
        """Draws everything random in `loss`: uses, noise, levels, augmentation; one draw per
        visibility table."""
        check_batch(batch, self.batch_spec)
        purposes = "assign", "noise", "augment", "level"
        keys = dict(zip(purposes, jax.random.split(rng, 4), strict=True))
        size, sizes, rollout = batch["rollout"].shape[0], self.layout.sizes, batch["rollout"]
        clean = targets.latents(
            self.layout,
            bound_codec(self.codec, params),
            clips.split(batch["video"], self.widths),
            targets.numbers(self.layout, batch, self.discount, self.compat),
            STRENGTHS[self.augment] if self.augment else None,
            keys["augment"],
        )
        noise = split(self.layout, jax.random.normal(keys["noise"], clean.shape))
        order = None
        if "tossed_mix" in self.compat:
            use = cosmos_uses.toss(keys["assign"], self.mix, rollout)
        else:
            order = shares.order(keys["assign"], self.mix, size, last=rollout)
            use = shares.use_of(order, self.mix)
        roles, trained = uses.roles(self.uses, sizes), uses.has_loss(self.uses, sizes)
        # Rollouts are not imitated: one that ends up in the policy's share has no loss.
        teaches = ~(rollout & (use == 0))[:, None]
        level = self.process.sample_level(keys["level"], (size, 1))
        predicted = [g for g, x in roles.items() if (x == Role.PREDICTED).any()]
        draw = Draw(
            clean=split(self.layout, clean),
            noise={g: noise[g] for g in predicted},
            level=dict.fromkeys(predicted, level),
            role={g: jnp.asarray(x)[use] for g, x in roles.items()},
            mask={g: jnp.asarray(x)[use] & teaches for g, x in trained.items() if x.any()},
            condition=self.text(batch),
            use=use,
            at=jnp.arange(size),
            table=self.uses[0].table,
        )
        if len(self.tables) == 1:  # all uses go through the network together
            return (draw,)
        parts = shares.split(draw, order, self.mix)
        return tuple(
            dataclasses.replace(part, table=u.table)
            for part, u in zip(parts, self.uses, strict=True)
        )

    def process_of(self, group: str) -> RectifiedFlow:
        """Returns the process of a group; all groups have the same."""
        del group
        if "bf16_times" in self.compat:
            return HalfToldFlow(**vars(self.process))
        return self.process

    def levels_of(self, group: str) -> np.ndarray:
        """Returns the levels at which a group is sampled; all groups have the same."""
        return self.sampler({}).schedule(self.steps)

    def reduce(
        self, draws: Sequence[Draw], losses: Sequence[dict[str, SlotLosses]]
    ) -> tuple[Array, dict[str, Array]]:
        """Computes the mean over all slots of all examples, and metrics; see `averages`."""
        rows = averages.rows(self.layout, self.action_weight, draws, losses)
        return averages.loss(rows), averages.metrics(self.layout, self.uses, rows)

    def examples(
        self, draws: Sequence[Draw], losses: Sequence[dict[str, SlotLosses]]
    ) -> dict[str, Array]:
        """Computes every example's "loss", its "use", and "slots" (b, t), the parts of each slot,
        which sum to the loss."""
        rows = averages.rows(self.layout, self.action_weight, draws, losses)
        slots = averages.SCALE * rows.weight * rows.velocity / rows.weight.shape[1]
        return {"loss": jnp.sum(slots, axis=1), "slots": slots, "use": rows.use}

    # ---- acting, predicting, valuing ----

    def prepare(self, params: Params) -> Params:
        """Returns parameters for fast sampling, see `transformer.unstack`; also those of the
        planner."""
        out = unstack(params, self.network.layers)
        return out | ({"planner": self.prepare(out["planner"])} if "planner" in out else {})

    def policy(
        self,
        params: Params,
        normalizers,
        observation: Batch,
        rng: Array | None,
        mode: str | None = None,
        noise=None,
        prefix=None,
    ) -> Float[Array, "b j a"]:
        """Returns a chunk of actions in robot units, in one program.

        Args:
          params: as trained, or through `prepare`. Parameters of a separate planner, see
            `planning`, are in ``params["planner"]``.
          normalizers: {"actions": ..., "proprio": ...}, see `wamjax.data.normalize`.
          observation: "video" (b, 1, H, W, 3) uint8, "proprio" (b, p) in robot units, "instruction"
            (b, s) ids or "context" embeddings.
          mode: "direct"; "frozen", which reuses the keys and values that the given slots have at
            the first step (an approximation, see `sampling.frozen_error`); or "plan".
          noise: starting point instead of draws from `rng`: as in `act`, or for "plan" as in
            `planning.plan`.

        Raises:
          ValueError: there is a prefix: one slot holds the whole chunk, see `builder.NO_PREFIX`.
        """
        if prefix is not None:
            raise ValueError("Cosmos Policy takes no prefix: one slot holds the whole chunk")
        mode = mode or MODES[0]
        if mode not in MODES:
            raise ValueError(f"acting has modes {MODES}, not {mode!r}{did_you_mean(mode, MODES)}")
        if mode == "plan":
            actions = plan(self, params, normalizers, observation, rng, noise).actions
        else:
            seen = self.observe(params, normalizers, observation)
            latents = self.act(params, seen, rng, frozen=mode == "frozen", noise=noise)
            actions = injection.extract(self.layout, latents, "action")
        return normalizers["actions"].inverse(actions)

    def expect(
        self,
        params: Params,
        normalizers,
        observation: Batch,
        rng: Array | None,
        mode: str | None = None,
        noise=None,
    ) -> Float[Array, " b"]:
        """Returns the predicted return in [0, 1] of the actions of `policy`, from the end of the
        chunk on.

        For "plan" it is the score of the chosen actions, otherwise the value function's prediction
        for the future sampled with them. (The value sampled with the actions does not judge them:
        it was trained on demonstrations, which succeed.)

        Args:
          noise: for "plan" as in `policy`; otherwise a pair, for acting and for the value.
        """
        if mode == "plan":
            return jnp.max(plan(self, params, normalizers, observation, rng, noise).scores, axis=1)
        first, second = (None, None) if noise is None else noise
        seen = self.observe(params, normalizers, observation)
        latents = self.act(params, seen, rng, frozen=mode == "frozen", noise=first)
        key = None if rng is None else noises.fold_in(rng, 1)
        return self.value(params, seen._replace(latents=latents), key, noise=second)

    def imagine(
        self, params: Params, normalizers, observation: Batch, rng: Array | None, noise=None
    ) -> Array:
        """Returns the observed picture and that at the end of the chunk: uint8 (b, 2, H, W, 3).

        To get its latents and the intermediate states, call `act` on the result of `observe`.
        """
        seen = self.observe(params, normalizers, observation)
        return self.show(params, self.act(params, seen, rng, noise=noise), observation)

    def show(self, params: Params, latents: Array, observation: Batch) -> Array:
        """Decodes the future of `latents` and appends it to the observation."""
        images = self._images(observation)
        future = clips.decode(self.layout, bound_codec(self.codec, params), latents, images)
        frames = [jnp.stack([images[c][:, 0], future.get(c, images[c][:, 0])], axis=1)
                  for c, _ in self.views]  # fmt: skip
        return jnp.concatenate(frames, axis=3)

    def observe(self, params: Params, normalizers, observation: Batch) -> Seen:
        """Encodes the slots that a policy is given, and no more of the clip."""
        layout, conditional = self.layout, self.layout.conditional
        if observation["video"].shape[1] != 1:
            frames = observation["video"].shape[1]
            raise ValueError(f"a policy acts on one frame, video has {frames}: pass the last one")
        images = self._images(observation)
        latents = clips.encode(layout, bound_codec(self.codec, params), images, conditional)
        if "proprio" in layout.numbers:
            proprio = normalizers["proprio"].forward(observation["proprio"])
            latents = injection.inject(layout, latents, {"proprio": proprio})
        padding = jnp.zeros((len(latents), len(layout) - conditional, *self.latent), latents.dtype)
        return Seen(jnp.concatenate([latents, padding], axis=1), self.read(params, observation))

    def read(self, params: Params, observation: Batch) -> Cache:
        """Computes keys and values of the instruction, for any number of calls."""
        return self.sampler(params).read(self.text(observation))

    def act(
        self,
        params,
        seen: Seen,
        rng: Array | None = None,
        steps: int = 0,
        frozen: bool = False,
        noise=None,
        states: bool = False,
    ) -> Array:
        """Samples all of p(a, s', V | s): latents of all slots, with the present unchanged.

        Args:
          noise: starting point instead of a draw from `rng`, of the shape of ``seen.latents``; for
            instance `sampling.published_noise`.
          states: return all intermediate states, see `Sampler`.
        """
        return self._sample(params, self.uses[0], seen, rng, steps, noise, states, frozen)

    def predict(
        self, params, seen: Seen, rng: Array | None = None, steps: int = 0, noise=None, states=False
    ) -> Array:
        """Samples p(s', V | s, a): like `act`, with the action of ``seen.latents``."""
        return self._sample(params, self.uses[1], seen, rng, steps, noise, states)

    def value(
        self, params, seen: Seen, rng: Array | None = None, steps: int = 0, noise=None
    ) -> Float[Array, " b"]:
        """Returns the return in [0, 1] that the model's value function predicts for
        ``seen.latents``."""
        latents = self._sample(params, self.uses[2], seen, rng, steps, noise)
        return injection.read_value(self.layout, latents)

    def sampler(self, params: Params) -> Sampler:
        """Returns the network with these parameters, ready to denoise."""
        return Sampler(
            self.bind(params), self.layout, self.process_of("action"), self.sigma_max,
            self.sigma_min, self.solver,
        )  # fmt: skip

    def with_planner(self, other: CosmosPolicy) -> CosmosPolicy:
        """Returns this policy with the value function of `other`, which plans for it.

        Raises:
          ValueError: the planner was trained on other data or has other inputs; names the
            difference.
        """
        checks.check_planner(self, other)
        return dataclasses.replace(self, judge=other.judge)

    # ---- parts ----

    @property
    def latent(self) -> tuple[int, int, int]:
        """Returns (h, w, c) of a latent frame; the network has two more channels, for masks."""
        h, w, c = self.network.latent
        return h, w, c - 2

    def _sample(self, params, use: Use, seen: Seen, rng, steps, noise, states=False, frozen=False):
        noise = noises.start(noise, rng, seen.latents.shape)
        options = {"states": True} if states else {}
        sampler, steps = self.sampler(params), steps or self.steps
        return sampler(use, seen.latents, seen.text, noise, steps, frozen, **options)

    @property
    def widths(self) -> dict[str, int]:
        """Returns camera -> width, in the order of the composite."""
        return {name: width for name, (_, width) in self.views}

    def text(self, batch: Batch) -> Groups:
        """Returns the instruction in the form that the network takes."""
        key = "instruction" if self.network.vocabulary else "context"
        return {key: batch[key]}

    def _images(self, observation: Batch) -> Groups:
        images = clips.split(observation["video"], self.widths)
        if self.augment:
            area = STRENGTHS[self.augment].area
            images = {c: centre_crop(x, area) for c, x in images.items()}
        return images
