"""Tests that robots asking over the wire act like a policy inside the world's program."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import synthetic
from envs import fake as line
from serving import fake
from serving.fake import serving

from wamjax import drive
from wamjax.bundle.policy import Chunk
from wamjax.data.spec import DataSpec
from wamjax.envs import tabletop
from wamjax.envs.world import open_world
from wamjax.serving import remote
from wamjax.serving.names import Names, tables
from wamjax.serving.worker import Batching, Worker
from wamjax.training import state as states

CAMERAS = dict(tabletop.CAMERAS)
SPEC = DataSpec(CAMERAS, tabletop.PROPRIO_DIM, tabletop.ACTION_DIM, 4, 3, 1, 12, 10.0)


def chase(video, proprio):
    """Computes actions (b, 4, 4) from every pixel and the state, in numpy or jax."""
    bright = (video.reshape(len(video), -1) == 255).sum(-1) % 7 / 8 - 0.375
    rows = jnp if isinstance(proprio, jax.Array) else np
    first = rows.stack([-proprio[:, 0], bright, -proprio[:, 2], bright], -1)
    return rows.stack([first, first / 2, -first, first / 4], 1).astype("float32")


class Chaser(fake.Policy):
    def act(self, arrays, key):
        self.batches.append(len(arrays["proprio"]))
        return Chunk(chase(arrays["video"], arrays["proprio"]))


class Committed(Chaser):
    """Continues its committed actions, which its first actions repeat."""

    prefix_max = 2

    def admit(self, observation, prefix=None, budget_ms=None):
        given = np.zeros((1, 2, 4), np.float32)
        if prefix is not None:
            given[0, : len(prefix)] = prefix
        count = np.array([0 if prefix is None else len(prefix)])
        return super().admit(observation) | {"given": given, "count": count}

    def act(self, arrays, key):
        chunk = super().act(arrays, key).actions
        return Chunk(follow(chunk, arrays["given"], arrays["count"], np))


def follow(chunk, given, count, rows):
    """Returns a chunk after the given actions, continuing from the last one."""
    kept = rows.arange(2) < count[:, None]
    last = rows.where(kept[:, 1:], given[:, -1], 0)[:, None]
    return rows.concatenate(
        [rows.where(kept[:, :, None], given, chunk[:, :2]), chunk[:, 2:] + last / 2], 1
    )


def test_delayed_robots_send_their_committed_actions(capsys):
    world, tasks = open_world("tabletop"), ["reach_red", "pick_red"]
    work = Worker(
        {"direct": Committed(SPEC)}, Names(tables((), tuple(CAMERAS))), Batching(2, 0.02)
    )
    about = {"horizon": 4, "cameras": {k: [*v, 3] for k, v in CAMERAS.items()}, "prefix": 2,
             "actions": {"size": 4, "hold": [False, False, False, True]}}  # fmt: skip
    options = {"max_steps": 6, "execute": 2}
    keys = jax.vmap(lambda i: states.key(0, "evaluate", i))(np.arange(2))
    with serving(work=work, about=about) as running:
        robots = remote.Robots(2, "127.0.0.1", running.port)
        join = robots.join("prefix", 2)
        over_wire = robots.roll_out(world, tasks, keys, join=join, **options)
        # Such a join passes no prefix to the policy.
        switched = robots.roll_out(world, tasks, keys, join=robots.join("switch", 2), **options)
        report = remote.evaluate(robots, world, tasks, 2, seed=0, batch=2, join=join, **options)
        flags = f"--server=ws://127.0.0.1:{running.port} --robots=2 --join=prefix --delay=2"
        scenes = "--tasks=reach_red,pick_red", "--episodes=2", "--max_steps=6"
        with synthetic.command(drive, *flags.split(), *scenes):
            drive.main([])
        with pytest.raises(ValueError, match="--delay=3: the policy takes at most 2 committed"):
            robots.join("prefix", 3)
        robots.close()

    def inside(observation, keys, prefix):
        images = jnp.concatenate([observation["images"][name] for name in CAMERAS], -2)
        chunk = chase(images, observation["proprio"])
        return follow(chunk, prefix[0], prefix[1], jnp)

    want = world.roll_out(
        jax.tree_util.Partial(inside), tasks, keys, shift={}, told={}, cameras=tuple(CAMERAS),
        join=join, **options,
    )  # fmt: skip
    np.testing.assert_array_equal(over_wire.actions, want.actions)
    assert np.abs(want.actions - switched.actions).max() > 0.1
    assert report["jerk"] > 0 and report["episodes"] == 2
    command = json.loads(capsys.readouterr().out)  # of the same episodes
    assert command | report | {"round_trip_ms": None} == command | {"round_trip_ms": None}
    assert (command["join"], command["delay"]) == ("prefix", 2)


class Goer(fake.Policy):
    """Goes where it is told."""

    def admit(self, observation, prefix=None, budget_ms=None):
        way = {"go left": -1.0, "go right": 1.0}.get(observation["instruction"], 0.0)
        return super().admit(observation) | {"way": np.full((1, 4, 1), way, np.float32)}

    def act(self, arrays, key):
        return Chunk(arrays["way"])


def test_each_robot_of_a_world_that_runs_a_few_at_a_time_is_told_its_own_task():
    """Once they were given the tasks of the first few, and half of them went the other way."""
    world = line.world(workers=2)
    tasks = ["left", "right", "right", "left", "right"]
    policy = Goer(DataSpec(dict(world.cameras), 2, 1, 4, 1, 1, 8, 10.0))
    work = Worker({"direct": policy}, Names(tables((), ("side",))), Batching(4, 0.0))
    about = {"horizon": 4, "actions": {"size": 1}, "cameras": {"side": [16, 16, 3]}}
    keys = jax.vmap(lambda i: states.key(0, "evaluate", i))(np.arange(len(tasks)))
    with serving(work=work, about=about) as running:
        robots = remote.Robots(len(tasks), "127.0.0.1", running.port)
        done = robots.roll_out(world, tasks, keys, execute=4)
        robots.close()
    assert done.success.all() and done.tasks == tuple(tasks)
    assert (np.sign(done.actions[:, 0, 0]) == [-1 if task == "left" else 1 for task in tasks]).all()


def test_a_loop_over_the_wire_equals_the_jitted_loop():
    world, tasks = open_world("tabletop"), ["reach_red", "pick_red", "reach_left_zone"]
    policy = Chaser(SPEC)
    work = Worker({"direct": policy}, Names(tables((), tuple(CAMERAS))), Batching(4, 0.02))
    about = {"horizon": 4, "actions": {"size": 4}, "cameras": {k: [*v, 3] for k, v in
             CAMERAS.items()}}  # fmt: skip
    options = {"max_steps": 6, "execute": 2}
    with serving(work=work, about=about) as running:
        robots = remote.Robots(3, "127.0.0.1", running.port)
        keys = jax.vmap(lambda i: states.key(0, "evaluate", i))(np.arange(3))
        over_wire = robots.roll_out(world, tasks, keys, **options)
        report = remote.evaluate(robots, world, tasks, 5, seed=0, batch=3, **options)
        robots.close()

    def inside(observation, keys):
        images = jnp.concatenate([observation["images"][name] for name in CAMERAS], -2)
        return chase(images, observation["proprio"])

    want = world.roll_out(
        jax.tree_util.Partial(inside), tasks, keys, shift={}, told={}, cameras=tuple(CAMERAS),
        **options,
    )  # fmt: skip
    np.testing.assert_array_equal(over_wire.actions, want.actions)
    np.testing.assert_array_equal(over_wire.success, want.success)
    assert np.abs(want.actions).max() > 0.1 and len(np.unique(want.actions)) > 20
    assert max(policy.batches[len(Batching(4).sizes) + 10 :]) == 4  # three robots, one call
    assert report["episodes"] == 6 and len(report["outcomes"]) == 6
    assert report["outcomes"][:3] == "".join(str(int(x)) for x in want.success)
    assert report["success_rate"] == report["outcomes"].count("1") / 6
    assert 0 < report["round_trip_ms"]["p50"] <= report["round_trip_ms"]["p99"]
