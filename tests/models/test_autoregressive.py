"""Tests the decoder-only transformer: equal to GPT-2, causal, and the same token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.helpers import precision, random_params

from wamjax.models import blocks
from wamjax.models.attention import masked
from wamjax.models.autoregressive import CAUSAL, STEP, AutoregressiveTransformer
from wamjax.models.blocks import ExpertSpec
from wamjax.models.transformer import Cache

B, CODES, GRID = 2, 11, (3, 2, 2)
LENGTH = int(np.prod(GRID))


def network(positions="rope", **options):
    choices = blocks.GPT | options.pop("choices", {})
    spec = ExpertSpec("video", 24, 40, **choices)
    return AutoregressiveTransformer(
        spec, CODES, GRID, layers=2, heads=2, head_dim=12, positions=positions, **options
    )


def condition_of(net, seed=3):
    rng = np.random.default_rng(seed)
    out = {"label": jnp.asarray(rng.integers(0, net.classes, B))} if net.classes else {}
    if net.vocabulary:
        size = B, net.instruction_length
        out["instruction"] = jnp.asarray(rng.integers(0, net.vocabulary, size))
    return out


def ids_of(seed=0, length=LENGTH):
    return jnp.asarray(np.random.default_rng(seed).integers(0, CODES, (B, length)))


def parameters(net, dtype=np.float64):
    abstract = jax.eval_shape(
        lambda: net.init(jax.random.key(0), condition_of(net), ids_of(), method="initialise")
    )
    return random_params(abstract["params"], 1, dtype)


def bound(net, params):
    return lambda method, *args, **kw: net.apply({"params": params}, *args, method=method, **kw)


@functools.partial(jax.jit, static_argnums=0)
def all_logits(net, params, ids, condition):
    call = bound(net, params)
    prefix = call("prefix", condition, B)
    tokens, _ = call("__call__", prefix, ids[:, :-1])
    return call("logits", tokens[:, prefix.shape[1] - 1 :])


def gpt2(net, params, double):
    """transformers' GPT-2 with the same weights; the start token is an id of its own."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    width = net.spec.width
    config = transformers.GPT2Config(
        vocab_size=CODES + 1,
        n_positions=LENGTH,
        n_embd=width,
        n_layer=net.layers,
        n_head=net.heads,
        n_inner=net.spec.ffn,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-6,
        tie_word_embeddings=False,
        bos_token_id=CODES,
        eos_token_id=CODES,
        attn_implementation="eager",
    )
    model = transformers.GPT2LMHeadModel(config)

    def tensor(x):
        return torch.tensor(np.asarray(x))

    blocks_ = jax.tree.map(np.asarray, params["blocks"]["video"])
    codes, start = (params[n]["embedding"] for n in ("code_embed", "start"))
    # GPT-2 also adds a position to the start token; here the first token of the clip has row 0.
    places = np.concatenate([np.zeros((1, width)), params["places"]["embedding"]])[:LENGTH]
    state = {"transformer.wte.weight": np.concatenate([codes, start]),
             "transformer.wpe.weight": places,
             "transformer.ln_f.weight": params["head_norm"]["scale"],
             "transformer.ln_f.bias": params["head_norm"]["bias"]}  # fmt: skip
    head = np.concatenate([params["head"]["kernel"], np.zeros((width, 1))], axis=1)
    assert not np.any(params["head"]["bias"])  # GPT-2 has none
    state["lm_head.weight"] = head.T
    for i in range(net.layers):
        layer = jax.tree.map(lambda x, i=i: x[i], blocks_)
        attn, name = layer["self_attn"], f"transformer.h.{i}."
        for part in ("kernel", "bias"):
            there = "weight" if part == "kernel" else "bias"
            joined = np.concatenate([attn[n][part] for n in "qkv"], axis=-1)
            state[f"{name}attn.c_attn.{there}"] = joined
            state[f"{name}attn.c_proj.{there}"] = attn["o"][part]
            state[f"{name}mlp.c_fc.{there}"] = layer["ffn"]["in"][part]
            state[f"{name}mlp.c_proj.{there}"] = layer["ffn"]["out"][part]
        for here, there in (("self_norm", "ln_1"), ("ffn_norm", "ln_2")):
            state[f"{name}{there}.weight"] = layer[here]["scale"]
            state[f"{name}{there}.bias"] = layer[here]["bias"]
    model = model.double() if double else model
    model.load_state_dict({k: tensor(v) for k, v in state.items()}, strict=True)

    def logits(ids):
        started = np.concatenate([np.full((B, 1), CODES), ids[:, :-1]], axis=1)
        with torch.no_grad():
            return model.eval()(torch.tensor(started)).logits[..., :CODES].numpy()

    return logits


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
def test_logits_equal_those_of_gpt2(double):
    with precision(double):
        net = network("learned", choices=dict(qk_norm="none"))
        params = parameters(net, np.float64 if double else np.float32)
        params["head"]["bias"] = np.zeros_like(params["head"]["bias"])
        ids = ids_of()
        want = gpt2(net, params, double)(np.asarray(ids))
        got = np.asarray(all_logits(net, params, ids, condition_of(net)))
    error = np.abs(got - want)
    assert got.dtype == want.dtype and np.std(want) > 0.1
    relative = np.linalg.norm(error) / np.linalg.norm(want)
    assert relative < (1e-12 if double else 2e-6), relative
    assert error.max() < (1e-11 if double else 1e-5) * np.sqrt(np.mean(want**2))


