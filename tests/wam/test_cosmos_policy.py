"""Tests Cosmos Policy's objective: what it learns from, what it ignores, and its published form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wam import cosmos_tiny as tiny

from wamjax.config import base_config, source
from wamjax.data import mixture
from wamjax.diffusion.noise import cosmos_policy as law
from wamjax.models.codec import CachedLatents
from wamjax.training import optim
from wamjax.training import state as states
from wamjax.training.sharding import batch_sharding, constrain, make_mesh, params_shardings
from wamjax.training.step import make_train_step
from wamjax.tree import flatten
from wamjax.wam.cosmos_policy import averages, targets
from wamjax.wam.cosmos_policy.checks import COMPAT
from wamjax.wam.cosmos_policy.injection import extract
from wamjax.wam.cosmos_policy.sampling import join
from wamjax.wam.cosmos_policy.uses import uses

KEY = jax.random.key(0)
T = len(tiny.LAYOUT)


@functools.partial(jax.jit, static_argnums=0)
def loss(objective, params, batch):
    return objective.loss(params, batch, KEY)


@functools.partial(jax.jit, static_argnums=0)
def errors(objective, params, batch, level):
    draws = [
        dataclasses.replace(draw, level={g: level[draw.at] for g in draw.level})
        for draw in objective.draw(params, batch, KEY)
    ]
    losses = [objective.denoising_loss(params, draw) for draw in draws]
    return averages.rows(objective.layout, objective.action_weight, draws, losses)


@functools.partial(jax.jit, static_argnums=0)
def latents_and_noise(objective, batch):
    (draw,) = objective.draw({}, batch, KEY)
    drawn = jax.random.normal(jax.random.split(KEY, 4)[1], (8, T, *tiny.LATENT))
    for group, at in tiny.LAYOUT.groups.items():
        if group in draw.noise:
            drawn = drawn.at[:, np.array(at)].set(draw.noise[group])
    return join(tiny.LAYOUT, draw.clean), drawn


def numbers(objective, batch):
    return targets.numbers(objective.layout, batch, objective.discount, objective.compat)


def test_gradient_reaches_every_parameter_and_metrics_say_where_the_loss_is():
    objective, batch = tiny.objective(), tiny.batch(rollouts=2)
    run = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    (value, metrics), grads = jax.device_get(run(tiny.params(), batch, KEY))
    assert np.isfinite(value) and value > 0.1
    assert all(np.any(g) for g in jax.tree.leaves(grads)), flatten(grads)
    fresh = jax.eval_shape(objective.init, KEY)
    assert jax.tree.structure(fresh) == jax.tree.structure(tiny.params())
    # The parts are weighted like the uses in the batch.
    parts = [metrics[f"loss_{u.name}"] for u in objective.uses]
    np.testing.assert_allclose(value, np.dot(parts, [0.5, 0.25, 0.25]), rtol=1e-5)
    # Each part is 10 / 9 of the sum of its slots' reported losses.
    for use, part in zip(objective.uses, parts, strict=True):
        own = [v for k, v in metrics.items() if k.startswith(f"velocity/{use.name}/")]
        np.testing.assert_allclose(part, 10 / T * sum(own), rtol=1e-5)
    names = {k.split("/", 1)[1] for k in metrics if k.startswith("l1/")}
    futures = {"future_proprio", "future_eye", "future_hand", "value"}
    assert names == {
        *(f"policy/{n}" for n in {"action", *futures}),
        *(f"world_model/{n}" for n in futures),
        "value/value",
    }
    assert {k.replace("l1/", "velocity/") for k in metrics if k.startswith("l1/")} == {
        k for k in metrics if k.startswith("velocity/")
    }


def test_the_loss_is_the_published_one_in_edm_form():
    """Computes section 5.3 of the specification: c_skip, c_out, weight, ground truth in the given
    slots, mean over everything, times 10."""
    objective, batch = tiny.objective(), tiny.batch(rollouts=2)
    sigma = np.asarray(jax.jit(lambda key: law(T).sample(key, (8, 1)))(jax.random.key(5)))
    level = np.asarray(objective.process.level_of(sigma))
    found = jax.device_get(errors(objective, tiny.params(), batch, level))

    x0, eps = jax.device_get(latents_and_noise(objective, batch))
    role = np.array([{"policy": 4, "world_model": 5, "value": 8}[objective.uses[i].name]
                     for i in found.use])  # fmt: skip
    given = np.arange(T) < role[:, None]
    s = sigma[:, :, None, None, None]
    c_in = c_skip = 1 / (1 + s)
    c_out, t = -s / (1 + s), np.where(given, 0, sigma / (1 + sigma))
    mask = given[:, :, None, None, None]
    x_t = x0 + s * eps
    inputs = np.where(mask, x0, c_in * x_t)
    channels = [inputs, np.broadcast_to(mask, (*inputs.shape[:-1], 1)), 0 * inputs[..., :1]]
    whole = np.concatenate(channels, axis=-1).astype(np.float32)
    groups = {g: whole[:, list(at)] for g, at in tiny.LAYOUT.groups.items()}
    told = {g: t[:, list(at)].astype(np.float32) for g, at in tiny.LAYOUT.groups.items()}
    text = {"instruction": batch["instruction"]}
    network = functools.partial(
        tiny.network().apply, visibility=objective.tables[0], method="evaluate"
    )
    out = jax.device_get(jax.jit(network)({"params": tiny.params()}, groups, told, text))
    f = np.concatenate([out[g] for g in tiny.LAYOUT.groups], axis=1)
    d = np.where(mask, x0, c_skip * x_t + c_out * f)
    weight = (1 + s) ** 2 / s**2
    want = 10 * np.mean(weight * (x0 - d) ** 2)
    got = 10 * np.mean(found.weight * found.velocity)
    np.testing.assert_allclose(got, want, rtol=2e-4)  # their form loses digits at small sigma
    l1 = np.abs(x0 - d).mean(axis=(2, 3, 4))
    np.testing.assert_allclose(np.where(given, 0, found.l1), l1, rtol=1e-3, atol=1e-5)


def test_an_example_weighs_by_its_slots_and_rollouts_are_not_imitated():
    def weights(rollouts, **changes):
        batch = tiny.batch(rollouts=rollouts)
        found = errors(tiny.stub(**changes), {}, batch, np.full((8, 1), np.float32(0.5)))
        found = jax.device_get(found)
        return {u: found.weight[found.use == u].mean(axis=1) for u in range(3)}

    mixed = weights(2)
    assert [len(mixed[u]) for u in range(3)] == [4, 2, 2]
    for u, share in enumerate((5 / 9, 4 / 9, 1 / 9)):
        np.testing.assert_allclose(mixed[u], share)
    scarce = weights(3)  # one demonstration in a row of four: half of the policy's examples
    np.testing.assert_allclose(sorted(scarce[0]), [0, 0, 5 / 9, 5 / 9])
    pure = weights(2, auxiliary=False)
    for u, share in enumerate((1 / 9, 3 / 9, 1 / 9)):
        np.testing.assert_allclose(pure[u], share)
    heavy = weights(2, action_weight=4.0)
    for u, share in enumerate((8 / 9, 4 / 9, 1 / 9)):
        np.testing.assert_allclose(heavy[u], share)


def test_values_are_discounted_returns_from_the_end_of_the_chunk():
    """Checks section 5.4's values, and partial scores, which the public code counts as full."""
    batch = tiny.batch()
    batch["score"] = np.float32([1.0, 1, 1, 0, 0.5, 0.5, 1, 1])
    batch["to_go"] = np.float32([0.0, 16, 100, 7, 0, 16, 1, 2])
    value = numbers(tiny.objective(), batch)["value"]
    np.testing.assert_allclose(value[:4], [1.0, 0.703, -0.268, -1.0], atol=5e-4)
    np.testing.assert_allclose(value[4:6], [0.0, 0.5 * 0.99**16 * 2 - 1], atol=1e-6)
    erased = numbers(tiny.objective(compat=("erased_scores",)), batch)["value"]
    np.testing.assert_allclose(erased[4:6], [1.0, 0.703], atol=5e-4)
    np.testing.assert_array_equal(erased[:4], value[:4])
    slow = numbers(tiny.objective(discount=0.998), batch)["value"]
    np.testing.assert_allclose(slow[2], 2 * 0.998**100 - 1, atol=1e-5)


