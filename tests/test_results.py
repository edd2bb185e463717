"""What is read from run directories, and the verdict beside a reference."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlx.errors import UserError
from rlx.results import (
    complete,
    minutes_of,
    read,
    reference_interval,
    score_matrix,
    short,
    statistics,
    verdict,
)
from rlx.study import Task
from tests.studies import ENVS, make_study, programs_of, record, reference


def result_of(tmp_path, scores, study=None, **keywords):
    program = programs_of(study or make_study(len(scores)))[0]
    record(tmp_path, program, scores, **keywords)
    return read(program, tmp_path)


def judge(tmp_path, scores, ours=None, **keywords):
    study = make_study(len(scores), references={("ppo", ENVS[0]): ours} if ours else {})
    result = result_of(tmp_path, scores, study, **keywords)
    return verdict(result, statistics(result), study)


def test_runs_are_read_with_their_last_evaluation_as_the_score(tmp_path):
    result = result_of(tmp_path, [10.0, 20.0, 40.0])
    assert result.state == "finished" and result.steps == 1000
    assert result.scores.tolist() == [10.0, 20.0, 40.0]
    assert result.runs[2].steps == (0, 250, 500, 750, 1000)
    assert result.runs[2].returns == (0.0, 10.0, 20.0, 30.0, 40.0)
    assert result.minutes == 4.0 and result.steps_per_second == 300.0  # of three runs together
    assert result.recorded["commit"] == "abc123"


def test_what_is_missing_or_begun_is_told_apart(tmp_path):
    first, second = programs_of(make_study(2))
    record(tmp_path, first, [1.0, 2.0], finished=False)
    assert read(first, tmp_path).state == "begun" and read(second, tmp_path).state == "missing"
    (tmp_path / first.folder / "seed-1" / "config.json").unlink()  # killed before it was made
    assert len(read(first, tmp_path).runs) == 1


def test_a_damaged_file_is_named(tmp_path):
    first = programs_of(make_study(2))[0]
    record(tmp_path, first, [1.0, 2.0])
    (tmp_path / first.folder / "seed-0" / "config.json").write_text("{")
    with pytest.raises(UserError, match="seed-0/config.json.*damaged"):
        read(first, tmp_path)


def test_a_clock_that_began_anew_after_a_resume_is_added():
    rows = [{"step": 0}, *({"step": 1, "time/elapsed": clock} for clock in (60.0, 120.0, 30.0, 90.0))]
    assert minutes_of(rows) == pytest.approx((120.0 + 90.0) / 60)
    slower = [{"step": 0, "time/compiling": 9.0}, {"step": 1, "time/elapsed": 60.0}]
    slower += [{"step": 2, "time/compiling": 9.0, "time/elapsed": 65.0}, {"step": 3, "time/elapsed": 70.0}]
    assert minutes_of(slower) == pytest.approx((60.0 + 70.0) / 60)


def test_statistics_by_hand_and_of_too_few_runs(tmp_path):
    found = statistics(result_of(tmp_path / "a", [1.0, 2.0, 3.0, 4.0, 20.0]))
    assert found.mean == 6.0 and found.iqm == 3.0 and found.low <= 3.0 <= found.high
    assert found.sd == pytest.approx(np.std([1.0, 2.0, 3.0, 4.0, 20.0], ddof=1))
    one = statistics(result_of(tmp_path / "b", [5.0]))
    assert (one.mean, one.iqm) == (5.0, 5.0) and math.isnan(one.sd) and math.isnan(one.low)
    none = statistics(result_of(tmp_path / "c", [5.0], failed=[0]))
    assert all(map(math.isnan, none))


def test_the_interval_of_a_reference_is_its_sd_or_a_share_of_its_value():
    task = Task(0.0, 1000.0)
    assert reference_interval(reference(500.0, 50.0), task, 0.05) == (450.0, 550.0)
    assert reference_interval(reference(1000.0, None), task, 0.05) == (950.0, 1050.0)
    assert reference_interval(reference(-200.0, 0.0), task, 0.05) == (-210.0, -190.0)
    assert reference_interval(reference(2.0, None), task, 0.05) == (-8.0, 12.0)  # a hundredth of the range


@pytest.mark.parametrize(
    ("scores", "word"),
    [([449.0] * 3, "worse"), ([450.0] * 3, "within"), ([550.0] * 3, "within"), ([551.0] * 3, "better")],
)
def test_the_verdict_is_where_the_mean_lies(tmp_path, scores, word):
    found = judge(tmp_path, scores, reference(steps=1000))
    assert found.word == word
    assert found.reason == ("with the reference's budget" if word == "worse" else "")


def test_fewer_steps_are_named_and_do_not_change_the_verdict(tmp_path):
    worse = judge(tmp_path / "a", [100.0] * 3, reference(steps=60_000))
    assert worse == ("worse", "at 1k of 60k steps: budget missing")
    assert judge(tmp_path / "b", [500.0] * 3, reference(steps=60_000)) == ("within", "at 1k of 60k steps")
    assert judge(tmp_path / "c", [900.0] * 3, reference(steps=1005)) == ("better", "")  # within 1 %: the same


def test_more_steps_than_the_reference_cannot_be_within_or_better(tmp_path):
    found = judge(tmp_path / "a", [900.0] * 3, reference(steps=500))
    assert found == ("not comparable", "better, but with 1k steps; the reference took 500")
    assert judge(tmp_path / "b", [100.0] * 3, reference(steps=500)).word == "worse"


def test_what_says_little_is_said_to(tmp_path):
    wide = judge(tmp_path / "a", [10.0] * 3, reference(12.0, 16.0, 1000))
    assert wide == ("within", "the reference's interval reaches the lowest score")
    unclear = judge(tmp_path / "b", [300.0, 440.0, 500.0], reference(steps=1000))
    assert unclear.word == "worse" and "not clear" in unclear.reason
    assert judge(tmp_path / "c", [960.0] * 3, reference(1000.0, None, 1000)) == ("within", "sd not known, 50 taken")
    unknown = judge(tmp_path / "d", [500.0] * 3, reference(steps=None))
    assert unknown == ("within", "the reference's budget is not known")


def test_what_is_not_comparable_and_why(tmp_path):
    assert judge(tmp_path / "a", [500.0] * 3) == ("not comparable", "no reference")
    failed = judge(tmp_path / "b", [500.0] * 3, reference(), failed=[1])
    assert failed == ("not comparable", "1 of 3 runs met a NaN or an infinity")
    assert judge(tmp_path / "c", [500.0] * 3, reference(), finished=False) == ("", "not finished")


def test_a_run_that_failed_counts_as_the_lowest_score_of_all(tmp_path):
    study = make_study(3)
    first, second = programs_of(study)
    record(tmp_path, first, [500.0, 600.0, 700.0], failed=[1])
    record(tmp_path, second, [1000.0, 0.0, 250.0])
    results = [read(program, tmp_path) for program in (first, second)]
    assert complete(results, study) == list(ENVS)
    assert complete(results[:1], study) == [ENVS[0]]
    matrix = score_matrix(results, study, "ppo", ENVS)
    np.testing.assert_allclose(matrix, [[0.5, 1.0], [0.0, 0.0], [0.7, 0.25]])


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (60_000_000, "60M"),
        (4_997_120, "5M"),
        (2_498_560, "2.5M"),
        (32_000, "32k"),
        (500, "500"),
        (999_936, "1M"),
        (10**9, "1000M"),
    ],
)
def test_steps_are_short(steps, text):
    assert short(steps) == text


def test_a_run_whose_last_evaluation_is_not_finite_has_no_score(tmp_path):
    program = programs_of(make_study(2))[0]
    record(tmp_path, program, [500.0, 500.0])
    with open(tmp_path / program.folder / "seed-1" / "metrics.jsonl", "a") as file:
        file.write('{"step": 1200, "eval/return": null}\n')
    result = read(program, tmp_path)
    assert [run.error for run in result.runs] == ["", "its last evaluation is not finite"]
    assert list(result.scores) == [500.0]


def test_runs_of_other_seeds_than_the_study_has_now_are_refused(tmp_path):
    record(tmp_path, programs_of(make_study(2))[0], [500.0, 500.0])
    with pytest.raises(UserError, match="runs of ppo on probe/lqr = .* holds .'seed-0', 'seed-1'.; name another --out"):
        read(programs_of(make_study(3))[0], tmp_path)


def test_evaluations_know_their_minutes(tmp_path):
    first = programs_of(make_study(2))[0]
    record(tmp_path, first, [1.0, 2.0])
    assert read(first, tmp_path).runs[1].minutes == (0.0, 1.0, 2.0, 3.0, 4.0)
