"""Tests Fast-WAM with a judge: the policy itself is unchanged, and the cache is exact."""

import dataclasses
import functools
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax import config as configs
from wamjax import tree, wam
from wamjax.bundle import policy as bundles
from wamjax.data.normalize import normalizers
from wamjax.data.spec import DataSpec
from wamjax.models.layers import unconstrained
from wamjax.runs import trained as trained_runs
from wamjax.training import partition
from wamjax.wam import ladder
from wamjax.wam import noise as noises
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
    """Returns random parameters, since fresh heads are zero."""
    shapes = jax.eval_shape(judged.init, jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda s: (0.2 * rng.standard_normal(s.shape)).astype(s.dtype), shapes
    )


@pytest.fixture(scope="module")
def seen(judged):
    rng = np.random.default_rng(0)
    spec = judged.observation_spec(SIZE)
    return {
        "video": rng.integers(0, 255, spec["video"].shape).astype(np.uint8),
        "proprio": rng.normal(size=spec["proprio"].shape).astype(np.float32),
        "instruction": rng.integers(0, 3, spec["instruction"].shape).astype(np.int32),
    }


@pytest.fixture(scope="module")
def normalise():
    def of(n):
        return {"min": [-2.0] * n, "max": [2.0] * n, "mean": [0.0] * n, "std": [1.0] * n,
                "q01": [-2.0] * n, "q99": [2.0] * n, "count": 9}  # fmt: skip

    return normalizers({"actions": of(4), "proprio": of(5)}, "min_max")


KEYS = jax.random.split(jax.random.key(5), SIZE)


def compiled(method, *static):
    """Compiles a method with its further arguments fixed."""
    return jax.jit(lambda *args: method(*args, *static))


@pytest.fixture(scope="module")
def direct(judged, params, seen, normalise):
    """Returns its actions without planning."""
    return np.asarray(compiled(judged.policy, "direct")(params, normalise, seen, KEYS))


@pytest.fixture(scope="module")
def best_of_four(judged):
    """Returns the program of its decisions in mode plan:4."""
    return compiled(judged.decide, "plan:4")


@pytest.fixture(scope="module")
def trains():
    """Returns whether a parameter is trained, by its path."""
    config = configs.base_config()
    presets.judge(config, "runs/policy", "runs/branches")
    return partition.trained(config.optim.freeze), config.init_from.missing


@pytest.fixture(scope="module")
def trained(judged, params, trains):
    """Returns the batch, (loss, metrics), and the gradient of trained parameters by path."""
    given, flat = batch(judged, [False, True]), tree.flatten(params)
    free = {path: x for path, x in flat.items() if trains[0](path)}

    def loss(free, rest, given):
        return judged.loss(tree.unflatten(rest | free), given, jax.random.key(0))

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return given, *jax.device_get(run(free, flat, given))


def test_direct_is_the_policy_without_a_judge(
    config, spec, params, seen, normalise, direct
):
    plain = config.copy_and_resolve_references()
    plain.objective.name = "fast_wam"
    configs.reset(plain, "objective.judge")
    policy = wam.build(plain, spec)
    own = tree.flatten(jax.eval_shape(policy.init, jax.random.key(0)))
    flat = tree.flatten(params)
    less = tree.unflatten({path: flat[path] for path in own})
    np.testing.assert_array_equal(compiled(policy.policy)(less, normalise, seen, KEYS), direct)


def test_the_first_proposal_is_what_direct_does(judged, params, seen, normalise, direct):
    """Cached proposals equal those of a policy that recomputes everything for each."""
    args = params, normalise, seen, KEYS
    cached = np.asarray(compiled(judged.propose, 3)(*args))
    plain = compiled(super(type(judged), judged).propose, 3)(*args)
    np.testing.assert_allclose(cached[:, 0], direct, atol=1e-5)
    np.testing.assert_allclose(cached, plain, atol=1e-5)
    assert np.abs(cached[:, 1] - cached[:, 0]).max() > 1e-3


def test_the_cached_value_is_that_of_one_whole_pass(judged, params, seen, normalise):
    shape = SIZE, 3, judged.chunk, judged.action_dim
    proposals = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    got = np.asarray(compiled(judged.value)(params, normalise, seen, proposals))
    assert got.shape == (SIZE, 3) and np.ptp(got) > 1e-3
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
        want = -np.asarray(whole(proposals[:, i])["value"])[:, 0, 0]
        np.testing.assert_allclose(got[:, i], want, atol=2e-5)


