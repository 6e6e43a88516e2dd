"""Tests picture models: all schemes and conditions train and sample; the cache changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.helpers import random_params

from wamjax.diffusion.ddpm import DDPM
from wamjax.diffusion.flow import RectifiedFlow
from wamjax.models import blocks, dit
from wamjax.models.blocks import ExpertSpec
from wamjax.models.codec import PixelCodec
from wamjax.wam.slots import Role, groups_of
from wamjax.wam.video.objective import Denoising
from wamjax.wam.video.schemes import SCHEMES, slots_of

PICTURE = (4, 4, 3)
BATCH = 3


def make(scheme="diffusion", frames=4, conditioning="adaln_zero", text="none", **options):
    width, heads = 24, 2
    choices = dict(positions="rope" if frames > 1 else "sincos")
    if text == "joint":
        choices["text_spec"] = ExpertSpec("text", 20, 30, **blocks.MMDIT)
    process = options.pop("process", RectifiedFlow())
    classes = options.pop("classes", 0)
    scheme = SCHEMES[scheme]
    network = dit.DiT(
        video_spec=dit.expert(width, 40, conditioning, text),
        groups=groups_of(slots_of(scheme, frames)),
        latent=(2, 2, 12),
        layers=2,
        heads=heads,
        head_dim=12,
        patch=1,
        outputs=24 if getattr(process, "variance", "") == "learned" else 12,
        conditioning=conditioning,
        classes=classes,
        text=text,
        context_width=10 if text != "none" else 0,
        vocabulary=7 if text != "none" else 0,
        instruction_length=5,
        freq_dim=16,
        **choices,
    )
    return Denoising(
        network, PixelCodec(2), process, scheme, frames, PICTURE, instruction_length=5, steps=3,
        **options,
    )  # fmt: skip


def batch_of(objective, b=BATCH, seed=0):
    rng = np.random.default_rng(seed)
    return {
        k: rng.integers(0, 255 if k == "video" else 7 if k == "instruction" else 2, s.shape)
        .astype(s.dtype)
        for k, s in objective.batch_spec(b).items()
    }  # fmt: skip


def parameters(objective):
    return random_params(jax.eval_shape(objective.init, jax.random.key(0)), 1)


def condition_of(batch):
    return {k: v for k, v in batch.items() if k != "video"}


CASES = {
    **{scheme: dict(scheme=scheme) for scheme in SCHEMES},
    **{c: dict(frames=1, conditioning=c, classes=3) for c in dit.CONDITIONING},
    **{f"text_{t}": dict(frames=1, text=t) for t in dit.TEXT[1:]},
    "text_video": dict(scheme="forcing_causal", text="both"),
    "ddpm": dict(frames=1, classes=3, process=DDPM(variance="learned"), solver="ancestral"),
}


# Other tests sample these: `test_rolling`, and `test_noise` with the draws of every step.
SAMPLED = ("blocks", "forcing_causal", "text_video", "ddpm")
QUICK = ("blocks", "in_context", "text_both", "text_joint", "ddpm")


def some_slow(names, quick):
    """Returns parameters of a test, of which only the quick ones run by default."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("case", some_slow(CASES, QUICK))
def test_every_case_trains_and_samples_and_reaches_every_parameter(case):
    objective = make(**CASES[case])
    params, batch = parameters(objective), batch_of(objective)
    # The published initialisation has all parameters, too.
    assert jax.tree.structure(params) == jax.tree.structure(
        jax.eval_shape(objective.init, jax.random.key(0))
    )

    def sample(params, batch):
        latents = objective.codec.encode(batch["video"])
        return objective.sample(
            params, condition_of(batch), jax.random.key(1), count=BATCH,
            given=latents[:, :1] if case == "image_to_video" else None,
        )  # fmt: skip

    @jax.jit
    def step(params, batch):
        (loss, _), grads = jax.value_and_grad(objective.loss, has_aux=True)(
            params, batch, jax.random.key(0)
        )
        return loss, grads, {} if case in SAMPLED else sample(params, batch)

    loss, grads, clip = jax.device_get(step(params, batch))
    assert np.isfinite(loss) and loss > 0
    assert np.all(np.isfinite(clip if len(clip) else 0.0))
    shape = BATCH, objective.frames, 2, 2, 12
    assert jax.eval_shape(sample, params, batch).shape == shape
    silent = [
        jax.tree_util.keystr(p)
        for p, g in jax.tree_util.tree_leaves_with_path(grads)
        if not np.any(g)
    ]
    # An expert that ends early needs no query in its last block.
    assert all("final_block" in p and "'text'" in p and "'q'" in p for p in silent), silent


