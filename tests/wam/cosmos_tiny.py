"""Defines a Cosmos Policy small enough to test: nine slots of four tokens, two layers."""

from __future__ import annotations

import functools

import jax
import numpy as np
from models.helpers import random_params

from wamjax.data.normalize import Normalizer
from wamjax.diffusion.flow import RectifiedFlow
from wamjax.diffusion.noise import cosmos_policy
from wamjax.models import blocks
from wamjax.models.blocks import ExpertSpec
from wamjax.models.codec import PixelCodec
from wamjax.models.dit import DiT
from wamjax.models.shell import GroupSpec
from wamjax.wam.cosmos_policy.layouts import parse
from wamjax.wam.cosmos_policy.objective import CosmosPolicy

WORDS = (
    "blank", "proprio:3", "camera:eye", "camera:hand",
    "action:4x2",
    "future_proprio:3", "future_camera:eye", "future_camera:hand",
    "value",
)  # fmt: skip
LAYOUT = parse(WORDS)
VIEWS = (("hand", (8, 8)), ("eye", (8, 8)))  # the composite has them in the opposite order
LATENT = (4, 4, 12)
TOKENS, VOCABULARY = 5, 11
PROCESS = RectifiedFlow(weighting="uniform", law=cosmos_policy(len(LAYOUT)))


def network(**changes) -> DiT:
    h, w, c = LATENT
    values = dict(
        video_spec=ExpertSpec("video", 24, 40, **blocks.COSMOS, lora_rank=4, context_rows=8),
        groups=tuple(GroupSpec(g, "video", at) for g, at in LAYOUT.groups.items()),
        latent=(h, w, c + 2), layers=2, heads=2, head_dim=12, outputs=c, text="cross",
        text_net="none", context_width=10, vocabulary=VOCABULARY, instruction_length=TOKENS,
        positions="rope", rope_scale=(1.0, 3.0, 3.0), freq_dim=24, time_scale=1.0,
    )  # fmt: skip
    return DiT(**values | changes)


def objective(**changes) -> CosmosPolicy:
    values = dict(network=network(), codec=PixelCodec(2), process=PROCESS, layout=LAYOUT,
                  views=VIEWS, instruction_length=TOKENS)  # fmt: skip
    return CosmosPolicy(**values | changes)


class Stub(CosmosPolicy):
    """Has a network that returns a third of its input, for tests in which it does not matter."""

    def bind(self, params, constrain=None):
        assert not params
        c = LATENT[-1]
        return lambda method, values, *_, **__: {g: x[..., :c] / 3 for g, x in values.items()}


def stub(**changes) -> CosmosPolicy:
    return Stub(**vars(objective(**changes)))


@functools.cache
def params(seed=0, dtype=np.float32):
    return random_params(jax.eval_shape(objective().init, jax.random.key(0)), seed, dtype)


def batch(size=8, seed=0, rollouts=0):
    """Returns a batch in which the last `rollouts` of every four examples are not imitated.

    It is in NumPy, like `tiny.batch`.
    """
    rng = np.random.default_rng(seed)
    chunk, dim = LAYOUT.numbers["action"].shape
    actions = rng.uniform(-1, 1, (size, chunk, dim))
    return {
        "video": rng.integers(0, 256, (size, 2, 8, 16, 3)).astype(np.uint8),
        "instruction": rng.integers(0, VOCABULARY, (size, TOKENS)).astype(np.int32),
        "proprio": rng.uniform(-1, 1, (size, 3)).astype(np.float32),
        "future_proprio": rng.uniform(-1, 1, (size, 3)).astype(np.float32),
        "actions": actions.astype(np.float32),
        "action_valid": np.ones((size, chunk), bool),
        "score": rng.uniform(0, 1, size).round().astype(np.float32),
        "to_go": rng.integers(0, 100, size).astype(np.float32),
        "rollout": np.arange(size) % 4 >= 4 - rollouts,
    }


def observation(size=2, seed=0):
    whole = batch(size, seed)
    return {k: whole[k] for k in ("instruction", "proprio")} | {"video": whole["video"][:, :1]}


def normalizers():
    """Returns normalizers for actions in [-2, 2] and states in [-1, 1]."""
    return {
        "actions": Normalizer(np.zeros(2), np.full(2, 2.0), np.ones(2)),
        "proprio": Normalizer(np.zeros(3), np.ones(3), np.ones(3)),
    }
