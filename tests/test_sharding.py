import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import PartitionSpec as P

from wamjax import tree, wam
from wamjax.data.spec import DataSpec
from wamjax.training import optim, sharding, state


def mesh(data=1, fsdp=1, tensor=1, devices=None):
    return sharding.make_mesh(dict(data=data, fsdp=fsdp, tensor=tensor), devices)


def abstract_params(variant="fast"):
    return jax.eval_shape(toy.fast_wam(variant).init, jax.random.key(0))


def shapes():
    return {k: x.shape for k, x in tree.flatten(abstract_params()).items()}


# ---- tree ----


def test_flatten_and_unflatten_are_inverse():
    nested = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    flat = tree.flatten(nested)
    assert flat == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert tree.unflatten(flat) == nested
    with pytest.raises(ValueError, match="a/b/x"):
        tree.unflatten({"a/b": 1, "a/b/x": 2})
    with pytest.raises(ValueError, match="a/b"):
        tree.unflatten({"a/b/x": 2, "a/b": 1})


def test_counts_add_up():
    params = abstract_params()
    want = sum(int(np.prod(s)) for s in shapes().values())
    assert tree.count(params) == want
    assert tree.nbytes(params) == 4 * want
    counts = tree.count_by_expert(params)
    assert counts.pop("total") == want == sum(counts.values())
    owned = {k: v for k, v in shapes().items() if k.removeprefix("blocks/").startswith("video/")}
    assert counts["video"] == sum(int(np.prod(s)) for s in owned.values())
    assert f"{want:,}" in tree.describe(params) and f"{counts['video']:,}" in tree.describe(params)


# ---- mesh ----


@pytest.mark.parametrize("sizes, want", [
    ((-1, 1, 1), (8, 1, 1)), ((-1, 2, 2), (2, 2, 2)), ((2, -1, 1), (2, 4, 1)),
    ((1, 2, -1), (1, 2, 4)), ((2, 2, 2), (2, 2, 2)), ((-1, 8, 1), (1, 8, 1)),
])  # fmt: skip
def test_make_mesh_fills_what_is_left(sizes, want):
    made = mesh(*sizes)
    assert tuple(made.shape.values()) == want and made.axis_names == sharding.AXES
    assert all(t == jax.sharding.AxisType.Auto for t in made.axis_types)


@pytest.mark.parametrize("sizes", [(-1, 3, 1), (4, 1, 1), (16, 1, 1), (-1, -1, 1), (0, 1, 8)])
def test_make_mesh_errors_name_the_sizes(sizes):
    with pytest.raises(ValueError) as error:
        mesh(*sizes)
    for axis, n in zip(sharding.AXES, sizes, strict=True):
        assert f"{axis}={n}" in str(error.value)


class Device(types.SimpleNamespace):
    """Fakes a device of a slice, with the attributes that ordering needs."""

    platform = device_kind = "simulated"
    __hash__ = object.__hash__


