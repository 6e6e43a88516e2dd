"""Defines a Fast-WAM small enough to test: four video tokens per frame, two layers."""

from __future__ import annotations

import functools

import jax
import numpy as np
from models.helpers import random_params

from wamjax.diffusion.flow import RectifiedFlow
from wamjax.models.blocks import ExpertSpec
from wamjax.models.codec import PixelCodec
from wamjax.models.mot import MixtureOfTransformers
from wamjax.models.shell import GroupSpec
from wamjax.wam.fast_wam.objective import FastWAM
from wamjax.wam.fast_wam.uses import USES

FRAMES, CHUNK, ACTION, PROPRIO, WORDS = 3, 3, 2, 3, 4
LAYERS, HEADS, HEAD_DIM, FREQ, PATCH, CONTEXT = 2, 2, 12, 8, 2, 10
PICTURE = (8, 8)
CODEC = PixelCodec(patch=2)
VARIANTS = ("fast", "joint", "idm", "no_cotrain", "optional_idm", "ladder")


def groups(*names):
    future = tuple(range(1, FRAMES))
    specs = {
        "first": GroupSpec("first", "video", (0,)),
        "future": GroupSpec("future", "video", future),
        "cond_first": GroupSpec("cond_first", "video", (0,)),
        "cond": GroupSpec("cond", "video", future),
        "anticipation": GroupSpec("anticipation", "video", future),
        "action": GroupSpec("action", "action", tuple(range(CHUNK))),
    }
    return tuple(specs[name] for name in names)


ALL = ("first", "future", "cond", "action")


def network(names=ALL, **changes) -> MixtureOfTransformers:
    _, h, w, c = CODEC.shape(FRAMES, *PICTURE)
    return MixtureOfTransformers(
        video_spec=ExpertSpec("video", 14, 20),
        action_spec=ExpertSpec("action", 8, 12),
        groups=groups(*names),
        layers=LAYERS,
        heads=HEADS,
        head_dim=HEAD_DIM,
        latent=(h, w, c),
        action_dim=ACTION,
        context_width=CONTEXT,
        instruction_length=WORDS,
        patch=PATCH,
        freq_dim=FREQ,
        **{"vocabulary": 11} | changes,
    )


def fast_wam(variant="fast", vocabulary=11, **changes) -> FastWAM:
    present = {group for use in USES[variant] for group in use.present} | {"future"}
    names = [n for n in ("first", "future", "cond", "anticipation", "action") if n in present]
    defaults = {
        "shares": {"optional_idm": (0.5, 0.5), "ladder": (0.25, 0.25, 0.5)}.get(variant, (1.0,)),
        "video_flow": RectifiedFlow(5.0),
        "action_flow": RectifiedFlow(1.0),
        "steps": 3,
        "codec": CODEC,
    }
    return FastWAM(
        variant=variant,
        network=network(names, vocabulary=vocabulary),
        frames=FRAMES,
        picture=PICTURE,
        chunk=CHUNK,
        action_dim=ACTION,
        proprio_dim=PROPRIO,
        **defaults | changes,
    )


class Stub(FastWAM):
    """Has a network that returns a third of its input, for tests in which it does not matter."""

    def bind(self, params, constrain=None):
        assert not params
        return lambda method, values, *_, predict, **__: {g: values[g] / 3 for g in predict}


def stub(variant="fast", **changes) -> FastWAM:
    return Stub(**vars(fast_wam(variant, **changes)))


@functools.cache
def _params(variant, vocabulary, seed, dtype):
    objective = fast_wam(variant, vocabulary)
    return random_params(jax.eval_shape(objective.init, jax.random.key(0)), seed, dtype)


def params(variant="fast", vocabulary=11, seed=0, dtype=np.float32):
    return _params(variant, vocabulary, seed, dtype)


def batch(size=4, seed=0):
    """Returns a batch in NumPy, so that changing or slicing it compiles nothing."""
    rng = np.random.default_rng(seed)
    return {
        "video": rng.integers(0, 256, (size, FRAMES, *PICTURE, 3)).astype(np.uint8),
        "proprio": rng.standard_normal((size, PROPRIO)).astype(np.float32),
        "actions": rng.standard_normal((size, CHUNK, ACTION)).astype(np.float32),
        "instruction": rng.integers(0, 11, (size, WORDS)).astype(np.int32),
        "frame_valid": np.ones((size, FRAMES), bool),
        "action_valid": np.ones((size, CHUNK), bool),
    }


def put(array, at, value):
    """Returns a copy with other values at an index."""
    array = np.array(array)
    array[at] = value
    return array
