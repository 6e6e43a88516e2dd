"""Tests starting from converted weights and from runs, with a list of what may be missing."""

import dataclasses
import types

import jax
import numpy as np
import pytest
import toy
from bundle import runs
from data import synthetic
from weights.test_convert import published, save

from wamjax import convert, export_policy, tree
from wamjax.data import pipeline
from wamjax.training import init_from, sharding
from wamjax.training import state as states
from wamjax.training.checkpoint import restore_params
from wamjax.wam.fast_wam import expert_init
from wamjax.weights import families, store

WAN = families.named(
    layers=2, width=32, heads=4, ffn=64, channels=48, context_width=16, freq_dim=32
)
MISSING = ("action/.*", "blocks/action/.*", "proprio/.*", "text/.*")


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """Writes a converted backbone with the sizes of `toy.fast_wam`, bfloat16."""
    folder = tmp_path_factory.mktemp("wan")
    save(folder / "wan.safetensors", published("wan22_ti2v", config=WAN))
    convert.bring_in("wan22_ti2v", folder / "wan.safetensors", folder / "ours", WAN, progress=False)
    return folder / "ours"


def prepare(path, missing=(), unused=(), fresh=(), objective=None):
    """Returns (objective, config, abstract parameters on a mesh)."""
    config = toy.config(**{
        "init_from.path": str(path), "init_from.missing": missing, "init_from.unused": unused,
        "init_from.fresh": fresh,
    })  # fmt: skip
    objective = objective or toy.fast_wam()
    abstract = jax.eval_shape(lambda: states.init_params(objective, config))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    places = sharding.params_shardings(abstract, mesh)
    return objective, config, sharding.with_shardings(abstract, places)


@pytest.fixture(scope="module")
def fresh():
    """Returns freshly initialised parameters of `toy.fast_wam`."""
    return jax.jit(lambda: states.init_params(toy.fast_wam(), toy.config()))()


