import functools
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from wamjax import flops, hardware


def spec(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_matmul_and_batched_einsum():
    assert flops.count(jnp.matmul, spec(3, 5), spec(5, 7)) == 2 * 3 * 5 * 7
    einsum = functools.partial(jnp.einsum, "b l n k, b s n k -> b n l s")
    assert flops.count(einsum, spec(2, 3, 4, 5), spec(2, 6, 4, 5)) == 2 * (2 * 4 * 3 * 6) * 5


def test_elementwise_and_dead_code_cost_nothing():
    assert flops.count(lambda x: jnp.tanh(x) + x, spec(8, 8)) == 0
    assert flops.count(lambda x: (x @ x, x + 1)[1], spec(8, 8)) == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_by_closed_form(groups):
    conv = functools.partial(
        lax.conv_general_dilated,
        window_strides=(2, 1),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    out_h, out_w = (9 - 3) // 2 + 1, 8 - 2 + 1
    want = 2 * 5 * out_h * out_w * 12 * (3 * 2 * 4 // groups)
    assert flops.count(conv, spec(5, 9, 8, 4), spec(3, 2, 4 // groups, 12)) == want


def test_padding_is_not_work():
    conv = functools.partial(lax.conv, window_strides=(1,), padding=[(1, 1)])
    assert flops.count(conv, spec(1, 1, 6), spec(1, 1, 3)) == 2 * (3 * 6 - 2)


@pytest.mark.parametrize("stride,padding", [(1, "SAME"), (2, "SAME"), (3, "VALID")])
def test_gradients_of_a_convolution_cost_as_much_as_itself(stride, padding):
    def loss(x, w):
        y = lax.conv_general_dilated(
            x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(y**2)  # so that the forward pass is needed by the backward pass

    x, w = spec(2, 11, 8, 3), spec(3, 3, 3, 5)
    both = jax.grad(loss, argnums=(0, 1))
    assert flops.count(both, x, w) == 3 * flops.count(loss, x, w)


def mlp(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.sum(x)


def test_backward_is_twice_the_forward_less_the_first_input_gradient():
    params, x = [spec(16, 32), spec(32, 32), spec(32, 8)], spec(4, 16)
    layer = [2 * 4 * a * b for a, b in (p.shape for p in params)]
    assert flops.count(mlp, params, x) == sum(layer)
    # argnums=0: x needs no gradient, so layer 0 has a weight gradient only.
    assert flops.count(jax.grad(mlp), params, x) == 3 * sum(layer) - layer[0]
    assert flops.count(jax.grad(mlp, argnums=(0, 1)), params, x) == 3 * sum(layer)


def test_remat_adds_one_forward():
    params, x = [spec(16, 32), spec(32, 32), spec(32, 8)], spec(4, 16)
    remat = jax.checkpoint(mlp)
    forward = flops.count(mlp, params, x)
    plain = flops.count(jax.value_and_grad(mlp, argnums=(0, 1)), params, x)
    assert flops.count(jax.value_and_grad(remat, argnums=(0, 1)), params, x) == plain + forward


def test_scan_multiplies_also_nested_in_jit_and_under_grad():
    def inner(x, w):
        return jnp.tanh(x @ w), None

    @jax.jit
    def model(ws, x):
        def outer(x, _):
            return lax.scan(inner, x, ws)[0], None

        return jnp.sum(lax.scan(outer, x, None, length=3)[0])

    ws, x = spec(5, 8, 8), spec(4, 8)
    forward = 3 * 5 * 2 * 4 * 8 * 8
    assert flops.count(model, ws, x) == forward
    assert flops.count(jax.grad(model, argnums=(0, 1)), ws, x) == 3 * forward


def test_custom_derivatives_are_entered():
    @jax.custom_vjp
    def double(x):
        return x @ x

    double.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))

    @jax.custom_jvp
    def square(x):
        return x @ x

    square.defjvp(lambda primals, tangents: (square(*primals), 2 * tangents[0]))
    one = 2 * 8**3
    assert flops.count(double, spec(8, 8)) == one
    assert flops.count(jax.value_and_grad(lambda x: double(x).sum()), spec(8, 8)) == 3 * one
    assert flops.count(square, spec(8, 8)) == one


def test_cond_counts_the_dearest_branch():
    def f(p, x):
        return lax.switch(p, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

    assert flops.count(f, jax.ShapeDtypeStruct((), jnp.int32), spec(8, 8)) == 2 * 2 * 8**3


def test_while_loops_give_a_warning_unless_their_count_is_given():
    def f(n, x):
        return lax.fori_loop(0, n, lambda _, x: x @ x, x)

    n = jax.ShapeDtypeStruct((), jnp.int32)
    with pytest.warns(flops.UnknownTripCount, match="while_trip_count"):
        assert flops.count(f, n, spec(8, 8)) == 2 * 8**3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flops.count(f, n, spec(8, 8), while_trip_count=7) == 7 * 2 * 8**3
        assert flops.count(functools.partial(f, 4), spec(8, 8)) == 4 * 2 * 8**3  # static bounds


def test_shard_map_counts_every_device():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    f = jax.shard_map(
        lambda x, w: x @ w,
        mesh=mesh,
        in_specs=(P("data"), P(None, "tensor")),
        out_specs=P("data", "tensor"),
    )
    assert flops.count(f, spec(8, 6), spec(6, 4)) == 2 * 8 * 6 * 4


def test_breakdown_by_primitive():
    def f(x, w):
        return lax.conv(x, w, (1,), "VALID") @ jnp.ones((4, 3))

    got = flops.count_by(f, spec(1, 2, 6), spec(5, 2, 3))
    assert got == {"conv_general_dilated": 2 * 5 * 4 * 6, "dot_general": 2 * 5 * 4 * 3}


def codec(kernel, x):
    """Encodes pictures (b, 6, 6, 3) to 4 latents of 5 numbers."""
    dims = ("NHWC", "HWIO", "NHWC")
    z = lax.conv_general_dilated(x, kernel, (3, 3), "VALID", dimension_numbers=dims)
    return z.reshape(-1, 5)


def test_training_counts_a_frozen_codec_once_and_frozen_layers_twice():
    b, kernel, layers = 2, spec(3, 3, 3, 5), [spec(5, 7), spec(7, 11), spec(11, 4)]
    x = spec(b, 6, 6, 3)
    conv, cost = 2 * b * 4 * 5 * 27, [2 * 4 * b * w.shape[0] * w.shape[1] for w in layers]

    def loss(trained, frozen, x):
        params = trained | frozen
        z = codec(params["codec"], x)
        return mlp([params[k] for k in "abc"], z)

    params = {"codec": kernel, **dict(zip("abc", layers, strict=True))}

    def training(*names):
        """Counts training of these parameters, and checks it against the gradient itself."""
        parts = {k: params[k] for k in names}, {k: v for k, v in params.items() if k not in names}
        total = flops.count_training(loss, *parts, x)
        assert total == flops.count(jax.value_and_grad(loss), *parts, x)
        return total

    assert training("codec", "a", "b", "c") == 2 * conv + 3 * sum(cost)
    # The codec counts once; the input of the first layer needs no gradient.
    assert training("a", "b", "c") == conv + 2 * cost[0] + 3 * (cost[1] + cost[2])
    assert training("a", "c") == conv + 2 * cost[0] + 2 * cost[1] + 3 * cost[2]
    assert training("c") == conv + cost[0] + cost[1] + 2 * cost[2]
    assert training("b") == conv + cost[0] + 2 * cost[1] + 2 * cost[2]


def test_training_under_stopped_gradients_loops_branches_and_remat():
    def loss(params, x, choice):
        w, stack, up = params

        @jax.checkpoint
        def body(x, w):
            return jnp.tanh(lax.stop_gradient(x @ x.T) @ x @ w), None

        x, _ = lax.scan(body, x, stack)
        x = lax.cond(choice, lambda x: jnp.tanh(x @ w), lambda x: x, x)
        return jnp.sum((x @ up) ** 2) + jnp.sum(lax.stop_gradient(x @ w))

    b, d, n = 3, 8, 5
    params = spec(d, d), spec(n, d, d), spec(d, 2)
    square, table = 2 * b * d * d, 2 * b * b * d  # table: x @ x.T, and that times x
    want = n * (table + 2 * table + 3 * square)  # nothing is trained in the first of the three
    want += 3 * square + 3 * 2 * b * d * 2 + square
    choice = jax.ShapeDtypeStruct((), jnp.bool_)
    assert flops.count_training(loss, params, spec(b, d), choice) == want


def test_training_flops_of_opaque_primitives():
    @jax.custom_vjp
    def double(x):
        return x @ x

    double.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))
    assert flops.count_training(lambda x: double(x).sum(), spec(8, 8)) == 3 * 2 * 8**3
    whole = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P("data"), P()), "out_specs": P("data")}
    f = jax.shard_map(lambda x, w: x @ w, mesh=whole, **specs)
    x, w = spec(8, 6), spec(6, 4)
    assert flops.count_training(lambda w, x: f(x, w).sum(), w, x) == 2 * 2 * 8 * 6 * 4


@pytest.mark.parametrize(
    "kind,name",
    [
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("cpu", None),
    ],
)
def test_chips_by_device_kind(kind, name):
    device = type("Device", (), {"device_kind": kind})()
    got = hardware.chip(device)
    assert (got and got.name) == name


def test_measured_rate_names_itself():
    rate, text = hardware.denominator(seconds=0.02)
    assert 1e8 < rate < 1e14
    assert "measured" in text and "float32" in text and f"{rate / 1e9:.4g}" in text


def test_calls_are_counted_through_loops_and_what_is_dead_is_not():
    @jax.jit
    def inner(x):
        return x @ x, x @ x @ x

    def outer(x):
        inner(x)  # unused

        def body(c, _):
            return inner(c)[0], None

        return lax.fori_loop(0, 3, lambda _, y: lax.scan(body, y, None, length=2)[0], x)

    total, calls = flops.count_calls(outer, spec(4, 4))
    assert calls["inner"] == (6, 6 * 2 * 4**3) and total == flops.count(outer, spec(4, 4))
    assert total == 6 * 2 * 4**3
