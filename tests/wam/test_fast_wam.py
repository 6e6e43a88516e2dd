"""Tests the training objective of every variant: what it learns from, and what it ignores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.helpers import assert_trees_close, random_params
from wam import tiny

from wamjax.data.normalize import Normalizer
from wamjax.models import codec as codecs
from wamjax.models.vae.bottleneck import Gaussian
from wamjax.tree import flatten
from wamjax.wam.fast_wam.uses import FAST, IDM, IDM_PUBLISHED
from wamjax.wam.loss import SlotLosses, denoising_loss

KEY = jax.random.key(0)


@functools.cache
def compiled(variant):
    return jax.jit(tiny.fast_wam(variant).loss)


def loss(variant, batch, params=None, key=KEY):
    params = tiny.params(variant) if params is None else params
    return jax.device_get(compiled(variant)(params, batch, key))


CODEC = codecs.small(Gaussian(12), spatial=2, temporal=1, width=8)


def test_variants_predict_the_same_groups_with_known_exceptions():
    """So the next test needs the gradients of only two."""
    predicted = {v: [u.predicted for u in tiny.fast_wam(v).uses] for v in tiny.VARIANTS}
    both = ("future", "action")
    assert predicted == {
        "fast": [both], "joint": [both], "idm": [both], "optional_idm": [both, both],
        "no_cotrain": [("action",)], "ladder": [both, ("anticipation", "action"), both],
    }  # fmt: skip


@pytest.mark.parametrize("variant", ["idm", "no_cotrain"])
def test_gradient_is_nonzero_exactly_where_the_loss_reaches(variant):
    """A codec with parameters is not trained."""
    codec = CODEC if variant == "idm" else tiny.CODEC
    objective = tiny.fast_wam(variant, codec=codec)
    params = random_params(jax.eval_shape(objective.init, KEY))
    run = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    (value, metrics), grads = jax.device_get(run(params, tiny.batch(), KEY))
    assert np.isfinite(value) and value > 0.01
    np.testing.assert_allclose(value, metrics["loss_video"] + metrics["loss_action"], rtol=1e-6)
    assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics.values())
    of_codec = jax.tree.leaves(grads.pop("codec", {}))
    assert len(of_codec) == len(jax.tree.leaves(params.get("codec", {})))
    assert not any(np.any(x) for x in of_codec)

    zero = set()
    for path, grad in flatten(grads).items():
        layers = grad if path.startswith("blocks/") else [grad]
        zero |= {(path, i) for i, layer in enumerate(layers) if not np.any(layer)}
    expected = set()
    if variant == "no_cotrain":
        # The video expert is trained only through the keys and values of its first frame.
        assert metrics["loss_video"] == 0
        last = tiny.LAYERS - 1
        for path in flatten(params):
            unused = ("self_attn/q", "self_attn/o", "cross_attn", "cross_norm", "ffn")
            if any(path.startswith(f"blocks/video/{name}") for name in unused):
                expected.add((path, last))
            if path.startswith("video/head"):
                expected.add((path, 0))
        # Rows: only shift and scale of the last layer's attention reach its keys and values.
        rows = np.abs(grads["blocks"]["video"]["modulation"]).sum(axis=-1) > 0
        np.testing.assert_array_equal(rows[last], [1, 1, 0, 0, 0, 0])
        assert rows[:last].all()
    assert zero == expected


def test_init_gives_the_same_tree_for_all_variants_and_zero_heads():
    trees = {v: jax.eval_shape(tiny.fast_wam(v).init, KEY) for v in tiny.VARIANTS}
    tokens = trees["ladder"]["video"].pop("anticipation")
    assert tokens.shape == ((tiny.FRAMES - 1) * 4, 14)  # four per frame, as wide as the expert
    assert all(t == trees["fast"] for t in trees.values())
    zero = {"video/head/kernel", "action/head/kernel", "blocks/video/ffn/in/bias"}
    drawn = {"action/encoder/kernel", "blocks/action/modulation", "video/head_table"}

    @jax.jit  # only the returned part of the tree is compiled
    def some(key):
        leaves = flatten(tiny.fast_wam("idm").init(key))
        return {path: leaves[path] for path in zero | drawn}

    for path, leaf in some(KEY).items():
        assert np.all(leaf == 0) if path in zero else np.std(leaf) > 0.01, path


def test_loss_is_the_weighted_sum_of_means_over_the_examples_that_have_it():
    class Fixed(tiny.FastWAM):
        def denoising_loss(self, params, draw):
            errors = {"future": [1.0, 2, 3, 6], "action": [5.0, 0, 7, 0]}
            return {
                g: SlotLosses(jnp.broadcast_to(jnp.array(x)[:, None], draw.mask[g].shape),
                              draw.mask[g], jnp.zeros(draw.mask[g].shape))
                for g, x in errors.items()
            }  # fmt: skip

    objective = Fixed(**vars(tiny.fast_wam("fast", video_weight=0.25, action_weight=10.0)))
    batch = tiny.batch()
    batch["action_valid"] = np.array([[0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 0, 0]], bool)
    value, metrics = jax.jit(objective.loss)({}, batch, KEY)
    assert (metrics["loss_video"], metrics["loss_action"]) == (3, 6)
    assert value == 0.25 * 3 + 10 * 6


def test_a_codec_with_parameters_encodes_inside():
    """Draw, loss and actions are the same as with precomputed latents."""
    inside = tiny.fast_wam("fast", codec=CODEC, steps=1)
    ahead = tiny.fast_wam("fast", codec=codecs.CachedLatents(12, 2, 1), steps=1)
    params = random_params(jax.eval_shape(inside.init, KEY))
    rest = {k: v for k, v in params.items() if k != "codec"}
    batch, identity = tiny.batch(), Normalizer(0.0, 1.0, 1.0)
    scales = {"actions": identity, "proprio": identity}

    def run(objective, params, batch):
        now = batch | {k: batch[k][:, :1] for k in ("video", "latents")}
        loss, draw = objective.loss(params, batch, KEY)[0], objective.draw(params, batch, KEY)
        return draw, loss, objective.policy(params, scales, now, KEY)

    @jax.jit
    def both(params, rest, batch):
        latents = CODEC.bind(params["codec"]).encode(batch["video"])
        batch = batch | {"latents": latents}
        return run(inside, params, batch), run(ahead, rest, batch)

    got, want = jax.device_get(both(params, rest, batch))
    assert_trees_close(got, want, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)  # the loss
    assert np.std(got[0][0].clean["future"]) > 0.1 and np.std(got[2]) > 0.1
    imagined = tiny.fast_wam("idm", codec=CODEC).imagine
    shown = jax.eval_shape(imagined, params, scales, batch | {"video": batch["video"][:, :1]}, KEY)
    assert shown.shape == batch["video"].shape and shown.dtype == jnp.uint8


def test_action_free_examples_contribute_nothing_to_the_action_loss():
    variant = "optional_idm"  # both ways to train actions at once

    def labelled(*examples, batch):
        valid = tiny.put(np.zeros((4, tiny.CHUNK), bool), list(examples), True)
        return loss(variant, batch | {"action_valid": valid})[1]

    batch = tiny.batch()
    one, two = labelled(1, batch=batch), labelled(3, batch=batch)
    both = labelled(1, 3, batch=batch)
    np.testing.assert_allclose(
        both["loss_action"], (one["loss_action"] + two["loss_action"]) / 2, rtol=1e-5
    )
    assert one["loss_action"] > 0 and abs(one["loss_action"] - two["loss_action"]) > 1e-3
    # The actions of unlabelled rows have no effect; their video is still learned from.
    others = np.array([0, 2])
    noisy = batch | {"actions": tiny.put(batch["actions"], others, batch["actions"][others] + 5)}
    assert_trees_close(labelled(1, 3, batch=noisy), both, rtol=1e-6)
    darker = batch | {"video": tiny.put(batch["video"], np.s_[::2, 1:], 0)}
    changed = labelled(1, 3, batch=darker)
    np.testing.assert_allclose(changed["loss_action"], both["loss_action"], rtol=1e-6)
    assert abs(changed["loss_video"] - both["loss_video"]) > 1e-3
    none = loss(variant, batch | {"action_valid": np.zeros((4, tiny.CHUNK), bool)})
    assert none[1]["loss_action"] == 0 and np.isfinite(none[0])


def test_padded_frames_and_steps_have_no_loss():
    """Without attention output tokens do not mix, so only the loss could see padding."""
    params = tiny.params("optional_idm")
    for expert in ("video", "action"):
        attention = params["blocks"][expert]["self_attn"]
        muted = attention | {"o": jax.tree.map(np.zeros_like, attention["o"])}
        blocks = params["blocks"] | {expert: params["blocks"][expert] | {"self_attn": muted}}
        params = params | {"blocks": blocks}
    batch = tiny.batch()
    batch["frame_valid"][:, 2] = False
    batch["action_valid"][:, 1:] = False
    base = loss("optional_idm", batch, params)[1]

    def with_changes(frame, step):
        video = tiny.put(batch["video"], np.s_[:, frame], 255 - batch["video"][:, frame])
        actions = tiny.put(batch["actions"], np.s_[:, step], batch["actions"][:, step] + 3)
        return loss("optional_idm", batch | {"video": video, "actions": actions}, params)[1]

    assert_trees_close(with_changes(frame=2, step=1), base, rtol=1e-6)
    seen = with_changes(frame=1, step=0)
    assert all(abs(seen[k] - base[k]) > 1e-3 for k in ("loss_video", "loss_action"))


def test_a_latent_frame_is_padding_only_if_all_its_source_frames_are():
    objective = tiny.fast_wam("fast")
    valid = np.ones((3, 9), bool)
    valid[1, 4:] = False  # frames 4 (one of the first latent's four) and later
    valid[2, 5:] = False
    batch = {"frame_valid": valid, "action_valid": None}
    got = objective._valid(batch)["future"]  # 8 frames for 2 latents, as with a video VAE
    np.testing.assert_array_equal(got, [[1, 1], [1, 0], [1, 0]])
    valid[1, 1:] = False
    np.testing.assert_array_equal(objective._valid(batch)["future"][1], [0, 0])


def velocities(net, params, values, levels, batch, table, predict):
    def call(method, *args, **kwargs):
        return net.apply({"params": params}, *args, method=method, **kwargs)

    contexts = call("conditions", batch).contexts
    times = call("times", levels)
    return call("__call__", values, times, contexts, table.restrict(values), predict=predict)[0]


def sample(names, size=4):
    """Computes latents and actions at their own levels; every group has its own random stream."""
    latents = np.asarray(tiny.CODEC.encode(tiny.batch(size)["video"]))
    rng = np.random.default_rng(9)
    values = {
        "first": latents[:, :1],
        "future": rng.standard_normal(latents[:, 1:].shape).astype(np.float32),
        "cond": latents[:, 1:],
        "action": rng.standard_normal((size, tiny.CHUNK, tiny.ACTION)).astype(np.float32),
    }
    values["cond_first"] = values["first"]
    slots = {"first": 1, "cond_first": 1, "future": 2, "cond": 2, "action": 1}
    draw = {g: rng.uniform(0.2, 0.9, (size, 1)) for g in ("future", "cond", "action")}
    levels = {
        g: np.broadcast_to(draw.get(g, np.zeros((size, 1))), (size, slots[g])) for g in slots
    }
    return {g: values[g] for g in names}, {g: levels[g].astype(jnp.float32) for g in names}


def test_actions_in_training_are_the_actions_without_the_future():
    """The paper claims that deleting future tokens changes nothing under Fast-WAM's table."""
    net, params, batch = tiny.network(), tiny.params("fast"), tiny.batch()

    @functools.partial(jax.jit, static_argnums=0)
    def action(names, params, inputs):
        return velocities(net, params, *inputs, batch, FAST, ("action",))["action"]

    full, alone = (
        np.asarray(action(names, params, sample(names)))
        for names in (("first", "future", "action"), ("first", "action"))
    )
    assert np.std(full) > 0.1
    np.testing.assert_allclose(full, alone, rtol=0, atol=2e-6)


