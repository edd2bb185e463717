"""Two algorithms beside each other: by hand, against scipy, and how often an algorithm beats itself."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from rlx.comparison import _studentised, _wins, compare, probability_of_improvement, sentence
from rlx.types import UserError


def like_returns(rng, num_runs, num_tasks):
    """Two humps and many equal values, as returns of tasks that some seeds solve and others never touch."""
    solved = rng.random((num_runs, num_tasks)) < 0.7
    return np.where(solved, np.round(rng.normal(900.0, 60.0, (num_runs, num_tasks)), -1), 0.0)


def test_the_probability_by_hand():
    # 1 beats neither 2 nor 3; 3 beats 2 and ties with 3: (0 + 0 + 1 + 1/2) / 4
    assert probability_of_improvement([[1.0], [3.0]], [[2.0], [3.0]]).probability == 0.375
    # and a second task, on which every run of the first is above every one of the second: the mean of 3/8 and 1
    two = probability_of_improvement([[1.0, 9.0], [3.0, 8.0]], [[2.0, 7.0], [3.0, 6.0]])
    assert two.probability == compare([[1.0, 9.0], [3.0, 8.0]], [[2.0, 7.0], [3.0, 6.0]]).probability == 0.6875


def test_the_probability_is_that_of_mann_and_whitney():
    rng = np.random.default_rng(0)
    x, y = like_returns(rng, 9, 3), like_returns(rng, 12, 3)
    expected = [scipy.stats.mannwhitneyu(x[:, task], y[:, task]).statistic / (9 * 12) for task in range(3)]
    assert probability_of_improvement(x, y).probability == pytest.approx(np.mean(expected))


def test_the_bootstrap_interval_is_that_of_scipy():
    rng = np.random.default_rng(1)
    x, y = rng.normal(0.5, 1.0, (15, 1)), rng.normal(0.0, 2.0, (12, 1))

    def probability(first, second):
        return scipy.stats.mannwhitneyu(first, second).statistic / (len(first) * len(second))

    options = {"n_resamples": 3000, "method": "percentile", "vectorized": False, "rng": np.random.default_rng(2)}
    expected = scipy.stats.bootstrap((x[:, 0], y[:, 0]), probability, **options).confidence_interval
    found = probability_of_improvement(x, y, num_resamples=3000)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_the_statistic_is_that_of_brunner_and_munzel():
    rng = np.random.default_rng(3)
    x, y = like_returns(rng, 10, 1), like_returns(rng, 14, 1) - 30.0
    labels = (np.arange(24) < 10).reshape(1, 1, 24)
    pooled = np.concatenate([x, y])
    probability, error = _studentised(_wins(pooled, pooled), labels, 10, 14)
    expected = scipy.stats.brunnermunzel(y[:, 0], x[:, 0]).statistic
    assert (probability[0] - 0.5) / error[0] == pytest.approx(expected)


def test_the_p_value_is_that_of_permuting_the_statistic_in_scipy():
    rng = np.random.default_rng(4)
    x, y = rng.normal(1.0, 1.0, (8, 1)), rng.normal(0.0, 2.0, (7, 1))

    def statistic(first, second):
        return abs(scipy.stats.brunnermunzel(first, second).statistic)

    options = {"n_resamples": 2000, "vectorized": False, "alternative": "greater", "rng": np.random.default_rng(5)}
    expected = scipy.stats.permutation_test((x[:, 0], y[:, 0]), statistic, **options).pvalue
    assert 0.02 < expected < 0.6
    assert compare(x, y).p_value == pytest.approx(expected, abs=0.03)


def test_the_interval_excludes_a_half_where_the_test_rejects_and_nowhere_else():
    rng = np.random.default_rng(6)
    excluded = []
    for shift in np.linspace(0.0, 2.0, 30):
        found = compare(rng.normal(shift, 1.0, (10, 2)), rng.normal(0.0, 1.0, (10, 2)), num_permutations=999)
        assert found.low <= found.probability <= found.high
        excluded.append(not found.low <= 0.5 <= found.high)
        assert excluded[-1] == (found.p_value <= 0.05) == (found.claim in ("better", "worse"))
    assert 3 < sum(excluded) < 27


@pytest.mark.parametrize("num_tasks", [1, 4])
def test_an_algorithm_is_hardly_ever_better_than_itself(num_tasks):
    """200 pairs of ten seeds each, drawn from one distribution: at most 7 % may claim a difference."""
    rng = np.random.default_rng(7)
    claims = [compare(like_returns(rng, 10, num_tasks), like_returns(rng, 10, num_tasks)).claim for _ in range(200)]
    assert set(claims) <= {"better", "worse", "no difference shown"}
    assert sum(claim != "no difference shown" for claim in claims) <= 14


def test_a_large_difference_is_found():
    rng = np.random.default_rng(8)
    claims = [compare(rng.normal(1.5, 1.0, (10, 2)), rng.normal(0.0, 1.0, (10, 2))).claim for _ in range(20)]
    assert claims.count("better") >= 18 and "worse" not in claims


def test_ten_runs_are_needed_of_each_before_a_winner_is_named():
    high, low = np.arange(100.0, 112.0)[:, None], np.arange(12.0)[:, None]
    assert compare(high[:10], low[:10]).claim == "better" and compare(low[:10], high[:10]).claim == "worse"
    for first, second in ((high[:9], low), (high, low[:9])):
        found = compare(first, second)
        assert found.claim == "exploratory" and found.low > 0.5
        text = sentence(found, "a", "b")
        assert "Exploratory" in text and "better" not in text
    assert sentence(compare(high, low), "a", "b").endswith("a is better.")
    assert sentence(compare(low, high), "a", "b").endswith("b is better.")
    assert "no difference shown" in sentence(compare(high, high), "a", "b")


def test_runs_that_all_win_do_not_make_the_probability_certain():
    found = compare(np.arange(100.0, 110.0)[:, None], np.arange(10.0)[:, None])
    assert found.probability == found.high == 1.0 and 0.6 < found.low < 0.95


def test_equal_scores_show_nothing():
    found = compare(np.full((10, 2), 3.0), np.full((10, 2), 3.0))
    assert (found.probability, found.p_value, found.claim) == (0.5, 1.0, "no difference shown")


def test_swapping_the_two_mirrors_the_finding():
    rng = np.random.default_rng(9)
    x, y = like_returns(rng, 10, 3), like_returns(rng, 11, 3)
    there, back = compare(x, y), compare(y, x)
    assert there.probability + back.probability == pytest.approx(1.0)
    assert there.low + back.high == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("function", [probability_of_improvement, compare])
def test_what_cannot_be_compared_is_refused(function):
    with pytest.raises(UserError, match="same tasks, got 1 and 2"):
        function(np.zeros((3, 1)), np.zeros((3, 2)))
    with pytest.raises(UserError, match="at least 2 runs"):
        function(np.zeros((1, 1)), np.zeros((3, 1)))
    with pytest.raises(UserError, match="nan in run 0"):
        function([[np.nan], [1.0]], np.zeros((3, 1)))
    with pytest.raises(UserError, match="confidence"):
        function(np.zeros((3, 1)), np.zeros((3, 1)), confidence=2.0)
