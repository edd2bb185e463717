from __future__ import annotations

import matplotlib
import numpy as np
import pytest

from rlx.errors import UserError
from rlx.logging import JsonlWriter
from rlx.plotting import Curve, _curve, _rows, band, plot
from rlx.run_directory import RunDirectory


def make_run(path, rows, algorithm="ppo", env="probe/one", **entries):
    run = RunDirectory.create(path, {"algorithm": algorithm, "env": env, **entries})
    writer = JsonlWriter(run.metrics_path)
    for step, metrics in rows:
        writer.write(step, metrics)
    writer.close()
    return run


def curve(steps, values):
    return Curve("env", "ppo", np.array(steps, float), np.array(values, float))


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_a_picture_of_several_runs_is_written_in_each_format(tmp_path, suffix, magic):
    runs = []
    for seed in range(3):
        rows = [(step, {"eval/return": step + seed}) for step in (0, 100, 200)]
        runs.append(make_run(tmp_path / f"a{seed}", rows))
        runs.append(make_run(tmp_path / f"b{seed}", rows, algorithm="sac", env="probe/two").path)
    out = plot(runs, tmp_path / "new" / f"curve.{suffix}")
    assert out.read_bytes().startswith(magic)


def test_a_picture_names_environment_algorithm_number_of_runs_and_axes(tmp_path):
    import matplotlib

    rows = [(0, {"eval/return": 1.0}), (10, {"eval/return": 2.0})]
    runs = [make_run(tmp_path / "0", rows), make_run(tmp_path / "1", rows), make_run(tmp_path / "2", rows, "sac")]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = plot(runs, tmp_path / "curve.svg").read_text()
    for part in ("probe/one", "ppo (mean and range of 2 runs)", "sac (1 run)"):
        assert part in text
    assert "environment steps" in text and "mean return of an evaluation episode" in text


def test_runs_with_other_settings_are_lines_of_their_own_and_stopped_ones_are_left_out(tmp_path):
    import matplotlib

    rows = [(step, {"eval/return": 1.0}) for step in (0, 10, 1000)]
    runs = [make_run(tmp_path / f"{i}", rows, algo={"gamma": g, "tau": 1}) for i, g in enumerate((0.9, 0.9, 0.5))]
    runs.append(make_run(tmp_path / "cut", rows[:2], algo={"gamma": 0.9, "tau": 1}))
    (tmp_path / "cut" / "failed.json").write_text("{}")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = plot(runs, tmp_path / "curve.svg").read_text()
        alone = plot(runs[3:], tmp_path / "alone.svg").read_text()
    for part in ("ppo gamma=0.9 (mean and range of 2 runs)", "ppo gamma=0.5 (1 run)", "(1 stopped run left out)"):
        assert part in text
    assert "tau" not in text and "ppo (1 run)" in alone


def test_without_evaluations_the_return_of_training_is_drawn(tmp_path):
    import matplotlib

    rows = [(1, {"train/return": 1.0, "eval/return": float("nan")}), (2, {"train/return": 2.0})]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = plot([make_run(tmp_path / "0", rows)], tmp_path / "curve.svg").read_text()
    assert "mean return of a training episode" in text


def test_pyplot_is_left_alone(tmp_path):
    import matplotlib.pyplot

    backend = matplotlib.get_backend()
    plot([make_run(tmp_path / "0", [(1, {"eval/return": 1.0})])], tmp_path / "curve.png")
    assert matplotlib.pyplot.get_fignums() == [] and matplotlib.get_backend() == backend


def test_two_runs_give_mean_and_range():
    steps, mean, low, high = band([curve([0, 10], [1, 3]), curve([0, 10], [3, 9])])
    np.testing.assert_array_equal(steps, [0, 10])
    np.testing.assert_array_equal([mean, low, high], [[2, 6], [1, 3], [3, 9]])


def test_runs_measured_at_different_steps_are_interpolated_where_they_overlap():
    steps, mean, _, _ = band([curve([0, 10], [0, 10]), curve([5, 8, 20], [0, 3, 15])])
    np.testing.assert_array_equal(steps, [5, 8, 10])
    np.testing.assert_allclose(mean, [(5 + 0) / 2, (8 + 3) / 2, (10 + 5) / 2])


def test_three_runs_give_an_interval_around_the_mean_inside_the_range():
    values = np.array([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])
    _, mean, low, high = band([curve([0, 1], row) for row in values])
    np.testing.assert_allclose(mean, [3.0, 5.0])
    assert 1.0 <= low[0] < 3.0 < high[0] <= 6.0
    assert low[1] == high[1] == 5.0


def test_what_cannot_be_plotted_is_named(tmp_path):
    run = make_run(tmp_path / "run", [(1, {"train/loss": 1.0})])
    with pytest.raises(UserError, match="curve.bmp.*must end in .png, .svg, .pdf"):
        plot([run], tmp_path / "curve.bmp")
    with pytest.raises(UserError, match="nothing to plot"):
        plot([], tmp_path / "curve.png")
    with pytest.raises(UserError, match="does not exist"):
        plot([tmp_path / "missing"], tmp_path / "curve.png")
    with pytest.raises(UserError, match="metric 'train/los' does not exist. Did you mean train/loss"):
        plot([run], tmp_path / "curve.png", "train/los")
    with pytest.raises(UserError, match="metric 'eval/return' does not exist. Allowed: train/loss"):
        plot([run], tmp_path / "curve.png")
    with pytest.raises(UserError, match="has no metrics yet"):
        plot([make_run(tmp_path / "empty", [])], tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


def test_the_axis_is_the_time_of_training_where_that_is_asked_for(tmp_path):
    rows = [(step, {"eval/return": 1.0, "time/elapsed": 30.0 * step}) for step in range(3)]
    rows += [(3, {"eval/return": 2.0, "time/elapsed": 60.0, "time/compiling": 1.0})]  # resumed: its clock begins anew
    run = make_run(tmp_path / "0", rows)
    np.testing.assert_allclose(_curve(run, _rows(run), "eval/return", "minutes", "ppo").steps, [0, 0.5, 1, 2])
    plot([run], tmp_path / "curve.png", x="minutes")
    with pytest.raises(UserError, match="x = 'hours' .* steps, minutes"):
        plot([run], tmp_path / "curve.png", x="hours")


def test_many_lines_have_their_legend_beside_them_and_short_numbers(tmp_path):
    runs = [
        make_run(tmp_path / f"{i}", [(1000, {"eval/return": 1.0})], algo={"learning_rate": i * 1e-4}) for i in range(12)
    ]
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # words stay words
        text = plot(runs, tmp_path / "curve.svg").read_text()
    assert "ppo learning_rate=0.0003 (1 run)" in text and text.count("1 run") == 12 and "0.00030000" not in text