def test_the_last_action_goes_on_past_the_end_of_an_episode():
    batch = tiny.batch()
    valid = np.ones((8, 4), bool)
    valid[1, 1:], valid[2, 3:] = False, False
    batch["action_valid"] = valid
    batch["actions"] = batch["actions"] * valid[..., None]
    got = np.asarray(numbers(tiny.objective(), batch)["action"])
    want = np.array(batch["actions"])
    want[1, 1:], want[2, 3:] = want[1, 0], want[2, 2]
    np.testing.assert_array_equal(got, want)


def test_targets_hold_the_right_picture_and_numbers_in_every_slot():
    objective, batch = tiny.objective(), tiny.batch()
    latents, _ = latents_and_noise(objective, batch)
    for camera, at in (("hand", slice(0, 8)), ("eye", slice(8, 16))):
        for time, name in ((0, camera), (1, f"future_{camera}")):
            picture = jnp.asarray(batch["video"][:, time : time + 1, :, at])
            slot = latents[:, tiny.LAYOUT.index(name)]
            np.testing.assert_array_equal(slot, objective.codec.encode(picture)[:, 0])
    for name, x in numbers(objective, batch).items():
        np.testing.assert_allclose(extract(tiny.LAYOUT, latents, name), x, atol=1e-6)
    np.testing.assert_array_equal(latents[:, 0], -1)  # black