@pytest.mark.parametrize("derive", [False, True])
def test_a_policy_starts_from_a_video_backbone(wan, fresh, derive):
    objective = dataclasses.replace(toy.fast_wam(), action_from_video=derive)
    objective, config, abstract = prepare(wan, MISSING, objective=objective)
    params = init_from.params(objective, config, abstract)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), abstract
    )
    arrays, flat = store.read(wan / "params").arrays, tree.flatten(params)
    for path, array in arrays.items():
        np.testing.assert_array_equal(flat[path], array.read().result().astype(np.float32))
    assert 20 < len(arrays) < len(flat)
    want = tree.unflatten(tree.flatten(fresh) | {p: flat[p] for p in arrays})
    want = tree.flatten(jax.jit(expert_init.action_from_video)(want) if derive else want)
    for path, x in flat.items():
        np.testing.assert_allclose(x, want[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_a_head_can_start_fresh_even_if_the_source_has_it(wan, fresh):
    """Also if shapes differ, which is an error otherwise; so is a rule without effect."""
    objective, config, abstract = prepare(wan, MISSING, fresh=("video/head/.*",))
    params = tree.flatten(init_from.params(objective, config, abstract))
    fresh = tree.flatten(fresh)
    arrays = store.read(wan / "params").arrays
    kernel, other = "video/head/kernel", "video/patch_embed/kernel"
    np.testing.assert_allclose(params[kernel], fresh[kernel], rtol=1e-6)
    assert np.abs(params[kernel] - arrays[kernel].read().result().astype(np.float32)).max() > 0.01
    np.testing.assert_array_equal(params[other], arrays[other].read().result().astype(np.float32))
    shapes, want = store.read(wan / "params").shapes, tree.flatten(abstract)
    want[kernel] = np.zeros((32, 7))
    assert init_from.check(shapes, want, config.init_from) >= {kernel, "video/head/bias"}
    config.init_from.fresh = ("vidio/.*",)
    with pytest.raises(ValueError, match="another shape") as error:
        init_from.check(shapes, want, config.init_from)
    assert "in init_from.fresh, but the model has nothing of it:\n    vidio/.*" in str(error.value)


def test_all_mismatches_are_reported_at_once(wan):
    _, config, abstract = prepare(wan, ("action/.*", "vidio/.*"), ("old/.*",))
    want = tree.flatten(abstract)
    del want["video/time_proj/bias"]
    want["video/head_table"] = np.zeros((2, 8))
    with pytest.raises(ValueError) as error:
        init_from.check(store.read(wan / "params").shapes, want, config.init_from)
    text = str(error.value)
    for part in (
        "missing in the source, and not in init_from.missing:\n    blocks/action/cross_attn/k/bias",
        "    proprio/bias\n    proprio/kernel\n    text/embedding",
        "unknown to the model, and not in init_from.unused:\n    video/time_proj/bias\n",
        "of another shape (source, model):\n    video/head_table (2, 32) (2, 8)\n",
        "in init_from.missing, but nothing of it is missing:\n    vidio/.*\n",
        "in init_from.unused, but nothing of it is unused:\n    old/.*",
    ):
        assert part in text
    assert "action/encoder" not in text


def test_a_run_starts_from_another_run_and_resumes_without_it(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    assert toy.run(toy.config(total_steps=4), old, devices=jax.devices()[:1])
    values = {"total_steps": 4, "init_from.path": str(old), "optim.learning_rate": 0.0}
    assert toy.run(toy.config(**values), new)
    for ema in (False, True):
        got = tree.flatten(restore_params(new, ema=ema).params)
        for path, x in tree.flatten(restore_params(old, ema=True).params).items():
            np.testing.assert_allclose(got[path], x, rtol=1e-6, err_msg=path)
    values = values | {"total_steps": 6, "init_from.path": str(tmp_path / "gone")}
    assert toy.run(toy.config(**values), new)
    with pytest.raises(FileNotFoundError, match="neither a folder of wamjax.convert"):
        toy.run(toy.config(**values), tmp_path / "fresh")


def test_sources_of_several_parts(wan, tmp_path):
    """Parameters below a prefix may come from their own folder."""
    vae = dict(width=8, decoder_width=8, blocks=1)
    save(tmp_path / "vae.safetensors", published("wan21_vae", config=vae))
    convert.bring_in("wan21_vae", tmp_path / "vae.safetensors", tmp_path / "vae", vae,
                     progress=False)  # fmt: skip
    both = init_from.sources(f"{wan},codec={tmp_path / 'vae'}")
    alone, codec = (store.read(folder / "params").shapes for folder in (wan, tmp_path / "vae"))
    assert both.shapes == alone | {f"codec/{path}": shape for path, shape in codec.items()}
    assert init_from.sources(str(wan)).shapes == alone
    path = next(iter(codec))
    np.testing.assert_array_equal(
        both.slice((f"codec/{path}", None)).read(),
        store.read(tmp_path / "vae" / "params").slice((path, None)).read(),
    )
    with pytest.raises(ValueError, match="more than one source has .*'blocks/video/"):
        init_from.sources(f"{wan},{wan}")
    with pytest.raises(FileNotFoundError, match="gone is neither a folder of wamjax.convert"):
        init_from.sources(f"{wan},codec={tmp_path / 'gone'}")


def test_words_keep_the_ids_of_what_a_run_starts_from(tmp_path):
    fresh, words = types.SimpleNamespace(latest=None), ("block", "the", "open")
    spec = dataclasses.replace(runs.SPEC, words=words)
    runs.save(tmp_path / "run", runs.fast_wam(), spec, steps=(2,))
    export_policy.from_run(tmp_path / "run", tmp_path / "b", progress=False)
    synthetic.write(tmp_path / "a")
    config = synthetic.config(tmp_path, a={"path": "a"})
    assert init_from.words(config, fresh) == ()
    for source in (tmp_path / "run", tmp_path / "b" / "weights"):
        config.init_from.path = f"{source},codec={tmp_path / 'gone'}"
        config.data.vocabulary = "words"
        assert init_from.words(config, fresh) == words
        config.data.vocabulary = "hash"
        with pytest.raises(ValueError, match="= 'hash', and .* was trained with 'words'"):
            init_from.words(config, fresh)
        config.init_from.fresh = ("text/.*",)
        assert init_from.words(config, fresh) == ()
        config.init_from.fresh = ()
    config.data.vocabulary = "words"
    mine, _, iterator = pipeline.open_data(config, known=words)
    assert mine.words == ("block", "the", "open", "lift")
    assert (next(iterator)["instruction"][:, :4] == [4, 2, 1, 0]).all()  # lift the block
    stopped = types.SimpleNamespace(latest=3, statistics=lambda: {"spec": mine.to_json()})
    assert init_from.words(config, stopped) == mine.words
