"""Tests the published sizes, traced abstractly (spec 1.6, 2)."""

import jax
import pytest

from wamjax.diffusion.flow import RectifiedFlow
from wamjax.models.blocks import ExpertSpec
from wamjax.models.codec import CachedLatents
from wamjax.models.mot import MixtureOfTransformers
from wamjax.models.shell import GroupSpec
from wamjax.tree import count
from wamjax.wam.fast_wam.objective import FastWAM


def published(picture, action_dim, proprio_dim):
    codec = CachedLatents(channels=48, spatial=16, temporal=4)
    t, h, w, c = codec.shape(9, *picture)
    assert t == 3
    network = MixtureOfTransformers(
        video_spec=ExpertSpec("video", 3072, 14336),
        action_spec=ExpertSpec("action", 1024, 4096),
        groups=(
            GroupSpec("first", "video", (0,)),
            GroupSpec("future", "video", (1, 2)),
            GroupSpec("action", "action", tuple(range(32))),
        ),
        layers=30,
        heads=24,
        head_dim=128,
        latent=(h, w, c),
        action_dim=action_dim,
        context_width=4096,
        instruction_length=128,
    )
    flow = RectifiedFlow(5.0)
    return FastWAM(
        "fast", network, codec, 9, picture, 32, action_dim, proprio_dim, flow, flow
    )  # fmt: skip


@pytest.mark.parametrize(
    "picture, action_dim, proprio_dim, latent, action_size, total",
    [
        ((224, 448), 7, 8, (3, 14, 28, 48), 1_020_886_023, 6_020_710_599),
        ((384, 320), 14, 14, (3, 24, 20, 48), 1_020_900_366, 6_020_749_518),
    ],
    ids=["libero", "robotwin"],
)
def test_parameter_counts(picture, action_dim, proprio_dim, latent, action_size, total):
    objective = published(picture, action_dim, proprio_dim)
    assert objective.batch_spec(2)["latents"].shape == (2, *latent)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    sizes = {e: count(params[e]) + count(params["blocks"][e]) for e in ("video", "action")}
    assert sizes == {"video": 4_999_787_712, "action": action_size}
    assert count(params["blocks"]["video"]) == 30 * 163_656_704
    assert count(params["blocks"]["action"]) == 30 * 33_600_512
    assert count(params) == total
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}


def test_cached_latents_want_shapes_that_the_vae_makes():
    codec = CachedLatents(48, 16, 4)
    for frames, height in ((8, 224), (9, 230)):
        with pytest.raises(ValueError, match="4 k \\+ 1 frames.*divisible by 16"):
            codec.shape(frames, height, 448)
