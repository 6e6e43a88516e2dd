"""Tests that `evaluate`, a bundle and a remote world give the same episodes of a host world."""

import shutil

import jax
import numpy as np
import pytest
from bundle import runs
from envs import fake
from envs.test_remote import Served

import wamjax
from wamjax import export_policy
from wamjax.data.spec import DataSpec
from wamjax.envs.world import open_world
from wamjax.runs import closed_loop, trained

EPISODES, EXECUTE, STEPS = 8, 4, 12
SPEC = DataSpec({"side": (fake.SIZE, fake.SIZE)}, 2, 1, 8, 3, 1, 4, 10.0)


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """Returns (the policy that `evaluate` loads of a run, its config, its bundle)."""
    root = tmp_path_factory.mktemp("world")
    sizes = {"data.cameras": ("side",), "data.chunk": 8, "data.instruction_length": 4}
    config = runs.fast_wam(**sizes, **{"precision.compute": "float32"})
    config.eval.update({"env": "envs.fake:world", "episodes": EPISODES, "execute": EXECUTE,
                        "max_steps": STEPS, "batch_size": EPISODES, "blind": False})  # fmt: skip
    runs.save(root / "run", config, SPEC)
    policy, config, _ = trained.load(root / "run")
    export_policy.from_run(root / "run", root / "bundle", progress=False)
    shutil.rmtree(root / "run")
    return policy, config, wamjax.load_policy(root / "bundle")


def alone(bundle, config, tasks):
    """Returns the success of a bundle's policy in a plain loop in this process."""
    keys = closed_loop.episode_keys(config, "evaluate", np.arange(len(tasks)))
    world = fake.world()
    lines = [fake.Line() for _ in tasks]
    seeds = np.asarray(jax.random.key_data(keys))[:, -1]
    seen = [e.reset(t, int(s), {}) for e, t, s in zip(lines, tasks, seeds, strict=True)]
    success, actions = np.zeros(len(tasks), bool), []
    for time in range(STEPS):
        if time % EXECUTE == 0:
            plan = jax.vmap(lambda k, n=time // EXECUTE: jax.random.fold_in(
                jax.random.fold_in(k, 1), n))(keys)  # fmt: skip
            chunk = bundle({
                "images": {"side": np.stack([s["images"]()["side"] for s in seen])},
                "proprio": np.stack([s["proprio"] for s in seen]).astype(np.float32),
                "instruction": [world.tasks[task] for task in tasks],
            }, plan)  # fmt: skip
        actions.append(chunk[:, time % EXECUTE])
        for i, line in enumerate(lines):
            seen[i], done = line.step(actions[-1][i])
            success[i] |= done
    return success, np.stack(actions, axis=1)


@pytest.mark.filterwarnings("ignore:proprio", "ignore:instruction")
def test_evaluate_and_the_bundle_succeed_in_the_same_episodes(policies):
    policy, config, bundle = policies
    report = closed_loop.roll_out(policy, config, {})
    tasks = [("left", "right")[i % 2] for i in range(EPISODES)]
    success, actions = alone(bundle, config, tasks)
    assert report["outcomes"] == "".join(str(int(s)) for s in success)
    keys = closed_loop.episode_keys(config, "evaluate", np.arange(EPISODES))
    done = closed_loop.play(policy, config, fake.world(workers=EPISODES), tasks, keys, {},
                            record=True)  # fmt: skip
    np.testing.assert_allclose(done.actions, actions, atol=1e-3)


def test_a_remote_world_gives_the_same_report(policies):
    policy, config, _ = policies
    here = closed_loop.roll_out(policy, config, {})
    with Served("envs.fake:Line") as server:
        config = config.copy_and_resolve_references()
        config.eval.env = f"remote:at={server.address},workers=3"
        there = closed_loop.roll_out(policy, config, {}, open_world(config.eval.env))
    assert there == here
