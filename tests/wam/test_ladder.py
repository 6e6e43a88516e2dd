"""Tests the ladder and its gate against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wamjax.wam import ladder

RUNGS = (1, 3, 6)
B, J, A = 5, 2, 3


@pytest.fixture(scope="module")
def made():
    """Returns all proposals of five states, and a judge's values of them."""
    keys = jax.random.split(jax.random.key(0), 2)
    proposals = jax.random.normal(keys[0], (B, RUNGS[-1], J, A))
    return proposals, jax.random.normal(keys[1], (B, RUNGS[-1]))


def climb(made, goes_on, rows=slice(None)):
    proposals, values = (x[rows] for x in made)

    def propose(rung, before):
        first, last = (0, *RUNGS)[rung : rung + 2]
        return proposals[:, first:last], values[:, first:last], before + rung

    return jax.jit(lambda: ladder.climb(len(RUNGS), propose, goes_on, jnp.zeros(())))()


@pytest.mark.parametrize("rung", range(len(RUNGS)))
def test_forced_to_a_rung_takes_the_best_of_its_proposals(made, rung):
    def goes_on(h, proposals, values):
        return jnp.full(len(values), h < rung), jnp.zeros(len(values))

    done = climb(made, goes_on)
    best = np.argmax(made[1][:, : RUNGS[rung]], axis=1)
    np.testing.assert_array_equal(done.rung, rung)
    np.testing.assert_array_equal(done.chosen, best)
    np.testing.assert_array_equal(done.actions, np.asarray(made[0])[np.arange(B), best])


def test_each_example_chooses_its_own_rung(made):
    """A batch equals its examples one by one; missing proposals have no value."""

    first, three = np.asarray(made[1][:, 0]), np.max(np.asarray(made[1][:, :3]), axis=1)
    limits = np.sort(first)[3], np.sort(three)[2]  # examples below them climb on

    def goes_on(h, proposals, values):
        return jnp.max(values, axis=1) < limits[h], values[:, 0]

    together = climb(made, goes_on)
    assert 0 < np.mean(together.rung) < len(RUNGS) - 1  # they differ
    for i in range(B):
        alone = climb(made, goes_on, slice(i, i + 1))
        for one, all_ in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one[0], all_[i])
    counts = np.sum(np.isfinite(together.values), axis=1)
    np.testing.assert_array_equal(counts, np.array(RUNGS)[np.asarray(together.rung)])
    last = np.asarray(together.rung) == 0
    assert np.all(np.isinf(together.benefit[last, 1]))


def test_unreached_rungs_are_not_computed(made):
    ran = []

    def propose(rung, before):
        jax.debug.callback(lambda: ran.append(rung))
        return made[0][:, rung : rung + 1], made[1][:, rung : rung + 1], before

    def stays(h, proposals, values):
        return jnp.zeros(len(values), bool), jnp.zeros(len(values))

    jax.block_until_ready(jax.jit(lambda: ladder.climb(len(RUNGS), propose, stays))())
    jax.effects_barrier()
    assert ran == [0]


def test_rungs_pass_their_state_to_examples_that_climb():
    """Each rung adds to a total; an unreached one passes it on unchanged."""

    def propose(rung, total):
        total = total + 10**rung
        return jnp.zeros((2, 1, J, A)), jnp.full((2, 1), total), total

    def below(rung):
        return lambda h, proposals, values: (jnp.arange(2) + h < rung, jnp.zeros(2))

    values = [
        jax.jit(lambda rung=rung: ladder.climb(3, propose, below(rung), jnp.zeros(())))().values
        for rung in (0, 1, 2)
    ]
    gone = -np.inf
    np.testing.assert_array_equal(values[0], [[1, gone, gone], [1, gone, gone]])
    np.testing.assert_array_equal(values[1], [[1, 11, gone], [1, gone, gone]])
    np.testing.assert_array_equal(values[2], [[1, 11, 111], [1, 11, gone]])


def test_pays_is_benefit_against_cost():
    rng = np.random.default_rng(0)
    benefit, costs = rng.normal(size=(50, 4)), np.array([0.1, 0.3, 0.35, 2.0])
    for rung in range(3):
        goes, best = ladder.pays(rung, jnp.asarray(benefit), jnp.asarray(costs))
        want = np.max((benefit - costs + costs[rung])[:, rung + 1 :], axis=1)
        np.testing.assert_allclose(best, want, atol=1e-6)
        np.testing.assert_array_equal(goes, want > 0)


def test_climbing_at_a_price_implies_climbing_at_lower_prices():
    benefit = jax.random.normal(jax.random.key(1), (200, 3))
    goes = [
        np.asarray(ladder.pays(0, benefit, price * jnp.array([1.0, 2.0, 4.0]))[0])
        for price in (0.0, 0.1, 0.5, 1.0, 10.0)
    ]
    for cheap, dear in zip(goes[:-1], goes[1:], strict=True):
        assert np.all(cheap | ~dear)
    assert goes[0].sum() > goes[-1].sum()


def test_outcomes_are_those_of_the_best_so_far():
    rng = np.random.default_rng(0)
    values, returns = rng.normal(size=(40, 6)), rng.random((40, 6))
    got = ladder.outcomes(RUNGS, jnp.asarray(values), jnp.asarray(returns))
    for i in range(40):
        want = [returns[i, values[i, :n].argmax()] for n in RUNGS]
        want[0] = returns[i].mean()  # one of them, in expectation
        np.testing.assert_allclose(got[i], want, rtol=1e-6)
    some = ladder.outcomes(RUNGS, jnp.asarray(values), jnp.asarray(returns), alike=[0, 3])
    np.testing.assert_allclose(some[:, 0], returns[:, [0, 3]].mean(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(some[:, 1:], got[:, 1:])


def test_proposals_of_one_mode_are_exchangeable():
    ways = ("direct", "imagine", "direct", "anticipate", "direct", "imagine")
    orders = np.asarray(ladder.shuffled(jax.random.key(0), ways, 500))
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(6), (500, 1)))
    assert np.all(np.array(ways)[orders] == np.array(ways))
    for place in (0, 2, 4):  # each of the three is there equally often
        counts = np.bincount(orders[:, place], minlength=6)[[0, 2, 4]]
        assert counts.sum() == 500 and counts.min() > 125


def test_the_gate_learns_mean_benefits_not_their_signs():
    """A benefit of +1 in one of five states and -0.1 in the others is rare, but pays on average."""
    import optax

    gate, rng = ladder.Gate(2), np.random.default_rng(0)
    seen = ladder.Features(jnp.zeros((512, 4)), jnp.zeros((512, 6)))
    came = jnp.asarray(np.where(rng.random(512) < 0.2, 1.0, -0.1), jnp.float32)
    params, tx = gate.init(jax.random.key(0), seen), optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((gate.apply(p, seen)[:, 1] - came) ** 2))(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(200):
        params, state = step(params, state)
    np.testing.assert_allclose(gate.apply(params, seen)[0, 1], np.mean(came), atol=0.02)
