"""Tests the transformer over random tables: the derived cache, loops over layers, remat,
reachability."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.helpers import assert_trees_close, precision, random_params, random_table

from wamjax import flops
from wamjax.models import attention
from wamjax.models.blocks import ExpertSpec, Stream
from wamjax.models.rope import rope
from wamjax.models.transformer import Cache, Transformer, unstack
from wamjax.models.visibility import cacheable, causal, table

EXPERTS = (ExpertSpec("left", 8, 12), ExpertSpec("right", 6, 10))
OWNER = {"g0": "left", "g1": "right", "g2": "left", "g3": "right"}
SLOTS = {"g0": 1, "g1": 2, "g2": 2, "g3": 1}  # slots per group, of two tokens each
LAYERS = 2
NET = Transformer(EXPERTS, LAYERS, heads=2, head_dim=4)
SIZES = {e.name: e.width for e in EXPERTS}


def inputs(seed=0, dtype=np.float32):
    """Returns group -> (tokens, modulation), expert -> context; modulation is per example."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    groups = {
        g: (draw(2, 2 * SLOTS[g], SIZES[OWNER[g]]), draw(2, SLOTS[g], 6, SIZES[OWNER[g]]))
        for g in OWNER
    }
    return groups, {e: draw(2, 3, w) for e, w in SIZES.items()}


def streams(groups):
    out = {}
    for expert in SIZES:
        names = [g for g in groups if OWNER[g] == expert]
        if names:
            start = {g: 10 * int(g[1]) for g in names}
            positions = np.concatenate([np.arange(2 * SLOTS[g]) + start[g] for g in names])
            out[expert] = Stream(
                x=jnp.concatenate([groups[g][0] for g in names], axis=1),
                modulation=jnp.concatenate([groups[g][1] for g in names], axis=1),
                rope=rope([positions], [4]),
                groups=tuple((g, 2 * SLOTS[g]) for g in names),
            )
    return out


def by_group(tokens, groups):
    out = {}
    for expert, stream in streams(groups).items():
        start = 0
        for g, length in stream.groups:
            out[g] = tokens[expert][:, start : start + length]
            start += length
    return out


def forward(net, params, groups, contexts, visibility, cache=None, emit=None):
    tokens, cache = net.apply(
        {"params": params}, streams(groups), contexts, visibility, cache, emit
    )
    return by_group(tokens, groups), cache


@functools.cache
def parameters(dtype=np.float32):
    groups, contexts = inputs()
    init = functools.partial(NET.init, visibility=causal(*OWNER))
    abstract = jax.eval_shape(init, jax.random.key(0), streams(groups), contexts)["params"]
    return random_params(abstract, seed=1, dtype=dtype)


def two_stages(net, params, groups, contexts, visibility, given):
    """Prefills what `cacheable` allows, then runs one step of the rest."""
    fixed = cacheable(visibility, given)
    constant = {g: groups[g] for g in fixed}
    _, cache = forward(net, params, constant, contexts, visibility, emit=fixed)
    assert set(cache.tokens) == set(fixed) and set(cache.context) == set(contexts)
    rest = {g: v for g, v in groups.items() if g not in fixed}
    return forward(net, params, rest, {}, visibility, cache)[0] if rest else {}


@pytest.mark.parametrize("double, trials", [(False, 1), (True, 6)])
def test_cached_equals_uncached_over_random_tables_and_roles(double, trials):
    dtype, tolerance = (np.float64, 1e-10) if double else (np.float32, 1e-5)
    rng = np.random.default_rng(3 + double)
    cases = []
    while len(cases) < trials:
        visibility = random_table(rng, 4, density=0.35)
        present = [g for g in OWNER if rng.random() < 0.9]
        visibility = visibility.restrict(present)
        given = [g for g in present if rng.random() < 0.7]
        # Requires keys in every row, and a non-trivial cache.
        if all(visibility.rows) and 0 < len(cacheable(visibility, given)) < len(present):
            cases.append((visibility, given))
    assert len({(v.rows, tuple(g)) for v, g in cases}) == len(cases)

    @functools.partial(jax.jit, static_argnums=0)
    def run(cached, params, groups, contexts):
        results = []
        for visibility, given in cases:
            present = {g: groups[g] for g in visibility.groups}
            if cached:
                y = two_stages(NET, params, present, contexts, visibility, given)
            else:
                y, _ = forward(NET, params, present, contexts, visibility)
                y = {g: v for g, v in y.items() if g not in cacheable(visibility, given)}
            results.append(y)
        return results

    with precision(double):
        args = (parameters(dtype), *inputs(dtype=dtype))
        got, want = run(True, *args), run(False, *args)
    assert all(x.dtype == dtype for x in jax.tree.leaves(got))
    assert_trees_close(got, want, rtol=0, atol=tolerance)


