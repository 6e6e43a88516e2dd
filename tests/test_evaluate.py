"""Tests evaluation of a policy whose success is known, and errors of `wamjax.evaluate`."""

import dataclasses
import functools
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from absl import app
from data import synthetic

from wamjax import config as configs
from wamjax import evaluate, wam
from wamjax.data.spec import DataSpec
from wamjax.envs import outcomes, tabletop, world
from wamjax.runs import closed_loop, evaluation, trained
from wamjax.wam import noise as draws
from wamjax.wam.protocols import Policy

TABLETOP = world.open_world("tabletop")
MIDDLE = (-0.5, 0.575, 0.08)  # middle of the left zone's area, low


class Homing(Policy):
    """Goes to the middle of the left zone's area by proprioception alone, for any instruction."""

    def batch_spec(self, batch_size):
        return {}

    def policy(self, params, normalizers, observation, rng, mode=None):
        error = jnp.asarray(MIDDLE) - observation["proprio"][:, :3]
        now = jnp.concatenate([params * error, -jnp.ones((len(error), 1))], axis=1)
        return jnp.stack([now, now], axis=1)


HOMING = Homing()  # one for all tests: programs are compiled for an objective


def config(**values):
    out = configs.base_config()
    settings = {"tasks": ("reach_left_zone", "pick_red"), "execute": 2, "max_steps": 20}
    out.eval.update(settings | values)
    return out


@functools.cache
def rolled(episodes, batch_size, gain=4.0, seed=0, shift="none"):
    asked = config(episodes=episodes, batch_size=batch_size, seed=seed)
    policy = trained.Policy(HOMING, jnp.float32(gain), {})
    return closed_loop.roll_out(policy, asked, world.shift_of(TABLETOP, shift))


def test_success_is_counted_by_task():
    got = rolled(12, 4)
    reach, pick = got["per_task"]["reach_left_zone"], got["per_task"]["pick_red"]
    assert got["episodes"] == 12 and reach["episodes"] == pick["episodes"] == 6
    assert reach["success_rate"] >= 0.5 and pick["success_rate"] == 0
    assert got["success_rate"] == pytest.approx(reach["success_rate"] / 2)
    assert 1 <= reach["steps"] <= 20 and pick["steps"] is None


def test_episodes_do_not_depend_on_how_they_are_batched():
    """11 episodes become 12, equally many per task; padding of the last batch does not count."""
    assert rolled(11, 4) == rolled(12, 4) == rolled(12, 8)


def test_success_depends_on_policy_seed_and_shift():
    still = rolled(12, 4, gain=0.0)
    assert still["success_rate"] < rolled(12, 4)["success_rate"]
    assert rolled(12, 4, seed=1) != rolled(12, 4)
    delayed = rolled(12, 4, shift="action_delay")["per_task"]["reach_left_zone"]
    assert delayed["steps"] > rolled(12, 4)["per_task"]["reach_left_zone"]["steps"]


class Shaky(Homing):
    """Does the same with random noise."""

    def policy(self, params, normalizers, observation, rng, mode=None):
        actions = super().policy(params, normalizers, observation, rng)
        return actions + 0.5 * draws.normal(rng, actions.shape)


def test_episodes_of_a_policy_that_draws_do_not_depend_on_how_they_are_batched():
    policy, found = trained.Policy(Shaky(), jnp.float32(4.0), {}), []
    for size in (4, 6):
        asked = config(episodes=12, batch_size=size)
        asked.eval.blind = False  # a replay draws no noise
        found.append(closed_loop.roll_out(policy, asked, {}))
    assert found[0] == found[1]
    assert rolled(12, 4) | found[1] != rolled(12, 4)


def test_the_blind_replay_is_the_floor():
    """Replays happen in another scene of the same task: they never beat the policy, and for a
    policy that ignores its observation they are as good."""
    looking = rolled(12, 4)
    assert 0 <= looking["blind_success_rate"] < looking["success_rate"]
    still = rolled(12, 4, gain=0.0)
    assert still["blind_success_rate"] == still["success_rate"]
    low, high = looking["interval"]
    assert low < looking["success_rate"] < high


