"""Tests best of N: aggregates against an oracle, batched calls, deeper plans."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wam import cosmos_tiny as tiny

from wamjax.models.codec import PixelCodec
from wamjax.training.step import compute_cast
from wamjax.wam.cosmos_policy import planning
from wamjax.wam.cosmos_policy.injection import extract, inject, tile
from wamjax.wam.cosmos_policy.layouts import parse
from wamjax.wam.cosmos_policy.objective import Seen
from wamjax.wam.cosmos_policy.planning import Plan, Planning, aggregate, plan, sample_bytes

KEY = jax.random.key(0)


def by_hand(values, how, zero=False):
    """Computes section 6.4 directly."""
    high = [v for v in values if v > 0.05]
    low = [v for v in values if not v > 0.05]
    if how == "mean":
        score = np.mean(values)
    elif how == "lcb":
        score = np.mean(values) - np.std(values, ddof=1)
    elif how == "success_vote":
        score = len(high) / len(values)
    elif 2 * len(high) >= len(values):
        score = np.mean(high)
    else:
        score = 0.0 if zero else np.mean(low)
    return min(max(score, 0.0), 1.0)


@pytest.mark.parametrize("how", planning.AGGREGATES)
def test_aggregates(how):
    rng = np.random.default_rng(0)
    rows = [rng.uniform(0, 1, 15) * rng.choice([0.04, 1], 15) for _ in range(20)]
    rows += [np.zeros(15), np.full(15, 0.05), np.ones(15), np.array([0.9] * 7 + [0.01] * 8),
             np.array([0.9] * 8 + [0.01] * 7)]  # fmt: skip
    for zero in (False, True):
        got = aggregate(jnp.asarray(np.stack(rows), jnp.float32), how, zero)
        want = [by_hand(np.float32(r), how, zero) for r in rows]
        np.testing.assert_allclose(got, want, atol=1e-6)
    even = jnp.asarray([0.8, 0.02])  # exactly half foresee success
    np.testing.assert_allclose(aggregate(even, "majority_mean"), 0.8)


def test_the_lower_bound_is_less_the_deviation_of_a_sample():
    """The deviation is sqrt(sum of squares / (n - 1)), as in torch.std and statistics.stdev."""
    values = jnp.asarray([0.2, 0.4, 0.9])
    want = 0.5 - (((0.3**2) + (0.1**2) + (0.4**2)) / 2) ** 0.5
    np.testing.assert_allclose(aggregate(values, "lcb"), want, atol=1e-6)
    alone = jnp.asarray([[0.3], [0.7]])  # published: not a number
    np.testing.assert_array_equal(aggregate(alone, "lcb"), alone[:, 0])


class Recorded(tiny.CosmosPolicy):
    """Fakes and records the network calls of a policy.

    All numbers of an action are the mean of its noise; a future follows from its action; a value
    grows with its future. So the best proposal is known.
    """

    def observe(self, params, normalizers, observation):
        size = observation["proprio"].shape[0]
        latents = jnp.zeros((size, len(self.layout), *self.latent))
        latents = inject(self.layout, latents, {"proprio": observation["proprio"]})
        return Seen(latents, self.read(params, observation))

    def read(self, params, observation):
        params["log"].append(("read", params["name"]))
        return {"k": observation["instruction"][None, :, None, :, None] * 1.0}  # (layers, b, ...)

    def sampler(self, params):
        def run(use, latents, text, noise, steps, frozen=False):
            log = params["log"]
            log.append((params["name"], use.name, latents.shape[0], steps))
            assert text["k"].shape[1] == latents.shape[0]
            layout, out = self.layout, latents
            mean = noise.mean(axis=(1, 2, 3, 4))
            if use.name == "policy":
                out = inject(
                    layout,
                    out,
                    {
                        "action": jnp.broadcast_to(
                            mean[:, None, None], (len(mean), *layout.numbers["action"].shape)
                        )
                    },
                )
            if use.name in ("policy", "world_model"):
                action = extract(layout, out, "action").mean(axis=(1, 2))
                state = extract(layout, out, "proprio") + action[:, None] + 0.1 * mean[:, None]
                out = inject(layout, out, {"future_proprio": state})
                out = out.at[:, layout.index("future_eye")].set(7.0)
            if use.name.startswith("value"):
                source = "action" if use.name == "value_q" else "future_proprio"
                seen = extract(layout, out, source)
                seen = seen.reshape(len(seen), -1).mean(axis=1)
                out = inject(layout, out, {"value": jnp.tanh(seen + 0.01 * mean)})
            return out  # fmt: skip

        return run


def recorded(value="value", **changes) -> Recorded:
    how = Planning(**dict(proposals=4, futures=3, values=2, aggregate="mean") | changes)
    return Recorded(**vars(tiny.objective(judge=value, planning=how, steps=10)))


@functools.cache
def run(policy, size=2, planner=False):
    """Runs a plan as one program, and returns it with the recorded network calls."""
    log = []
    params = {"log": log, "name": "policy"}
    if planner:
        params["planner"] = {"log": log, "name": "planner"}
    once = jax.jit(lambda o, key: plan(policy, params, tiny.normalizers(), o, key))
    return jax.device_get(once(tiny.observation(size), KEY)), tuple(log)


def asked(log=None):
    """Returns the first arguments of its methods: parameters with a log, normalisers,
    observation."""
    params = {"log": [] if log is None else log, "name": "policy"}
    return params, tiny.normalizers(), tiny.observation(2)


def test_a_plan_expects_its_best_score_and_executes_that_proposal():
    policy, (done, _) = recorded(), run(recorded())
    expected, does = jax.jit(
        lambda key: (policy.expect(*asked(), key, "plan"), policy.policy(*asked(), key, "plan"))
    )(KEY)
    np.testing.assert_array_equal(expected, done.scores.max(axis=1))
    np.testing.assert_allclose(does, 2 * done.actions, rtol=1e-6)  # the normaliser's scale


def test_what_direct_acting_expects_is_the_value_of_its_future():
    policy, log = recorded(), []
    params, *seen = asked(log)

    @jax.jit
    def both(key):
        expected = policy.expect(params, *seen, key)
        assert [name for _, name, *_ in log[1:]] == ["policy", "value"]
        acted = policy.act(params, policy.observe(params, *seen), key)
        return expected, extract(policy.layout, acted, "future_proprio")

    expected, state = map(np.asarray, both(KEY))
    np.testing.assert_allclose(expected, (np.tanh(state.mean(axis=1)) + 1) / 2, atol=0.02)


def test_calls_are_batched_and_proposals_differ():
    done, log = run(recorded())
    assert log == (
        ("read", "policy"),
        ("policy", "policy", 2 * 4, 10),
        ("policy", "world_model", 2 * 4 * 3, 5),
        ("policy", "value", 2 * 4 * 3 * 2, 5),
    )
    assert isinstance(done, Plan)
    assert done.proposals.shape == (2, 4, 4, 2) and done.values.shape == (2, 4, 6)
    assert done.scores.shape == (2, 4) and done.actions.shape == (2, 4, 2)
    first = np.asarray(done.proposals[..., 0, 0])
    assert len(np.unique(first)) == 8  # separate noise for each proposal and example
    # The largest action leads to the largest state and value; noise is a tenth of it, averaged.
    np.testing.assert_array_equal(done.chosen, np.argmax(done.scores, axis=1))
    for b in range(2):
        np.testing.assert_array_equal(done.actions[b], done.proposals[b, done.chosen[b]])
    state = np.asarray(tiny.observation()["proprio"]).mean(axis=1)
    worth = first + state[:, None]
    assert np.corrcoef(worth.ravel(), np.asarray(done.scores).ravel())[0, 1] > 0.99
    # A proposal is judged by its own futures: values of one future are closer than those of two.
    spread = np.asarray(done.values).reshape(2, 4, 3, 2)
    assert spread.std(axis=3).mean() < spread.mean(axis=3).std(axis=2).mean()


def test_a_plan_starts_from_given_noise():
    policy = recorded(depth=2, proposals=3, futures=2)
    params, *seen = asked()
    noise = jax.device_get(jax.jit(lambda key: planning.draw_noise(policy, 2, key))(KEY))
    shapes = planning.noise_shapes(policy, 2)
    assert [{k: x.shape for k, x in d.items()} for d in noise] == shapes
    assert [d["policy"][0] for d in shapes] == [3, 6] and shapes[1]["value"][0] == 12
    want = run(policy)[0]
    got = jax.jit(lambda noise: plan(policy, params, *seen, None, noise))(noise)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    blind = planning.noise_shapes(recorded("value_q"), 2)
    assert [list(d) for d in blind] == [["policy", "value_q"]] and blind[0]["value_q"][0] == 8
    for wrong, message in (
        (noise[:1], "noise has depth 1, the plan has depth 2"),
        (noise[::-1], r"noise\[0\]\['policy'\] has shape \(6, 2, .* the plan needs \(3, 2"),
        ([noise[0], {}], r"noise\[1\] has entries \[\], the plan needs \['policy', 'value', 'wor"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(policy, params, *seen, None, wrong)
    with pytest.raises(ValueError, match="give a key, or noise"):
        plan(policy, params, *seen, None)


def test_what_is_expected_may_start_from_given_noise():
    policy, seen = recorded(), asked()
    shape = jax.eval_shape(lambda: policy.observe(*seen).latents).shape

    @jax.jit
    def both(key):
        noise = [jax.random.normal(k, shape) for k in (key, jax.random.fold_in(key, 1))]
        return policy.expect(*seen, None, noise=noise), policy.expect(*seen, key)

    np.testing.assert_array_equal(*both(KEY))


def test_ties_choose_the_first_proposal():
    policy = recorded(aggregate="success_vote")
    done, _ = run(policy)
    same = np.asarray(done.scores)
    for b in range(2):
        assert done.chosen[b] == np.flatnonzero(same[b] == same[b].max())[0]


@pytest.mark.parametrize("limit, together", [(0, 8), (8, 8), (7, 4), (4, 4), (3, 3), (1, 1)])
def test_a_memory_limit_changes_the_calls_and_not_the_result(limit, together):
    want, _ = run(recorded())
    got, log = run(recorded(limit=limit))
    assert log[1] == ("policy", "policy", together, 10)
    assert not limit or max(samples for _, _, samples, _ in log[1:]) <= limit
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


def test_a_published_majority_reaches_the_plan():
    observation = tiny.observation(2)
    observation["proprio"] = np.asarray([[-1.6] * 3, [0.5] * 3])  # the first has a low value
    params, normalizers, _ = asked()

    @jax.jit
    def both(key):
        return [
            plan(Recorded(**vars(recorded(aggregate="majority_mean")) | {"compat": compat}),
                 params, normalizers, observation, key)
            for compat in ((), ("zero_minority",))
        ]  # fmt: skip

    plain, zero = jax.device_get(both(KEY))
    np.testing.assert_array_equal(plain.values, zero.values)
    minority = 2 * np.sum(np.asarray(plain.values) > planning.SUCCESS, axis=-1) < 6
    assert minority[0].any() and not minority[1].any()
    np.testing.assert_array_equal(zero.scores, np.where(minority, 0, plain.scores))
    assert np.asarray(plain.scores)[minority].max() > 0


def test_a_separate_planner_predicts_and_judges():
    _, log = run(recorded(depth=2), planner=True)
    assert [entry[:2] for entry in log] == [
        ("read", "policy"),
        ("read", "planner"),
        ("policy", "policy"),
        ("planner", "world_model"),
        ("planner", "value"),
        ("planner", "policy"),  # the second chunk is the planner's
        ("planner", "world_model"),
        ("planner", "value"),
    ]
    assert [entry[2] for entry in log[2:]] == [8, 24, 48, 24, 24, 48]  # every branch continues


def test_the_predicted_state_and_pictures_are_carried_on():
    """The public code injects the first proprioception again, at any depth."""
    layout = tiny.LAYOUT
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 9, 4, 4, 12)).astype(np.float32)

    @jax.jit
    def carried(x):
        y, state = planning._carry(layout)(x), extract(layout, x, "future_proprio")
        return y, state, extract(layout, y, "proprio"), tile(state, (3,), (4, 4, 12))

    y, state, found, want = jax.device_get(carried(x))
    np.testing.assert_allclose(found, state, atol=1e-6)
    # Injected again, so all copies are equal.
    np.testing.assert_array_equal(y[:, layout.index("proprio")], want)
    for camera in ("eye", "hand"):
        got = y[:, layout.index(camera)]
        np.testing.assert_array_equal(got, x[:, layout.index(f"future_{camera}")])
    np.testing.assert_array_equal(y[:, 4:], x[:, 4:])
    # Overall, states add up over depths, so scores at depth 2 depend on two actions.
    shallow, deep = run(recorded())[0], run(recorded(depth=2))[0]
    np.testing.assert_array_equal(shallow.proposals, deep.proposals)
    assert np.abs(shallow.scores - deep.scores).max() > 0.01
    mean = run(recorded(depth=2, over_depth="mean"))[0]
    np.testing.assert_allclose(mean.scores, (shallow.scores + deep.scores) / 2, atol=1e-6)


def test_q_values_need_no_future():
    done, log = run(recorded("value_q"))
    assert [entry[1:3] for entry in log[1:]] == [("policy", 8), ("value_q", 16)]
    assert done.values.shape == (2, 4, 2)
    with pytest.raises(ValueError, match="plan.depth 2 .* Q\\(s, a\\) does not imagine any"):
        recorded("value_q", depth=2)


@pytest.mark.parametrize("missing", ["future_proprio:3", "future_camera:hand"])
def test_deeper_plans_need_the_future_of_everything_that_is_seen(missing):
    words = tuple(w for w in tiny.WORDS if w != missing)
    layout, deep = parse(words), Planning(depth=2)
    tiny.objective(layout=layout)
    with pytest.raises(ValueError, match=rf"objective.slots lacks \['{missing}'\]"):
        tiny.objective(layout=layout, planning=deep)
    tiny.objective(planning=deep)


def test_a_planner_that_does_not_match_the_policy_is_an_error():
    policy = tiny.objective()
    other = tiny.objective(judge="value_v", network=tiny.network(remat="full", unroll=2))
    assert policy.with_planner(other).uses[2].name == "value_v"
    for changes, what in (
        (dict(visibility="prefix"), "differ in visibility$"),
        (dict(compat=("bf16_times",)), "differ in objective.compat 'bf16_times'$"),
        (dict(network=tiny.network(layers=3)), "differ in sizes of the network$"),
        (dict(views=tiny.VIEWS[::-1]), "differ in cameras$"),
        (dict(codec=PixelCodec(4)), "differ in codec$"),
    ):
        with pytest.raises(ValueError, match=what):
            policy.with_planner(tiny.objective(**changes))


def test_the_real_network_plans_in_one_program():
    how = Planning(proposals=2, futures=1, values=2, future_steps=1, value_steps=1)
    objective = tiny.objective(planning=how, steps=1)
    params = objective.prepare(tiny.params() | {"planner": tiny.params(1)})
    assert "blocks_0" in params["planner"]

    @functools.partial(jax.jit, static_argnums=0)
    def acting(objective, params):
        return plan(objective, params, tiny.normalizers(), tiny.observation(), KEY)

    done = acting(objective, params)
    assert np.all(np.isfinite(done.scores)) and np.ptp(done.proposals, axis=1).min() > 0
    limited = dataclasses.replace(objective, planning=dataclasses.replace(how, limit=2))
    got = acting(limited, params)
    np.testing.assert_allclose(got.scores, done.scores, atol=2e-5)
    np.testing.assert_allclose(got.proposals, done.proposals, atol=2e-5)


def test_in_bfloat16_losses_actions_and_plans_are_those_of_float32():
    how = Planning(proposals=2, futures=1, values=2, future_steps=1, value_steps=1)
    objective = tiny.objective(planning=how, steps=2)

    seen = tiny.normalizers(), tiny.observation(), KEY

    @jax.jit
    def run(params):
        loss = objective.loss(params, tiny.batch(rollouts=2), KEY)[0]
        return loss, objective.policy(params, *seen)

    want = jax.device_get(run(tiny.params()))
    cast = compute_cast(tiny.params(), "bfloat16")
    got = jax.device_get(run(cast))
    assert [x.dtype for x in got] == [jnp.float32] * 2
    plans = [jax.eval_shape(lambda p: plan(objective, p, *seen), p) for p in (tiny.params(), cast)]
    assert plans[0] == plans[1] and plans[0].proposals.dtype == jnp.float32
    np.testing.assert_allclose(got[0], want[0], rtol=5e-3)
    for a, b in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=0.05)
        assert np.abs(a - b).max() > 0


def test_memory_of_a_sample_and_errors():
    # LIBERO at full size: logits and weights of 16 heads over 1764 tokens, in float32.
    from wam.test_cosmos_network import FULL, network

    got = sample_bytes(network(9, (28, 28), **FULL), 9)
    attention = 2 * 16 * 1764**2 * 4
    assert attention < got < 1.5 * attention
    for changes, message in (
        (dict(aggregate="median"), "plan.aggregate 'median' is not one of"),
        (dict(over_depth="lst"), "'lst' is not one of .*, did you mean 'last'"),
        (dict(proposals=0), "plan.proposals 0 must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            Planning(**changes)
