"""Tests frozen parameters and adapters: what changes, and what keeps every bit."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import toy
from models.helpers import random_params
from test_step import arrays, assert_close, assert_same, build

from wamjax import tree, weights
from wamjax.data.normalize import normalizers
from wamjax.training import adapters, optim, partition, sharding
from wamjax.training import state as states
from wamjax.training.step import forward_flops, model_flops, plan
from wamjax.weights import families

FROZEN = ("action/encoder/.*", "proprio/bias")  # of the toy objective
TARGETS = ("blocks/video/self_attn/(q|v)/kernel", "video/patch_embed/kernel")


def with_zeros(state):
    """Includes negative zeros, in which adding zero would change a bit."""

    def put(x):
        values = np.array(x)
        values.flat[::3] = -0.0
        return jax.device_put(values, x.sharding)

    params = jax.tree.map(put, state.params)
    ema = None if state.ema is None else jax.tree.map(put, state.ema)
    return dataclasses.replace(state, params=params, ema=ema)


def bits(x):
    return {k: v.tobytes() for k, v in arrays(x).items()}


@pytest.mark.parametrize("options", [{}, {"optim.accumulate": 2, "optim.ema_decay": 0.0}])
def test_frozen_parameters_keep_every_bit(options):
    config = toy.config(**{"optim.freeze": FROZEN, "optim.weight_decay": 0.5} | options)
    state, run = build(config)
    state = with_zeros(state)
    before, average = bits(state.params), bits(state.ema)
    for seed in range(3):
        state, _ = run(state, toy.batch(seed=seed))
    after, is_trained = bits(state.params), partition.trained(FROZEN)
    assert before.keys() == after.keys()
    for path in before:
        assert (before[path] == after[path]) == (not is_trained(path)), path
    new = {p for p in before if is_trained(p)}
    assert set(tree.flatten(state.opt_state[1].mu)) == new
    if config.optim.ema_decay:  # frozen parameters need no average
        assert {p for p, x in bits(state.ema).items() if x != average[p]} == set(average) == new


def test_freezing_does_not_change_the_gradients_of_the_rest():
    """Trained parameters and losses of the first step equal those without freezing."""
    results = {}
    for rules in ((), FROZEN):
        config = toy.config(**{"optim.freeze": rules, "optim.clip_norm": 0.0})
        state, run = build(config)
        results[rules] = run(state, toy.batch())
    (whole, metrics), (part, others) = results.values()
    assert metrics["loss"] == others["loss"] and metrics["grad_norm"] > others["grad_norm"]
    keep = partition.trained(FROZEN)
    assert_close(partition.split(whole.params, keep)[0], partition.split(part.params, keep)[0])


def test_split_and_merge():
    params = {"a": {"x": 1, "y": 2}, "b": {"x": 3}}
    kept, rest = partition.split(params, lambda path: path.endswith("x"))
    assert kept == {"a": {"x": 1}, "b": {"x": 3}} and rest == {"a": {"y": 2}}
    assert partition.merge(kept, rest) == params
    assert partition.split(params, lambda _: True) == (params, {})


def test_rules_that_match_nothing_are_errors():
    for key, value, text in (
        ("optim.freeze", ("blocks/vidio/.*",), r"optim.freeze: no parameter matches \['blocks/vid"),
        ("lora.targets", ("blocks/.*/bias",), r"lora.targets .*'blocks/\.\*/bias'\] matches no"),
        ("lora.targets", (), "nothing matches no matrix"),
    ):
        config = toy.config(**{key: value, "lora.rank": 2 if "lora" in key else 0})
        with pytest.raises(ValueError, match=text):
            states.create(toy.Toy(), optim.make(config), config)


# ---- adapters ----

DIT = families.named(layers=2, width=16, heads=2, ffn=24, classes=3, freq_dim=8)


@functools.cache
def dit(double):
    """Returns (random parameters, the network's output as a function of parameters)."""
    base = random_params(families.family("dit").params(families.sizes("dit", DIT)), 1)
    x = np.random.default_rng(2).standard_normal((2, 1, 4, 4, 4))
    x, t, label = x.astype(np.float64 if double else np.float32), np.ones((2, 1)), np.array([0, 3])
    run = weights.functions("dit", DIT)["denoise"]
    return base, jax.jit(lambda params: run(params, x, t.astype(x.dtype), {"label": label}))


def test_fresh_adapters_change_nothing():
    base, run = dit(False)
    params = adapters.add(base, 3, TARGETS, jax.random.key(1))
    new = {p: x for p, x in tree.flatten(params).items() if adapters.is_adapter(p)}
    assert {p: x.shape for p, x in new.items()} == {
        "blocks/video/self_attn/q/lora_down": (2, 16, 3),
        "blocks/video/self_attn/q/lora_up": (2, 3, 16),
        "blocks/video/self_attn/v/lora_down": (2, 16, 3),
        "blocks/video/self_attn/v/lora_up": (2, 3, 16),
        "video/patch_embed/lora_down": (16, 3),
        "video/patch_embed/lora_up": (3, 16),
    }
    downs = [np.std(x) * x.shape[-2] ** 0.5 for p, x in new.items() if p.endswith("down")]
    np.testing.assert_allclose(downs, 1, atol=0.3)
    np.testing.assert_array_equal(run(params), run(base))
    assert_same(adapters.merge(params), base)
    assert adapters.add(base, 0, (), jax.random.key(1)) is base


def test_merged_adapters_compute_the_same():
    with jax.enable_x64(True):
        base, run = dit(True)
        base = jax.tree.map(lambda x: x.astype(np.float64), base)
        params = adapters.add(base, 3, TARGETS, jax.random.key(1))
        flat = tree.flatten(raised(params))
        params = tree.unflatten(flat)
        merged = adapters.merge(params)
        assert jax.tree.structure(merged) == jax.tree.structure(base)
        want = run(params)
        np.testing.assert_allclose(run(merged), want, rtol=1e-12, atol=1e-12)
        assert np.abs(want - run(base)).max() > 0.1
        q = "blocks/video/self_attn/q"
        kernel = np.einsum("lir,lro->lio", flat[f"{q}/lora_down"], flat[f"{q}/lora_up"])
        kernel += flat[f"{q}/kernel"]
        np.testing.assert_allclose(tree.flatten(merged)[f"{q}/kernel"], kernel, rtol=1e-12)


def raised(params):
    """Returns adapters that have an effect."""
    return tree.map_with_path(lambda p, x: x + 0.3 if p.endswith("lora_up") else x, params)


def test_adapters_act_in_sampling_too():
    """Sampling unstacks the layers."""
    objective = toy.fast_wam()
    base = random_params(jax.eval_shape(objective.init, jax.random.key(0)), 1)
    params = raised(adapters.add(base, 3, TARGETS, jax.random.key(1)))
    rows = {k: [0.0] * 5 for k in ("mean", "q01", "q99")} | {"min": [-1.0] * 5, "max": [1.0] * 5}
    rows |= {"std": [1.0] * 5, "count": 3}
    normalise = normalizers(
        {"proprio": rows, "actions": {k: v[:3] if k != "count" else v for k, v in rows.items()}},
        "min_max",
    )
    batch = toy.batch_of(objective, 2)
    observation = {"video": batch["video"][:, :1]} | {
        k: batch[k] for k in ("proprio", "instruction")
    }

    @jax.jit
    def act(params):
        return objective.policy(
            objective.prepare(params), normalise, observation, jax.random.key(0)
        )

    got = act(params)
    np.testing.assert_allclose(got, act(adapters.merge(params)), rtol=1e-4, atol=1e-5)
    assert np.abs(got - act(base)).max() > 1e-3


def test_training_adapters_leaves_a_frozen_backbone():
    config = toy.config(**{"optim.freeze": (".*",), "lora.rank": 2, "lora.targets": TARGETS,
                           "optim.ema_decay": 0.0})  # fmt: skip
    objective = toy.fast_wam()
    drawn = random_params(jax.eval_shape(lambda: states.init_params(objective, config)))
    # A fresh head is zero and stops gradients; a fresh adapter changes nothing yet.
    drawn = tree.map_with_path(lambda p, x: 0 * x if p.endswith("lora_up") else x, drawn)
    state, run = build(config, objective, (2, 2, 2), drawn)
    before, losses = bits(state.params), []
    for _ in range(4):
        state, metrics = run(state, toy.batch_of(objective))
        losses.append(float(metrics["loss"]))
    changed = {p for p, x in bits(state.params).items() if x != before[p]}
    assert changed == {p for p in before if adapters.is_adapter(p)} and len(changed) == 6
    assert losses[-1] < losses[0]


def test_the_gradient_of_a_frozen_backbone_is_not_computed():
    objective, flops, model = toy.fast_wam(), {}, {}
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    for rules in ((), (".*",)):
        values = {"optim.freeze": rules, "lora.rank": 2, "lora.targets": TARGETS}
        config = toy.config(**values)
        with jax.set_mesh(mesh):
            work = plan(objective, optim.make(config), config, mesh)
            flops[rules] = work.step.lower(*work.arguments).cost_analysis()["flops"]
            model[rules] = model_flops(objective, config, work.state.params, work.batch)
            once = forward_flops(objective, config, work.state.params, work.batch)
    assert flops[(".*",)] < 0.8 * flops[()]
    # It is not counted either: with a frozen backbone, a step costs two forward passes, not three.
    assert 2.8 * once < model[()] <= 3 * once and 1.8 * once < model[(".*",)] < 2.2 * once