@pytest.mark.parametrize("sizes, slices, crossing", [
    ((2, 4, 1), 2, "data"), ((8, 1, 1), 2, "data"), ((4, 1, 2), 4, "data"), ((1, 4, 2), 2, "fsdp"),
    ((2, 8, 1), 4, "data fsdp"), ((2, 2, 3), 4, "data fsdp"), ((6, 2, 1), 4, "data fsdp"),
])  # fmt: skip
def test_slices_are_joined_by_the_axes_that_communicate_least(sizes, slices, crossing):
    count = int(np.prod(sizes))
    devices = [Device(id=i, slice_index=i * slices // count) for i in range(count)]
    out = sharding.over_slices(sizes, slices, devices[::-1])  # in any order
    assert out.shape == sizes and sorted(d.id for d in out.flat) == list(range(count))
    where = np.vectorize(lambda d: d.slice_index)(out)
    assert np.array_equal(np.unique(where), np.arange(slices))
    crosses = [a for i, a in enumerate(sharding.AXES) if np.any(np.diff(where, axis=i))]
    assert crosses == crossing.split()
    assert all(np.ptp(row) == 0 for row in where.reshape(-1, sizes[2]))


def test_the_tensor_axis_does_not_cross_slices():
    devices = [Device(id=i, slice_index=i // 4) for i in range(8)]
    text = "mesh data=1 x fsdp=1 x tensor=8 on 2 slices: .* make mesh.data a multiple of 2"
    with pytest.raises(ValueError, match=text):
        sharding.over_slices((1, 1, 8), 2, devices)


def test_check_config():
    sharding.check_config(toy.config(), mesh(4, 2))
    with pytest.raises(ValueError, match="data.batch_size 12 .* 8 shards"):
        sharding.check_config(toy.config(**{"data.batch_size": 12}), mesh(4, 2))
    with pytest.raises(ValueError, match="multiple of 16"):
        sharding.check_config(toy.config(**{"optim.accumulate": 2}), mesh(4, 2))
    with pytest.raises(ValueError, match="model.heads 4 .* 8"):
        sharding.check_config(toy.config(), mesh(1, 1, 8))


# ---- rules ----


def test_every_parameter_is_sharded_by_its_role():
    specs = {
        k: sharding.spec_of(k, s, mesh(2, 2, 2)) for k, s in shapes().items()
    }  # no parameter is unmatched
    for e in ("video", "action"):
        block = f"blocks/{e}"
        for a in ("self_attn", "cross_attn"):
            for name in "qkv":  # column parallel: bias follows the output
                assert specs[f"{block}/{a}/{name}/kernel"] == P(None, "fsdp", "tensor")
                assert specs[f"{block}/{a}/{name}/bias"] == P(None, "tensor")
            assert specs[f"{block}/{a}/o/kernel"] == P(None, "tensor", "fsdp")
        assert specs[f"{block}/ffn/in/kernel"] == P(None, "fsdp", "tensor")
        assert specs[f"{block}/ffn/out/kernel"] == P(None, "tensor", "fsdp")
    for path, spec in specs.items():
        if path.startswith("blocks/"):
            assert spec[0] is None, f"{path}: the layer axis is sliced by the scan"
        used = [a for a in spec if a is not None]
        assert len(used) == len(set(used))


def test_all_matmul_parameters_are_split_over_fsdp():
    for path, shape in shapes().items():
        if path.endswith("kernel"):
            assert "fsdp" in sharding.spec_of(path, shape, mesh(4, 2))


@pytest.mark.parametrize("name", ["fast_wam_libero", "fast_wam_robotwin"])
@pytest.mark.parametrize("variant", ["fast", "optional_idm"])
def test_the_published_models_are_split_64_ways(name, variant):
    """All parameters match a rule and divide, and a device holds about 1/64 of them."""
    file = pathlib.Path(__file__).parent.parent / "experiments" / "configs" / f"{name}.py"
    config = runpy.run_path(str(file))["get_config"](f"variant={variant}")
    data, size = config.data, config.data.declared
    spec = DataSpec(
        {name: size.camera_size for name in data.cameras}, size.proprio_dim, size.action_dim,
        data.chunk, data.frames, data.frame_stride, data.instruction_length, 10.0,
    )  # fmt: skip
    objective = wam.build(config, spec)
    params = tree.flatten(jax.eval_shape(objective.init, jax.random.key(0)))
    made = jax.sharding.AbstractMesh((1, 16, 4), sharding.AXES)
    held = 0
    for path, x in params.items():
        spec = sharding.spec_of(path, x.shape, made)
        held += x.size // int(np.prod([made.shape[a] for a in spec if a is not None]))
    assert tree.count(params) / 64 <= held < 1.1 * tree.count(params) / 64


def test_an_unmatched_parameter_is_an_error():
    with pytest.raises(ValueError, match="'video/novel/kernel'.*RULES"):
        sharding.spec_of("video/novel/kernel", (4, 4), mesh(8))
    # A rule matches whole paths, not parts of them.
    with pytest.raises(ValueError, match="no sharding rule"):
        sharding.spec_of("other/video/head/kernel", (4, 4), mesh(8))


def test_a_dimension_that_does_not_divide_is_an_error_naming_it():
    with pytest.raises(ValueError) as error:
        sharding.spec_of("blocks/video/ffn/in/kernel", (2, 6, 8), mesh(2, 4))
    for part in ("blocks/video/ffn/in/kernel", "dimension 1", "size 6", "'fsdp'", "size 4"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="names 3 dimensions"):
        sharding.spec_of("blocks/video/ffn/in/kernel", (8, 8), mesh(2, 4))


def test_optimiser_state_is_sharded_like_its_parameter():
    config = toy.config()
    abstract = jax.eval_shape(lambda: state.create(toy.fast_wam(), optim.make(config), config))
    m = mesh(2, 2, 2)
    places = sharding.state_shardings(abstract, abstract.params, m)
    want = tree.flatten(places.params)
    assert tree.flatten(places.ema) == want
    flat = tree.flatten(places.opt_state)
    for moment in ("mu", "nu"):
        found = {k.split(f"{moment}/")[1]: v for k, v in flat.items() if f"/{moment}/" in k}
        assert found == want
    assert places.step.spec == P()
    with pytest.raises(ValueError, match="mirrors no parameter"):
        sharding.state_shardings({"odd": jax.ShapeDtypeStruct((3,), jnp.float32)},
                                 abstract.params, m)  # fmt: skip


def test_sharded_init_equals_the_unsharded_one_and_is_really_split():
    config = toy.config()
    create = lambda: state.create(toy.fast_wam(), optim.make(config), config)  # noqa: E731
    abstract = jax.eval_shape(create)
    m = mesh(2, 2, 2)
    places = sharding.state_shardings(abstract, abstract.params, m)
    made, plain = jax.jit(create, out_shardings=places)(), jax.jit(create)()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(made), jax.device_get(plain))
    kernel = made.opt_state[1].mu["blocks"]["video"]["ffn"]["in"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size


# ---- activations and batches ----


def test_constrain():
    x = jnp.ones((8, 3, 4))
    with pytest.raises(RuntimeError, match="set_mesh"):
        jax.jit(lambda x: sharding.constrain(x, "batch", "tokens", "embed"))(x)
    with jax.set_mesh(mesh(4, 2)):
        y = jax.jit(lambda x: sharding.constrain(x, "batch", "tokens", "embed"))(x)
        assert y.addressable_shards[0].data.shape == (1, 3, 4)
        with pytest.raises(ValueError, match="did you mean 'tokens'"):
            sharding.constrain(x, "batch", "token", "embed")
        with pytest.raises(ValueError, match="2 names"):
            sharding.constrain(x, "batch", "tokens")
        jax.jit(lambda x: sharding.constrain(x, "batch", "tokens", "embed"))(x[:1])


def test_rows_of_a_batch_are_those_that_the_devices_hold():
    devices = jax.devices()
    for sizes, mine, want in (
        ((4, 2, 1), devices[:2], [0, 1]),
        ((2, 2, 2), devices[:4], [0, 1, 2, 3]),
        ((1, 2, 4), devices[:4], [0, 1, 2, 3]),
        ((1, 1, 8), devices[:4], list(range(8))),  # tensor spans processes: the same rows for all
        ((1, 1, 8), devices[4:], list(range(8))),
        ((4, 1, 2), [devices[0], devices[5], devices[4]], [0, 1, 4, 5]),
        ((8, 1, 1), None, list(range(8))),
    ):
        assert sharding.batch_rows(mesh(*sizes), 8, mine).tolist() == want


def test_global_batch_keeps_values_and_splits_rows():
    batch = toy.batch(16)
    out = sharding.global_batch(batch, mesh(2, 2, 2))
    for key, value in batch.items():
        np.testing.assert_array_equal(out[key], value)
        assert out[key].addressable_shards[0].data.shape[0] == 4
