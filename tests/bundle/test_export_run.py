"""Tests bundles of runs: the same actions to the last bit, after the run is deleted."""

import dataclasses
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from bundle import runs
from data import synthetic
from wam.test_cosmos_configs import get

import wamjax
from wamjax import export_policy
from wamjax.bundle import files
from wamjax.bundle.observation import BadObservation
from wamjax.bundle.policy import _act
from wamjax.data.embeddings import EmbeddingCache, Settings
from wamjax.data.spec import DataSpec
from wamjax.data.tokens import Vocabulary
from wamjax.envs import tabletop
from wamjax.export_policy import Choices
from wamjax.runs import trained
from wamjax.runs.closed_loop import told
from wamjax.training import sharding
from wamjax.weights import store

SPEC = runs.SPEC


@jax.jit
def act(policy, observation, key):
    """Returns one program for all policies of a kind, as in `evaluate`."""
    return policy.actions(policy.params, observation, key)


def act_by_run(policy, seen, key, spec=SPEC, cache=None):
    """Returns actions as `evaluate` computes them, from one hand-made observation."""
    video = np.concatenate([seen["images"][c] for c in spec.cameras], axis=-2)
    batch = {"video": video[None, None], "proprio": seen["proprio"][None]}
    if cache is None:
        ids = spec.vocabulary.tokenize(seen["instruction"], spec.instruction_length)
        batch["instruction"] = ids[None]
    else:
        batch["context"] = cache.lookup(seen["instruction"])[None]
    return np.asarray(act(policy, batch, key))[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Returns (policy of a bundle whose run was deleted, `trained.load` of the run, folder)."""
    root = tmp_path_factory.mktemp("bundle")
    runs.save(root / "run", runs.fast_wam())
    export_policy.from_run(root / "run", root / "bundle", progress=False)
    before = trained.load(root / "run")[0]
    shutil.rmtree(root / "run")
    (root / "bundle").rename(root / "moved")
    return wamjax.load_policy(root / "moved"), before, root / "moved"


def test_actions_are_those_of_the_run_to_the_last_bit(exported):
    policy, before, _ = exported
    for seed in (0, 7):
        seen = runs.observation(seed=seed)
        got = policy(seen, seed)
        assert got.shape == (8, 3) and got.dtype == np.float32 and np.isfinite(got).all()
        np.testing.assert_array_equal(got, act_by_run(before, seen, jax.random.key(seed)))
        np.testing.assert_array_equal(got, policy(seen, jax.random.key(seed)))
    assert not np.array_equal(policy(seen, 7), policy(seen, 8))
    other = seen | {"instruction": "open it"}
    assert not np.array_equal(policy(seen, 7), policy(other, 7))


def test_a_batch_of_robots_is_one_call(exported):
    policy, before, _ = exported
    seen = runs.observation(batch=3)
    got = policy(seen, 1)
    assert got.shape == (3, 8, 3)
    video = np.concatenate([seen["images"][c] for c in SPEC.cameras], axis=-2)[:, None]
    ids = np.stack([Vocabulary().tokenize(t, SPEC.instruction_length) for t in seen["instruction"]])
    batch = {"video": video, "proprio": seen["proprio"], "instruction": ids}
    want = act(before, batch, jax.random.key(1))
    np.testing.assert_array_equal(got, want)
    same = policy(seen | {"instruction": "lift the block"}, 1)
    np.testing.assert_array_equal(same[0], got[0])
    assert not np.array_equal(same[1], got[1])


def test_one_program_serves_all_calls(exported):
    policy = exported[0]
    policy(policy.example())
    count = _act._cache_size()
    for seed in range(3):
        policy(runs.observation(seed=seed, text=f"do {seed}"), seed)
    policy(runs.observation(), jax.random.key(3))
    assert _act._cache_size() == count


def test_prefixes_come_back_unchanged_and_share_one_program(exported, tmp_path):
    runs.save(tmp_path / "run", runs.fast_wam(**{"objective.prefix_max": 3}))
    export_policy.from_run(tmp_path / "run", tmp_path / "bundle", progress=False)
    policy = wamjax.load_policy(tmp_path / "bundle")
    assert policy.prefix_max == 3 and exported[0].prefix_max == 0
    seen, actions = runs.observation(), np.linspace(-1, 1, 9, dtype=np.float32).reshape(3, 3)
    free = policy(seen, 0)
    count = _act._cache_size()
    for d in (1, 3):
        got = policy(seen, 0, prefix=(actions, d))
        np.testing.assert_array_equal(got[:d], actions[:d])
        assert np.abs(got[d:] - free[d:]).max() > 1e-3
        short = policy(seen, 0, prefix=(actions[:d], d))
        np.testing.assert_array_equal(short, got)
    np.testing.assert_array_equal(policy(seen, 0, prefix=(actions, 0)), free)
    assert _act._cache_size() == count
    several = policy(runs.observation(batch=2), 0, prefix=(np.stack([actions] * 2), [0, 2]))
    np.testing.assert_array_equal(several[1, :2], actions[:2])
    assert np.abs(several[0, :2] - actions[:2]).max() > 1e-3

    for prefix, message in (
        ((actions, 4), "counts 4 must lie in 0 to 3"),
        ((actions[:1], 2), "counts 2 must lie in 0 to 1"),
        ((actions[:, :2], 2), r"actions have shape \(3, 2\), they must be \(1, at most 3, 3\)"),
        ((actions, 1.5), "counts are 1.5, they must be 1 integers"),
        ((actions * np.nan, 1), "must be finite"),
    ):
        with pytest.raises(BadObservation, match=message):
            policy(seen, 0, prefix=prefix)
    with pytest.raises(BadObservation, match="takes no prefix: .* objective.prefix_max = 0"):
        exported[0](seen, 0, prefix=(actions, 1))


def test_the_manifest_describes_the_policy(exported):
    policy, _, folder = exported
    said = policy.manifest
    assert said.spec == SPEC and list(said.spec.cameras) == list(SPEC.cameras)
    assert said.step == 5 and policy.mode == "direct" and said.planner is None
    assert said.config.precision.compute == "bfloat16"
    assert {p.name for p in folder.iterdir()} == {"policy.json", "weights"}
    dtypes = {p: a.dtype.name for p, a in store.read(folder / "weights" / "params").arrays.items()}
    assert set(dtypes.values()) == {"bfloat16", "float32"}
    assert all(d == "bfloat16" for p, d in dtypes.items() if p.endswith("kernel"))
    # It is also a folder that a run can start from.
    stored, step = store.source(folder / "weights")
    assert step == 5 and stored.arrays.keys() == dtypes.keys()


def test_the_vocabulary_is_part_of_the_bundle(tmp_path):
    words = ("block", "lift", "the")
    spec = dataclasses.replace(SPEC, words=words)
    runs.save(tmp_path / "run", runs.fast_wam(), spec, (2,))
    runs.save(tmp_path / "hashed", runs.fast_wam(), SPEC, (2,))
    export_policy.from_run(tmp_path / "run", tmp_path / "b", progress=False)
    policy, before = wamjax.load_policy(tmp_path / "b"), trained.load(tmp_path / "run")[0]
    hashed = trained.load(tmp_path / "hashed")[0]
    assert policy.manifest.spec.words == before.words == words and hashed.words == ()
    asked, length = runs.fast_wam(), SPEC.instruction_length
    asked.data.instruction_length = length
    ids = Vocabulary(words).tokenize("lift the block", length)
    seen = runs.observation()
    np.testing.assert_array_equal(policy.admit(seen)["instruction"], ids[None])
    np.testing.assert_array_equal(told(asked, before, ["lift the block"])["instruction"], ids[None])
    assert told(asked, hashed, ["lift the block"])["instruction"][0, 1] == 289
    want = act_by_run(before, seen, jax.random.key(0), spec)
    np.testing.assert_array_equal(policy(seen, 0), want)
    assert not np.array_equal(want, act_by_run(hashed, seen, jax.random.key(0)))
    text = (tmp_path / "b" / "policy.json").read_text()
    plain = re.sub(r',\s*"digest": "[0-9a-f]+"', "", text)
    (tmp_path / "b" / "policy.json").write_text(plain.replace('"lift"', '"the"', 1))
    with pytest.raises(ValueError, match="spec.words must be words, each once"):
        wamjax.load_policy(tmp_path / "b")


def test_step_mode_dtype_and_names_are_chosen(tmp_path):
    runs.save(tmp_path / "run", runs.fast_wam("joint"))
    chosen = Choices(mode="direct", dtype="float32", action_names=("x", "y", "z"))
    with pytest.raises(ValueError, match="acts in modes joint, not 'direct'"):
        export_policy.from_run(tmp_path / "run", tmp_path / "b", 3, None, chosen, False)
    assert not (tmp_path / "b").exists()
    arguments = [f"--workdir={tmp_path}/run", f"--output={tmp_path}/b", "--step=3",
                 "--mode=joint", "--dtype=float32", "--action_names=x,y,z"]  # fmt: skip
    with synthetic.command(export_policy, *arguments):
        export_policy.main([""])
    policy = wamjax.load_policy(tmp_path / "b")
    assert (policy.mode, policy.manifest.step) == ("joint", 3)
    assert policy.manifest.action_names == ("x", "y", "z") and policy.manifest.proprio_names == ()
    arrays = store.read(tmp_path / "b" / "weights" / "params").arrays
    assert {a.dtype.name for a in arrays.values()} == {"float32"}
    before = trained.load(tmp_path / "run", 3, "joint")[0]
    got, seen = policy(runs.observation(), 0), runs.observation()
    want = act_by_run(before, seen, jax.random.key(0))
    np.testing.assert_allclose(got, want, rtol=0.1, atol=0.1)  # the run computes in bfloat16
    assert not np.array_equal(got, want)
    with pytest.raises(ValueError, match="modes joint, not 'dirct'"):
        wamjax.load_policy(tmp_path / "b", mode="dirct")


def test_adapters_act_as_in_the_run(tmp_path):
    lora = {"lora.rank": 2, "lora.targets": (r"blocks/video/self_attn/q/kernel",)}
    sizes = {"model.layers": 2, "precision.compute": "float32"}
    runs.save(tmp_path / "run", runs.fast_wam(**lora, **sizes), steps=(2,))
    export_policy.from_run(tmp_path / "run", tmp_path / "b", progress=False)
    seen, before = runs.observation(), trained.load(tmp_path / "run")[0]
    got = wamjax.load_policy(tmp_path / "b")(seen, 0)
    np.testing.assert_array_equal(got, act_by_run(before, seen, jax.random.key(0)))


def test_a_planner_is_part_of_the_bundle(tmp_path):
    config = get("tabletop", "debug")
    config.objective.infer_steps, config.objective.value = 1, "value"
    config.model.layers = 1
    data = config.data
    spec = DataSpec(
        {n: tabletop.CAMERAS[n] for n in data.cameras}, tabletop.PROPRIO_DIM, tabletop.ACTION_DIM,
        data.chunk, data.frames, data.frame_stride, data.instruction_length, 10.0,
    )  # fmt: skip
    runs.save(tmp_path / "run", config, spec, (2,))
    other = config.copy_and_resolve_references()
    other.objective.value = "value_v"
    planner = runs.save(tmp_path / "planner", other, spec, (4,), seed=9)
    export_policy.from_run(tmp_path / "run", tmp_path / "b", None, planner, None, False)
    seen = runs.observation(spec)
    planned = trained.load(tmp_path / "run", mode="plan", planner=planner)[0]
    worded = dataclasses.replace(spec, words=("lift",))
    odd = runs.save(tmp_path / "odd", other, worded, (4,), seed=9)
    said = f"the planner {odd} gives words other ids"
    with pytest.raises(ValueError, match=said):
        trained.load(tmp_path / "run", mode="plan", planner=odd)
    with pytest.raises(ValueError, match=said):
        export_policy.from_run(tmp_path / "run", tmp_path / "c", None, odd, None, False)
    other.data.normalization = "mean_std"
    strange = runs.save(tmp_path / "strange", other, spec, (4,), seed=9)
    said = f"the planner {strange} was trained with another normalization of actions"
    with pytest.raises(ValueError, match=said):
        trained.load(tmp_path / "run", mode="plan", planner=strange)
    with pytest.raises(ValueError, match=said):
        export_policy.from_run(tmp_path / "run", tmp_path / "c", None, strange, None, False)
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(planner)
    policy = wamjax.load_policy(tmp_path / "b")
    assert policy.mode == "plan" and policy.manifest.action_names == ("dx", "dy", "dz", "grip")
    want = act_by_run(planned, seen, jax.random.key(0), spec)
    np.testing.assert_array_equal(policy(seen, 0), want)


def test_text_embeddings_are_part_of_the_bundle(tmp_path):
    cache = EmbeddingCache.create(tmp_path / "text", Settings("toy", runs.SPEC.instruction_length))
    rng = np.random.default_rng(0)
    texts = ["lift the block", "open the drawer"]
    cache.add({text: rng.normal(size=(2 + i, 16)) for i, text in enumerate(texts)})
    config = runs.fast_wam(**{"model.text.kind": "context"})
    runs.save(tmp_path / "run", config, steps=(2,))
    with pytest.raises(ValueError, match="the text embeddings are missing: give --embeddings=DIR"):
        export_policy.from_run(tmp_path / "run", tmp_path / "b", progress=False)
    chosen = Choices(embeddings=tmp_path / "text")
    export_policy.from_run(tmp_path / "run", tmp_path / "b", None, None, chosen, False)
    shutil.rmtree(tmp_path / "text")
    policy, before = wamjax.load_policy(tmp_path / "b"), trained.load(tmp_path / "run")[0]
    for text in texts:
        seen = runs.observation(text=text)
        want = act_by_run(before, seen, jax.random.key(0), SPEC, cache)
        np.testing.assert_array_equal(policy(seen, 0), want)
    assert policy.example()["instruction"] == "lift the block"
    with pytest.raises(ValueError, match="(?s)'open drawer' is not among the 2 that .* such as "
                       "'open the drawer'; add it by.*--cache=.*/b/embeddings"):  # fmt: skip
        policy(runs.observation(text="open drawer"))
    (file,) = (tmp_path / "b" / "embeddings").glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 4
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=f"embeddings/{file.name} in the same folder is not what"):
        wamjax.load_policy(tmp_path / "b")


def test_actions_on_a_mesh_are_the_same(exported):
    policy, _, folder = exported
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    spread = wamjax.load_policy(folder, mesh=mesh)
    kernels = [x for x in jax.tree.leaves(spread._acting.params) if x.ndim == 2]
    assert {len(x.sharding.device_set) for x in kernels} == {8}
    seen = runs.observation()
    np.testing.assert_allclose(spread(seen, 0), policy(seen, 0), rtol=0.05, atol=0.05)


def test_export_never_overwrites_and_is_atomic(tmp_path, monkeypatch):
    runs.save(tmp_path / "run", runs.fast_wam(), steps=(2,))
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there exists; remove it or choose another output"):
        export_policy.from_run(tmp_path / "run", tmp_path / "there", progress=False)
    monkeypatch.setattr(files.Manifest, "to_json", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_policy.from_run(tmp_path / "run", tmp_path / "b", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "there"]


def test_folders_that_are_not_bundles_are_errors(exported, tmp_path):
    with pytest.raises(FileNotFoundError, match="(?s)not a policy bundle .*export_policy"):
        wamjax.load_policy(tmp_path)
    folder = shutil.copytree(exported[2], tmp_path / "b")
    text = (folder / "policy.json").read_text()
    (folder / "policy.json").write_text(text.replace('"format": 1', '"format": 9', 1))
    with pytest.raises(ValueError, match="has format 9, this wamjax reads 1"):
        wamjax.load_policy(folder)
    plain = re.sub(r',\s*"digest": "[0-9a-f]+"', "", text)  # as if written by hand
    (folder / "policy.json").write_text(plain.replace('"layers": 1', '"layers": 3', 1))
    with pytest.raises(ValueError, match="(?s)does not fit the model.*of another shape"):
        wamjax.load_policy(folder)
    shutil.rmtree(folder / "weights")
    (folder / "policy.json").write_text(text)
    with pytest.raises(FileNotFoundError, match="lacks weights; export the policy again"):
        wamjax.load_policy(folder)
    with pytest.raises(FileNotFoundError, match="no checkpoint 4"):
        runs.save(tmp_path / "run", runs.fast_wam(), steps=(2,))
        export_policy.from_run(tmp_path / "run", tmp_path / "c", 4, progress=False)


def test_importing_wamjax_stays_light():
    code = (
        "import sys, wamjax; assert 'jax' not in sys.modules; f = wamjax.load_policy; "
        "heavy = {'torch', 'tensorflow', 'wandb', 'matplotlib', 'transformers'}; "
        "print(f.__name__, sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "load_policy []"
    with pytest.raises(AttributeError, match="no attribute 'load_polcy'"):
        _ = wamjax.load_polcy
