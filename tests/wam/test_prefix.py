"""Tests chunks whose first actions are given: in the loss, in the solver, and in the result."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from wam import tiny

from wamjax.data.normalize import Normalizer
from wamjax.wam.fast_wam.uses import MODES
from wamjax.wam.loss import denoising_loss
from wamjax.wam.prefix import Prefix
from wamjax.wam.slots import Role

KEY = jax.random.key(0)
SIZE, MOST = 4, tiny.CHUNK - 1
SCALES = {
    "actions": Normalizer(np.float32([0.3, -0.2]), np.float32([2.0, 0.7]), 1.0),
    "proprio": Normalizer(0.0, 1.0, 1.0),
}


def observation(size=SIZE):
    batch = tiny.batch(size)
    return {"video": batch["video"][:, :1]} | {k: batch[k] for k in ("proprio", "instruction")}


def prefix(*count, seed=3):
    draw = np.random.default_rng(seed).uniform(-1, 1, (len(count), MOST, tiny.ACTION))
    return Prefix(draw.astype(np.float32), np.asarray(count))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _act(objective, mode, params, prefix):
    return objective.policy(params, SCALES, observation(), KEY, mode, prefix=prefix)


def act(objective, mode, prefix=None):
    return np.asarray(_act(objective, mode, tiny.params(objective.variant), prefix))


def test_counts_are_uniform_and_only_predicted_slots_are_given():
    objective = tiny.fast_wam("fast", prefix_max=MOST)
    batch = tiny.batch(600)
    batch["action_valid"][:150] = False
    (draw,) = jax.jit(objective.draw)({}, batch, KEY)
    role = np.asarray(draw.role["action"])
    assert role.shape == (600, tiny.CHUNK) and (role[:150] == Role.ABSENT).all()
    given = role[150:] == Role.GIVEN
    count = given.sum(axis=1)
    np.testing.assert_array_equal(given, np.arange(tiny.CHUNK) < count[:, None])
    share = np.bincount(count, minlength=MOST + 1) / len(count)
    assert len(share) == MOST + 1 and np.abs(share - 1 / (MOST + 1)).max() < 0.06
    np.testing.assert_array_equal(draw.mask["action"], role == Role.PREDICTED)
    assert (np.asarray(draw.role["future"]) == Role.PREDICTED).all()


def test_given_actions_enter_clean_and_what_is_predicted_at_them_has_no_gradient():
    objective = tiny.fast_wam("fast", prefix_max=MOST)
    (draw,) = jax.device_get(jax.jit(objective.draw)({}, tiny.batch(40), KEY))
    given = np.asarray(draw.role["action"]) == Role.GIVEN
    assert 0 < given.mean() < 1

    def total(outputs):
        seen = {}

        def network(values, levels, condition, table, predict):
            seen.update(values=values["action"], levels=levels["action"])
            return {"future": values["future"], "action": outputs}

        losses = denoising_loss(network, draw, objective.process_of)
        return objective.reduce([draw], [losses])[0], seen

    clean = draw.clean["action"]
    slope, seen = jax.device_get(jax.jit(jax.grad(total, has_aux=True))(clean))
    np.testing.assert_array_equal(np.abs(slope).sum(axis=-1) == 0, given)
    values, levels = seen["values"], seen["levels"]
    np.testing.assert_array_equal(values[given], clean[given])
    assert (levels[given] == 0).all() and (levels[~given] > 0).all()
    assert np.abs(values - clean)[~given].min() > 0


def test_noise_on_given_actions_is_on_those_alone():
    options = dict(prefix_max=MOST)
    plain, noisy = tiny.stub("fast", **options), tiny.stub("fast", **options, prefix_noise=0.5)
    run = jax.jit(lambda batch: [o.draw({}, batch, KEY)[0] for o in (plain, noisy)])
    draw, other = jax.device_get(run(tiny.batch(64)))
    given = draw.role["action"] == Role.GIVEN
    change = other.clean.pop("action") - draw.clean.pop("action")
    assert (change[~given] == 0).all() and 0.4 < change[given].std() < 0.6
    jax.tree.map(np.testing.assert_array_equal, draw, other)  # nothing else differs


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_a_prefix_changes_roles_of_actions_alone_in_every_variant(variant):
    plain, with_prefix = tiny.stub(variant), tiny.stub(variant, prefix_max=MOST)

    @jax.jit
    def run(batch):
        both = plain, with_prefix
        return [(o.draw({}, batch, KEY), o.loss({}, batch, KEY)) for o in both]

    (draws, (_, before)), (others, (value, metrics)) = jax.device_get(run(tiny.batch()))
    for one, other in zip(draws, others, strict=True):
        assert one.role["action"].shape == (len(one.at), 1)
        same = dataclasses.replace(other, role=one.role, mask=one.mask)
        jax.tree.map(np.testing.assert_array_equal, one, same)  # all other draws are the same

    assert metrics["loss_video"] == before["loss_video"] and np.isfinite(value)
    assert abs(metrics["loss_action"] - before["loss_action"]) > 1e-4


def test_the_loss_ignores_the_prefix_but_for_what_the_rest_sees_of_it():
    """Without attention and cross-attention nothing sees it."""
    objective, params = tiny.fast_wam("fast", prefix_max=MOST), tiny.params("fast")
    attention = params["blocks"]["action"]["self_attn"]
    muted = attention | {"o": jax.tree.map(np.zeros_like, attention["o"])}
    action = params["blocks"]["action"] | {"self_attn": muted}
    alone = params | {"blocks": params["blocks"] | {"action": action}}
    (draw,) = jax.device_get(jax.jit(objective.draw)(params, tiny.batch(8), KEY))
    given = draw.role["action"] == Role.GIVEN
    clean = draw.clean | {"action": draw.clean["action"] + given[..., None]}
    moved = dataclasses.replace(draw, clean=clean)
    run = jax.jit(lambda p, draw: objective.loss_of(p, [draw])[0])
    assert run(alone, draw) == run(alone, moved)
    assert abs(float(run(params, draw)) - float(run(params, moved))) > 1e-4


@pytest.mark.parametrize(
    "variant, mode", [(v, m) for v in ("joint", "optional_idm") for m in MODES[v]]
)
def test_a_prefix_comes_back_unchanged_and_the_rest_follows_it_with_and_without_cache(
    variant, mode
):
    objective = tiny.fast_wam(variant, prefix_max=MOST)
    asked = prefix(0, 1, 2, 2)
    got = act(objective, mode, asked)
    mask = np.arange(tiny.CHUNK) < np.asarray(asked.count)[:, None]
    np.testing.assert_array_equal(got[:, :MOST][mask[:, :MOST]], asked.actions[mask[:, :MOST]])
    # Once without a prefix, which is a separate program; else with empty ones.
    free = act(objective, mode, None if mode == "direct" else prefix(0, 0, 0, 0))
    np.testing.assert_allclose(got[0], free[0], atol=1e-6)  # nothing is committed
    assert np.abs(got - free)[1:, MOST].min() > 1e-4  # the rest of the plan differs
    beyond = asked._replace(actions=np.where(mask[:, :MOST, None], asked.actions, np.nan))
    np.testing.assert_array_equal(act(objective, mode, beyond), got)
    want = act(dataclasses.replace(objective, use_cache=False), mode, asked)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("solver", ["heun", "unipc"])
def test_every_solver_keeps_the_prefix_clean_on_the_whole_way(solver, monkeypatch):
    objective = tiny.fast_wam("fast", prefix_max=MOST, solver=solver, use_cache=False)
    asked, seen = prefix(0, 1, 2, 2), []
    params = tiny.params("fast")
    mask = np.arange(tiny.CHUNK) < np.asarray(asked.count)[:, None]
    normal = SCALES["actions"].forward(asked.actions)

    class Spy(type(objective.network)):
        def __call__(self, values, times, *args, **kwargs):
            if "action" in values:
                jax.debug.callback(lambda x: seen.append(np.array(x)), values["action"])
            return super().__call__(values, times, *args, **kwargs)

    names = {f.name: getattr(objective.network, f.name)
             for f in dataclasses.fields(objective.network) if f.name not in ("parent", "name")}
    spied = dataclasses.replace(objective, network=Spy(**names))
    run = jax.jit(functools.partial(spied.sample, mode=None, states=True))
    way = run(params, SCALES, observation(), KEY, prefix=asked)["action"]
    jax.effects_barrier()
    assert len(seen) >= objective.steps
    for x in (*seen, *np.asarray(way)):
        np.testing.assert_array_equal(x[:, :MOST][mask[:, :MOST]], normal[mask[:, :MOST]])
        assert np.isfinite(x).all()


def test_a_prefix_without_training_is_an_error_that_names_the_fix():
    with pytest.raises(ValueError, match=r"takes no prefix: .* objective.prefix_max = 0"):
        act(tiny.fast_wam("fast"), "direct", prefix(1, 1, 1, 1))
    objective = tiny.fast_wam("fast", prefix_max=MOST)
    with pytest.raises(ValueError, match=r"count \(3,\) must be \(b, d, a\) and \(b,\)"):
        act(objective, "direct", prefix(1, 1, 1, 1)._replace(count=np.ones(3)))
