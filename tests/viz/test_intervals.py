import math

import numpy as np
import pytest

from wamjax.viz import intervals


def test_wilson_is_the_set_of_rates_that_a_score_test_keeps():
    got = intervals.wilson(13, 20)
    for end in (got.low, got.high):  # the definition: |rate - p| = z sqrt(p (1 - p) / n)
        assert abs(0.65 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 20))
    assert got.low < got.mean == 0.65 < got.high


@pytest.mark.parametrize("n", [1, 7, 500])
def test_wilson_stays_inside_and_mirrors(n):
    none, every = intervals.wilson(0, n), intervals.wilson(n, n)
    assert none.low == 0 < none.high < 1 and every.high == 1
    assert none.high == pytest.approx(1 - every.low)


def test_wilson_covers_the_truth_as_often_as_it_says():
    rng, n, p = np.random.default_rng(0), 40, 0.9
    hits = [
        i.low <= p <= i.high for i in (intervals.wilson(k, n) for k in rng.binomial(n, p, 2000))
    ]
    assert 0.93 < np.mean(hits) < 0.98


def test_student_t_against_the_table():
    got = intervals.student_t([1.0, 2.0, 3.0])
    assert got.mean == 2 and got.high - got.mean == pytest.approx(4.302653 / math.sqrt(3))
    assert intervals.student_t([0.5]) == (0.5, -math.inf, math.inf)


def test_bootstrap_widens_with_variance_between_seeds():
    rng = np.random.default_rng(1)
    alike = [rng.integers(0, 2, 400) for _ in range(10)]
    apart = [np.full(400, rate) for rate in np.linspace(0, 1, 10)]
    narrow, wide = intervals.bootstrap(alike), intervals.bootstrap(apart)
    assert narrow.low < narrow.mean < narrow.high and narrow.high - narrow.low < 0.08
    assert wide.mean == pytest.approx(0.5) and wide.high - wide.low > 0.3
    assert intervals.bootstrap(alike) == narrow  # no hidden randomness


@pytest.mark.parametrize("successes,trials", [(3, 2), (-1, 2), (0, 0)])
def test_invalid_rates_are_errors(successes, trials):
    with pytest.raises(ValueError, match="not a rate"):
        intervals.wilson(successes, trials)


def test_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        intervals.student_t([1.0, math.nan])


def test_percent():
    assert intervals.Interval(0.831, 0.7951, 0.862).percent() == "83.1 [79.5, 86.2]"
