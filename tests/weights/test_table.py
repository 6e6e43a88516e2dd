"""Tests the language of key maps in both directions, and errors about mismatched sources."""

import numpy as np
import pytest

from wamjax import tree
from wamjax.weights import beside, plan, tensor
from wamjax.weights.table import Row, linear, norm

LAYERS, D, F = 3, 4, 6
TABLE = (
    *linear("block.{i}.qkv[{x}/3]", "blocks/e/attn/{x:q=0|k=1|v=2}"),
    *linear("block.{i}.{m}", "blocks/e/{m:up=mlp.0|down=mlp.1}"),
    *linear("block.{i}.shift", "blocks/e/mod"),
    *linear("block.{i}.shift", "final_block/e/mod", order=(1, 0)),
    *norm("block.{i}.norm_{n}", "blocks/e/{n}_norm"),
    *linear("head", "e/head", order=(2, 0, 1)),
    *linear("embed.{i}.time", "e/time"),
    Row("patch.weight", "e/patch/kernel", "o c 1 p q -> (c p q) o", (("p", 2), ("q", 2))),
    Row("conv.weight", "e/conv/kernel", "o i ... -> ... i o"),
    Row("table", "e/table", "1 n d -> n d"),
    Row("nowhere.weight", "e/{x:in|out}/absent"),
)


def shapes():
    block = {
        **{f"attn/{x}/kernel": (D, D) for x in "qkv"}, **{f"attn/{x}/bias": (D,) for x in "qkv"},
        "up/kernel": (D, F), "down/kernel": (F, D), "in_norm/scale": (D,), "mod/kernel": (D, 2 * D),
    }  # fmt: skip
    return {
        **{f"blocks/e/{k}": (LAYERS, *s) for k, s in block.items()},
        **{f"final_block/e/{k}": s for k, s in block.items()},
        "e/head/kernel": (D, 9), "e/head/bias": (9,), "e/time/kernel": (2, D),
        "e/patch/kernel": (3 * 4, D), "e/conv/kernel": (3, 3, 3, D, F), "e/table": (2, D),
    }  # fmt: skip


def draw(all_shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {k: rng.standard_normal(s).astype(dtype) for k, s in all_shapes.items()}


class Struct:
    """Holds a leaf that only has a shape."""

    def __init__(self, shape):
        self.shape = shape


def make(table=TABLE, all_shapes=None, **options):
    structs = {k: Struct(s) for k, s in (all_shapes or shapes()).items()}
    return plan.make("toy", table, tree.unflatten(structs), **options)


def lazily(arrays):
    return {k: tensor.of(v) for k, v in arrays.items()}


def read(tensors):
    return {k: x.read() for k, x in tensors.items()}


def params_of(slices):
    """Assembles whole parameters from their slices."""
    out = {}
    for (path, layer), x in slices.items():
        assert x.read().shape == x.shape and x.read().dtype == x.dtype
        out.setdefault(path, []).append((layer, x.read()))
    return {
        p: x[0][1] if x[0][0] is None else np.stack([v for _, v in sorted(x, key=lambda y: y[0])])
        for p, x in out.items()
    }


def slicer(params):
    return lambda key: tensor.of(params[key[0]] if key[1] is None else params[key[0]][key[1]])


def same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        assert a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]), k


def test_the_published_side_as_a_person_would_write_it():
    p = draw(shapes())
    got = read(make().to_theirs(slicer(p)))
    want = {
        "head.weight": p["e/head/kernel"].T[[3, 4, 5, 6, 7, 8, 0, 1, 2]],
        "head.bias": p["e/head/bias"][[3, 4, 5, 6, 7, 8, 0, 1, 2]],
        "patch.weight": p["e/patch/kernel"].T.reshape(D, 3, 1, 2, 2),
        "conv.weight": np.moveaxis(p["e/conv/kernel"], (-1, -2), (0, 1)),
        "table": p["e/table"][None],
    }  # fmt: skip
    for i in range(LAYERS + 1):
        want[f"embed.{i}.time.weight"] = p["e/time/kernel"].T  # a copy in every layer
        b = {
            k.split("/", 1)[1]: v[i] if i < LAYERS else p[k.replace("blocks", "final_block")]
            for k, v in p.items()
            if k.startswith("blocks")
        }
        for leaf, ours in (("weight", "kernel"), ("bias", "bias")):
            want[f"block.{i}.qkv.{leaf}"] = np.concatenate(
                [b[f"e/attn/{x}/{ours}"].T for x in "qkv"]
            )
        want[f"block.{i}.mlp.0.weight"] = b["e/up/kernel"].T
        want[f"block.{i}.mlp.1.weight"] = b["e/down/kernel"].T
        want[f"block.{i}.norm_in.weight"] = b["e/in_norm/scale"]
        shift = b["e/mod/kernel"].T
        want[f"block.{i}.shift.weight"] = shift if i < LAYERS else np.roll(shift, D, axis=0)
    same(got, want)


def test_round_trips_are_bit_identical():
    there = make()
    params = draw(shapes())
    file = read(there.to_theirs(slicer(params)))
    there.check(lazily(file))
    same(params_of(there.to_ours(lazily(file))), params)
    again = read(there.to_theirs(slicer(params_of(there.to_ours(lazily(file))))))
    same(again, file)
    assert there.published == {k: x.shape for k, x in file.items()}
    assert there.params == shapes()


