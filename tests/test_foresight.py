"""Tests comparisons of predictions with outcomes, by hand and with policies that know them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from wamjax import config as configs
from wamjax import foresight
from wamjax.runs import trained
from wamjax.wam.protocols import Policy

CHUNK = 4
MIDDLE = (-0.5, 0.575, 0.08)  # middle of the left zone's area, low


class Homing(Policy):
    """Goes to the middle of the left zone's area; predicts success if it is near, and imagines that
    nothing moves."""

    imagines = judges = True
    discount = 0.9

    def batch_spec(self, batch_size):
        return {}

    def policy(self, params, normalizers, observation, rng, mode=None):
        error = jnp.asarray(MIDDLE) - observation["proprio"][:, :3]
        now = jnp.concatenate([params * error, -jnp.ones((len(error), 1))], axis=1)
        return jnp.repeat(now[:, None], CHUNK, axis=1)

    def expect(self, params, normalizers, observation, rng, mode=None):
        away = jnp.linalg.norm(jnp.asarray(MIDDLE) - observation["proprio"][:, :3], axis=1)
        return jnp.exp(-away)

    def imagine(self, params, normalizers, observation, rng):
        return jnp.repeat(observation["video"], 2, axis=1)


HOMING = Homing()  # one for all tests: programs are compiled for an objective


def config():
    out = configs.base_config()
    out.eval.update({"tasks": ("reach_left_zone", "pick_red"), "max_steps": 18})
    out.data.chunk = CHUNK
    return out


@pytest.fixture(scope="module")
def plans():
    return foresight.watch(trained.Policy(HOMING, jnp.float32(2.0), {}), config(), 8)


def test_predictions_are_compared_with_the_end_of_their_chunk(plans):
    """16 of 18 steps are 4 whole chunks, and each chunk starts where the last one ended."""
    assert plans.value.shape == plans.achieved.shape == plans.open.shape == (8, 4)
    np.testing.assert_array_equal(plans.real[:, :-1], plans.now[:, 1:])
    np.testing.assert_array_equal(plans.predicted, plans.now)  # as it imagines
    assert (plans.real != plans.now).any(axis=(2, 3, 4)).any()


def test_returns_are_discounted_from_the_end_of_the_chunk_on(plans):
    reach, pick = plans.achieved[::2], plans.achieved[1::2]
    assert (pick == 0).all() and plans.open[1::2].all() and (reach[:, -1] > 0).any()
    for returns, is_open in zip(reach, plans.open[::2], strict=True):
        if returns[-1] > 0:  # a success: powers of 0.9 that grow by one chunk, and 1 from then on
            steps = np.log(returns) / np.log(0.9)
            np.testing.assert_allclose(steps, np.maximum(steps[0] - CHUNK * np.arange(4), 0),
                                       atol=1e-4)  # fmt: skip
            # Plans after a success do not count.
            assert (is_open[1:] == (returns[:-1] < 1)).all() or steps[0] == 0
    found = foresight.calibration(plans.value[plans.open], plans.achieved[plans.open])
    assert found["plans"] == plans.open.sum() == sum(b["plans"] for b in found["bins"])


def test_reused_keys_change_actions_by_the_difference_of_the_modes():
    class Modes(Homing):
        modes = ("direct", "frozen")

        def policy(self, params, normalizers, observation, rng, mode=None):
            actions = super().policy(params, normalizers, observation, rng)
            return actions + 0.25 * (mode == "frozen")

    plans = foresight.watch(trained.Policy(Modes(), jnp.float32(2.0), {}), config(), 2)
    assert plans.reuse.shape == (2, 4, 2)
    np.testing.assert_allclose(plans.reuse[..., 0], 0.25, rtol=1e-6)
    assert (plans.reuse[..., 1] > 0).all()


def test_calibration_of_values_that_are_right_and_of_some_that_are_not():
    rng = np.random.default_rng(0)
    value = rng.uniform(size=4000)
    achieved = (rng.uniform(size=4000) < value).astype(float)
    good, inverted = (foresight.calibration(x, achieved) for x in (value, 1 - value))
    assert good["error"] < 0.03 and good["correlation"] > 0.5
    assert good["rmse"] < good["rmse_constant"]
    assert inverted["error"] > 0.4 and inverted["correlation"] < -0.5
    assert inverted["rmse"] > inverted["rmse_constant"]
    inside = [b["low"] <= b["predicted"] <= b["high"] for b in good["bins"]]
    assert np.mean(inside) > 0.6 and len(inside) == foresight.BINS
    assert foresight.calibration(np.full(5, 0.5), np.zeros(5))["correlation"] is None


def test_frames_are_compared_with_a_still_picture(plans):
    still = foresight.frames(plans)
    assert still["psnr"] == still["psnr_still"] and still["relative"] == 1
    half = (np.float32(plans.now) + plans.real) / 2
    better = foresight.frames(plans._replace(predicted=half))
    assert better["relative"] == pytest.approx(0.25, abs=1e-6)
    assert better["psnr"] == pytest.approx(still["psnr"] + 10 * np.log10(4), abs=1e-3)
    assert 0 < still["changed"] < 0.5 and still["psnr_changed"] < still["psnr"]  # most stays
    gain = better["psnr_changed"] - better["psnr_changed_still"]
    assert gain == pytest.approx(10 * np.log10(4), abs=1e-3)
    only = plans._replace(open=np.zeros_like(plans.open))
    only.open[0, 0] = True
    assert foresight.frames(only)["psnr_still"] != still["psnr_still"]


def test_run_writes_a_report_of_what_the_policy_predicts(monkeypatch, tmp_path):
    policy = trained.Policy(HOMING, jnp.float32(2.0), {})
    monkeypatch.setattr(trained, "load", lambda *args: (policy, config(), 7))
    found = foresight.run(tmp_path, episodes=8)
    assert json.loads((tmp_path / "foresight.json").read_text()) == found
    assert found["step"] == 7 and set(found) == {"step", "mode", "episodes", "values", "frames"}
    assert {p.name for p in (tmp_path / "media").iterdir()} == {"values.png", "futures.png"}

    class Silent(Homing):
        imagines = judges = False

    blind = trained.Policy(Silent(), None, {})
    monkeypatch.setattr(trained, "load", lambda *args: (blind, config(), 7))
    with pytest.raises(ValueError, match="predicts neither frames nor values"):
        foresight.run(tmp_path)


def test_options_other_than_the_defaults_are_part_of_file_names(monkeypatch, tmp_path):
    """The future of a plan is not the imagined one, so no frames are compared."""
    planning = trained.Policy(HOMING, jnp.float32(2.0), {}, "plan")
    monkeypatch.setattr(trained, "load", lambda *args: (planning, config(), 7))
    found = foresight.run(tmp_path, step=7, mode="plan", planner="runs/other", episodes=2)
    assert "frames" not in found and "values" in found
    assert (tmp_path / "foresight_plan_7_other.json").exists()
    assert [p.name for p in (tmp_path / "media").iterdir()] == ["values_plan_7_other.png"]


def test_losses_by_level_are_drawn(tmp_path):
    found = {"sigma": [0.1, 1.0, 10.0], "loss_policy": [3.0, 2.0, 1.0], "loss_value": [1.0, 1, 2]}
    foresight.draw_levels(found, tmp_path / "levels.png")
    assert (tmp_path / "levels.png").stat().st_size > 1000
