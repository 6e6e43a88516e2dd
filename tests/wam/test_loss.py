"""Tests the loss as a function of its draw: against references, by slot, by example."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wam import cosmos_tiny, tiny
from wam import test_denoising as pictures

from wamjax.wam.loss import Draw
from wamjax.wam.slots import Role

KEY = jax.random.key(0)


# ---- Fast-WAM against torch, with given noise and levels ----


def weight(tau, shift):
    """Computes section 5.1 of the specification independently."""
    bump = np.exp(-2 * (tau - 0.5) ** 2) - np.exp(-0.5)
    u = np.linspace(1, 0, 1001)[:-1]
    s = shift * u / (1 + (shift - 1) * u)
    return bump / np.mean(np.exp(-2 * (s - 0.5) ** 2) - np.exp(-0.5))


@pytest.mark.parametrize("name, variant", [("FAST", "fast"), ("IDM", "idm")])
def test_fast_wam_equals_torch_slot_by_slot(name, variant):
    pytest.importorskip("torch")
    from wam import test_parity as parity
    from wam.official_names import tensor

    params, oracle = parity.models()
    x, rng = parity.data(), np.random.default_rng(1)
    noise = {g: rng.standard_normal(x[g].shape) for g in ("future", "action", "cond")}
    level = {g: x[f"{g}_level"] for g in noise}
    valid = {"future": np.array([[1, 1], [1, 0]], bool), "action": np.ones((2, 3), bool)}
    valid["action"][0, 2] = False

    def mixed(group):
        tau = level[group].reshape(2, *[1] * (x[group].ndim - 1))
        return (1 - tau) * x[group] + tau * noise[group]

    videos = [parity.clip(x["first"], mixed("future"))]
    levels = [parity.clip_levels(level["future"])]
    if name == "IDM":
        videos.append(parity.clip(x["first"], mixed("cond")))
        levels.append(parity.clip_levels(level["cond"]))
    clips, action = oracle(
        videos, levels, tensor(mixed("action")), tensor(level["action"]),
        tensor(x["text"]), tensor(x["state"]), parity.mask(name),
    )  # fmt: skip
    out = {"future": parity.channels_last(clips[0])[:, 1:], "action": action.numpy()}
    want = {g: np.square(v - (noise[g] - x[g])).reshape(2, v.shape[1], -1).mean(-1)
            for g, v in out.items()}  # fmt: skip
    shifts = {"future": 5.0, "action": 1.0}
    examples = {
        g: (want[g] * valid[g]).sum(1) / valid[g].sum(1) * weight(level[g], shifts[g]) for g in want
    }

    objective = tiny.fast_wam(variant, vocabulary=0)
    with jax.enable_x64(True):
        draw = tiny_draw(objective, x, noise, level, valid)
        slots, parts, (loss, metrics) = jax.jit(
            lambda d: (objective.denoising_loss(params, d),
                       objective.example_losses(params, (d,)), objective.loss_of(params, (d,)))
        )(draw)  # fmt: skip
    for g, error in want.items():
        weighted = error * weight(level[g], shifts[g])[:, None]
        np.testing.assert_allclose(slots[g].error, weighted, rtol=1e-8)  # the mean has 1e-10 added
        np.testing.assert_array_equal(slots[g].mask, valid[g])
    np.testing.assert_allclose(parts["video"], examples["future"], rtol=1e-8)
    np.testing.assert_allclose(parts["action"], examples["action"], rtol=1e-8)
    total = examples["future"].mean() + examples["action"].mean()
    np.testing.assert_allclose(loss, total, rtol=1e-8)
    np.testing.assert_allclose(metrics["loss_action"], examples["action"].mean(), rtol=1e-8)


def tiny_draw(objective, x, noise, level, valid):
    use = objective.uses[0]
    noisy = [g for g in noise if g in use.present]
    role = {g: jnp.full((2, objective.rows[g]), Role.PREDICTED if g in noisy else Role.GIVEN)
            for g in use.present}  # fmt: skip
    return Draw(
        clean={g: jnp.asarray(x[g]) for g in use.present},
        noise={g: jnp.asarray(noise[g]) for g in noisy},
        level={g: jnp.asarray(level[g])[:, None] for g in noisy},
        role=role,
        mask=jax.tree.map(jnp.asarray, valid),
        condition={"context": jnp.asarray(x["text"]), "proprio": jnp.asarray(x["state"])},
        use=jnp.zeros(2, int),
        at=jnp.arange(2),
        table=use.table,
    )


# ---- the loss of a draw, and of single examples, in every family ----


def fast_wam():
    batch = tiny.batch(8)
    batch["action_valid"][1] = batch["action_valid"][2, 1:] = False
    batch["frame_valid"][3, 2] = False
    return tiny.stub("ladder", action_weight=2.0, anticipation_weight=0.5), {}, batch


def cosmos(**changes):
    return cosmos_tiny.stub(**changes), {}, cosmos_tiny.batch(rollouts=3)


def picture(scheme):
    objective = pictures.make(scheme, classes=3)
    return objective, pictures.parameters(objective), pictures.batch_of(objective, 4)


FAMILIES = {  # one with a real network
    "fast_wam": fast_wam,
    "cosmos_prefix": functools.partial(cosmos, visibility="prefix"),
    "forcing_causal": functools.partial(picture, "forcing_causal"),
}


@functools.cache
def computed(family):
    """Returns the objective, its batch, a draw, its loss; and functions of a draw."""
    objective, params, batch = FAMILIES[family]()
    run = jax.jit(lambda p, b: (objective.draw(p, b, KEY), objective.loss(p, b, KEY)))

    @jax.jit
    def compute(params, draw):
        slots = [objective.denoising_loss(params, d) for d in draw]
        return objective.loss_of(params, draw), objective.example_losses(params, draw), slots

    def of(draw):
        return jax.device_get(compute(params, draw))

    return objective, batch, *jax.device_get(run(params, batch)), of


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_its_draw_and_the_mean_of_its_examples(family):
    _, _, draw, want, of = computed(family)
    (value, metrics), examples, _ = of(draw)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), metrics, want[1])
    np.testing.assert_allclose(value, want[0], rtol=1e-6)
    np.testing.assert_allclose(np.mean(examples["loss"]), value, rtol=1e-5)

    # Only example 2 changes with its clean values, wherever its use has placed it.
    def changed(d):
        clean = jax.tree.map(
            lambda x: np.where((d.at == 2).reshape(-1, *[1] * (x.ndim - 1)), x + 0.7, x), d.clean
        )
        return dataclasses.replace(d, clean=clean)

    other = of(tuple(map(changed, draw)))[1]["loss"]
    moved = np.abs(other - examples["loss"]) > 1e-4 * np.abs(examples["loss"])
    assert moved.tolist() == [i == 2 for i in range(len(moved))]


def test_slots_of_cosmos_policy_sum_to_their_example_and_tell_its_use():
    objective, batch, draws, _, of = computed("cosmos_prefix")
    found = of(draws)[1]
    np.testing.assert_allclose(found["slots"].sum(axis=1), found["loss"], rtol=1e-6)
    at, use = (np.concatenate([getattr(d, k) for d in draws]) for k in ("at", "use"))
    np.testing.assert_array_equal(found["use"][at], use)
    use = found["use"]
    value = list(objective.layout.names).index("value")
    alone = np.asarray(use == 2)  # the value function has a loss in one slot
    assert (np.delete(found["slots"], value, axis=1)[alone] == 0).all()
    imitated = np.asarray((use == 0) & ~batch["rollout"])
    assert (np.asarray(found["slots"])[imitated][:, value] > 0).all()


def test_a_use_of_several_has_its_own_examples():
    objective, batch, draws, _, of = computed("fast_wam")
    assert sorted(np.concatenate([d.at for d in draws]).tolist()) == list(range(8))
    assert len(draws) == len(objective.uses) == 3
    for draw, slots in zip(draws, of(draws)[2], strict=True):
        for i, number in enumerate(np.asarray(draw.at)):
            np.testing.assert_array_equal(slots["action"].mask[i], batch["action_valid"][number])
            for group in {"future", "anticipation"} & slots.keys():
                shown = batch["frame_valid"][number, 1:]
                np.testing.assert_array_equal(slots[group].mask[i], shown)


def test_learned_tokens_have_nothing_of_what_they_predict():
    """Their level is pure noise, with zero noise, so one step leads to the data, and an output of
    zero has the data as its error."""
    _, _, draws, _, of = computed("fast_wam")
    (draw,) = (d for d in draws if "anticipation" in d.mask)
    np.testing.assert_array_equal(draw.noise["anticipation"], 0)
    np.testing.assert_array_equal(draw.level["anticipation"], 1)
    (slots,) = (s for s in of(draws)[2] if "anticipation" in s)
    clean = np.asarray(draw.clean["anticipation"])
    want = (clean**2).mean(axis=(2, 3, 4))
    np.testing.assert_allclose(slots["anticipation"].error, want, rtol=1e-5)


def test_noise_of_a_draw_may_be_anyones():
    objective, _, (draw,), want, of = computed("forcing_causal")
    mine = {g: x + 1 for g, x in draw.noise.items()}
    assert abs(of((dataclasses.replace(draw, noise=mine),))[0][0] - want[0]) > 1e-3
    # Given slots have none.
    first = list(mine)[0]
    role = draw.role | {first: np.full_like(draw.role[first], Role.GIVEN)}
    mask = draw.mask | {first: np.zeros_like(draw.mask[first])}
    given = dataclasses.replace(draw, role=role, mask=mask)
    other = dataclasses.replace(given, noise=draw.noise | {first: mine[first]})
    assert of((given,))[0][0] == of((other,))[0][0] > 0