def test_one_first_frame_serves_both_videos_of_imagine_then_act():
    """Our four groups equal the five of the published layout."""
    params, batch = tiny.params("idm"), tiny.batch()
    predict = ("future", "action")

    def run(names, table):
        net = tiny.network(names)
        forward = jax.jit(lambda p, inputs: velocities(net, p, *inputs, batch, table, predict))
        return jax.device_get(forward(params, sample(names)))

    out = run(tiny.ALL, IDM)
    want = run(("first", "future", "cond_first", "cond", "action"), IDM_PUBLISHED)
    assert all(np.std(x) > 0.1 for x in out.values())
    assert_trees_close(out, want, rtol=0, atol=5e-6)


def test_optional_idm_shares_are_exact_and_reported():
    objective = tiny.fast_wam("optional_idm", shares=(0.25, 0.75))
    sizes = []

    class Spy(type(objective)):
        def denoising_loss(self, params, draw):
            sizes.append((self.uses[len(sizes)].name, len(draw.at)))
            return super().denoising_loss(params, draw)

    spy = Spy(**vars(objective))
    metrics = jax.eval_shape(spy.loss, tiny.params("optional_idm"), tiny.batch(8), KEY)[1]
    assert sizes == [("teacher", 2), ("co_train", 6)]
    assert {"loss_action/teacher", "loss_action/co_train"} <= set(metrics)
    with pytest.raises(ValueError, match="optional_idm has 2 uses .* shares, not \\(1.0,\\)"):
        tiny.fast_wam("optional_idm", shares=(1.0,))


