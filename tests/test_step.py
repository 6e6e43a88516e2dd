import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from models.helpers import random_params

from wamjax import tree
from wamjax.config import source
from wamjax.data import mixture
from wamjax.training import optim, sharding
from wamjax.training import state as states
from wamjax.training.step import (
    compute_cast,
    ema_weights,
    make_train_step,
    microbatch_row,
    microbatches,
    plan,
)


def build(config, objective=None, sizes=(1, 1, 1), params=None):
    """Returns (state, jitted step without donation) on a mesh; fresh, or from `params`."""
    objective = objective or toy.Toy()
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), devices)
    tx = optim.make(config)

    def create():
        return states.create(objective, tx, config)

    abstract = jax.eval_shape(create)
    places = sharding.state_shardings(abstract, abstract.params, mesh)
    step = jax.jit(
        make_train_step(objective, tx, config),
        out_shardings=(places, sharding.replicated(mesh)),
    )
    if params is None:
        state = jax.jit(create, out_shardings=places)()
    else:
        start = functools.partial(states.start, tx=tx, config=config)
        state = jax.jit(start, out_shardings=places)(params)

    def run(state, batch):
        with jax.set_mesh(mesh):
            return step(state, sharding.global_batch(batch, mesh))

    return state, run


def arrays(x):
    return {k: np.asarray(v) for k, v in tree.flatten(x).items()}


def assert_close(a, b, rtol=1e-5, atol=1e-5):
    a, b = arrays(a), arrays(b)
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol, atol, err_msg=key)


def assert_same(a, b):
    a, b = arrays(a), arrays(b)
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def in_mid_run(state):
    """Returns `state` with the moments of a run in progress.

    Adam's very first update is g / |g|, which turns the rounding of a gradient near zero into a
    fraction of the learning rate; later updates are as well conditioned as the gradient.
    """
    rng = np.random.default_rng(0)

    def fill(low, high):
        return lambda x: jax.device_put(rng.uniform(low, high, x.shape).astype("f4"), x.sharding)

    adam = state.opt_state[1]
    adam = adam._replace(
        count=adam.count + 10,
        mu=jax.tree.map(fill(-0.1, 0.1), adam.mu),
        nu=jax.tree.map(fill(0.01, 0.1), adam.nu),
    )
    parts = (state.opt_state[0], adam, *state.opt_state[2:])
    return dataclasses.replace(state, opt_state=parts)


def test_loss_and_update_of_the_real_objective_are_the_same_on_a_mesh():
    """The mesh has all axes. Parameters are not at their initialisation, where most gradients are
    0, and a shard of the batch is a single example."""
    # The moving average is compared on the small objective alone.
    config = toy.config(**{"data.batch_size": 4, "optim.ema_decay": 0.0})
    objective = toy.fast_wam()
    params = random_params(jax.eval_shape(objective.init, jax.random.key(0)))
    results = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        state, step = build(config, objective, sizes, params)
        results.append(step(in_mid_run(state), toy.batch_of(objective, 4)))
    (want, want_metrics), (got, metrics) = results
    assert_close(metrics, want_metrics)
    assert_close(got.params, want.params)
    assert_close(got.opt_state, want.opt_state)


@pytest.fixture(scope="module")
def plain():
    """Returns state and step with an average without warm-up."""
    return build(toy.config(**{"optim.ema_decay": 0.3, "optim.ema_warmup": False}))


def test_randomness_is_a_function_of_seed_and_step(plain):
    state, step = plain
    batch = toy.batch()
    first, again = step(state, batch)[1], step(state, batch)[1]
    assert_same(first, again)
    later = step(dataclasses.replace(state, step=state.step + 1), batch)[1]
    assert later["loss"] != first["loss"]
    seen = {
        tuple(np.asarray(jax.random.key_data(states.key(seed, purpose, i))).tolist())
        for seed in (0, 1) for purpose in states.PURPOSES for i in range(3)
    }  # fmt: skip
    assert len(seen) == 2 * len(states.PURPOSES) * 3


def test_accumulation_equals_the_big_batch_on_every_mesh():
    batch = toy.batch(32)

    def update(micro, sizes):
        config = toy.config(**{"optim.accumulate": micro, "data.batch_size": 32})
        state, step = build(config, toy.Toy(noise=0.0), sizes)
        return step(in_mid_run(state), batch)

    whole, metrics = update(1, (1, 1, 1))
    for micro, sizes in ((4, (1, 1, 1)), (4, (4, 2, 1)), (1, (8, 1, 1))):
        parts, other = update(micro, sizes)
        assert_close(other, metrics)
        # Compare the first moment, the gradient, since Adam's quotient would hide differences.
        assert_close(parts.opt_state, whole.opt_state)
        assert_close(parts.params, whole.params)


