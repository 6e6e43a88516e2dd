"""Tests a toy plug of each kind (method, world, backbone, kernel), without changing the package."""

import functools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from envs import fake
from plugs import other, reader

from wamjax import config as configs
from wamjax import train, wam, weights
from wamjax.data import pipeline
from wamjax.data.windows import Windows
from wamjax.envs.world import open_world
from wamjax.models import attention
from wamjax.models.visibility import causal
from wamjax.runs import closed_loop, evaluation, trained
from wamjax.weights import families


def config():
    out = configs.base_config()
    out.objective.name = "plugs.method:METHOD"
    out.data.sources.demos = configs.source(
        collect={"env": "envs.fake:world", "episodes": 24, "noise": 0.2}
    )
    out.data.cameras, out.data.frames, out.data.chunk = ("side",), 1, 4
    out.data.batch_size, out.total_steps, out.log_every = 16, 60, 20
    out.optim.learning_rate, out.optim.ema_decay = 3e-3, 0.9
    out.eval.env, out.eval.episodes, out.eval.execute = "envs.fake:world", 8, 4
    out.eval.max_steps, out.mesh.data = 20, 1
    return out


def test_a_custom_method_and_world_are_trained_and_evaluated(tmp_path, monkeypatch):
    monkeypatch.setattr(fake, "world", functools.partial(fake.world, expert=True))
    asked = config()
    asked.data.root = str(tmp_path)
    assert train.run(asked, tmp_path / "run", devices=jax.devices()[:1])
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert all(row["teacher"] == 1 for row in rows)
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert result["episodes"] == 8 and result["variant"] == "plugs.method:METHOD"
    policy, own, step = trained.load(tmp_path / "run")
    assert step == 60 and policy.objective.modes == ("direct",)
    world = open_world("envs.fake:world")
    again = closed_loop.roll_out(policy, own, {}, world)
    assert again["outcomes"] == result["outcomes"]
    assert evaluation.versions(world)["wamjax"]
    with pytest.raises(ValueError, match="a Cloning does not plan"):
        policy.objective.with_planner(policy.objective)


def test_a_custom_source_is_read_in_place_and_trained_on(tmp_path):
    asked = config()
    asked.data.sources.demos = configs.source(path="plugs.reader:Dot", episodes=2)
    asked.total_steps, asked.eval.episodes, asked.data.root = 2, 0, str(tmp_path)
    spec, statistics, sources = pipeline.open_episodes(asked)
    assert spec.words == ("go", "left", "right") and spec.cameras == {"side": (16, 16)}
    assert statistics["proprio"]["max"][0] == 2  # from the first two episodes
    windows = Windows(sources[0].reader, spec)
    assert len(windows) == sum(reader.STEPS[:2])
    again = pickle.loads(pickle.dumps(windows))  # as a worker process gets it
    for i in (3, 9, 14):
        mine, other = windows[i], again[i]
        episode, step = windows.locate(i)
        assert np.argwhere(mine["images"]["side"][0])[0].tolist() == [8, step, 0]
        assert mine["images"]["side"].max() == 255 - episode
        jax.tree.map(np.testing.assert_array_equal, mine, other)
    assert train.run(asked, tmp_path / "run", devices=jax.devices()[:1])
    assert trained.load(tmp_path / "run")[0].words == spec.words
    asked.total_steps, asked.data.sources.demos.path = 3, "plugs.reader:slow"
    with pytest.raises(ValueError, match=r"'spec.words' of the data are \('slowly',\), .* \(\)"):
        train.run(asked, tmp_path / "run", devices=jax.devices()[:1])
    asked.data.sources.demos.path = "plugs.reader:Dot"
    assert train.run(asked, tmp_path / "run", devices=jax.devices()[:1])
    assert not list(tmp_path.glob("*.array*")) and not (tmp_path / "plugs.reader:Dot").exists()
    for path, said in (
        ("plugs.reader:Dott", "has no 'Dott', did you mean 'Dot'"),
        ("plugs.reader:broken", "has no camera 'side'; it has ..front.."),
    ):
        asked.data.sources.demos.path = path
        with pytest.raises(ValueError, match=said):
            pipeline.open_episodes(asked)


def test_unknown_plug_names_are_errors():
    for name, said in (
        ("fast_wan", "config.objective.name = 'fast_wan' does not exist, did you mean 'fast_wam'"),
        ("plugs.metod:METHOD", "config.objective.name='plugs.metod:METHOD': No module named"),
        ("plugs.method:METOD", "has no 'METOD', did you mean 'METHOD'"),
    ):
        with pytest.raises(ValueError, match=said):
            wam.method(name)


def test_a_custom_kernel_computes_a_networks_attention():
    chosen = attention.named("plugs.other:kernel")
    assert hash(chosen) == hash(attention.named("plugs.other:kernel"))
    rng = np.random.default_rng(0)
    q, k, v = ({g: rng.standard_normal((2, 2, n, 8)).astype(np.float32)
                for g, n in (("a", 3), ("b", 5))} for _ in range(3))  # fmt: skip
    other.CALLS.clear()
    got = jax.jit(functools.partial(chosen, visibility=causal("a", "b")))(q, k, v)
    assert len(other.CALLS) == 2  # one for each set of visible keys
    want = attention.masked(q, k, v, causal("a", "b"))
    for group in q:
        np.testing.assert_allclose(got[group], want[group], atol=1e-6)


def test_a_custom_backbone_needs_only_a_key_map_and_sizes(tmp_path):
    name = "plugs.other:BACKBONE"
    small = families.named(layers=2, width=48, heads=2, ffn=96, channels=4) | {}
    sizes = {k: v for k, v in small.items() if k in families.family(name).sizes}
    shapes = families.family(name).params(dict(families.family(name).sizes) | sizes)
    keys = iter(jax.random.split(jax.random.key(0), 200))
    params = jax.tree.map(lambda s: jax.random.normal(next(keys), s.shape, jnp.float32), shapes)
    weights.export(name, params, tmp_path / "toy.safetensors", sizes)
    loaded = weights.load(name, tmp_path / "toy.safetensors", sizes)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