def test_prefix_visibility_trains_with_the_same_shares_under_its_own_tables():
    batch = tiny.batch(rollouts=2)
    value, metrics = loss(tiny.stub(visibility="prefix"), {}, batch)
    parts = [metrics[f"loss_{u.name}"] for u in uses("value")]
    np.testing.assert_allclose(value, np.dot(parts, [0.5, 0.25, 0.25]), rtol=1e-5)
    # With a network without attention, neither tables nor regrouping make a difference.
    for other in (loss(tiny.stub(visibility=v), {}, batch) for v in ("bidirectional", "prefix")):
        want = loss(tiny.stub(), {}, batch)
        np.testing.assert_allclose(other[0], want[0], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), other[1], want[1])
    names = [table.name for table in tiny.objective(visibility="prefix").tables]
    assert names == ["prefix_policy", "prefix_world_model", "prefix_value"]
    assert [table.name for table in tiny.objective().tables] == ["bidirectional"]


def test_the_loss_is_the_same_on_a_mesh():
    plain = tiny.objective(visibility="prefix")
    sharded = dataclasses.replace(plain, network=plain.network.clone(constrain=constrain))
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 1}, jax.devices()[:4])
    batch, params = tiny.batch(rollouts=2), tiny.params()

    @functools.partial(jax.jit, static_argnums=0)
    def total(objective, params, batch):  # without metrics, which are half of the program
        return objective.loss(params, batch, KEY)[0]

    want = total(plain, params, batch)
    with jax.set_mesh(mesh):
        places = jax.device_put(batch, batch_sharding(mesh))
        got = total(sharded, jax.device_put(params, params_shardings(params, mesh)), places)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("value", ["value_v", "value_q"])