def test_microbatches_get_different_noise():
    config = toy.config(**{"optim.accumulate": 2, "data.batch_size": 8})
    state, step = build(config)
    half = toy.batch(4)
    twice = {k: np.repeat(v, 2, axis=0) for k, v in half.items()}  # both microbatches are `half`
    _, metrics = step(state, twice)
    _, one = build(toy.config(**{"data.batch_size": 4}), params=state.params)
    losses = {float(one(state, half)[1]["loss"]), float(metrics["loss"])}
    assert len(losses) == 2


@dataclasses.dataclass(frozen=True)
class Shares(toy.Toy):
    """Reports the share of marked examples that it sees, and its square."""

    row: int = 1

    def loss(self, params, batch, rng, average=None):
        loss, _ = super().loss(params, batch, rng)
        share = jnp.mean(batch["proprio"][:, 0])
        seen = jnp.where(share > 0.5, share, jnp.nan)
        return loss, {"share": share, "square": share**2, "seen": seen}


def of_sources(weights, micro):
    """Returns (config, batch of 32) in which the examples of the first source are marked."""
    config = toy.config(**{"optim.accumulate": micro, "data.batch_size": 32})
    for i, weight in enumerate(weights):
        config.data.sources[f"s{i}"] = source(weight=float(weight))
    batch = toy.batch(32)
    counts = mixture.counts({f"s{i}": float(w) for i, w in enumerate(weights)}, 32)
    batch["proprio"][:, 0] = mixture.layout(counts) == 0
    return config, batch