def test_a_delay_costs_success_and_the_robot_waits_or_goes_on():
    """Repeats the same action, so a delay means acting on an old position."""

    def late(way, delay, execute):
        asked = config(episodes=12, batch_size=4, execute=execute, join=way, delay=delay)
        asked.eval.blind = False
        policy = trained.Policy(HOMING, jnp.float32(4.0), {})
        return closed_loop.roll_out(policy, asked, {})

    want = {k: v for k, v in rolled(12, 4).items() if k != "blind_success_rate"}
    assert late("sync", 0, 2) == want
    waits, goes = late("sync", 1, 1), late("switch", 1, 1)
    reach = [x["per_task"]["reach_left_zone"] for x in (late("sync", 0, 1), waits, goes)]
    assert reach[0]["steps"] < reach[2]["steps"] and reach[0]["steps"] < reach[1]["steps"]
    assert waits["jerk"] > 1.5 * goes["jerk"] > 0  # stop and go


def test_a_killed_evaluation_resumes_without_repeating_episodes(tmp_path, monkeypatch):
    asked, policy = config(episodes=12, batch_size=4), trained.Policy(HOMING, jnp.float32(4), {})
    path, about = tmp_path / "episodes.jsonl", {"step": 3}
    whole = closed_loop.roll_out(policy, asked, {}, record=outcomes.Outcomes(path, about))
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 12 and json.loads(lines[0]) == {"asked": about}
    path.write_text("".join(lines[:10]) + lines[10][:20])  # killed while it wrote the second batch
    calls, play = [], closed_loop.play
    monkeypatch.setattr(closed_loop, "play", lambda *a, **k: calls.append(0) or play(*a, **k))
    again = closed_loop.roll_out(policy, asked, {}, record=outcomes.Outcomes(path, about))
    assert again == whole and len(calls) == 2
    assert sorted(path.read_text().splitlines()) == sorted("".join(lines).splitlines())
    # Nothing is reused of another checkpoint, or when a finished evaluation is repeated.
    for other in (outcomes.Outcomes(path, {"step": 4}), outcomes.Outcomes(path, about, anew=True)):
        assert not other.has("policy", [0])


def test_tasks_default_to_those_of_the_data():
    asked = config(tasks=())
    assert closed_loop.task_names(asked) == list(tabletop.TASKS)
    for name, tasks in (("a", ("pick_red", "reach_red")), ("b", ("reach_red", "reach_left_zone"))):
        asked.data.sources[name] = configs.source(collect={"tasks": tasks})
    assert closed_loop.task_names(asked) == ["pick_red", "reach_red", "reach_left_zone"]
    asked.eval.tasks = ("pick_red",)
    assert closed_loop.task_names(asked) == ["pick_red"]
    asked.eval.tasks = ("pick_rod",)
    asked.eval.episodes = 2
    with pytest.raises(KeyError, match="pick_rod"):
        closed_loop.roll_out(trained.Policy(HOMING, jnp.float32(1), {}), asked, {})


def test_dials_override_a_shift():
    assert world.shift_of(TABLETOP, "lighting") == {"lighting": 0.5}
    both = world.shift_of(TABLETOP, "lighting", {"colours": 0.1})
    assert both == {"lighting": 0.5, "colours": 0.1}
    assert world.shift_of(TABLETOP, "lighting", {"lighting": 0.0}) == {}


@pytest.mark.parametrize(
    "key, value, shift, message",
    [
        ("shift", {}, "lightning", "shift 'lightning' does not exist in tabletop, did you mean "
         "'lighting'"),
        ("shift", {"colour": 1.0}, "none", "eval.shift.colour: tabletop has no dial 'colour', did "
         "you mean 'colours'"),
        ("env", "table_top", "none", "eval.env = 'table_top' does not exist, did you mean "
         "'tabletop'"),
    ],
)
def test_bad_settings_are_errors_before_anything_is_loaded(key, value, shift, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluation.run(config(**{key: value}), tmp_path, shift=shift)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eval.tasks": ("pick_rod",)}, "no task 'pick_rod', did you mean 'pick_red'"),
        ({"eval.execute": 9}, "eval.execute = 9, and a plan has 8 actions"),
        ({"eval.join": "blind"}, r"eval.join = 'blind' must be one of .* did you mean 'blend'"),
        ({"eval.delay": 3, "eval.join": "switch"}, "eval.execute = 2 must lie in 3 to 5: plans of"),
        ({"eval.delay": 1, "eval.join": "prefix"}, "prefixes of at most 0 actions .objective.pref"),
        ({"eval.execute": 0}, "eval.execute = 0 must be at least 1"),
        ({"eval.batch_size": 0}, "eval.batch_size = 0 must be at least 1"),
        ({"eval.episodes": -5}, "eval.episodes = -5 must be at least 1"),
        ({"eval.env": "calvin"}, "eval.env = 'calvin' does not exist; there are tabletop"),
        ({"eval.env": "no.such:world"}, "eval.env='no.such:world': No module"),
        ({"data.cameras": ("overhead", "side")}, r"tabletop has no \['side'\]"),
        ({"data.cameras": ("overhead",)}, r"video of the policy are \(64, 128, 3\), of tab"),
        ({"model.text.kind": "context", "model.context_width": 8}, "no 'instruction': set it to 0"),
    ],
)
def test_impossible_evaluations_are_errors_before_training(changes, message):
    asked = config(episodes=4)
    asked.objective.infer_steps = 1
    asked.update_from_flattened_dict({"data.frames": 2, "data.chunk": 8, "model.codec.patch": 8})
    closed_loop.check(asked, built(asked))
    asked.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        closed_loop.check(asked, built(asked))


