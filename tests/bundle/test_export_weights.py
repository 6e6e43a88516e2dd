"""Tests bundles of published weights, statistics and embeddings, by the commands for users."""

import importlib.util
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app
from bundle import runs
from data import synthetic
from weights.test_convert import published, save

import wamjax
from wamjax import convert, export_policy, tree, wam
from wamjax.bundle import files
from wamjax.data import pipeline, published_statistics
from wamjax.data.embeddings import EmbeddingCache, Settings
from wamjax.data.normalize import normalizers
from wamjax.models import codec as codecs
from wamjax.weights import encoders, families, networks, store

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "configs"
FAST_WAM = families.named(
    layers=2, heads=3, head_dim=16, width=48, ffn=96, action_width=16, action_ffn=32, channels=48,
    context_width=32, freq_dim=32, action_dim=7, proprio_dim=8,
)  # fmt: skip
COSMOS = families.named(
    layers=2, width=24, heads=2, ffn=48, channels=48, context_width=32, lora_rank=8,
    rope_scale=(1.0, 3.0, 3.0),
)  # fmt: skip
TEXT = "open the drawer"


def get(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config("debug")


def weights(root, family, sizes, name="weights", scale=0.3):
    """Converts a file in the published layout to a folder of `wamjax.convert`."""
    arrays = {k: np.asarray(scale * x, x.dtype) for k, x in published(family, config=sizes).items()}
    save(root / f"{name}.pt", arrays)
    convert.bring_in(family, root / f"{name}.pt", root / name, sizes, progress=False)
    return root / name


def statistics(config, form):
    said = config.data.declared
    rng = np.random.default_rng(0)
    rows = {}
    for key, size in (("actions", said.action_dim), ("proprio", said.proprio_dim)):
        low = rng.normal(size=size)
        values = {"min": low, "max": low + 1, "mean": low + 0.4, "std": 0 * low + 0.2,
                  "q01": low + 0.1, "q99": low + 0.9, "median": low + 0.5}  # fmt: skip
        rows[key] = {k: v.tolist() for k, v in values.items()}
    return published_statistics.to_published(rows, form)


def embeddings(path, config, encoder="t5-11b"):
    cache = EmbeddingCache.create(path, Settings(encoder, config.data.instruction_length))
    cache.add({TEXT: np.random.default_rng(0).normal(size=(3, config.model.context_width))})
    return cache


def run(*arguments):
    with synthetic.command(export_policy, *arguments):
        export_policy.main([""])


def act(config, params, observation, key):
    """Returns actions of an objective that was built by hand."""
    spec = pipeline.declared(config.data)
    objective = wam.build(config, spec)
    normalise = normalizers(observation.pop("statistics"), config.data.normalization)
    params = objective.prepare(jax.tree.map(jnp.asarray, params))
    policy = jax.jit(lambda p, o, k: objective.policy(p, normalise, o, k))
    return np.asarray(policy(params, observation, key))[0]


def composite(seen):
    return np.concatenate(list(seen["images"].values()), axis=-2)[None, None]


def read(folder):
    arrays = store.read(folder / "params").arrays
    return tree.unflatten({p: a.read().result().astype(np.float32) for p, a in arrays.items()})


def test_fast_wam_from_published_files_to_actions(tmp_path):
    """The converted video autoencoder encodes its pictures."""
    config = get("fast_wam_libero")
    weights(tmp_path, "fast_wam", FAST_WAM)
    vae = dict(width=8, decoder_width=8, multipliers=(1, 1, 1, 1), blocks=1)
    weights(tmp_path, "wan22_vae", vae, "vae")
    (tmp_path / "dataset_stats.json").write_text(json.dumps(statistics(config, "fast_wam")))
    cache = embeddings(tmp_path / "text", config, "umt5-xxl")
    run(f"--config={FOLDER}/fast_wam_libero.py:debug", f"--weights={tmp_path}/weights",
        f"--statistics={tmp_path}/dataset_stats.json", f"--embeddings={tmp_path}/text",
        f"--codec={tmp_path}/vae", f"--output={tmp_path}/bundle")  # fmt: skip
    policy = wamjax.load_policy(tmp_path / "bundle")
    spec = policy.manifest.spec
    assert list(spec.cameras) == ["image", "wrist_image"] and policy.mode == "direct"
    assert len(policy.manifest.constants["mean"]) == 48
    seen = runs.observation(spec, text=TEXT)
    got = policy(seen, 42)
    assert got.shape == (32, 7) and np.isfinite(got).all()
    latents = encoders.video(tmp_path / "vae")(composite(seen))
    observation = {
        "latents": np.asarray(latents).astype(jnp.bfloat16),
        "proprio": seen["proprio"][None],
        "context": cache.lookup(TEXT)[None],
        "statistics": published_statistics.read(tmp_path / "dataset_stats.json"),
    }
    want = act(config, read(tmp_path / "weights"), observation, jax.random.key(42))
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)
    other = seen | {"images": {k: 255 - x for k, x in seen["images"].items()}}
    assert np.abs(policy(other, 42) - got).max() > 0.05