def test_adaptive_climbs_to_the_top_if_free_and_not_at_all_if_expensive(
    judged, params, seen, normalise, direct, best_of_four
):
    """If time is free it climbs to the last rung if that has any benefit; if expensive, to none."""
    decide = jax.jit(
        lambda costs: judged.decide(params, normalise, seen, KEYS, "adaptive", costs=costs)
    )
    top, none = decide(np.array([0.0, -9.0, -99.0])), decide(np.array([0.0, 9.0, 99.0]))
    np.testing.assert_array_equal(top.rung, 2)
    np.testing.assert_array_equal(none.rung, 0)
    best = best_of_four(params, normalise, seen, KEYS).actions
    np.testing.assert_allclose(top.actions, best, atol=1e-5)
    np.testing.assert_allclose(none.actions, direct, atol=1e-5)
    with pytest.raises(ValueError, match="cost for each of its 3 rungs"):
        jax.eval_shape(lambda costs: judged.policy(
            params, normalise, seen, KEYS, "adaptive", costs=costs), np.zeros(2))  # fmt: skip
    # The benefits expected while climbing equal those computed for the same proposals.
    costs = np.array([0.0, -9.0, -99.0])
    asked = compiled(judged.benefits)(params, normalise, seen, top.proposals)
    assert asked.shape == (SIZE, 2, 3)
    for rung in range(2):
        _, best = ladder.pays(rung, asked[:, rung], costs)
        np.testing.assert_allclose(top.benefit[:, rung], best, atol=1e-4)


def test_a_budget_ends_the_climb_for_each_robot_at_its_own_rung(
    judged, params, seen, normalise, direct, best_of_four
):
    """Time is free, but rungs that take longer than a robot's budget are not climbed."""
    ms = jnp.array([3.0, 7.0, 11.0])
    policy = trained_runs.Policy(
        judged, params, normalise, "adaptive:0", costs=-9.0 * jnp.arange(3.0), milliseconds=ms
    )
    act = jax.jit(lambda budget: policy.actions(params, seen, KEYS, budget=budget))
    best = best_of_four(params, normalise, seen, KEYS).actions
    np.testing.assert_allclose(act(np.array([1.0, 11.0]))[0], direct[0], atol=1e-5)
    np.testing.assert_allclose(act(np.array([1.0, 11.0]))[1], best[1], atol=1e-5)
    np.testing.assert_allclose(act(np.array([np.inf, 6.9]))[0], best[0], atol=1e-5)
    np.testing.assert_allclose(act(np.array([np.inf, 6.9]))[1], direct[1], atol=1e-5)
    inf = np.inf
    np.testing.assert_array_equal(ladder.affordable(2 * ms, ms, 8.0), [6, 14, inf])
    each = ladder.affordable(2 * ms, ms, np.array([2.0, 7.0]))
    np.testing.assert_array_equal(each, [[6, inf, inf], [6, 14, inf]])
    benefit = np.array([[0.0, 9.0, 99.0], [0.0, 9.0, 99.0]])
    goes_on, net = ladder.pays(0, benefit, each)
    assert not goes_on[0] and goes_on[1] and net[1] == 1.0


def test_a_loaded_policy_takes_a_budget(judged, params, normalise, monkeypatch):
    """Every budget is an argument of the same program; one that is no number is refused."""
    acting = trained_runs.Policy(
        judged, params, normalise, "adaptive:0:5", costs=jnp.arange(3.0), milliseconds=jnp.ones(3)
    )
    monkeypatch.setattr(bundles.LoadedPolicy, "_check", lambda self, texts, proprio: None)
    spec = types.SimpleNamespace(action_dim=judged.action_dim)
    manifest = types.SimpleNamespace(statistics={}, source="a run", step=1, spec=spec)

    def load(acting):
        def observer(x):
            return {"proprio": np.zeros((1, 5))}, False

        return bundles.LoadedPolicy(manifest, acting, None, observer)

    policy = load(acting)
    assert policy.rung_ms == [1, 1, 1]
    given = policy.admit({"instruction": ""}, budget_ms=4)[bundles.BUDGET]
    np.testing.assert_array_equal(given, np.float32([4]))
    assert given.dtype == policy.admit({"instruction": ""})[bundles.BUDGET].dtype == np.float32
    for wrong in (0, -1, np.nan, "12", True):
        with pytest.raises(bundles.BadObservation, match="budget_ms is .* above 0"):
            policy.admit({"instruction": ""}, budget_ms=wrong)
    direct = load(dataclasses.replace(acting, mode="direct", costs=None, milliseconds=None))
    assert bundles.BUDGET not in direct.admit({"instruction": ""}, budget_ms=4)
    assert direct.rung_ms == []
    with pytest.raises(bundles.BadObservation, match="takes no budget_ms: load it with mode"):
        direct({"instruction": ""}, 0, budget_ms=4)


@pytest.mark.parametrize("mode, terms", [
    ("adaptive:0.5", (0.5, np.inf)), ("adaptive:0:12", (0, 12)), ("adaptive:1e-3:7.5", (1e-3, 7.5)),
])  # fmt: skip
def test_terms_of_a_mode(mode, terms):
    assert ladder.terms(mode) == terms


def test_prepared_parameters_decide_alike(judged, params, seen, normalise, best_of_four):
    plain, prepared = (
        best_of_four(p, normalise, seen, KEYS) for p in (params, judged.prepare(params))
    )
    np.testing.assert_allclose(plain.values, prepared.values, atol=1e-5)
    np.testing.assert_allclose(plain.actions, prepared.actions, atol=1e-5)