def test_conditioning_video_is_noised_as_often_as_asked_and_tells_its_level():
    batch = tiny.batch(400)
    video = np.asarray(tiny.CODEC.encode(batch["video"]))[:, 1:]

    @jax.jit
    def run(probability):
        seen = {}

        def network(values, levels, condition, table, predict):
            seen.update(value=values["cond"], level=levels["cond"])
            return {g: values[g] for g in predict}

        objective = tiny.fast_wam("idm", cond_noise_prob=probability)
        (draw,) = objective.draw({}, batch, jax.random.key(1))
        assert set(denoising_loss(network, draw, objective.process_of)) == {"future", "action"}
        return seen["value"], seen["level"]

    for probability in (0.0, 0.5, 1.0):
        got, level = map(np.asarray, run(probability))
        noised = np.any(np.asarray(got != video), axis=(1, 2, 3, 4))
        assert abs(noised.mean() - probability) < 0.1 and level.shape == (400, 2)
        np.testing.assert_array_equal(np.asarray(level > 0).all(axis=1), noised)
        np.testing.assert_array_equal(level[:, 0], level[:, 1])
    residual = np.asarray(got - (1 - level[:, 0, None, None, None, None]) * video)
    ratio = residual.std(axis=(1, 2, 3, 4)) / np.asarray(level[:, 0])
    assert abs(ratio.mean() - 1) < 0.02


def test_bad_batches_are_named():
    objective, params, batch = tiny.fast_wam("fast"), tiny.params("fast"), tiny.batch()
    with pytest.raises(KeyError, match="the batch has no 'proprio'"):
        objective.loss(params, {k: v for k, v in batch.items() if k != "proprio"}, KEY)
    with pytest.raises(KeyError, match="no 'action_valid'"):
        objective.loss(params, {k: v for k, v in batch.items() if k != "action_valid"}, KEY)
    with pytest.raises(ValueError, match=r"'actions'\] has shape \(4, 2, 2\), .* \(4, 3, 2\)"):
        objective.loss(params, batch | {"actions": batch["actions"][:, :2]}, KEY)