CASES = {
    "rope": {},
    "learned": dict(positions="learned"),
    "all": dict(classes=3, vocabulary=7, instruction_length=4),
}


@pytest.mark.parametrize("case", ["rope", "learned", "all"])
def test_a_token_sees_what_comes_before_it_and_the_prefix(case):
    with precision(True):
        net = network(**CASES[case])
        params, ids = parameters(net), ids_of()
        want = all_logits(net, params, ids, condition_of(net))
        for i in (0, 1, 6, LENGTH - 1):
            other = ids.at[:, i].set((ids[:, i] + 1) % CODES)
            change = np.abs(all_logits(net, params, other, condition_of(net)) - want).max(
                axis=(0, 2)
            )
            assert np.all(change[: i + 1] == 0) and np.all(change[i + 1 :] > 1e-6), i
        for key in condition_of(net):
            other = condition_of(net, 4)[key]
            changed = all_logits(net, params, ids, condition_of(net) | {key: other})
            assert np.all(np.abs(changed - want).max(axis=(0, 2)) > 1e-6), key
        whole = all_logits(net.clone(attention=masked), params, ids, condition_of(net))
        np.testing.assert_allclose(whole, want, atol=1e-12)


@pytest.mark.parametrize("case", ["rope", "learned", "all"])
def test_decoding_from_a_buffer_equals_one_causal_pass(case):
    known = 5

    @functools.partial(jax.jit, static_argnums=0)
    def decode(net, params, ids, condition):
        call = bound(net, params)
        prefix = call("prefix", condition, B)
        before, room = prefix.shape[1], prefix.shape[1] + LENGTH
        tokens, cache = call("__call__", prefix, ids[:, :known], emit=("prefix", "video"))
        parts = cache.tokens["prefix"], cache.tokens["video"]
        buffers = jax.tree.map(
            lambda a, b: jnp.zeros((*a.shape[:3], room, a.shape[4]))
            .at[..., : before + known, :].set(jnp.concatenate([a, b], axis=3)), *parts
        )  # fmt: skip

        def step(buffers, i):
            valid = {"past": jnp.arange(room)[None] < before + i}
            token = jax.lax.dynamic_slice_in_dim(ids, i, 1, axis=1)
            cache = Cache({"past": buffers}, {})
            tokens, new = call("__call__", None, token, i, STEP, cache, ("now",), valid)
            buffers = jax.tree.map(
                lambda x, y: x.at[..., before + i, :].set(y[..., 0, :]), buffers, new.tokens["now"]
            )
            return buffers, call("logits", tokens)[:, 0]

        rest = jax.lax.scan(step, buffers, jnp.arange(known, LENGTH - 1))[1]
        return call("logits", tokens)[:, -1], jnp.moveaxis(rest, 0, 1)

    with precision(True):
        net = network(**CASES[case])
        params, ids = parameters(net), ids_of()
        want = all_logits(net, params, ids, condition_of(net))
        first, rest = decode(net, params, ids, condition_of(net))
        np.testing.assert_allclose(first, want[:, known], atol=1e-12)
        np.testing.assert_allclose(rest, want[:, known + 1 :], atol=1e-12)


def test_rope_ignores_a_shift_by_a_frame_but_not_by_a_cell():
    """Without a prefix, the same tokens one frame later give the same result."""
    with precision(True):
        net = network()
        params, ids = parameters(net), ids_of(length=4)
        see = CAUSAL.restrict({"video"})

        @jax.jit
        def run(params):  # 4: a frame later; 1: over a row's end
            call = bound(net, params)
            return [call("__call__", None, ids, start, see)[0] for start in (0, 4, 1)]

        a, b, c = run(params)
        np.testing.assert_allclose(a, b, atol=1e-12)
        assert np.abs(a - c).max() > 1e-3


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="positions 'sincos' is not one of"):
        parameters(network("sincos"))
    net = network()
    params = parameters(net)
    with pytest.raises(ValueError, match="tokens 8 to 12 do not fit a clip of 12"):
        bound(net, params)("__call__", None, ids_of(length=5), 8, CAUSAL.restrict({"video"}))