@pytest.fixture(scope="module")
def climber(config, spec):
    """Returns a judge on a ladder with every kind of rung, and its parameters."""
    config = config.copy_and_resolve_references()
    presets.fast_wam(config, "ladder", "2026-08")
    config.objective.name, config.objective.infer_steps = "fast_wam_judge", 3
    config.objective.judge.rungs = (1, 2, 3, 4, 6)
    config.objective.judge.branches = 6
    config.objective.judge.modes = ("direct", "anticipate", "imagine:1", "imagine", "direct")
    built = wam.build(config, spec)
    shapes = jax.eval_shape(built.init, jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: (0.2 * rng.standard_normal(s.shape)).astype(s.dtype), shapes)
    return dataclasses.replace(built, network=built.network.clone(constrain=unconstrained)), params


def test_every_rung_is_its_mode_alone(climber, seen, normalise):
    """Reuse between rungs (one cache of the first frame, one future that each rung continues to
    imagine) changes nothing: proposals equal those of the modes from the same noise, without
    caches."""
    judged, params = climber
    plain = dataclasses.replace(judged, use_cache=False)

    @jax.jit
    def climb(params):
        costs = -jnp.arange(5.0) * 99
        return judged.decide(params, normalise, seen, KEYS, "adaptive", costs=costs)

    @jax.jit
    def alone(params):
        first, _ = judged._observe(params, normalise, seen)
        keys = [noises.proposal(KEYS, i) for i in range(6)]
        future = judged._noise("future", first, keys[0], None)
        return [
            plain.policy(params, normalise, seen, None, mode, {
                "future": future, "action": judged._noise("action", first, key, None)})
            for mode, key in zip((*judged.rung_modes, "direct"), keys, strict=True)
        ]  # fmt: skip

    done, want = climb(params), alone(params)
    np.testing.assert_array_equal(done.rung, 4)
    for i, chunk in enumerate(want):
        np.testing.assert_allclose(done.proposals[:, i], chunk, atol=5e-5)
    pairs = [np.abs(x - y).max() for x, y in itertools.combinations(want[:4], 2)]
    assert min(pairs) > 1e-3
    for mode in ("anticipate", "imagine:1", "imagine"):
        act = functools.partial(judged.policy, params, normalise, seen, mode=mode)
        assert jax.eval_shape(act, KEYS).shape == chunk.shape


def test_a_ladder_of_several_kinds_trains(climber):
    judged, params = climber
    given = batch(judged, [False, True])
    loss, metrics = jax.jit(judged.loss)(params, given, jax.random.key(0))
    total = metrics["loss_value"] + metrics["loss_ranking"] + metrics["loss_gate"]
    assert np.isfinite(loss) and abs(loss - total) < 1e-5 and metrics["loss_gate"] > 0


@pytest.mark.parametrize("modes, wrong", [
    (("direct", "anticipate"), "the mode of each of the rungs"),
    (("imagine", "direct", "direct"), "the first of them 'direct'"),
    (("direct", "imagine", "imagine:1"), "must not decrease"),
    (("direct", "direct", "imagine:99"), "acts in modes"),
])  # fmt: skip
def test_modes_of_rungs_are_checked(config, spec, modes, wrong):
    config = config.copy_and_resolve_references()
    presets.fast_wam(config, "ladder", "2026-08")
    config.objective.name, config.objective.judge.modes = "fast_wam_judge", modes
    with pytest.raises(ValueError, match=wrong):
        wam.build(config, spec)


@pytest.mark.parametrize("mode, message", [
    *((mode, "acts in modes") for mode in ("imagine", "plan:0", "plan:x", "direct:2")),
    *((f"adaptive:{rest}", "must be adaptive:PRICE or") for rest in
      ("-1", "x", "0.1:0", "0.1:x", "0.1:5:5", "inf", "nan", "0.1:nan", ":5")),
])  # fmt: skip
def test_modes_that_do_not_exist(judged, mode, message):
    with pytest.raises(ValueError, match=message):
        judged.check_mode(mode)


@pytest.mark.parametrize(
    "mode", [None, "direct", "plan", "plan:16", "adaptive", "adaptive:0.2", "adaptive:0:12"]
)
def test_modes_that_exist(judged, mode):
    judged.check_mode(mode)


def batch(judged, gate):
    rng, out = np.random.default_rng(1), {}
    for key, s in judged.batch_spec(SIZE).items():
        out[key] = (rng.random(s.shape) * 2).astype(s.dtype)
    return out | {"gate": np.asarray(gate), "success": np.round(out["success"] / 2)}


def test_the_loss_is_that_of_the_values(judged, params, normalise, trained):
    """Computes squared error and error of differences by hand, over the judge's states."""
    given, (loss, metrics), _ = trained
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


def test_everything_but_judge_and_gate_is_frozen(params, trains, trained):
    keep, missing = trains
    free = [path for path in tree.flatten(params) if keep(path)]
    for path in tree.flatten(params):  # trained are those that the policy's run lacks
        assert keep(path) == any(re.fullmatch(r, path) for r in missing)
    *_, grads = trained
    moved = [path for path, gradient in grads.items() if np.any(gradient != 0)]
    assert {p.split("/")[0] for p in free} == {"value", "gate", "blocks"}
    assert len(moved) > 0.8 * len(free)
