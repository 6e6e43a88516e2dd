"""Tests the study of gates on made-up outcomes."""

import adaptive_tabletop as study
import numpy as np

RUNGS, MS = (1, 4, 8), [1.0, 2.0, 4.0]


def outcomes(states=4000):
    """Half of the states gain 0.5 by choosing, the others nothing; gates know which."""
    rng = np.random.default_rng(0)
    gains = rng.random(states) < 0.5
    came = np.stack([np.full(states, 0.2), 0.2 + 0.4 * gains, 0.2 + 0.5 * gains], axis=1)
    benefit = came[:, None, :] - came[:, :2, None]
    return {"came": came, "succeeded": came, "benefit": benefit, "spread": gains + 0.0,
            "rise": rng.random(states)}, gains  # fmt: skip


def test_a_perfect_gate_equals_the_oracle_and_beats_the_others():
    x, gains = outcomes()
    choices = study._choices(x, np.array(MS), np.random.default_rng(1))
    for mine, best in zip(choices["learned"], choices["oracle"], strict=True):
        np.testing.assert_array_equal(mine, best)
    free, dear = choices["oracle"][0], choices["oracle"][-1]
    np.testing.assert_array_equal(free, 2 * gains)
    np.testing.assert_array_equal(dear, 0 * gains)
    rungs = np.stack(choices["oracle"])
    assert (np.diff(rungs, axis=0) <= 0).all()  # a higher price never climbs further
    spent = {
        name: np.array([study._spent(x["succeeded"], rung, RUNGS, MS) for rung in some])
        for name, some in choices.items()
    }
    oracle = spent["oracle"][np.argsort(spent["oracle"][:, 0])]
    for name, points in spent.items():
        ceiling = np.interp(points[:, 0], oracle[:, 0], oracle[:, 2])
        assert (points[:, 2] <= ceiling + 1e-9).all(), name
    # A gate that knows which states gain only loses the four proposals that it always makes.
    assert max(spent["spread"][:, 2]) == max(oracle[:, 2]) > max(spent["random"][:-1, 2])


def test_reliability_compares_expected_with_observed_benefits():
    x, gains = outcomes()
    right = study._reliability(x, len(gains))
    for expected, came, error, states in right:
        assert abs(expected - came) < 1e-9 and error >= 0 and states > 0
    x["benefit"] = 2 * x["benefit"]
    assert any(abs(came - expected) > 0.4 for expected, came, _, _ in study._reliability(x, 4000))


def test_a_table_at_equal_effort():
    found = {"states": 8, "curves": {"fixed": [[1.0, 1.0, 0.2], [2.0, 4.0, 0.5]]}}
    assert "| fixed | 25.0 | 30.0 | 40.0 | 50.0 | - | - |" in study.at_equal_effort(found)