def test_prefill_in_two_stages_equals_one():
    """A second prefill reuses keys and values of the first (imagine, then act)."""
    visibility = causal(*OWNER)
    groups, contexts = inputs()
    first, second, last = (
        {g: groups[g] for g in names} for names in (["g0"], ["g1", "g2"], ["g3"])
    )

    @jax.jit
    def run(params):
        want, _ = forward(NET, params, groups, contexts, visibility)
        _, a = forward(NET, params, first, contexts, visibility, emit=("g0",))
        _, b = forward(NET, params, second, {}, visibility, a, emit=("g1", "g2"))
        cache = Cache(a.tokens | b.tokens, a.context | b.context)
        return forward(NET, params, last, {}, visibility, cache)[0]["g3"], want["g3"]

    got, want = run(parameters())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_scan_unrolled_scan_and_no_scan_agree_also_with_a_cache():
    visibility = table("t", {"g0": "g0", "g1": "g0 g1", "g2": "g0 g2", "g3": "g0 g1 g3"})
    args = inputs()

    @jax.jit
    def run(params):
        loose = unstack(params, LAYERS)
        assert not any(k == "blocks" for k in loose)
        variants = [(NET, params), (NET.clone(unroll=2), params), (NET.clone(unroll=0), loose)]
        return [two_stages(net, p, *args, visibility, ["g0", "g1"]) for net, p in variants]

    scanned, unrolled, loose = run(parameters())
    assert set(scanned) == {"g2", "g3"}
    assert_trees_close(unrolled, scanned, rtol=0, atol=1e-5)
    assert_trees_close(loose, scanned, rtol=0, atol=1e-5)


def test_layers_use_their_own_parameters():
    params = parameters()
    swapped = jax.tree.map(lambda x: x[::-1], params)
    run = jax.jit(lambda p: forward(NET, p, *inputs(), causal(*OWNER))[0])
    for a, b in zip(jax.tree.leaves(run(params)), jax.tree.leaves(run(swapped)), strict=True):
        assert np.abs(a - b).max() > 1e-2


def test_masked_path_and_remat_policies_give_the_same_gradients():
    visibility = table("t", {"g0": "g0", "g2": "g0 g2"})
    # One expert without cross-attention is enough here, and compiles three times as fast.
    drawn, _ = inputs(dtype=np.float64)
    groups = {g: drawn[g] for g in visibility.groups}
    plain = Transformer((ExpertSpec("left", 8, 12, cross="none"),), LAYERS, heads=2, head_dim=4)
    init = functools.partial(plain.init, visibility=visibility)

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.grad, argnums=1)
    def gradient(net, params):
        tokens, _ = net.apply({"params": params}, streams(groups), {}, visibility)
        return sum(jnp.sum(jnp.sin(x)) for x in tokens.values())

    with precision(True):
        abstract = jax.eval_shape(lambda: init(jax.random.key(0), streams(groups), {}))["params"]
        params = random_params(abstract, dtype=np.float64)
        want = gradient(plain, params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(want):
            assert all(np.any(layer) for layer in leaf), path
        for changes in (
            {"remat": "full"},
            {"remat": "attention", "unroll": 2},
            {"attention": attention.masked, "remat": "dots"},
            {"remat": "projections"},
            {"remat": "offload"},
        ):
            got = gradient(plain.clone(**changes), params)
            assert_trees_close(got, want, rtol=1e-9, atol=1e-10)


def test_a_policy_that_keeps_less_computes_more():
    visibility = table("t", {"g0": "g0", "g2": "g0 g2"})
    groups, contexts = inputs()
    groups = {g: groups[g] for g in visibility.groups}
    contexts = {"left": contexts["left"]}
    params = {"blocks": {"left": parameters()["blocks"]["left"]}}

    def work(remat):
        def loss(params):
            out, _ = forward(NET.clone(remat=remat), params, groups, contexts, visibility)
            return sum(jnp.sum(x) for x in out.values())

        return flops.count(jax.grad(loss), params)

    tokens = sum(x.shape[0] * x.shape[1] for x, _ in groups.values())
    hidden = 2 * tokens * params["blocks"]["left"]["ffn"]["in"]["kernel"].size  # of all layers
    none, dots, projections, least, full = map(
        work, ("none", "dots", "projections", "attention", "full")
    )
    assert none <= dots < projections < least < full
    assert projections - dots == hidden


def test_an_output_changes_iff_a_group_it_reaches_changes():
    """In n layers, paths of at most n steps in the table reach a group."""
    rng = np.random.default_rng(11)
    names = list(OWNER)
    groups, contexts = inputs()
    tables = [causal(*OWNER), table("chain", {"g0": "g0", "g1": "g0", "g2": "g1", "g3": "g2"})]
    tables.append(random_table(rng, 4, density=0.3))

    @jax.jit
    def run(groups):
        return [forward(NET, parameters(), groups, contexts, t)[0] for t in tables]

    before = run(groups)
    for changed in names:
        tokens, modulation = groups[changed]
        after = run(groups | {changed: (tokens + 1, modulation)})
        for visibility, a, b in zip(tables, before, after, strict=True):
            step = np.eye(4, dtype=int) | visibility.matrix()
            reach = np.linalg.matrix_power(step, LAYERS) > 0
            for g in names:
                expected = reach[names.index(g), names.index(changed)]
                assert (not np.array_equal(a[g], b[g])) == expected, (visibility, changed, g)


def test_context_reaches_only_its_expert_directly():
    visibility = table("t", {g: g for g in OWNER})  # nobody sees anybody else
    groups, contexts = inputs()
    run = jax.jit(lambda c: forward(NET, parameters(), groups, c, visibility)[0])
    before, after = run(contexts), run(contexts | {"left": contexts["left"] + 1})
    for g, owner in OWNER.items():
        assert (not np.array_equal(before[g], after[g])) == (owner == "left")


def test_errors():
    args = inputs()
    with pytest.raises(ValueError, match="remat 'some' is not one of.*'full'"):
        forward(NET.clone(remat="some"), parameters(), *args, causal(*OWNER))
    bad = streams(args[0])
    bad["left"] = bad["left"].replace(groups=(("g0", 2),))
    with pytest.raises(ValueError, match="have 2 tokens in all, but the stream has 6"):
        NET.apply({"params": parameters()}, bad, args[1], causal(*OWNER))
