"""Rolling out, counted against a policy whose success is known; errors of `wamjax.evaluate`."""

import functools

import jax.numpy as jnp
import pytest

from wamjax import config as configs
from wamjax import evaluate
from wamjax.envs import tabletop

MIDDLE = (-0.5, 0.575, 0.08)  # of where the left zone may be, low


class Homing:
    """Goes to the middle of the left zone's area, whatever it is told, by proprioception alone."""

    def policy(self, params, normalizers, observation, rng, mode=None):
        error = jnp.asarray(MIDDLE) - observation["proprio"][:, :3]
        now = jnp.concatenate([params * error, -jnp.ones((len(error), 1))], axis=1)
        return jnp.stack([now, now], axis=1)


def config(**values):
    out = configs.base_config()
    settings = {"tasks": ("reach_left_zone", "pick_red"), "execute": 2, "max_steps": 20}
    out.eval.update(settings | values)
    return out


@functools.cache
def rolled(episodes, batch_size, gain=4.0, seed=0, shift="none"):
    asked = config(episodes=episodes, batch_size=batch_size, seed=seed)
    policy = evaluate.Policy(Homing(), jnp.float32(gain), {})
    return evaluate.roll_out(policy, asked, tabletop.SHIFTS[shift])


def test_success_is_counted_by_task():
    got = rolled(12, 4)
    reach, pick = got["per_task"]["reach_left_zone"], got["per_task"]["pick_red"]
    assert got["episodes"] == 12 and reach["episodes"] == pick["episodes"] == 6
    assert reach["success_rate"] >= 0.5 and pick["success_rate"] == 0
    assert got["success_rate"] == pytest.approx(reach["success_rate"] / 2)
    assert 1 <= reach["steps"] <= 20 and pick["steps"] is None


def test_episodes_do_not_depend_on_how_they_are_batched():
    """11 episodes become 12, equally many of each task; what fills the last batch up is not
    counted."""
    assert rolled(11, 4) == rolled(12, 4) == rolled(12, 8)


def test_the_policy_the_seed_and_the_shift_matter():
    still = rolled(12, 4, gain=0.0)
    assert still["success_rate"] < rolled(12, 4)["success_rate"]
    assert rolled(12, 4, seed=1) != rolled(12, 4)
    delayed = rolled(12, 4, shift="action_delay")["per_task"]["reach_left_zone"]
    assert delayed["steps"] > rolled(12, 4)["per_task"]["reach_left_zone"]["steps"]


def test_tasks_are_those_of_the_data_unless_asked():
    asked = config(tasks=())
    assert evaluate.task_names(asked) == list(tabletop.TASKS)
    for name, tasks in (("a", ("pick_red", "reach_red")), ("b", ("reach_red", "reach_left_zone"))):
        asked.data.sources[name] = configs.source(collect={"tasks": tasks})
    assert evaluate.task_names(asked) == ["pick_red", "reach_red", "reach_left_zone"]
    asked.eval.tasks = ("pick_red",)
    assert evaluate.task_names(asked) == ["pick_red"]
    asked.eval.tasks = ("pick_rod",)
    with pytest.raises(KeyError, match="pick_rod.*pick_red"):
        evaluate.roll_out(evaluate.Policy(Homing(), jnp.float32(1), {}), asked, tabletop.Shift())


def test_dials_override_a_shift():
    asked = config()
    assert evaluate._shift(asked, "lighting") == tabletop.SHIFTS["lighting"]
    asked.eval.shift.colours = 0.1
    shift = evaluate._shift(asked, "lighting")
    assert (shift.lighting, shift.colours, shift.distractors) == (0.5, 0.1, 0)


@pytest.mark.parametrize(
    "key, value, shift, message",
    [
        ("shift", {}, "lightning", "shift 'lightning' does not exist, did you mean 'lighting'"),
        ("shift", {"colour": 1.0}, "none", "eval.shift.colour is no dial, did you mean 'colours'"),
        ("env", "table_top", "none", "eval.env 'table_top' is not 'tabletop'"),
    ],
)
def test_errors_name_the_offender_before_anything_is_loaded(key, value, shift, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate.run(config(**{key: value}), tmp_path, shift=shift)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*not a run"):
        evaluate.run(config(), tmp_path)
