"""Evaluation statistics against known values and a coverage check."""

from __future__ import annotations

import numpy as np
import pytest

from rlx.statistics import iqm, iqm_band, performance_profile, stratified_bootstrap_interval, summary
from rlx.types import UserError


def test_iqm_is_the_mean_of_the_middle_half_by_hand():
    # 0 .. 7: the two smallest and the two largest are dropped, (2 + 3 + 4 + 5) / 4
    assert iqm(np.array([[0.0, 7.0], [6.0, 1.0], [5.0, 2.0], [3.0, 4.0]])) == 3.5


def test_iqm_pools_all_runs_and_tasks_and_ignores_outliers():
    scores = np.array([[0, 1, 2, 3], [4, 5, 6, 7]], float)
    wild = scores.copy()
    wild[0, 0], wild[1, 3] = -1e9, 1e9
    assert iqm(scores) == iqm(wild) == 3.5


def test_iqm_of_fewer_than_four_scores_is_the_mean():
    assert iqm([[1.0], [2.0], [9.0]]) == 4.0


def test_the_interval_contains_the_statistic_and_is_ordered():
    scores = np.random.default_rng(0).normal(size=(8, 3))
    low, high = stratified_bootstrap_interval(scores)
    assert low < iqm(scores) < high


def test_the_interval_grows_with_the_confidence_and_shrinks_with_the_runs():
    scores = np.random.default_rng(1).normal(size=(40, 2))

    def width(x, confidence):
        low, high = stratified_bootstrap_interval(x, confidence=confidence, num_resamples=500)
        return high - low

    assert width(scores, 0.5) < width(scores, 0.95) < width(scores, 0.999)
    assert width(scores, 0.95) < width(scores[:5], 0.95)


def test_resampling_is_stratified_by_task():
    """Tasks of other levels but with equal runs: no interval. Scores pooled over tasks would give a wide one."""
    low, high = stratified_bootstrap_interval(np.tile([0.0, 100.0, 1000.0], (6, 1)), np.mean)
    assert (low, high) == pytest.approx((1100 / 3, 1100 / 3))


def test_tasks_are_resampled_independently():
    """Equal columns: the mean over tasks of independent resamples spreads less, by the root of their number."""
    scores = np.tile(np.random.default_rng(2).normal(size=(30, 1)), (1, 9))
    one = np.diff(stratified_bootstrap_interval(scores[:, :1], np.mean))
    nine = np.diff(stratified_bootstrap_interval(scores, np.mean))
    assert nine / one == pytest.approx(1 / 3, rel=0.15)


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation():
    scores = np.random.default_rng(3).normal(size=(200, 1))
    low, high = stratified_bootstrap_interval(scores, np.mean)
    half = 1.96 * scores.std() / np.sqrt(200)
    assert (low, high) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.02)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(100):
        low, high = stratified_bootstrap_interval(rng.normal(size=(20, 2)), confidence=0.8, num_resamples=100)
        covered += low <= 0.0 <= high
    assert 65 <= covered <= 92


def test_the_seed_decides_the_interval():
    scores = np.random.default_rng(5).normal(size=(6, 2))
    first = stratified_bootstrap_interval(scores, num_resamples=100, seed=1)
    assert first == stratified_bootstrap_interval(scores, num_resamples=100, seed=1)
    assert first != stratified_bootstrap_interval(scores, num_resamples=100, seed=2)


def test_summary_by_hand():
    # Deviations of the tasks over runs: sqrt(2) and sqrt(8)
    result = summary([[1.0, 10.0], [3.0, 14.0]])
    assert result.mean == 7.0
    assert result.sd == pytest.approx(1.5 * np.sqrt(2))
    assert result.iqm == 6.5  # 3 and 10
    assert (result.low, result.high) == stratified_bootstrap_interval([[1.0, 10.0], [3.0, 14.0]])


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, 2.0], r"\[runs, tasks\].*\[2\]"),
        (np.zeros((2, 3, 4)), r"\[2, 3, 4\]"),
        (np.zeros((0, 3)), r"\[0, 3\]"),
        ([[1.0], [2.0, 3.0]], "same runs for every task"),
        ([["a"], ["b"]], "numbers"),
        ([[1.0, 2.0], [3.0, np.nan]], "nan in run 1 of task 1"),
        ([[1.0, np.inf], [3.0, 4.0]], "inf in run 0 of task 1"),
    ],
)
@pytest.mark.parametrize("function", [iqm, stratified_bootstrap_interval, summary])
def test_scores_of_other_shapes_or_not_finite_are_refused(function, scores, message):
    with pytest.raises(UserError, match=message):
        function(scores)


def test_intervals_need_two_runs_and_sensible_settings():
    with pytest.raises(UserError, match="at least 2 runs"):
        summary([[1.0, 2.0]])
    with pytest.raises(UserError, match="confidence.*95"):
        stratified_bootstrap_interval([[1.0], [2.0]], confidence=95)
    with pytest.raises(UserError, match="num_resamples.*0"):
        stratified_bootstrap_interval([[1.0], [2.0]], num_resamples=0)


def test_a_performance_profile_by_hand():
    scores = [[0.1, 0.6], [0.3, 0.8]]
    found = performance_profile(scores, [0.0, 0.3, 0.5, 0.8])
    assert found.value.tolist() == [1.0, 0.5, 0.5, 0.0]  # strictly above: 0.3 is not above 0.3
    assert (found.low <= found.value).all() and (found.value <= found.high).all()
    # Above 0.3 there is every run of the second task and none of the first, whatever is resampled within tasks
    assert found.low[1] == found.high[1] == 0.5


def test_the_band_of_a_profile_is_the_interval_of_each_fraction():
    scores = np.random.default_rng(6).normal(size=(12, 4))
    found = performance_profile(scores, [-0.5, 0.4], num_resamples=4000)
    for index, threshold in enumerate((-0.5, 0.4)):
        interval = stratified_bootstrap_interval(scores, lambda x, t=threshold: float((x > t).mean()))
        assert (found.low[index], found.high[index]) == pytest.approx(interval, abs=0.03)


def test_the_band_of_a_curve_is_the_iqm_and_its_interval_at_every_point():
    curves = np.random.default_rng(7).normal(size=(9, 3)) + [0.0, 5.0, 10.0]
    found = iqm_band(curves, num_resamples=4000)
    for point in range(3):
        assert found.value[point] == pytest.approx(iqm(curves[:, point : point + 1]))
        interval = stratified_bootstrap_interval(curves[:, point : point + 1])
        assert (found.low[point], found.high[point]) == pytest.approx(interval, abs=0.08)


@pytest.mark.parametrize("thresholds", [0.5, [], [[0.1], [0.2]]])
def test_thresholds_of_another_shape_are_refused(thresholds):
    with pytest.raises(UserError, match="thresholds"):
        performance_profile([[1.0], [2.0]], thresholds)
