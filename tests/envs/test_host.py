"""Tests host environments in their own processes against a plain loop; crashes; the commands."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from envs import fake

from wamjax import config as configs
from wamjax import rollouts
from wamjax.data.records import Reader
from wamjax.envs import collection
from wamjax.envs.world import SETTLE, World, open_world
from wamjax.runs import closed_loop, trained
from wamjax.wam import noise as draws
from wamjax.wam.protocols import Policy

TASKS = ["left", "right", "right", "left", "right"]
KEYS = jax.random.split(jax.random.key(0), len(TASKS))


@dataclasses.dataclass(frozen=True)
class Told(Policy):
    """Goes in the direction of the second word, with some noise; also reads the picture."""

    def batch_spec(self, batch_size):
        return {}

    def policy(self, params, normalizers, observation, rng, mode=None):
        left = observation["instruction"][:, 1] == observation["left"][:, 0]
        way = jnp.where(left, -1.0, 1.0) * params
        bright = observation["video"].astype(jnp.float32).mean((1, 2, 3, 4)) / 255
        noise = 0.1 * draws.normal(rng, (len(way), 4, 1))
        return (way + 0.0 * bright)[:, None, None] + noise


def act(observation, keys):
    way = jnp.where(observation["left"][:, 0] == 1, -1.0, 1.0)
    actions = way[:, None, None] + 0.1 * draws.normal(keys, (len(way), 4, 1))
    return actions, {"seen": observation["images"]["side"], "x": observation["proprio"][:, 0]}


POLICY = jax.tree_util.Partial(act)


def play(world, tasks=TASKS, keys=KEYS, **options):
    told = {"left": np.array([[t == "left"] for t in tasks], np.int32)}
    options = {"shift": {}, "execute": 4, **options}
    return world.roll_out(POLICY, tasks, keys, told=told, **options)


@pytest.fixture(scope="module")
def recorded():
    return play(fake.world(), record=True)


@pytest.mark.parametrize("count", [1, 3])
def test_frames_are_kept_of_the_first_episodes(recorded, count):
    some = play(fake.world(), record=count)
    for name, frames in recorded.frames.items():
        np.testing.assert_array_equal(some.frames[name], frames[:count])
    np.testing.assert_array_equal(some.success, recorded.success)


def test_a_host_world_implements_the_protocol(recorded):
    assert isinstance(fake.world(), World)
    assert isinstance(open_world("envs.fake:world"), World)


def test_lockstep_in_rounds_equals_a_plain_loop(recorded):
    """Computes the expected result: one environment after another, in this process."""
    for row, task in enumerate(TASKS):
        environment = fake.Line()
        seen = environment.reset(task, int(jax.random.key_data(KEYS[row])[-1]), {})
        achieved = []
        for time in range(12):
            shown = recorded.frames["side"][row, time]
            np.testing.assert_array_equal(shown, seen["images"]()["side"])
            np.testing.assert_allclose(recorded.proprio[row, time], seen["proprio"], rtol=1e-6)
            if time % 4 == 0:
                own = jax.random.fold_in(jax.random.fold_in(KEYS[row], 1), time // 4)
                noise = 0.1 * jax.random.normal(own, (4, 1))
                chunk = (-1.0 if task == "left" else 1.0) + np.asarray(noise)
            np.testing.assert_allclose(recorded.actions[row, time], chunk[time % 4], rtol=1e-6)
            seen, done = environment.step(chunk[time % 4])
            achieved.append(done)
        assert recorded.success[row] == any(achieved)
        first = achieved.index(True) + 1 if any(achieved) else 12
        assert recorded.steps[row] == first
    assert recorded.success.all() and recorded.crashes.sum() == 0
    np.testing.assert_array_equal(
        recorded.extras["seen"], np.swapaxes(recorded.frames["side"][:, :12:4], 0, 1)
    )
    assert recorded.rewards.sum() == len(TASKS)


def test_finished_episodes_are_latched_and_rounds_do_not_matter(recorded):
    for workers in (2, 5):
        plain = play(fake.world(workers=workers))
        assert plain.frames is None
        np.testing.assert_array_equal(plain.success, recorded.success)
        np.testing.assert_array_equal(plain.steps, recorded.steps)
        np.testing.assert_array_equal(plain.returns, recorded.returns)
        # Everything before success is the same; nothing is simulated after it.
        for row, steps in enumerate(plain.steps):
            np.testing.assert_array_equal(plain.actions[row, :steps], recorded.actions[row, :steps])
            assert (plain.proprio[row, steps:] == plain.proprio[row, steps]).all()


def test_a_shift_is_told_to_the_environment():
    assert not play(fake.world(), shift={"slip": 0.18}).success.any()


def test_a_crashed_environment_is_restored_by_replay(recorded, tmp_path):
    for i in range(2):
        (tmp_path / f"crash-{i}").touch()
    done = play(fake.world(options={"crash": str(tmp_path)}))
    assert done.crashes.sum() == 2 and not list(tmp_path.iterdir())
    np.testing.assert_array_equal(done.success, recorded.success)
    np.testing.assert_array_equal(done.steps, recorded.steps)


def test_an_environment_that_always_crashes_fails_its_episode_only(tmp_path, caplog):
    (tmp_path / "crash-0").touch()
    done = play(fake.world(options={"crash": str(tmp_path), "always": True}), TASKS[:2], KEYS[:2])
    assert not done.success.any() and (done.crashes == 3).all()
    assert "task 'left'" in caplog.text and "died and is started again (3 of 3)" in caplog.text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cameras": {"front": (16, 16)}}, r"line has no camera 'front', only \['side'\]"),
        ({"cameras": {"side": (8, 8)}}, r"camera 'side' returned a picture of shape \(16, 16"),
        ({"proprio_names": ("x",)}, r"line returned proprio of shape \(2,\), .* \(1,\)"),
        ({"action_names": ("dx", "dy")}, r"actions of shape \(2, 4, 1\); line needs \(2, chunk, 2"),
    ],
)
def test_a_world_that_contradicts_its_description_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        play(fake.world(**changes), TASKS[:2], KEYS[:2])


def test_an_environment_that_cannot_be_created_reports_why():
    with pytest.raises(RuntimeError, match="task 'left' cannot be reset .*no_such_argument"):
        play(fake.world(options={"no_such_argument": 1}), TASKS[:1], KEYS[:1])


def test_the_expert_is_recorded_until_a_little_after_success(tmp_path):
    world = fake.world(expert=True, noisy=(1.0,))
    calm, drawn = world.demonstrate(TASKS, KEYS, noise=0.0), []
    shaky = world.demonstrate(TASKS, KEYS, noise=0.1, draw=drawn.append)
    assert len(drawn) == 1 and calm.recording.success.all()
    np.testing.assert_array_equal(calm.recording.actions, calm.intended)
    assert np.abs(shaky.recording.actions - shaky.intended).std() > 0.03
    for done in (calm, shaky):
        np.testing.assert_array_equal(
            done.length, np.minimum(done.recording.steps + SETTLE, world.max_steps)
        )
    again = world.demonstrate(TASKS[3:], KEYS[3:], noise=0.1)  # alone, in another round
    length = again.length[0]
    np.testing.assert_array_equal(
        again.recording.actions[0, :length], shaky.recording.actions[3, :length]
    )
    with pytest.raises(NotImplementedError, match="line has no scripted expert"):
        fake.world().demonstrate(TASKS, KEYS, noise=0.0)


def test_demonstrations_of_any_world_are_collected(tmp_path, monkeypatch):
    monkeypatch.setattr(fake, "world", functools.partial(fake.world, expert=True))
    settings = collection.Settings(env="envs.fake:world", episodes=4, noise=0.05)
    summary = collection.collect(tmp_path / "a", settings, progress=False)
    collection.collect(tmp_path / "b", settings, progress=False)
    reader = Reader(tmp_path / "a")
    assert summary["episodes"] == 4 == len(reader) and reader.info.robot == "line"
    assert reader.info.collection["tasks"] == ["left", "right"]
    assert [e.task for e in reader] == ["left", "right"] * 2
    for name in sorted(p.name for p in (tmp_path / "a").iterdir()):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(ValueError, match="line has no scripted expert to collect from"):
        monkeypatch.setattr(fake, "world", functools.partial(fake.world, expert=False))
        collection.collect(tmp_path / "c", settings)


def test_metaworld_is_a_world_and_its_seeds_determine_episodes(tmp_path):
    pytest.importorskip("metaworld")
    world = open_world("metaworld", workers=1)
    assert isinstance(world, World) and len(world.tasks) == 50
    keys = jax.random.split(jax.random.key(1), 1)
    one, two = (world.demonstrate(["handle-press-side"], keys, noise=0.0) for _ in range(2))
    assert one.recording.success.all() and 20 < one.length[0] < 80
    for name in ("corner2", "gripperPOV"):
        frames = one.recording.frames[name]
        assert frames.shape[2:] == (64, 64, 3) and frames.std() > 20
        np.testing.assert_array_equal(frames, two.recording.frames[name])
    # The same actions in closed loop give the same episode.
    replay = jax.tree_util.Partial(lambda o, k: o["actions"])
    played = world.roll_out(
        replay, ["handle-press-side"], keys, shift={}, told={"actions": one.recording.actions},
        max_steps=one.recording.actions.shape[1], execute=one.recording.actions.shape[1],
    )  # fmt: skip
    assert played.success.all() and played.steps[0] == one.recording.steps[0]


def test_evaluation_and_recording_work_with_any_world(tmp_path, monkeypatch):
    config = configs.base_config()
    config.data.cameras = ("side",)
    config.eval.update({"env": "envs.fake:world", "episodes": 4, "execute": 4, "max_steps": 12,
                        "batch_size": 4})  # fmt: skip
    told = closed_loop.told

    def with_side(config, policy, instructions):
        left = np.array([[text == "go left"] for text in instructions])
        words = told(config, policy, instructions)
        return words | {"left": np.where(left, words["instruction"][:, 1:2], -1)}

    monkeypatch.setattr(closed_loop, "told", with_side)
    policy = trained.Policy(Told(), jnp.float32(1.0), {})
    found = closed_loop.roll_out(policy, config, {})
    assert found["success_rate"] == 1 and list(found["per_task"]) == ["left", "right"]
    # A task here has one direction, so its actions also succeed blindly.
    assert found["blind_success_rate"] == 1 and found["crashes"] == 0
    summary = rollouts.record(policy, config, tmp_path / "made", ("left", "right"), 3, 7,
                              progress=False)  # fmt: skip
    reader = Reader(tmp_path / "made")
    assert summary["episodes"] == 3 == len(reader)
    assert reader.info.robot == "line" and reader.info.action_names == ("dx",)
    assert {e.instruction for e in reader} == {"go left", "go right"}
    assert reader[0].frames("side", [0]).shape == (1, 16, 16, 3)
