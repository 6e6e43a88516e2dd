"""Compares outputs and gradients of kernels with the reference, for every table of the project."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.helpers import random_params

from wamjax import config as configs
from wamjax import flops, wam
from wamjax.data.spec import DataSpec
from wamjax.models import kernels
from wamjax.models.attention import attend, grouped, masked, named
from wamjax.models.visibility import bidirectional, causal
from wamjax.training import sharding
from wamjax.wam.cosmos_policy import uses as cosmos_uses
from wamjax.wam.fast_wam import uses as programs

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
TABLES = {
    "fast": programs.FAST,
    "joint": programs.JOINT,
    "idm": programs.IDM,
    "idm_published": programs.IDM_PUBLISHED,
    "ladder": programs.LADDER,
    **{f"prefix_{use.name}": use.table
       for value in cosmos_uses.VALUES for use in cosmos_uses.uses(value, "prefix")},
    "bidirectional": bidirectional("a", "b"),
    "causal": causal("a", "b", "c"),
}  # fmt: skip


def tensors(shapes, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    return [{g: rng.standard_normal((1, 2, n, 64)).astype(dtype) for g, n in shapes.items()}
            for _ in range(4)]  # fmt: skip


@functools.cache
def results(kernel, rows, keys):
    """Returns the output and gradients of `attend` by a kernel."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 2, n, 64)).astype("f4") for n in (rows, keys, keys))
    weights = rng.standard_normal(q.shape).astype("f4")

    @jax.jit
    def both(*x):
        y, back = jax.vjp(lambda *x: attend(*x, kernel=kernel), *x)
        return y, *back(weights)

    return both(q, k, v)


@pytest.mark.parametrize("rows, keys", [(128, 256), (130, 200), (40, 129)])
def test_splash_is_the_reference(rows, keys):
    """With whole blocks and with padded ones."""
    for a, b in zip(results("splash", rows, keys), results("xla", rows, keys), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["fast", "idm", "prefix_policy", "causal"])
def test_every_table_by_splash(name):
    check_table(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(TABLES) - {"fast", "idm", "prefix_policy", "causal"}))
def test_every_other_table_by_splash(name):
    check_table(name)


def check_table(name):
    table = TABLES[name]
    q, k, v, weights = tensors({g: 24 + 40 * i for i, g in enumerate(table.groups)})

    @functools.partial(jax.jit, static_argnums=0)
    def run(attention, *x):
        y, back = jax.vjp(lambda *x: attention(*x, table), *x)
        return y, back({g: weights[g] for g in y})

    want, got = run(masked, q, k, v), run(named("splash"), q, k, v)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5, rtol=3e-5)


def test_splash_on_a_mesh_is_that_of_one_device():
    q, k, v, _ = (x["a"] for x in tensors({"a": 96}))
    q, k, v = (np.concatenate([x] * 4) * np.arange(1, 5)[:, None, None, None] for x in (q, k, v))
    alone = kernels.splash(q, k, v)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        spread = jax.jit(kernels.splash)(q, k, v)
    np.testing.assert_allclose(alone, spread, atol=1e-5)


def test_auto_is_xla_where_nothing_faster_is_known():
    q, k, v, _ = (x["a"] for x in tensors({"a": 96}))
    assert kernels.choose(jnp.asarray(q), jnp.asarray(k)) == {}
    np.testing.assert_array_equal(attend(q, k, v, kernel="auto"), attend(q, k, v))
    wide = jnp.zeros((1, 2, kernels.SPLASH_KEYS, 64))
    assert kernels.choose(wide, wide) == {"tpu": kernels.splash}
    assert kernels.choose(wide[..., :40], wide[..., :40]) == {}
    work = flops.count_by(lambda x: attend(x, x, x, kernel="auto"), wide)
    assert work == {"kernel": 2 * 2 * 2 * kernels.SPLASH_KEYS**2 * 64}


def test_auto_takes_the_kernel_of_the_platform_that_is_compiled_for():
    """The choice is made at lowering, so a program for an absent TPU has the TPU's kernel."""
    x = jax.ShapeDtypeStruct((1, 2, 1152, 128), jnp.bfloat16)
    run = jax.jit(functools.partial(attend, kernel="auto"))
    trace = run.trace(x, x, x)
    assert "tpu_custom_call" in trace.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in trace.lower(lowering_platforms=("cpu",)).as_text()


def test_names_are_kernels_and_the_reference():
    assert named("masked") is masked and named("auto") == named("auto") != named("xla")
    assert hash(named("xla")) == hash(named("xla"))
    with pytest.raises(ValueError, match="model.attention = 'slash' must be one of .*'splash'"):
        named("slash")
    with pytest.raises(ValueError, match="'cudnn' computes in bfloat16 or float16, not float32"):
        kernels.cudnn(*[jnp.zeros((1, 1, 2, 8))] * 3)
    x = tensors({"a": 8, "b": 4})[:3]
    table = bidirectional("a", "b")
    for g, y in grouped(*x, table).items():
        np.testing.assert_array_equal(named("xla")(*x, table)[g], y)


def test_the_config_selects_the_kernel_and_the_loss_is_the_same():
    config = configs.base_config()
    config.update_from_flattened_dict(
        {"model.layers": 1, "model.heads": 2, "model.head_dim": 8, "model.codec.patch": 8,
         "model.video.width": 16, "model.video.ffn": 16, "model.action.width": 8,
         "model.action.ffn": 8, "model.context_width": 8, "data.instruction_length": 4}
    )  # fmt: skip
    spec = DataSpec({"front": (16, 16)}, 3, 2, 4, 5, 1, 4, 10.0)
    programs, found, args = {}, {}, None
    for kind in ("xla", "auto", "masked"):
        config.model.attention = kind
        objective = wam.build(config, spec)
        if args is None:
            params = random_params(jax.eval_shape(objective.init, jax.random.key(0)))
            batch = {k: np.ones(s.shape, s.dtype) for k, s in objective.batch_spec(2).items()}
            args = params, batch, jax.random.key(1)
        with jax.set_mesh(sharding.make_mesh(ONE, jax.devices()[:1])):
            lowered = jax.jit(objective.loss).lower(*args)
            programs[kind] = lowered.as_text()
            if kind != "auto":
                found[kind] = lowered.compile()(*args)[0]
    assert programs["auto"] == programs["xla"] != programs["masked"]
    np.testing.assert_allclose(found["masked"], found["xla"], rtol=1e-5)
