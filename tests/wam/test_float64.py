"""Tests that under x64 a loss, its gradient and a sampler are in float64 throughout.

This is read from the programs: a single cast to float32 would leave seven of sixteen digits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wam import cosmos_tiny, test_denoising, tiny

from wamjax.diffusion.ddpm import DDPM
from wamjax.diffusion.edm import EDM
from wamjax.diffusion.flow import RectifiedFlow
from wamjax.models.codec import CachedLatents, CosineCodec
from wamjax.models.vae.autoencoder import Sizes
from wamjax.models.vae.bottleneck import CodeBook, FiniteScalar, Gaussian
from wamjax.models.vae.training import CodecObjective
from wamjax.models.vae.vae_codec import VAECodec

NARROW = {"float32", "bfloat16", "float16"}


def narrow(function, *arguments):
    """Returns the operations of a program that output a float of less than 64 bits."""
    with jax.enable_x64(True):
        program = jax.make_jaxpr(function)(*arguments)
    return sorted(set(_narrow(program.jaxpr)))


def _narrow(jaxpr):
    for equation in jaxpr.eqns:
        inner = [p for p in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program)
                 if _is_program(p)]  # fmt: skip
        for part in inner:
            yield from _narrow(getattr(part, "jaxpr", part))
        if not inner and any(str(v.aval.dtype) in NARROW for v in equation.outvars):
            shapes = [str(v.aval) for v in equation.outvars]
            yield f"{equation.primitive.name} {shapes} {equation.source_info.traceback}"[:2000]


def _is_program(x):
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def wide(tree):
    """Returns shapes with all floats as float64."""

    def one(x):
        floats = jnp.issubdtype(x.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(x.shape, np.float64 if floats else x.dtype)

    return jax.tree.map(one, tree)


def of(objective):
    """Returns parameters and a batch."""
    params = wide(jax.eval_shape(objective.init, jax.random.key(0)))
    return params, wide(dict(objective.batch_spec(4)))


def check_loss(objective):
    params, batch = of(objective)
    run = jax.value_and_grad(objective.loss, has_aux=True)
    assert not narrow(lambda p, b: run(p, b, jax.random.key(0)), params, batch)


class Identity:
    forward = inverse = staticmethod(lambda x: x)


NORMALIZERS = {"actions": Identity, "proprio": Identity}


@pytest.mark.parametrize("variant", ["joint", "optional_idm"])
def test_fast_wam(variant):
    objective = tiny.fast_wam(variant)
    check_loss(objective)
    params, batch = of(objective)
    seen = {k: batch[k] for k in ("proprio", "instruction")}
    seen["video"] = jax.ShapeDtypeStruct((4, 1, *tiny.PICTURE, 3), np.uint8)
    objective = tiny.fast_wam(variant, solver="unipc", codec=CosineCodec(2, 12))
    for run in (objective.policy, objective.imagine):
        draw = functools.partial(run, rng=jax.random.key(0))
        assert not narrow(lambda p, o, draw=draw: draw(p, NORMALIZERS, o), params, seen)


SAMPLERS = {
    "guided flow": dict(process=RectifiedFlow(3.0), guidance=2.0),
    "ddpm": dict(process=DDPM(variance="learned", weighting="uniform"), solver="ancestral"),
    "ddim": dict(process=DDPM(), solver="ddim", guidance=1.5),
    "edm": dict(process=EDM(), solver="heun"),
    "x0": dict(process=RectifiedFlow(predicts="x0", weighting="min_snr"), solver="dpmpp_2m"),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_pictures(name):
    objective = test_denoising.make(frames=1, classes=3, **SAMPLERS[name])
    check_loss(objective)
    params, batch = of(objective)
    condition = test_denoising.condition_of(batch)
    draw = objective.sample
    assert not narrow(lambda p, c: draw(p, c, jax.random.key(0)), params, condition)


def test_pictures_of_text():
    check_loss(test_denoising.make(frames=1, text="joint"))


def test_video_with_groups_that_are_given():
    check_loss(test_denoising.make("image_to_video"))
    codec = CachedLatents(3, 1, 1)
    clip = jax.ShapeDtypeStruct((1, 2, 3, 4, 3), jnp.bfloat16)
    with jax.enable_x64(True):
        assert jax.eval_shape(codec.encode, clip).dtype == np.float64


@pytest.mark.parametrize("bottleneck", [Gaussian(3), FiniteScalar((8, 5, 5)), CodeBook(7, 3)])
def test_codecs(bottleneck):
    sizes = Sizes("causal", 3, 4, multipliers=(1, 2), blocks=1, temporal=(True,))
    codec = VAECodec(sizes, bottleneck, mean=(0.1, 0.2, 0.3), std=(1.5, 2.5, 0.7))
    check_loss(CodecObjective(codec, 3, (4, 4)))
    params = wide(jax.eval_shape(codec.init, jax.random.key(0)))
    clip = jax.ShapeDtypeStruct((1, 3, 4, 4, 3), np.uint8)

    def there_and_back(params, clip):
        bound = codec.bind(params)
        latents = bound.encode(clip)
        return latents, bound.decode(latents)

    assert not narrow(there_and_back, params, clip)


def test_cosmos_policy():
    objective = cosmos_tiny.objective()
    check_loss(objective)
    params, _ = of(objective)
    seen = wide(cosmos_tiny.observation())
    for mode in ("direct", "frozen"):
        assert not narrow(
            lambda p, o, mode=mode: objective.policy(p, NORMALIZERS, o, jax.random.key(0), mode),
            params, seen,
        )  # fmt: skip
    levels = np.array([0.5, 4.0])
    assert not narrow(
        lambda p, b: objective.by_level(p, b, jax.random.key(0), levels), *of(objective)
    )