def test_keys_are_in_the_order_of_layers():
    names = list(make(TABLE, {"blocks/e/in_norm/scale": (12, D)}).published)
    assert names == [f"block.{i}.norm_in.weight" for i in range(12)]


def test_dtypes():
    there, params = make(), draw(shapes())
    file = read(there.to_theirs(slicer(params), tensor.BFLOAT16))
    assert {x.dtype for x in file.values()} == {tensor.BFLOAT16}
    file["block.1.norm_in.weight"] = file["block.1.norm_in.weight"].astype(np.float32)
    slices = there.to_ours(lazily(file))
    assert {k[0] for k, x in slices.items() if x.dtype == np.float32} == {"blocks/e/in_norm/scale"}
    assert {x.dtype for x in there.to_ours(lazily(file), np.float16).values()} == {np.dtype("f2")}


def fits(**changes):
    there = make(ignore={r"noise\..*": beside.other_network}, tied={"copy": "table"})
    file = read(there.to_theirs(slicer(draw(shapes())))) | changes
    there.check(lazily({k: v for k, v in file.items() if v is not None}))


def test_ignored_and_tied_keys_may_be_there():
    table = read(make().to_theirs(slicer(draw(shapes()))))["table"]
    fits(**{"noise.1": np.zeros(3, int), "copy": table})
    for other in (table + 1, table[0]):
        with pytest.raises(plan.Mismatch, match="copy differs from table"):
            fits(copy=other)
    with pytest.raises(plan.Mismatch, match=r"unequal copies \(1\): embed.2.time.weight differs"):
        fits(**{"embed.2.time.weight": np.zeros((D, 2), np.float32)})
    almost = read(make().to_theirs(slicer(draw(shapes()))))["embed.0.time.weight"].copy()
    almost[0, 0] = np.nextafter(almost[0, 0], np.inf)
    with pytest.raises(plan.Mismatch, match="differs"):
        fits(**{"embed.1.time.weight": almost})


def test_all_offenders_are_reported_at_once():
    with pytest.raises(plan.Mismatch) as error:
        fits(**{
            "head.bias": None,
            **{f"block.{i}.mlp.0.weight": None for i in (0, 1, 3)},
            "head.biases": np.zeros(9, np.float32),
            "block.0.extra": np.zeros((2, 2)),
            "table": np.zeros((2, D), np.float32),
            "conv.weight": np.zeros((F, D, 3, 3, 3), np.int8),
        })  # fmt: skip
    assert str(error.value) == (
        "the source does not match toy: "
        "missing (4): block.{0-1,3}.mlp.0.weight (6, 4); head.bias (9,); "
        "unknown (2): head.biases (9,), did you mean 'head.bias'?; block.0.extra (2, 2); "
        f"of another shape (1): table is (2, {D}), expected (1, 2, {D}); "
        "not floating-point (1): conv.weight is int8; if the sizes are not the published ones, "
        'give them by --config, a JSON file such as {"model.layers": 12}'
    )


def test_many_offenders_are_abbreviated_to_one_line():
    wrong = {f"{name}.extra": np.zeros(1) for name in "abcdefghijklmnop"}
    with pytest.raises(plan.Mismatch) as error:
        fits(**wrong, table=None)
    said = "a.extra (1,); b.extra (1,); c.extra (1,); d.extra (1,); and 12 more"
    assert str(error.value) == (
        f"the source does not match toy: missing (1): table (1, 2, {D}); unknown (16): {said}"
    )


def test_parameters_that_do_not_fit_are_reported_at_once():
    there = make()
    there.check_ours(shapes())
    wrong = shapes() | {"e/new": (1,), "e/table": (3, D)}
    del wrong["e/head/bias"], wrong["blocks/e/mod/kernel"]
    with pytest.raises(plan.Mismatch) as error:
        there.check_ours(wrong)
    for text in ("missing (2)", f"blocks/e/mod/kernel ({LAYERS}, {D}, {2 * D})", "e/head/bias (9,)",
                 "unknown (1)", "e/new (1,)", "e/table is (3, 4)"):  # fmt: skip
        assert text in str(error.value)


def test_a_table_must_cover_every_parameter_once():
    with pytest.raises(ValueError) as error:
        make((*TABLE, Row("other", "e/{x}"), Row("another.{i}", "blocks/e/{x}/kernel")),
             shapes() | {"e/lost/scale": (2,), "lost": (1,)})  # fmt: skip
    text = str(error.value)
    assert "e/lost/scale (2,): no row" in text and "lost (1,): no row" in text
    assert "e/table (2, 4): several rows: e/table, e/{x}" in text
    assert "blocks/e/up/kernel (3, 4, 6): several rows" in text


def test_a_table_must_use_every_tensor_once_and_wholly():
    lacks = {k: s for k, s in shapes().items() if "attn/k" not in k}
    with pytest.raises(ValueError, match=r"block.0.qkv.bias: parts \[\(0, 3\), \(2, 3\)\]"):
        make(TABLE, lacks)
    twice = (Row("same", "a"), Row("same", "b"))
    with pytest.raises(ValueError, match=r"same: parts \[\(0, 1\), \(0, 1\)\]"):
        make(twice, {"a": (1,), "b": (1,)})