def test_a_hidden_slot_is_noise_without_a_loss(value):
    objective = tiny.objective(judge=value, mix=(1, 1, 2))
    batch = tiny.batch(rollouts=3)
    level = np.full((8, 1), objective.process.level_of(1e9), np.float32)  # pure noise

    def run(batch):
        return jax.device_get(errors(objective, tiny.params(), batch, level=level))

    found = run(batch)
    judged = np.asarray(found.use) == 2
    assert judged.sum() == 4
    hidden = {"value_v": ("proprio", "actions"), "value_q": ("future_proprio",)}[value]
    shown = {"value_v": "future_proprio", "value_q": "proprio"}[value]
    changed = run(batch | {k: -batch[k] for k in hidden})
    last = np.asarray(found.velocity)[judged, -1]
    np.testing.assert_allclose(np.asarray(changed.velocity)[judged, -1], last, rtol=1e-4)
    seen = np.asarray(run(batch | {shown: -batch[shown]}).velocity)[judged, -1]
    assert np.abs(seen / last - 1).max() > 1e-3
    assert np.asarray(found.weight)[judged].sum(axis=1).tolist() == [1] * 4


def test_compat_switches_do_what_they_say():
    batch = tiny.batch(rollouts=2)
    plain, rounded = (
        numbers(tiny.objective(compat=c), batch) for c in ((), ("bf16_targets",))
    )
    for name, x in plain.items():
        want = x.astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(rounded[name], want, err_msg=name)
    # Section 1.6: the rounded five levels of the published grid.
    sigmas = np.array([80, 42.2911, 20.9724, 9.6183, 4.0])
    rounded = tiny.objective(compat=("bf16_times",)).process_of("action")
    told = rounded.c_noise(jnp.asarray(sigmas / (1 + sigmas)))
    want = [0.98828125, 0.9765625, 0.953125, 0.90625, 0.80078125]
    np.testing.assert_array_equal(told, np.float32(want))
    exact = tiny.objective().process_of("action").c_noise(jnp.asarray(sigmas / (1 + sigmas)))
    np.testing.assert_allclose(exact, [0.98765, 0.97690, 0.95449, 0.90582, 0.8], atol=1e-5)
    level = jnp.full((8, 1), 0.5)
    tossed = errors(tiny.stub(compat=("tossed_mix",)), {}, tiny.batch(), level)
    assert np.bincount(tossed.use, minlength=3).tolist() != [4, 2, 2]
    assert set(COMPAT) == {"bf16_times", "bf16_targets", "erased_scores", "tossed_mix",
                           "zero_minority"}  # fmt: skip


def test_times_are_rounded_under_compat_in_training_too():
    class Spy(tiny.Stub):
        def bind(self, params, constrain=None):
            inner = super().bind({})

            def net(method, values, levels, *rest, **options):
                params["seen"].update(levels)
                return inner(method, values, levels, *rest)

            return net

    @functools.partial(jax.jit, static_argnums=0)
    def told(spy, batch, level):
        seen = {}
        errors.__wrapped__(spy, {"seen": seen}, batch, level)
        return seen

    level = np.full((8, 1), np.float32(0.7))
    for compat, want in (((), 0.7), (("bf16_times",), 0.69921875)):
        seen = told(Spy(**vars(tiny.objective(compat=compat))), tiny.batch(), level)
        assert set(np.unique(seen["value"])) == {np.float32(want)}
        assert set(np.unique(seen["blank"])) == {0}


def test_the_noise_law_is_the_published_one_times_the_root_of_the_slots():
    """Checks section 5.2: medians and masses of the effective law."""
    for slots, below, above in ((9, 0.127, 0.248), (11, 0.112, 0.264)):
        process = dataclasses.replace(tiny.PROCESS, law=law(slots))
        level = np.asarray(process.sample_level(jax.random.key(0), (200_000,)))
        sigma = level / (1 - level)
        assert abs((sigma < 4).mean() - below) < 0.005
        assert abs((sigma > 80).mean() - above) < 0.005


