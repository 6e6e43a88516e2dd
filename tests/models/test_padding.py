"""Tests that padded slots change no outputs, gradients or caches, with any kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.helpers import assert_trees_close, random_params

from wamjax.models import attention, blocks, padding
from wamjax.models.blocks import ExpertSpec
from wamjax.models.dit import DiT
from wamjax.models.mot import MixtureOfTransformers
from wamjax.models.shell import GroupSpec
from wamjax.models.visibility import bidirectional, table

# 15 tokens per slot become 16, and 7 actions become 8.
SIZES = dict(latent=(10, 6, 4), layers=2, heads=2, head_dim=12, freq_dim=24)
GROUPS = (
    GroupSpec("first", "video", (0,)),
    GroupSpec("future", "video", (1, 2)),
    GroupSpec("action", "action", tuple(range(7))),
)
MIXTURE = MixtureOfTransformers(
    video_spec=ExpertSpec("video", 24, 32),
    action_spec=ExpertSpec("action", 16, 24),
    groups=GROUPS,
    action_dim=3,
    context_width=8,
    instruction_length=4,
    **SIZES,
)
COSMOS = DiT(
    video_spec=ExpertSpec("video", 24, 32, **blocks.COSMOS, lora_rank=4),
    groups=GROUPS[:2],
    text="cross",
    text_net="none",
    context_width=24,
    positions="rope",
    **SIZES,
)
FAST = table("fast", {"first": "first", "future": "first future", "action": "first action"})
BOTH = bidirectional("first", "future")
CASES = {  # case -> kernels
    "fast": (MIXTURE, FAST, ("xla",)),
    "cosmos": (COSMOS, BOTH, ("xla", "splash")),
}


def inputs(network):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    values = {"first": draw(2, 1, 10, 6, 4), "future": draw(2, 2, 10, 6, 4)}
    levels = {"first": draw(2, 1), "future": draw(2, 2)}
    if len(network.groups) == 3:
        values["action"], levels["action"] = draw(2, 7, 3), draw(2, 1)
    condition = {"context": draw(2, 4, network.context_width), "proprio": draw(2, 5)}
    return values, levels, condition


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_without_padding(name):
    network, visibility, kernels = CASES[name]
    values, levels, condition = inputs(network)
    init = functools.partial(network.init, visibility=visibility, method="evaluate")
    abstract = jax.eval_shape(init, jax.random.key(0), values, levels, condition)["params"]
    params = random_params(abstract)

    def run(**changes):
        @jax.jit
        def loss(params, values):
            outputs = network.clone(**changes).apply(
                {"params": params}, values, levels, condition, visibility, method="evaluate"
            )
            return sum(jnp.mean(jnp.sin(3 * y)) for y in outputs.values()), outputs

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, values)

    want = run(pad_slots="off")  # not rematerialised: a smaller program, the same numbers
    for kernel in kernels:
        got = run(pad_slots="on", attention=attention.named(kernel), remat="full")
        assert_trees_close(got, want, rtol=2e-4, atol=2e-6)


def test_caches_are_without_padding_and_fit_programs_with_it():
    values, levels, condition = inputs(MIXTURE)
    init = functools.partial(MIXTURE.init, visibility=FAST, method="evaluate")
    params = random_params(
        jax.eval_shape(init, jax.random.key(0), values, levels, condition)["params"]
    )
    # One of the frames' tokens does not exist.
    valid = {"first": np.arange(15)[None] != 4}

    def caller(kind, params):
        network = MIXTURE.clone(pad_slots=kind)

        def call(method, *args, **options):
            return network.apply({"params": params}, *args, method=method, **options)

        return call

    @functools.partial(jax.jit, static_argnums=0)
    def prefill(kind, params):
        call = caller(kind, params)
        contexts, times = call("conditions", condition).contexts, call("times", levels)
        head = {"first": values["first"]}
        _, cache = call("__call__", head, times, contexts, FAST, emit=("first",), valid=valid)
        return cache, times

    @functools.partial(jax.jit, static_argnums=0)
    def step(kind, params, cache, times):
        rest = {g: v for g, v in values.items() if g != "first"}
        call = caller(kind, params)
        return call("__call__", rest, times, {}, FAST, cache, tuple(rest), valid=valid)[0]

    bare, padded = prefill("off", params), prefill("on", params)
    assert padded[0].tokens["first"][0].shape == (2, 2, 2, 15, 12)
    assert_trees_close(padded, bare, rtol=2e-4, atol=2e-6)
    want = step("off", params, *bare)
    for kind, filled in (("off", padded), ("on", bare), ("on", padded)):
        assert_trees_close(step(kind, params, *filled), want, rtol=2e-4, atol=2e-6)


def test_automatic_padding_is_for_tpus():
    assert padding.choose("auto", [98, 196], 3) is None
    device = jax.sharding.AbstractDevice("TPU v5", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert padding.choose("auto", [98, 196], 3) == (98, 104)
        assert padding.choose("off", [98, 196], 3) is None
    assert padding.choose("on", [256], 1) == (256, 256)  # whole tiles, apart nevertheless
    assert padding.choose("on", [32], 32) is None  # eight times as many
    assert padding.choose("on", [32, 1], 1) is None  # a group that is not a whole slot
    with pytest.raises(ValueError, match="model.pad_slots = 'always'"):
        padding.choose("always", [98], 1)
