"""Tests the optimisers: their steps, their parameters, and the sharding of their state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from wamjax import config as configs
from wamjax.training import optim, sharding


def make(name, **values):
    config = configs.base_config()
    config.optim.name, config.optim.learning_rate, config.total_steps = name, 1e-2, 1
    config.optim.warmup_fraction = config.optim.weight_decay = config.optim.clip_norm = 0.0
    config.optim.update(values)
    return config


def tree(rng):
    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    block = {"q": {"kernel": draw(3, 16, 8), "bias": draw(3, 8)}, "modulation": draw(3, 6, 8)}
    final = {"video": {"ffn": {"in": {"kernel": draw(8, 12)}}}}
    head = {"kernel": draw(8, 4)}
    return {"blocks": {"video": block}, "final_block": final, "head": head}


def test_muon_steps_along_an_orthogonal_matrix_in_each_layer_and_adam_elsewhere():
    rng = np.random.default_rng(0)
    params, grads = tree(rng), tree(rng)
    updates = {}
    for name in ("adamw", "muon"):
        tx = optim.make(make(name))
        update = jax.jit(lambda grads, params, tx=tx: tx.update(grads, tx.init(params), params)[0])
        updates[name] = update(grads, params)
    muon, adam = updates["muon"], updates["adamw"]

    def matrices(t):
        stacked = t["blocks"]["video"]["q"]["kernel"]
        return [*stacked, t["final_block"]["video"]["ffn"]["in"]["kernel"]]

    for step, grad in zip(matrices(muon), matrices(grads), strict=True):
        values = np.linalg.svd(step, compute_uv=False) / (1e-2 * 0.2 * max(step.shape) ** 0.5)
        # Newton-Schulz in five steps leaves singular values between 0.68 and 1.13 (Jordan 2024).
        assert np.all((values > 0.6) & (values < 1.2))
        left, _, right = np.linalg.svd(grad, full_matrices=False)
        polar = left @ right
        cosine = -np.sum(step * polar) / np.linalg.norm(step) / np.linalg.norm(polar)
        assert cosine > 0.97
    for a, b in (
        (muon["head"]["kernel"], adam["head"]["kernel"]),
        (muon["blocks"]["video"]["modulation"], adam["blocks"]["video"]["modulation"]),
        (muon["blocks"]["video"]["q"]["bias"], adam["blocks"]["video"]["q"]["bias"]),
    ):
        np.testing.assert_array_equal(a, b)


def test_the_state_of_muon_is_sharded_like_the_parameters():
    config = toy.config()
    config.optim.name = "muon"
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    params = jax.eval_shape(lambda: tree(np.random.default_rng(0)))
    block = params["blocks"]["video"].pop("q")
    params["blocks"]["video"]["self_attn"] = {"q": block}
    params["video"] = {"head": params.pop("head")}
    tx = optim.make(config)
    state = {"opt_state": jax.eval_shape(tx.init, params)}
    places = sharding.state_shardings(state, params, mesh)
    where = sharding.params_shardings(params, mesh)
    kernel = places["opt_state"][1].inner_states["muon"].inner_state[0].mu
    want = where["blocks"]["video"]["self_attn"]["q"]["kernel"]
    assert kernel["blocks"]["video"]["self_attn"]["q"]["kernel"] == want


def test_an_unknown_optimiser_is_an_error_and_changing_it_on_resume_too():
    with pytest.raises(ValueError, match="optim.name 'lion' is not 'adamw' or 'muon'"):
        optim.make(make("lion"))
    with pytest.raises(ValueError, match="config.optim.name"):
        configs.check_resume(make("adamw"), make("muon"), "checkpoint 1")


def published_rate(n, warm_up, lengths, start, high, low):
    """Computes Cosmos Policy's multiplier of the n-th update: a cycle includes its last step."""
    ends = np.cumsum([0, *lengths])
    cycle = next(i for i, end in enumerate(ends[1:]) if n <= end)
    n = n - ends[cycle]
    if n < warm_up[cycle]:
        return start[cycle] + (high[cycle] - start[cycle]) * n / warm_up[cycle]
    way = (n - warm_up[cycle]) / (lengths[cycle] - warm_up[cycle])
    return high[cycle] - (high[cycle] - low[cycle]) * way


@pytest.mark.parametrize("warm_up, length", [(1000, 30_000), (2000, 20_000), (1500, 15_000)])
def test_a_cycle_of_the_rate_holds_the_step_that_it_ends_at(warm_up, length):
    rate = optim.piecewise(1.0, (0, warm_up, length, length), (1e-6, 1.0, 0.3, 0.06))
    steps = [0, 1, length + 10**5]
    steps += [at + d for at in (warm_up, length) for d in (-2, -1, 0, 1, 2)]
    cycles = (warm_up, 0), (length, 10**14), (1e-6, 0.06), (1.0, 0.06), (0.3, 0.06)
    want = [published_rate(n, *cycles) for n in steps]
    got = [float(jax.jit(rate)(jnp.int32(n))) for n in steps]
    np.testing.assert_allclose(got, want, rtol=1e-5)
