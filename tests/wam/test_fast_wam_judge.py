"""Fast-WAM with a judge: the policy beneath it is untouched, and what is cached is exact."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax import config as configs
from wamjax import tree, wam
from wamjax.data.normalize import normalizers
from wamjax.data.spec import DataSpec
from wamjax.models.layers import unconstrained
from wamjax.training import partition
from wamjax.wam.fast_wam import presets

SIZE = 2


@pytest.fixture(scope="module")
def config():
    config = configs.base_config()
    presets.fast_wam(config, "fast", "2026-08")
    presets.tabletop(config)
    presets.tabletop_debug(config)
    config.objective.name = "fast_wam_judge"
    config.objective.judge.rungs, config.objective.judge.branches = (1, 2, 4), 4
    config.objective.judge.width, config.objective.judge.ffn = 16, 32
    return config


@pytest.fixture(scope="module")
def spec(config):
    return DataSpec(
        cameras={"overhead": (16, 16), "gripper": (16, 16)}, proprio_dim=5, action_dim=4,
        chunk=config.data.chunk, frames=config.data.frames,
        frame_stride=config.data.frame_stride,
        instruction_length=config.data.instruction_length, control_hz=10.0, words=("reach", "red"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def judged(config, spec):
    """Without a mesh."""
    made = wam.build(config, spec)
    return dataclasses.replace(made, network=made.network.clone(constrain=unconstrained))


@pytest.fixture(scope="module")
def params(judged):
    """Random everywhere: heads that start at zero say nothing."""
    shapes = jax.eval_shape(judged.init, jax.random.key(0))
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    return structure.unflatten([0.2 * jax.random.normal(k, s.shape, s.dtype) for k, s in pairs])


@pytest.fixture(scope="module")
def seen(judged):
    rng = np.random.default_rng(0)
    spec = judged.observation_spec(SIZE)
    return {
        "video": jnp.asarray(rng.integers(0, 255, spec["video"].shape), jnp.uint8),
        "proprio": jnp.asarray(rng.normal(size=spec["proprio"].shape), jnp.float32),
        "instruction": jnp.asarray(rng.integers(0, 3, spec["instruction"].shape), jnp.int32),
    }


@pytest.fixture(scope="module")
def normalise():
    def of(n):
        return {"min": [-2.0] * n, "max": [2.0] * n, "mean": [0.0] * n, "std": [1.0] * n,
                "q01": [-2.0] * n, "q99": [2.0] * n, "count": 9}  # fmt: skip

    return normalizers({"actions": of(4), "proprio": of(5)}, "min_max")


KEYS = jax.random.split(jax.random.key(5), SIZE)


def compiled(method, *static):
    """A method with its further arguments fixed, in one program."""
    return jax.jit(lambda *args: method(*args, *static))


def test_direct_is_the_policy_without_a_judge(config, spec, judged, params, seen, normalise):
    plain = config.copy_and_resolve_references()
    plain.objective.name = "fast_wam"
    configs.reset(plain, "objective.judge")
    policy = wam.build(plain, spec)
    own = tree.flatten(jax.eval_shape(policy.init, jax.random.key(0)))
    flat = tree.flatten(params)
    less = tree.unflatten({path: flat[path] for path in own})
    np.testing.assert_array_equal(
        compiled(judged.policy, "direct")(params, normalise, seen, KEYS),
        compiled(policy.policy)(less, normalise, seen, KEYS),
    )


def test_the_first_proposal_is_what_direct_does(judged, params, seen, normalise):
    """And the cached ones are those of a policy that computes everything anew for each."""
    args = params, normalise, seen, KEYS
    direct = compiled(judged.policy, "direct")(*args)
    cached = compiled(judged.propose, 3)(*args)
    plain = compiled(super(type(judged), judged).propose, 3)(*args)
    np.testing.assert_allclose(cached[:, 0], direct, atol=1e-5)
    np.testing.assert_allclose(cached, plain, atol=1e-5)
    assert np.abs(np.asarray(cached[:, 1] - cached[:, 0])).max() > 1e-3


def test_the_cached_value_is_that_of_one_whole_pass(judged, params, seen, normalise):
    proposals = jax.random.normal(jax.random.key(3), (SIZE, 3, judged.chunk, judged.action_dim))
    got = compiled(judged.value)(params, normalise, seen, proposals)
    assert got.shape == (SIZE, 3) and np.ptp(np.asarray(got)) > 1e-3
    table = judged.uses[0].table

    @jax.jit
    def whole(chunk):
        first, _ = judged._observe(params, normalise, seen)
        values = {"first": first, "action": normalise["actions"].forward(chunk),
                  "value": jnp.zeros((SIZE, 1, 1))}  # fmt: skip
        told = {g: jnp.full((1, 1), float(g == "value")) for g in values}
        condition = seen | {"proprio": normalise["proprio"].forward(seen["proprio"])}
        return judged.bind(params)("evaluate", values, told, condition, table, predict=("value",))

    for i in range(3):
        want = -whole(proposals[:, i])["value"][:, 0, 0]
        np.testing.assert_allclose(got[:, i], want, atol=2e-5)


def test_adaptive_at_no_price_and_at_any(judged, params, seen, normalise):
    """Free time goes to the last rung if that promises anything; dear time to none."""
    decide = jax.jit(
        lambda costs: judged.decide(params, normalise, seen, KEYS, "adaptive", costs=costs)
    )
    top, none = decide(jnp.array([0.0, -9.0, -99.0])), decide(jnp.array([0.0, 9.0, 99.0]))
    np.testing.assert_array_equal(top.rung, 2)
    np.testing.assert_array_equal(none.rung, 0)
    best = compiled(judged.policy, "plan:4")(params, normalise, seen, KEYS)
    np.testing.assert_allclose(top.actions, best, atol=1e-5)
    direct = compiled(judged.policy, "direct")(params, normalise, seen, KEYS)
    np.testing.assert_allclose(none.actions, direct, atol=1e-5)
    with pytest.raises(ValueError, match="costs of its 3 rungs"):
        judged.policy(params, normalise, seen, KEYS, "adaptive", costs=jnp.zeros(2))


def test_prepared_parameters_decide_alike(judged, params, seen, normalise):
    decide = compiled(judged.decide, "plan:4")
    plain, prepared = (
        decide(p, normalise, seen, KEYS) for p in (params, judged.prepare(params))
    )
    np.testing.assert_allclose(plain.values, prepared.values, atol=1e-5)
    np.testing.assert_allclose(plain.actions, prepared.actions, atol=1e-5)


@pytest.mark.parametrize("mode", ["imagine", "plan:0", "plan:x", "direct:2", "adaptive:-1"])
def test_modes_that_do_not_exist(judged, mode):
    with pytest.raises(ValueError, match="acts in modes"):
        judged.check_mode(mode)


@pytest.mark.parametrize("mode", [None, "direct", "plan", "plan:16", "adaptive:0", "adaptive:0.2"])
def test_modes_that_exist(judged, mode):
    judged.check_mode(mode)


def batch(judged, gate):
    rng, out = np.random.default_rng(1), {}
    for key, s in judged.batch_spec(SIZE).items():
        out[key] = jnp.asarray(rng.random(s.shape) * 2, s.dtype)
    return out | {"gate": jnp.asarray(gate), "success": jnp.round(out["success"] / 2)}


def test_the_loss_is_that_of_the_values(judged, params, normalise):
    """Squared error and error of differences, by hand, over the states that are the judge's."""
    given = batch(judged, [False, True])
    loss, metrics = jax.jit(judged.loss)(params, given, jax.random.key(0))
    values = np.asarray(compiled(judged.value)(
        params, normalise, given | {"proprio": normalise["proprio"].inverse(given["proprio"])},
        normalise["actions"].inverse(given["actions"]),
    ))  # fmt: skip
    returns = np.asarray(given["success"] * judged.discount ** given["steps"])
    error = (values - returns)[0]
    np.testing.assert_allclose(metrics["loss_value"], np.mean(error**2), rtol=1e-3)
    pairs = [(x - y) ** 2 for i, x in enumerate(error) for y in error[:i]]
    # Over the pairs of n branches the mean of (x - y)^2 is 2 / (n - 1) times the sum of squares
    # about their mean, of which the loss has 1 / (n - 1).
    np.testing.assert_allclose(metrics["loss_ranking"], np.mean(pairs) / 2, rtol=1e-3)
    total = metrics["loss_value"] + metrics["loss_ranking"] + metrics["loss_gate"]
    np.testing.assert_allclose(loss, total, rtol=1e-6)


def test_what_is_frozen_is_all_but_judge_and_gate(judged, params):
    config = configs.base_config()
    presets.judge(config, "runs/policy", "runs/branches")
    keep = partition.trained(config.optim.freeze)
    free = [path for path in tree.flatten(params) if keep(path)]
    for path in tree.flatten(params):  # what is trained is what the policy's run lacks
        assert keep(path) == any(re.fullmatch(r, path) for r in config.init_from.missing)
    given = batch(judged, [False, True])
    grads = jax.jit(jax.grad(lambda p: judged.loss(p, given, jax.random.key(0))[0]))(params)
    moved = [p for p, g in tree.flatten(grads).items() if p in free and np.any(g != 0)]
    assert {p.split("/")[0] for p in free} == {"value", "gate", "blocks"}
    assert len(moved) > 0.8 * len(free)
