"""Tests the enumerated choices of a block: each has its effect, and combinations run."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from models.helpers import precision, random_params

from wamjax.models import blocks
from wamjax.models.attention import masked
from wamjax.models.blocks import ExpertSpec, Stream
from wamjax.models.layers import MLPS
from wamjax.models.rope import rope
from wamjax.models.transformer import Cache, Transformer, join, unstack
from wamjax.models.visibility import bidirectional, table

B, L, D, HEADS, K = 2, 6, 8, 2, 4
PUBLISHED = {
    "wan": blocks.WAN, "dit": blocks.DIT, "cosmos": blocks.COSMOS, "gpt": blocks.GPT,
    "t5": blocks.T5, "umt5": blocks.T5 | dict(mlp="gated_gelu", position_bias=5),
    "adaln": blocks.DIT | dict(gates=False),
    "text": dict(modulation="linear", cross="modulated", qk_norm="head"),
    "cross": dict(modulation="none", cross="plain", qk_norm="none"),
}  # fmt: skip


def stream(spec, rng, slots=2):
    modulation = {
        "table": rng.standard_normal((B, slots, 6, D)),
        "linear": rng.standard_normal((B, slots, D)),
        "lora": (rng.standard_normal((B, slots, D)), rng.standard_normal((B, slots, 3, D))),
        "none": None,
    }[spec.modulation]
    bias = None
    if spec.position_bias:
        bias = rng.integers(0, spec.position_bias, (L, L))
    return Stream(
        rng.standard_normal((B, L, D)), modulation, rope([np.arange(L)], [K]), (("x", L),), bias
    )


def arguments(spec, seed=0):
    rng = np.random.default_rng(seed)
    x = {spec.name: stream(spec, rng)}
    text = {} if spec.cross == "none" else {spec.name: rng.standard_normal((B, 3, D))}
    return x, text


def drawn(net, spec):
    see = bidirectional("x")
    init = functools.partial(net.init, visibility=see)
    abstract = jax.eval_shape(lambda: init(jax.random.key(0), *arguments(spec)))["params"]
    return random_params(abstract, 1, np.float64)


def program(net):
    """Returns (params, the parts of the stream, contexts) -> tokens, as one compiled program."""

    @functools.partial(jax.jit, static_argnums=1)
    def run(params, groups, x, text):
        x = {name: dataclasses.replace(s, groups=groups) for name, s in x.items()}
        (y,) = net.apply({"params": params}, x, text, bidirectional("x"))[0].values()
        return y

    return lambda params, x, text: run(params, (("x", L),), x, text)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_block_runs_scanned_unstacked_and_masked(name):
    spec = ExpertSpec("e", D, 12, lora_rank=3, **PUBLISHED[name])
    net = Transformer((spec,), 2, HEADS, K)
    with precision(True):
        params, run = drawn(net, spec), program(net)
        want = run(params, *arguments(spec))
        assert np.std(want) > 0
        loose = program(net.clone(unroll=0, attention=masked))
        got = loose(unstack(params, 2), *arguments(spec))
        np.testing.assert_allclose(got, want, atol=1e-12)
        other = run(params, *arguments(spec, seed=5))
        assert np.std(other - want) > 1e-3


def test_every_choice_changes_the_result_or_the_parameters():
    base = ExpertSpec("e", D, 12, modulation="linear", lora_rank=3)
    changes = dict(
        modulation="none", gates=False, cross="none", qk_norm="none", rotary="half", mlp="relu",
        bias=False, scaled=False,
    )  # fmt: skip
    with precision(True):
        net = Transformer((base,), 1, HEADS, K)
        params = drawn(net, base)
        want = program(net)(params, *arguments(base))
        for key, value in changes.items():
            spec = dataclasses.replace(base, **{key: value})
            net = Transformer((spec,), 1, HEADS, K)
            other = drawn(net, spec)
            if jax.tree.structure(params) == jax.tree.structure(other):
                got = program(net)(other, *arguments(spec))
                assert np.std(got - want) > 1e-3, key


def test_zero_gates_make_a_block_the_identity():
    """Checks adaLN-Zero at initialisation (DiT, section 3.2)."""
    spec = ExpertSpec("e", D, 12, **blocks.DIT)
    net = Transformer((spec,), layers=2, heads=HEADS, head_dim=K)
    x = {"e": stream(spec, np.random.default_rng(0))}

    @jax.jit
    def fresh(key):
        return net.init_with_output(key, x, {}, bidirectional("x"))[0][0]["e"]

    y = fresh(jax.random.key(0))
    np.testing.assert_array_equal(y, x["e"].x.astype(np.float32))


def test_an_expert_that_ends_early_still_feeds_the_last_block():
    specs = tuple(ExpertSpec(n, D, 12, **blocks.MMDIT) for n in ("image", "text"))
    see = bidirectional("image", "text")
    rng = np.random.default_rng(0)
    x = {
        s.name: dataclasses.replace(stream(s, rng), groups=((s.name, L),), rope=None) for s in specs
    }
    nets = [Transformer(specs, 3, HEADS, K, ends=e) for e in ((), ("text",))]
    with precision(True):
        params = [
            random_params(
                jax.eval_shape(lambda n=n: n.init(jax.random.key(0), x, {}, see))["params"],
                1, np.float64,
            )
            for n in nets
        ]  # fmt: skip
        last = params[1]["final_block"]["text"]
        assert set(last) == {"self_attn", "modulation"} and set(last["self_attn"]) == set("qkv")
        # With the same weights in the full stack, the image must be the same.
        full = params[0]
        cut = jax.tree.map(lambda p: p[:2], full["blocks"])
        text = jax.tree.map(lambda p: p[2], full["blocks"])["text"]
        modulation = jax.tree.map(lambda p: p[..., : 2 * D], text["modulation"])
        attention = {n: text["self_attn"][n] for n in "qkv"}
        image = jax.tree.map(lambda p: p[2], full["blocks"])["image"]
        final = {"image": image, "text": {"self_attn": attention, "modulation": modulation}}
        params = {"blocks": cut, "final_block": final}

        @functools.partial(jax.jit, static_argnums=0)
        def run(net, params):
            return net.apply({"params": params}, x, {}, see)[0]

        want, got = run(nets[0], full), run(nets[1], params)
        assert set(got) == {"image"}
        np.testing.assert_allclose(got["image"], want["image"], atol=1e-12)
        got = run(nets[1].clone(unroll=0), unstack(params, 2))
        np.testing.assert_allclose(got["image"], want["image"], atol=1e-12)


def test_token_by_token_decoding_with_a_buffer_equals_one_causal_pass():
    """Decodes like an autoregressive model, with a preallocated cache of which `valid` marks the
    filled part."""
    spec = ExpertSpec("e", D, 12, **blocks.GPT)
    net = Transformer((spec,), layers=2, heads=HEADS, head_dim=K)
    see = table("decode", {"past": "past", "now": "past now"}, causal=("now",))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, L, D))
    angles = rope([np.arange(L)], [K])

    def tokens(i, j):
        cut = tuple(a[i:j] for a in angles)
        return {"e": Stream(x[:, i:j], None, cut, (("now", j - i),))}

    with precision(True):
        abstract = jax.eval_shape(lambda: net.init(jax.random.key(0), tokens(0, L), {}, see))
        params = random_params(abstract["params"], 1, np.float64)
        whole = tokens(0, L)
        want = jax.jit(lambda p: net.apply({"params": p}, whole, {}, see)[0]["e"])(params)
        step = jax.jit(lambda p, x, cache, valid: net.apply(
            {"params": p}, x, {}, see, cache, ("now",), valid
        ))  # fmt: skip
        room = np.zeros((2, 2, B, HEADS, L + 2, K))  # keys and values
        for i in range(L):
            cache = Cache({"past": tuple(room)}, {})
            valid = {"past": np.arange(L + 2)[None] < i}
            y, new = step(params, tokens(i, i + 1), cache, valid)
            np.testing.assert_allclose(y["e"][:, 0], want[:, i], atol=1e-12)
            room[..., i : i + 1, :] = new.tokens["now"]


def test_an_unknown_choice_names_the_expert_and_the_known_ones():
    for key in blocks.CHOICES:
        with pytest.raises(ValueError, match=f"'e': {key} 'nope' is not one of"):
            ExpertSpec("e", D, 12, **{key: "nope"})
    with pytest.raises(ValueError, match="needs a modulation"):
        ExpertSpec("e", D, 12, modulation="none", cross="modulated")


def test_gated_and_plain_mlps_equal_their_formula():
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    for name, activation in dict(gelu_tanh=lambda x: jax.nn.gelu(x, approximate=True),
                                 gelu=lambda x: jax.nn.gelu(x, approximate=False),
                                 relu=jax.nn.relu, gated_gelu=lambda x: jax.nn.gelu(x),
                                 gated_silu=jax.nn.silu).items():  # fmt: skip
        net = MLPS[name](5, 4)
        abstract = jax.eval_shape(net.init, jax.random.key(0), x)["params"]

        gated = name.startswith("gated")

        @jax.jit
        def both(params, net=net, gated=gated, activation=activation):
            apply = {n: (lambda y, p=p: y @ p["kernel"] + p["bias"]) for n, p in params.items()}
            hidden = apply["in"](x)
            hidden = activation(apply["gate"](x)) * hidden if gated else activation(hidden)
            return net.apply({"params": params}, x), apply["out"](hidden)

        got, want = both(random_params(abstract))
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


def test_heads_that_are_moved_as_tiles_are_the_same_heads(monkeypatch):
    x = np.random.default_rng(0).normal(size=(2, 24, 3 * 128))
    apart = [blocks.heads_first(x[:, :n], 3) for n in (24, 20)]
    monkeypatch.setattr(blocks, "on_tpu", lambda: True)
    for n, want in zip((24, 20), apart, strict=True):  # 20 tokens do not fill whole tiles
        got = blocks.heads_first(x[:, :n], 3)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(blocks.heads_last(got), x[:, :n].astype(got.dtype))


@pytest.mark.parametrize("choices", [blocks.WAN, blocks.COSMOS | dict(bias=False)])
def test_queries_keys_and_values_joined_are_the_same(choices):
    spec = ExpertSpec("e", D, 12, lora_rank=3, **choices)
    net = Transformer((spec,), 2, HEADS, K, unroll=0)
    with precision(True):
        params = unstack(drawn(net.clone(unroll=1), spec), 2)
        one = join(params, ("e",))
        assert {"qkv", "o"} <= set(one["blocks_1"]["e"]["self_attn"])
        assert not {"q", "k", "v"} & set(one["blocks_1"]["e"]["self_attn"])
        want, got = (program(net)(p, *arguments(spec)) for p in (params, one))
        np.testing.assert_allclose(got, want, atol=1e-12)
        again = join(one, ("e",))
    assert jax.tree.structure(again) == jax.tree.structure(one)
    assert jax.tree.structure(join(params, ("other",))) == jax.tree.structure(params)
    attention = params["blocks_0"]["e"]["self_attn"]
    part = {"blocks_0": {"e": {"self_attn": {"k": attention["k"]}}}}
    assert join(part, ("e",)) == part  # a loader has one array at a time
    adapted = attention | {"q": attention["q"] | {"lora_up": 0, "lora_down": 0}}
    assert blocks.join(adapted) is adapted