def built(asked, action_dim=4, cameras=("overhead", "gripper")):
    """Returns a policy for the tabletop with any ``data.cameras``."""
    seen = {name: tabletop.CAMERAS[name] for name in cameras}
    return wam.build(asked, DataSpec(seen, 5, action_dim, 8, 2, 8, 12, 10.0))


def test_policies_of_other_robots_are_not_rolled_out():
    asked = config(episodes=4)
    asked.update_from_flattened_dict({"data.frames": 2, "data.chunk": 8, "model.codec.patch": 8})
    with pytest.raises(ValueError, match=r"actions of the policy are \(7,\), of tabletop \(4,"):
        closed_loop.check(asked, built(asked, action_dim=7))


def test_a_policy_looks_through_its_own_cameras_in_their_order():
    """Moves by what its left picture shows."""

    class Looking(Homing):
        def policy(self, params, normalizers, observation, rng, mode=None):
            half = observation["video"][:, 0, :, :64].astype(jnp.float32).mean((1, 2, 3)) / 255
            return jnp.broadcast_to(half[:, None, None], (len(half), 2, 4))

    asked = config(episodes=4, max_steps=2)
    policy, names = trained.Policy(Looking(), None, {}), ["reach_red"] * 3
    keys = closed_loop.episode_keys(asked, "evaluate", np.arange(3))
    moved = {}
    for cameras in (("overhead", "gripper"), ("gripper", "overhead"), ("gripper",)):
        asked.data.cameras = cameras
        policy = dataclasses.replace(policy, cameras=cameras)
        done = closed_loop.play(policy, asked, TABLETOP, names, keys, {}, record=True)
        frames = world.composite(done.frames, cameras)
        assert frames.shape[3] == 64 * len(cameras)
        moved[cameras] = done.actions[:, 0, 0], frames[:, 0]
    both, turned, one = moved.values()
    np.testing.assert_array_equal(turned[0], one[0])
    assert np.abs(turned[0] - both[0]).min() > 1e-3
    np.testing.assert_array_equal(turned[1], np.roll(both[1], 64, axis=2))
    np.testing.assert_array_equal(one[1], both[1][:, :, 64:])


def test_options_of_the_command_are_in_the_name_of_the_file(tmp_path, monkeypatch):
    asked, seen = config(episodes=0), {}
    monkeypatch.setattr(evaluate, "find", lambda *_: types.SimpleNamespace(config=asked))
    monkeypatch.setattr(evaluation, "run", lambda config, *rest: seen.update(rest=rest))

    def command(*options):
        with synthetic.command(evaluate, "--workdir=RUN", *options):
            evaluate.main([""])

    with pytest.raises(app.UsageError, match="0 episodes: give --episodes"):
        command()
    command("--episodes=3", "--execute=1", "--tasks=pick_red,reach_red", "--join=blend",
            "--delay=1", "--dials=colours=0.1,action_delay=2")  # fmt: skip
    assert asked.eval.join == "blend" and asked.eval.delay == 1
    assert asked.eval.episodes == 3 and asked.eval.execute == 1
    assert asked.eval.tasks == ("pick_red", "reach_red")
    assert asked.eval.shift.to_dict() == {"colours": 0.1, "action_delay": 2}
    label = "episodes3_execute1_pick_red-reach_red_joinblend_delay1_colours0.1_action_delay2"
    assert seen["rest"] == ("RUN", None, None, "none", None, label, None)
    asked.eval.env = "aloha"
    command("--episodes=3", "--workers=2")  # no other episodes, so no part of the name
    assert asked.eval.env == "aloha:workers=2" and seen["rest"][5] == "episodes3"
    with pytest.raises(app.UsageError, match="--dials=lighting is not of the form DIAL=NUMBER"):
        command("--dials=lighting")


def test_a_folder_that_is_not_a_run_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*not a run"):
        evaluation.run(config(), tmp_path)