@pytest.mark.parametrize(
    "scheme", some_slow(["image_to_video", "forcing_causal", "blocks"], ["forcing_causal"])
)
def test_cached_sampling_equals_uncached(scheme):
    objective = make(scheme, classes=3, guidance=2.0)
    params, batch = parameters(objective), batch_of(objective)
    given = objective.codec.encode(batch["video"])[:, : 2 if scheme == "blocks" else 1]

    @functools.partial(jax.jit, static_argnums=0)
    def run(objective, params):
        return objective.sample(params, condition_of(batch), jax.random.key(1), given)

    # With unstacked layers, which `test_rolling` compares with cached stacked ones.
    want = run(dataclasses.replace(objective, use_cache=False), params)
    got = run(objective, objective.prepare(params))
    np.testing.assert_array_equal(got[:, : given.shape[1]], given)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_later_frame_does_not_change_an_earlier_one_in_causal_schemes():
    objective = make("forcing_causal")
    params, batch = parameters(objective), batch_of(objective)
    clean = objective.split(objective.codec.encode(batch["video"]))
    told = {g: jnp.full((BATCH, 1), 0.5) for g in clean}

    @jax.jit
    def outputs(values):
        return objective.network.apply(
            {"params": params}, values, told, {}, objective.use.table, method="evaluate"
        )

    a, b = outputs(clean), outputs(clean | {"g3": clean["g3"] + 1})
    for g in ("g0", "g1", "g2"):
        np.testing.assert_array_equal(a[g], b[g])
    assert np.any(a["g3"] != b["g3"])


def test_guidance_scale_one_is_off_and_others_extrapolate():
    objective = make(frames=1, classes=3)
    params, batch = parameters(objective), batch_of(objective)

    def run(**changes):
        changed = dataclasses.replace(objective, **changes)
        return jax.jit(changed.sample)(params, condition_of(batch), jax.random.key(1))

    plain, none = run(), run(guidance=0.0)
    null = {"label": np.full(BATCH, 3, np.int32)}
    want = jax.jit(objective.sample)(params, null, jax.random.key(1))
    np.testing.assert_allclose(none, want, atol=1e-5)
    assert np.std(run(guidance=3.0) - plain) > 1e-3
    outside = run(guidance=3.0, guidance_interval=(2.0, 3.0))
    np.testing.assert_allclose(outside, plain, atol=1e-5)


def test_given_groups_have_no_loss_and_levels_are_of_their_scheme():
    @functools.partial(jax.jit, static_argnums=0)
    def drawn(objective):
        keys = jax.random.key(0), jax.random.key(1)
        return objective._roles(keys[0], 400), objective._levels(keys[1], 400)

    for name, scheme in SCHEMES.items():
        roles, levels = jax.device_get(drawn(make(name)))
        given = np.stack([x[:, 0] == Role.GIVEN for x in roles.values()], axis=1)
        per_frame = np.concatenate(list(levels.values()), axis=1)
        distinct = {len(set(row)) for row in per_frame.tolist()}
        assert distinct == {4 // max(scheme.chunk, 1) if scheme.independent else 1}, name
        assert given[:, : scheme.given].all() and not given[:, -1].any()
        if scheme.history:
            assert abs(given[:, 0].mean() - scheme.history) < 0.08
    objective = make("image_to_video")
    params, batch = parameters(objective), batch_of(objective)
    other = dict(batch, video=batch["video"].copy())
    other["video"][:, 0] = 0
    loss = jax.jit(objective.loss)
    losses = [float(loss(params, x, jax.random.key(0))[0]) for x in (batch, other)]
    assert losses[0] != losses[1]  # conditions have an effect


def test_forcing_takes_any_number_of_given_frames():
    """They are clean frames of the single group of training, each with its own level."""
    objective = make("forcing", classes=3)
    params, batch = parameters(objective), batch_of(objective)
    latents = objective.codec.encode(batch["video"])
    begun = objective._begun(1)
    told = jnp.array([[0.0, 0.7, 0.2, 0.4]] * BATCH)
    parts = {"g0": told[:, :1], "g1": told[:, 1:]}

    @functools.partial(jax.jit, static_argnums=0)
    def run(o, levels):
        return o.network.apply(
            {"params": params}, o.split(latents), levels, condition_of(batch), o.use.table,
            method="evaluate",
        )  # fmt: skip

    whole, parted = run(objective, {"g0": told}), run(begun, parts)
    np.testing.assert_allclose(
        jnp.concatenate([*parted.values()], axis=1), whole["g0"], rtol=1e-4, atol=1e-5
    )
    draw = jax.jit(objective.sample, static_argnames="count")
    for known in (1, 3):
        made = draw(params, condition_of(batch), jax.random.key(1), latents[:, :known])
        np.testing.assert_array_equal(made[:, :known], latents[:, :known])
        other = draw(params, condition_of(batch), jax.random.key(1), 1 - latents[:, :known])
        assert made.shape == latents.shape
        assert np.abs(other[:, known:] - made[:, known:]).max() > 1e-4


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="do not divide"):
        make("blocks", frames=5)
    objective = make("blocks")
    params, batch = parameters(objective), batch_of(objective)
    given = objective.codec.encode(batch["video"])[:, :1]
    with pytest.raises(ValueError, match="1 given frames do not fill whole groups"):
        objective.sample(params, {}, jax.random.key(0), given, BATCH)
    with pytest.raises(KeyError, match="has no 'video'"):
        objective.loss(params, {"x": np.zeros(2)}, jax.random.key(0))