def test_loss_by_level_is_the_loss_at_each_level():
    objective, batch = tiny.stub(), tiny.batch(rollouts=2)
    got = jax.jit(objective.by_level)({}, batch, KEY, jnp.asarray([0.5, 4.0, 80.0]))
    (draw,) = jax.jit(objective.draw)({}, batch, KEY)
    same = dataclasses.replace(draw, level=dict.fromkeys(draw.level, jnp.full((8, 1), 4 / 5)))
    want = jax.jit(lambda draw: objective.loss_of({}, [draw])[1])(same)
    assert got.keys() == want.keys()
    for name in got:
        assert got[name].shape == (3,)
        np.testing.assert_allclose(got[name][1], want[name], rtol=1e-4)


def test_loss_by_level_needs_no_mesh_even_of_a_network_that_is_sharded():
    network = tiny.objective().network.clone(constrain=constrain)
    asked = tiny.params(), tiny.batch(size=4, rollouts=2), KEY, np.float32([0.5])
    got, want = (
        str(jax.make_jaxpr(o.by_level)(*asked))
        for o in (tiny.objective(network=network), tiny.objective())
    )
    assert got == want


class Uses(tiny.Stub):
    """Reports how many examples train each use, with a loss."""

    def init(self, rng):
        return {"x": jnp.zeros(())}

    def loss(self, params, batch, rng, average=None):
        (draw,) = self.draw({}, batch, rng)
        taught = jnp.any(jnp.concatenate(list(draw.mask.values()), axis=1), axis=1)
        counts = {u.name: jnp.sum((draw.use == i) & taught) for i, u in enumerate(self.uses)}
        return params["x"], {name: x.astype(jnp.float32) for name, x in counts.items()}


@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_accumulation_keeps_exact_shares(micro):
    """Returns LIBERO's sources: demonstrations, successes and failures in a pattern of four."""
    config = base_config()
    config.optim.accumulate, config.data.batch_size, config.total_steps = micro, 32, 1
    for name, weight in (("demos", 2.0), ("successes", 1.0), ("failures", 1.0)):
        config.data.sources[name] = source(weight=weight)
    objective = Uses(**vars(tiny.objective()))
    rollout = mixture.layout(mixture.counts(dict(demos=2, successes=1, failures=1), 32)) > 0
    tx = optim.make(config)
    state = states.create(objective, tx, config)
    step = jax.jit(make_train_step(objective, tx, config))
    _, found = step(state, tiny.batch(32) | {"rollout": jnp.asarray(rollout)})
    got = [round(float(found[u.name]) * micro) for u in objective.uses]
    assert got == [16, 8, 8]


def test_errors_name_the_key():
    batch = tiny.batch()
    with pytest.raises(KeyError, match="the batch has no 'to_go'"):
        tiny.objective().loss({}, {k: v for k, v in batch.items() if k != "to_go"}, KEY)
    with pytest.raises(ValueError, match=r"batch\['actions'\] has shape \(8, 3, 2\)"):
        tiny.objective().loss({}, batch | {"actions": batch["actions"][:, 1:]}, KEY)
    for changes, message in (
        (dict(compat=("bf16_time",)), "'bf16_time' does not exist, did you mean 'bf16_times'"),
        (dict(augment="week"), "'week' does not exist, did you mean 'weak'"),
        (dict(mix=(1, 1)), r"\(1, 1\) must have a positive count for each of \['policy'"),
        (dict(codec=CachedLatents(12, 2, 1)), "cannot use the latents of CachedLatents"),
        (dict(visibility="prefix", compat=("tossed_mix",)), "needs objective.visibility"),
        (dict(solver="exponentiel"), "'exponentiel' does not exist, did you mean 'exponential'"),
        (dict(solver="ancestral"), "objective.solver 'ancestral' does not exist"),
        (dict(steps=0), "objective.infer_steps 0 must be at least 1"),
        (dict(sigma_min=100.0), "sigma_min 100.0 must be positive and below objective.sigma_max"),
        (dict(discount=1.5), r"objective.discount 1.5 must be in \(0, 1\]"),
        (dict(action_weight=-1.0), "objective.action_weight -1.0 must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.objective(**changes)