@pytest.mark.parametrize("weights", [(3, 1), (1, 3), (1, 1, 2), (2, 1, 1)])
@pytest.mark.parametrize("micro", [2, 4, 8])
def test_every_microbatch_has_the_shares_of_the_sources(weights, micro):
    config, batch = of_sources(weights, micro)
    parts = microbatches(batch["proprio"], micro, microbatch_row(Shares(row=2), config))
    assert parts.shape == (micro, 32 // micro, toy.P)
    np.testing.assert_array_equal(parts[:, :, 0].mean(axis=1), weights[0] / sum(weights))
    # Every example is in one microbatch.
    every = [set(map(bytes, x.reshape(32, -1))) for x in (np.asarray(parts), batch["proprio"])]
    assert every[0] == every[1] and len(every[0]) == 32


def test_shares_that_do_not_fit_a_microbatch_are_right_to_one_example():
    config, batch = of_sources((27, 5), 2)
    parts = microbatches(batch["proprio"], 2, microbatch_row(Shares(), config))
    assert sorted(parts[:, :, 0].sum(axis=1)) == [13, 14]  # of 16 examples each


def test_a_step_on_a_mesh_takes_its_microbatches_in_these_shares():
    config, batch = of_sources((3, 1), 4)
    state, step = build(config, Shares(row=2), (4, 2, 1))
    _, metrics = step(state, batch)
    share = 3 / 4
    np.testing.assert_allclose((metrics["share"], metrics["square"]), (share, share**2), rtol=1e-6)


def test_metrics_average_over_the_microbatches_that_have_them():
    config = toy.config(**{"optim.accumulate": 4, "data.batch_size": 8})
    batch = toy.batch(8)
    batch["proprio"][:, 0] = [1, 1, 0, 0, 1, 1, 0, 1]  # in pairs of 0 and 4, 1 and 5, ...
    state, step = build(config, Shares())
    _, metrics = step(state, batch)
    assert metrics["share"] == 5 / 8 and metrics["seen"] == 1.0
    batch["proprio"][:, 0] = 0
    assert np.isnan(step(state, batch)[1]["seen"])


def test_programs_that_fit_no_microbatch_are_an_error():
    config = toy.config(**{"optim.accumulate": 2, "data.batch_size": 12})
    with pytest.raises(ValueError, match="batch_size 12 .* rows of 4, .* a multiple of 8"):
        make_train_step(Shares(row=4), optim.make(config), config)


def test_a_batch_that_does_not_divide_into_microbatches_is_an_error():
    config = toy.config(**{"optim.accumulate": 3})
    with pytest.raises(ValueError, match="batch_size 8 does not divide by optim.accumulate 3"):
        make_train_step(toy.Toy(), optim.make(config), config)


# ---- guard ----


@dataclasses.dataclass(frozen=True)
class BadGradient(toy.Toy):
    """Has a NaN loss if `bad` is 1; if it is 2, a finite loss with an infinite gradient (sqrt at
    0)."""

    def loss(self, params, batch, rng, average=None):
        loss, metrics = super().loss(params, batch, rng)
        bad = batch["bad"][0] > 1
        zero = jnp.where(bad, jnp.sum(params["proprio"]["bias"] * 0), 1.0)
        return jnp.where(bad, jnp.sqrt(zero), loss), metrics


def test_a_skipped_step_changes_nothing_but_counters_even_at_step_0():
    state, step = build(toy.config(), BadGradient(noise=0.0), (2, 2, 2))
    want, want_metrics = step(state, toy.batch())
    for bad in (1, 2):
        batch = toy.batch() | {"bad": np.full(8, bad, np.float32)}
        skipped, metrics = step(state, batch)
        assert_same((skipped.params, skipped.opt_state, skipped.ema),
                    (state.params, state.opt_state, state.ema))  # fmt: skip
        assert (int(skipped.step), int(skipped.skips), int(skipped.streak)) == (1, 1, 1)
        assert metrics["skips"] == metrics["skips_in_a_row"] == 1
        assert np.isfinite(metrics["loss"]) == (bad == 2)
        again, _ = step(skipped, batch)
        assert (int(again.skips), int(again.streak)) == (2, 2)
        # The next good step equals that of a run without the bad ones, and ends the streak.
        good, metrics = step(again, toy.batch())
        assert_same((good.params, good.opt_state, good.ema),
                    (want.params, want.opt_state, want.ema))  # fmt: skip
        assert (int(good.step), int(good.skips), int(good.streak)) == (3, 2, 0)
        assert metrics["learning_rate"] == want_metrics["learning_rate"]


# ---- precision ----


@dataclasses.dataclass(frozen=True)
class Spy(toy.Toy):
    seen: list = dataclasses.field(default_factory=list, hash=False)

    def loss(self, params, batch, rng, average=None):
        self.seen.append({x.dtype for x in jax.tree.leaves(params)})
        loss, metrics = super().loss(params, batch, rng)
        return loss.astype(jnp.bfloat16), metrics


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_masters(plain):
    spy = Spy()
    config = toy.config(**{"precision.compute": "bfloat16", "optim.learning_rate": 1e-7})
    state, step = build(config, spy, params=plain[0].params)
    new, metrics = step(state, toy.batch())
    assert spy.seen and all(d == {jnp.dtype("bfloat16")} for d in spy.seen)
    kept = jax.tree.leaves((new.params, new.ema, new.opt_state[1].mu, new.opt_state[1].nu))
    assert {x.dtype for x in kept} == {jnp.dtype("float32")}
    assert {v.dtype for v in metrics.values()} == {jnp.dtype("float32")}
    reference, step32 = plain
    _, metrics32 = step32(reference, toy.batch())
    np.testing.assert_allclose(metrics["loss"], metrics32["loss"], rtol=0.03)
    # An update far below bfloat16's resolution is not lost.
    kernel = lambda s: np.asarray(s.params["action"]["head"]["kernel"])  # noqa: E731
    assert (kernel(new) != kernel(state)).mean() > 0.5


# ---- optimiser ----


def oracle_schedule(n, peak, total, warmup_fraction, final):
    """Computes torch's LinearLR(1/W, 1, W), then CosineAnnealingLR(N - W, final), in numpy."""
    warmup = round(warmup_fraction * total)
    if n < warmup:
        return peak * (1 / warmup + (1 - 1 / warmup) * n / warmup)
    share = min((n - warmup) / (total - warmup), 1)
    return peak * (final + (1 - final) * 0.5 * (1 + np.cos(np.pi * share)))


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5])
def test_schedule_is_the_closed_form(warmup):
    config = toy.config(**{"total_steps": 200, "optim.warmup_fraction": warmup,
                           "optim.learning_rate": 1e-4})  # fmt: skip
    rate = optim.schedule(config)
    for n in range(0, 201):
        want = oracle_schedule(n, 1e-4, 200, warmup, 0.01)
        np.testing.assert_allclose(rate(n), want, rtol=2e-5)
    if warmup:
        np.testing.assert_allclose(rate(0), 1e-4 / (200 * warmup), rtol=1e-6)
        assert rate(int(200 * warmup)) == np.float32(1e-4)
    np.testing.assert_allclose(rate(200), 1e-6, rtol=1e-5)