def test_cosmos_policy_from_published_files_to_actions(tmp_path):
    config = get("cosmos_policy_libero")
    weights(tmp_path, "cosmos_policy", COSMOS)
    file = tmp_path / "libero_dataset_statistics.json"
    file.write_text(json.dumps(statistics(config, "cosmos_policy")))
    cache = embeddings(tmp_path / "text", config)
    run(f"--config={FOLDER}/cosmos_policy_libero.py:debug", f"--weights={tmp_path}/weights",
        f"--statistics={file}", f"--embeddings={tmp_path}/text",
        f"--output={tmp_path}/bundle")  # fmt: skip
    policy = wamjax.load_policy(tmp_path / "bundle")
    assert policy.manifest.constants is None  # pixels serve as latents
    seen = runs.observation(policy.manifest.spec, text=TEXT)
    got = policy(seen, 195)
    observation = {
        "video": composite(seen),
        "proprio": seen["proprio"][None],
        "context": cache.lookup(TEXT)[None],
        "statistics": published_statistics.read(file),
    }
    want = act(config, read(tmp_path / "weights"), observation, jax.random.key(195))
    assert got.shape == (16, 7) and np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


def test_a_policy_and_its_planner_from_published_files(tmp_path):
    """Dual deployment, the paper's main recipe: two checkpoints, with V(s') from the second."""
    config = get("cosmos_policy_aloha")
    weights(tmp_path, "cosmos_policy", COSMOS)
    weights(tmp_path, "cosmos_policy", COSMOS, "other", scale=0.2)
    (tmp_path / "s.json").write_text(json.dumps(statistics(config, "cosmos_policy")))
    embeddings(tmp_path / "text", config)
    file = f"{FOLDER}/cosmos_policy_aloha.py"
    common = (f"--config={file}:debug", f"--weights={tmp_path}/weights", "--mode=plan",
              f"--statistics={tmp_path}/s.json", f"--embeddings={tmp_path}/text",
              f"--planner={tmp_path}/other")  # fmt: skip
    with pytest.raises(app.UsageError, match="--planner=DIR and --planner_config=FILE"):
        run(*common, f"--output={tmp_path}/none")
    run(*common, f"--planner_config={file}:planner,debug", f"--output={tmp_path}/bundle")
    said = files.read(tmp_path / "bundle")
    assert said.mode == "plan" and said.planner.objective.value == "value_v"
    assert said.config.objective.value == "value"
    for part, folder in (("weights", "weights"), ("planner", "other")):
        want = tree.flatten(read(tmp_path / folder))
        got = store.read(tmp_path / "bundle" / part / "params").arrays
        assert got.keys() == want.keys()
        path = "blocks/video/self_attn/q/kernel"
        np.testing.assert_array_equal(got[path].read().result(), want[path])
    objective = wamjax.load_policy(tmp_path / "bundle")._acting.objective
    assert [u.name for u in objective.uses] == ["policy", "world_model", "value_v"]


