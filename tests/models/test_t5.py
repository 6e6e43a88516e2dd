"""Tests the text encoders against transformers on random weights, and the effects of padding."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.helpers import precision, random_params

from wamjax import tree
from wamjax.models import t5
from wamjax.models.attention import masked
from wamjax.models.t5 import T5Encoder
from wamjax.models.transformer import unstack

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # threads do not pay at these sizes

# Heads x head_dim differs from the width, as in published sizes; length 24 uses every bucket.
SIZES = dict(
    vocabulary=50, width=32, ffn=48, layers=3, heads=5, head_dim=8, buckets=12, max_distance=20
)
TINY = {
    "t5": SIZES,
    "t5 v1.1": SIZES | dict(mlp="gated_gelu"),
    "umt5": SIZES | dict(mlp="gated_gelu", shared_bias=False),
}
PUBLISHED = dict(T5_11B=t5.T5_11B, T5_V1_1_XXL=t5.T5_V1_1_XXL, UMT5_XXL=t5.UMT5_XXL)
COUNTS = dict(T5_11B=4_864_791_552, T5_V1_1_XXL=4_762_310_656, UMT5_XXL=5_680_910_336)
LENGTH = 24
TOKENS = 24, 9, 1  # of each text
MASK = np.arange(LENGTH) < np.array(TOKENS)[:, None]
IDS = np.random.default_rng(1).integers(0, SIZES["vocabulary"], MASK.shape)


@functools.cache
def abstract(name):
    network = T5Encoder(**(TINY | PUBLISHED)[name])
    init = functools.partial(network.init, jax.random.key(0), IDS[:, :4], MASK[:, :4])
    return jax.eval_shape(init)["params"]


@functools.cache
def weights(name, dtype=np.float64):
    return random_params(abstract(name), 2, dtype)


@functools.cache
def compiled(name, changes=()):
    network = T5Encoder(**TINY[name] | dict(changes))
    return jax.jit(lambda params, ids, mask: network.apply({"params": params}, ids, mask))


def encode(name, params, ids=IDS, mask=MASK):
    return compiled(name)(params, ids, mask)


def oracle(sizes):
    """Returns a transformers encoder of the same sizes, in evaluation mode."""
    config, model = (
        (transformers.T5Config, transformers.T5EncoderModel)
        if sizes.get("shared_bias", True)
        else (transformers.UMT5Config, transformers.UMT5EncoderModel)
    )
    return model(
        config(
            vocab_size=sizes["vocabulary"], d_model=sizes["width"], d_ff=sizes["ffn"],
            num_layers=sizes["layers"], num_heads=sizes["heads"], d_kv=sizes["head_dim"],
            relative_attention_num_buckets=sizes.get("buckets", 32),
            relative_attention_max_distance=sizes.get("max_distance", 128),
            feed_forward_proj="gated-gelu" if "mlp" in sizes else "relu",
            attn_implementation="eager",
        )
    ).eval()  # fmt: skip


def published(params):
    """Returns our parameters, or their gradients, in the names and layout of transformers."""
    flat = tree.flatten(params)
    layers = len(flat["blocks/text/self_norm/scale"])
    gated = "blocks/text/ffn/gate/kernel" in flat
    inner = {
        "self_norm/scale": "layer.0.layer_norm",
        **{f"self_attn/{x}/kernel": f"layer.0.SelfAttention.{x}" for x in "qkvo"},
        "position_bias": "layer.0.SelfAttention.relative_attention_bias",
        "ffn_norm/scale": "layer.1.layer_norm",
        "ffn/gate/kernel": "layer.1.DenseReluDense.wi_0",
        "ffn/in/kernel": f"layer.1.DenseReluDense.{'wi_1' if gated else 'wi'}",
        "ffn/out/kernel": "layer.1.DenseReluDense.wo",
    }
    outer = {
        "embedding": "shared",
        "position_bias": f"encoder.block.0.{inner['position_bias']}",
        "final_norm/scale": "encoder.final_layer_norm",
    }
    names = {}
    for path, value in flat.items():
        if path in outer:
            names[f"{outer[path]}.weight"] = value
            continue
        theirs = inner[path.removeprefix("blocks/text/")]
        for i in range(layers):
            x = value[i].T if path.endswith("kernel") else value[i]
            names[f"encoder.block.{i}.{theirs}.weight"] = x
    return names


@contextlib.contextmanager
def exact(double):
    """Removes the casts to float32 in norms of transformers, for a float64 reference."""
    to = torch.Tensor.to
    if double:
        torch.Tensor.to = lambda x, *a, **k: to(
            x, *[torch.float64 if y is torch.float32 else y for y in a], **k
        )
    try:
        yield
    finally:
        torch.Tensor.to = to


@functools.cache
def theirs(name, double, padded, gradients=False):
    """Returns the output, or the gradients of its weighted sum over tokens."""
    dtype = torch.float64 if double else torch.float32
    model = oracle(TINY[name]).to(dtype)
    state = {k: torch.tensor(v) for k, v in published(weights(name)).items()}
    model.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]})
    mask = torch.as_tensor(MASK if padded else np.ones_like(MASK))
    with exact(double):
        y = model(torch.as_tensor(IDS), mask.long()).last_hidden_state
        if not gradients:
            return y.detach().numpy()
        (y * mask[..., None] * torch.as_tensor(weigh(y), dtype=dtype)).sum().backward()
    return {k: p.grad.numpy() for k, p in model.named_parameters()}


def weigh(y):
    return np.random.default_rng(3).standard_normal(y.shape)


def relative(got, want):
    assert got.shape == want.shape
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_parameters_of_transformers(name):
    params = abstract(name)
    assert tree.count(params) == COUNTS[name]
    with torch.device("meta"):
        want = {k: tuple(p.shape) for k, p in oracle(PUBLISHED[name]).named_parameters()}
    got = jax.eval_shape(published, params)
    assert {k: p.shape for k, p in got.items()} == want


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("name", TINY)
def test_encodings_equal_transformers(name, double, padded):
    """Also in rows of padding, which attend the same tokens."""
    dtype = np.float64 if double else np.float32
    mask = MASK if padded else np.ones_like(MASK)
    with precision(double):
        got = encode(name, weights(name, dtype), mask=mask)
    want = theirs(name, double, padded)
    assert got.dtype == want.dtype == dtype and np.std(want) > 0.3
    assert relative(got, want) < (1e-10 if double else 5e-6)
    if not double:
        assert np.abs(got - want).max() < 3e-5 * np.sqrt(np.mean(want**2))


@pytest.mark.parametrize(
    "name, double", [("t5", True), ("t5 v1.1", True), ("umt5", True), ("umt5", False)]
)
def test_gradients_equal_transformers(name, double):
    network = T5Encoder(**TINY[name])

    def loss(params):
        y = network.apply({"params": params}, IDS, MASK)
        return jnp.sum(y * MASK[..., None] * weigh(y).astype(y.dtype))

    with precision(double):
        got = jax.jit(jax.grad(loss))(weights(name, np.float64 if double else np.float32))
        got = {k: np.asarray(v) for k, v in published(got).items()}
    want = theirs(name, double, True, gradients=True)
    assert got.keys() == want.keys()
    for path, gradient in want.items():
        assert np.linalg.norm(gradient) > 1e-3, path
        assert relative(got[path], gradient) < (1e-9 if double else 2.5e-5), path


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_stays_near_and_stays_bfloat16(name):
    got = encode(name, weights(name, jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    assert relative(got, theirs(name, True, True)) < 4e-2


@pytest.mark.parametrize("buckets, distance", [(32, 128), (12, 20), (8, 20), (10, 100), (32, 300)])
def test_buckets_equal_transformers_and_whole_number_arithmetic(buckets, distance):
    length = 700
    got = t5.position_buckets(length, buckets, distance)
    offset = np.arange(length)[None] - np.arange(length)[:, None]
    attention = transformers.models.t5.modeling_t5.T5Attention
    want = attention._relative_position_bucket(
        torch.as_tensor(offset), num_buckets=buckets, max_distance=distance
    )
    np.testing.assert_array_equal(got, want)

    # Bucket `single + i` begins at the first d with d / single >= (distance / single)^(i / rest).
    half = buckets // 2
    single, rest = half // 2, half - half // 2
    for d in range(length):
        i = sum(d**rest * single**i >= distance**i * single**rest for i in range(1, rest))
        bucket = d if d < single else single + i
        assert got[d, 0] == bucket  # the key comes before the query
        assert got[0, d] == bucket + half * (d > 0)
    assert set(got.flat) == set(range(buckets)) - {half}  # half: a later key at distance 0


@pytest.mark.parametrize("name", TINY)
def test_padding_changes_no_token(name):
    """Neither its amount nor its ids matter; dropping a token does."""
    with precision(True):
        params = weights(name)
        want = np.asarray(encode(name, params))
        # The first text fills its row; the others are the same with any number of columns.
        shorter = np.asarray(encode(name, params, IDS[1:, :9], MASK[1:, :9]))
        np.testing.assert_allclose(shorter[MASK[1:, :9]], want[1:][MASK[1:]], atol=1e-12)
        other = np.where(MASK, IDS, (IDS + 7) % SIZES["vocabulary"])
        np.testing.assert_allclose(
            np.asarray(encode(name, params, other))[MASK], want[MASK], atol=1e-12
        )
        fewer = encode(name, params, mask=MASK & (np.arange(LENGTH) != 5))
        assert np.abs(fewer - want)[1, :5].max() > 1e-3


@pytest.mark.parametrize(
    "name, changes", [("t5", dict(attention=masked, remat="full")), ("umt5", dict(unroll=0))]
)
def test_the_choices_of_the_transformer_change_nothing(name, changes):
    with precision(True):
        want, params = encode(name, weights(name)), weights(name)
        if "unroll" in changes:
            params = unstack(params, SIZES["layers"])
        got = compiled(name, tuple(changes.items()))(params, IDS, MASK)
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_a_context_is_tokens_then_zeros():
    network, params = T5Encoder(**TINY["umt5"]), weights("umt5", np.float32)
    y = encode("umt5", params)
    embed = jax.jit(t5.embed, static_argnums=(1, 4, 5))
    context = embed(params, network, IDS, MASK)
    assert context.dtype == np.float32
    np.testing.assert_array_equal(context, np.where(MASK[..., None], y, 0))
    longer = embed(params, network, IDS, MASK, jnp.bfloat16, 30)
    assert longer.dtype == jnp.bfloat16 and longer.shape == (3, 30, SIZES["width"])
    np.testing.assert_array_equal(longer[:, :LENGTH], context.astype(jnp.bfloat16))
    assert not longer[:, LENGTH:].any()
    with pytest.raises(ValueError, match="24 token ids do not fit a context of length 20"):
        embed(params, network, IDS, MASK, None, 20)


def test_pooling_is_the_mean_over_tokens():
    context = np.random.default_rng(0).standard_normal((3, LENGTH, 4)).astype(np.float32)
    got = t5.pool(context, MASK)
    want = [row[:tokens].mean(0) for row, tokens in zip(context, TOKENS, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    ones = jnp.ones((1, 257, 2), jnp.bfloat16)  # bfloat16 has no 257: it would be 256 / 257
    np.testing.assert_array_equal(t5.pool(ones, np.ones((1, 257))), jnp.ones((1, 2)))


def test_a_text_without_tokens_is_zero_and_harms_no_gradient():
    network, params = T5Encoder(**TINY["t5"]), weights("t5", np.float32)
    empty = MASK & (np.arange(3) != 1)[:, None]

    @jax.jit
    def pooled(params, mask):
        return t5.pool(t5.embed(params, network, IDS, mask), mask)

    @jax.jit
    @jax.grad
    def gradients(params):
        return jnp.sum(pooled(params, empty) ** 2)

    got, whole = pooled(params, empty), pooled(params, MASK)
    assert not got[1].any()
    np.testing.assert_array_equal(got[::2], whole[::2])
    assert all(np.isfinite(g).all() and g.any() for g in jax.tree.leaves(gradients(params)))


def test_an_id_outside_the_vocabulary_is_detected():
    ids = IDS.copy()
    ids[1, 3] = SIZES["vocabulary"]
    y = encode("t5", weights("t5", np.float32), ids)
    assert np.isnan(y[1]).any() and np.isfinite(y[::2]).all()