def test_adamw_is_the_textbook_one_with_decay_on_everything_and_clipping():
    config = toy.config(**{"total_steps": 20, "optim.warmup_fraction": 0.2,
                           "optim.weight_decay": 0.3, "optim.clip_norm": 1.0})  # fmt: skip
    tx, rng = optim.make(config), np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    params = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    state, update = tx.init(params), jax.jit(tx.update)
    want = {k: np.asarray(v, np.float64) for k, v in params.items()}
    m, v = ({k: np.zeros_like(x) for k, x in want.items()} for _ in range(2))
    for n in range(6):
        grads = {k: rng.normal(size=x.shape) * 10.0 ** (n - 3) for k, x in want.items()}
        updates, state = update({k: jnp.asarray(g, jnp.float32) for k, g in grads.items()},
                                state, params)  # fmt: skip
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        rate = oracle_schedule(n, 1e-2, 20, 0.2, 0.01)
        for k, g in grads.items():
            g = g / max(norm, 1.0)
            m[k] = 0.9 * m[k] + 0.1 * g
            v[k] = 0.95 * v[k] + 0.05 * g**2
            step = (m[k] / (1 - 0.9 ** (n + 1))) / (np.sqrt(v[k] / (1 - 0.95 ** (n + 1))) + 1e-8)
            want[k] = want[k] - rate * (step + 0.3 * want[k])
        for k in want:
            np.testing.assert_allclose(params[k], want[k], rtol=1e-4, atol=1e-6)


def test_settings_do_not_change_the_structure_of_the_optimiser_state():
    params = {"a": jnp.ones(3)}
    shapes = {
        str(jax.tree.structure(optim.make(toy.config(**values)).init(params)))
        for values in (
            {},
            {"optim.clip_norm": 0.0},
            {"optim.warmup_fraction": 0.0},
            {"optim.weight_decay": 0.0},
        )  # fmt: skip
    }
    assert len(shapes) == 1


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_is_the_closed_form(warmup, plain):
    state, step = plain
    if warmup:
        config = toy.config(**{"optim.ema_decay": 0.3, "optim.ema_warmup": True})
        state, step = build(config, params=state.params)
    history = [arrays(state.params)]
    for i in range(5):
        state, _ = step(state, toy.batch(seed=i, bad=i == 2))  # a skipped step is no update
        history.append(arrays(state.params))
    del history[3]
    # (1 + n) / (10 + n) is 0.1, 0.18, 0.25, 0.31: the last one is over 0.3
    decays = [1 / 10, 2 / 11, 3 / 12, 0.3] if warmup else [0.3] * 4
    for key, got in arrays(state.ema).items():
        want = history[0][key].astype(np.float64)
        for decay, params in zip(decays, history[1:], strict=True):
            want = decay * want + (1 - decay) * params[key]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_ema_warmup_keeps_a_short_run_from_averaging_its_start():
    """At the published 0.9999, the start still has a weight of 97.5 % after 250 steps; with warm-up
    the first half has almost none. At published lengths both are equal to the bit."""
    config, share = toy.config(**{"optim.ema_decay": 0.9999}), {}
    for warmup in (False, True):
        config.optim.ema_warmup = warmup
        old = [float(ema_weights(config, n)[0]) for n in range(250)]
        share[warmup] = np.prod(old), np.prod(old[125:])
    assert share[False][0] > 0.97 and share[True][1] < 0.003
    config.optim.ema_warmup = False
    published = ema_weights(config, 0)
    config.optim.ema_warmup = True
    for n in (90_000, 400_000):
        assert [np.float32(x) for x in ema_weights(config, n)] == [np.float32(x) for x in published]


def test_no_decay_is_no_average():
    config = toy.config(**{"optim.ema_decay": 0.0})
    create = functools.partial(states.create, toy.Toy(), optim.make(config), config)
    assert jax.eval_shape(create).ema is None


def test_norm_scales_and_modulation_stay_in_master_precision():
    """Kernels are cast for compute; parameters used in float32 arithmetic are not."""
    names = "q/kernel", "q/bias", "q_norm/scale", "modulation", "head_table"
    params = tree.unflatten({name: jnp.ones((2, 2)) for name in names})
    cast = tree.flatten(compute_cast(params, "bfloat16"))
    precise = {path for path, x in cast.items() if x.dtype == jnp.float32}
    assert precise == {"q_norm/scale", "modulation", "head_table"}


@pytest.mark.parametrize("value", [0, 7, 2**31 + 3, 2**32 + 5, -1])
def test_a_seed_given_as_an_argument_makes_the_same_keys(value):
    config = toy.config(seed=value)
    argument = jax.jit(lambda seed: states.key(seed, "train", 3))(states.seed_of(config))
    expected = jax.jit(lambda: states.key(value, "train", 3))()
    np.testing.assert_array_equal(jax.random.key_data(argument), jax.random.key_data(expected))


def test_runs_that_differ_in_the_seed_alone_share_their_programs():
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])
    steps, starts = set(), set()
    for value in (1, 2):
        config = toy.config(seed=value)
        tx = optim.make(config)
        with jax.set_mesh(mesh):
            work = plan(toy.Toy(), tx, config, mesh)
            steps.add(work.step.lower(*work.arguments).as_text())
        create = jax.jit(functools.partial(states.create, toy.Toy(), tx, config))
        starts.add(create.lower(seed=states.seed_of(config)).as_text())
    assert len(steps) == len(starts) == 1