def test_a_codec_with_parameters_of_the_policy_is_merged(tmp_path, monkeypatch):
    """As at the published size, with an autoencoder of few channels."""
    config, sizes = get("cosmos_policy_libero"), dict(width=8, multipliers=(1, 1, 1, 1), blocks=1)
    config.model.codec.kind, config.optim.freeze = "wan2.1", ("codec/.*",)
    config.data.declared.camera_size = (128, 128)
    weights(tmp_path, "cosmos_policy", COSMOS | families.named(channels=16))
    vae = weights(tmp_path, "wan21_vae", sizes, "vae")
    small = networks.vae_sizes(store.about(vae)["sizes"])
    made = codecs.wan21().replace(sizes=small)
    monkeypatch.setitem(codecs.PUBLISHED, "wan2.1", lambda: made)
    cache = embeddings(tmp_path / "text", config)
    (tmp_path / "s.json").write_text(json.dumps(statistics(config, "cosmos_policy")))
    choices = export_policy.Choices(embeddings=cache.path)
    arguments = config, tmp_path / "weights", tmp_path / "s.json", tmp_path / "bundle"
    with pytest.raises(ValueError, match="(?s)missing in the source:\n    codec/.*"):
        export_policy.from_weights(*arguments, choices, False)
    choices = export_policy.Choices(embeddings=cache.path, codec=vae)
    export_policy.from_weights(*arguments, choices, False)
    stored = store.read(tmp_path / "bundle" / "weights" / "params").shapes
    assert {p for p in stored if p.startswith("codec/")} == {
        f"codec/{p}" for p in store.read(vae / "params").shapes
    }
    policy = wamjax.load_policy(tmp_path / "bundle")
    assert policy.manifest.constants["std"] == list(codecs.wan21().std)
    assert np.isfinite(policy(runs.observation(policy.manifest.spec, text=TEXT))).all()
    text = (tmp_path / "bundle" / "policy.json").read_text()
    text = re.sub(r',\s*"digest": "[0-9a-f]+"', "", text)  # as if written by hand
    (tmp_path / "bundle" / "policy.json").write_text(text.replace("-0.7571", "-0.7572"))
    with pytest.raises(ValueError, match="latents have mean and std .*export the policy again"):
        wamjax.load_policy(tmp_path / "bundle")


def test_all_missing_parts_are_reported_at_once(tmp_path):
    config = get("fast_wam_libero")
    config.data.embeddings = ""
    weights(tmp_path, "fast_wam", FAST_WAM | families.named(ffn=64))
    choices = export_policy.Choices(action_names=("x", "y"))
    with pytest.raises(ValueError) as error:
        export_policy.from_weights(
            config, tmp_path / "weights", None, tmp_path / "bundle", choices, False
        )
    text = str(error.value)
    for part in (
        "the policy is not complete:",
        "weights does not fit the policy that the config builds:\n  of another shape",
        " (2, 48, 64) (2, 48, 96)\n",
        "statistics of actions and proprio are missing: give --statistics=FILE",
        "the codec (channels, pixels, frames: (48, 16, 4)) is missing: give",
        "the text embeddings are missing: give --embeddings=DIR",
        "--action_names names 2 dimensions, there are 7",
    ):  # fmt: skip
        assert part in text, text
    common = f"--config={FOLDER}/fast_wam_libero.py:debug", f"--output={tmp_path}/bundle"
    with pytest.raises(SystemExit, match="^nothing was written: the policy is not") as error:
        run(*common, f"--weights={tmp_path}/gone", f"--statistics={tmp_path}/gone.json",
            f"--codec={tmp_path}/weights", f"--embeddings={tmp_path}/no")  # fmt: skip
    text = str(error.value)
    for part in ("gone is neither a folder of wamjax.convert", "gone.json", "of 'fast_wam', "
                 "not of a codec", "there is no cache of text embeddings in"):  # fmt: skip
        assert part in text, text
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith((".", "bundle"))] == []


def test_parts_of_other_sizes_are_named(tmp_path):
    config = get("fast_wam_libero")
    weights(tmp_path, "wan21_vae", dict(width=8, multipliers=(1, 1, 1, 1), blocks=1), "vae")
    config.data.instruction_length = 64
    embeddings(tmp_path / "text", config)
    config.data.instruction_length = 128
    said = statistics(get("cosmos_policy_libero"), "cosmos_policy")
    (tmp_path / "s.json").write_text(json.dumps(said))
    choices = export_policy.Choices(codec=tmp_path / "vae", embeddings=tmp_path / "text")
    with pytest.raises(ValueError) as error:
        export_policy.from_weights(
            config, tmp_path / "none", tmp_path / "s.json", tmp_path / "b", choices, False
        )
    for part in ("proprio.min has 9 dimensions, the policy 8", "the policy reads (128, 32)",
                 "(channels, pixels, frames) (16, 8, 4), the policy (48, 16, 4)"):  # fmt: skip
        assert part in str(error.value)
    config.data.declared.action_dim = 0
    with pytest.raises(ValueError, match="config.data.declared has no sizes"):
        export_policy.from_weights(config, tmp_path, None, tmp_path / "b", None, False)
