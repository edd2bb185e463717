"""Sweeps: the space, what shares a program, which seeds pick and which judge, and the command."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from rlx import cli, training
from rlx.errors import UserError
from rlx.sweep import (
    Random,
    Space,
    combinations,
    judge,
    names_of,
    programs,
    read_grid,
    read_random,
    read_space,
    table,
)


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("algo.gamma=0.9,0.99", "algo.gamma", [0.9, 0.99]),
        ("--num-envs=8", "num_envs", [8]),
        ("algo.actor-hidden=(8,),(8,8)", "algo.actor_hidden", [(8,), (8, 8)]),
        ("algo.activation=tanh,swish", "algo.activation", ["tanh", "swish"]),
        ("algo.recurrent=true,false", "algo.recurrent", [True, False]),
    ],
)
def test_a_grid_is_read_as_the_command_line_is(text, key, values):
    assert read_grid(text) == (key, values)


def test_a_random_number_is_read():
    assert read_random("algo.gamma=0.9:0.999") == ("algo.gamma", Random(0.9, 0.999))
    assert read_random("algo.learning-rate=log:1e-5:1e-2") == ("algo.learning_rate", Random(1e-5, 1e-2, True))


@pytest.mark.parametrize("text", ["algo.gamma", "algo.gamma=", "algo.gamma=0.9", "a=2:1", "a=log:0:1", "a=x:y"])
def test_another_form_is_refused(text):
    with pytest.raises(UserError, match="--random"):
        read_random(text)
    if "=" not in text or text.endswith("="):
        with pytest.raises(UserError, match="--grid"):
            read_grid(text)


def test_draws_lie_between_the_bounds_and_are_whole_where_those_are():
    generator = np.random.default_rng(0)
    log = np.array([Random(1e-5, 1e-1, True).draw(generator) for _ in range(2000)])
    assert log.min() >= 1e-5 and log.max() <= 1e-1
    assert 0.45 < (log < 1e-3).mean() < 0.55  # half of the decades
    whole = [Random(1, 3).draw(generator) for _ in range(100)]
    assert set(whole) == {1, 2, 3} and all(type(value) is int for value in whole)
    uniform = np.array([Random(0.0, 1.0).draw(generator) for _ in range(2000)])
    assert 0.45 < uniform.mean() < 0.55


def test_every_point_of_the_grid_gets_the_same_draws():
    space = Space({"a": [1, 2], "b": ["x"]}, {"c": Random(0.0, 1.0)}, samples=3, seed=5)
    found = combinations(space)
    assert len(found) == 6 and [c["a"] for c in found] == [1, 1, 1, 2, 2, 2]
    assert [c["c"] for c in found[:3]] == [c["c"] for c in found[3:]] and len({c["c"] for c in found}) == 3
    assert combinations(space) == found != combinations(space._replace(seed=6))
    assert combinations(Space({"a": [1, 2]}, {}, samples=8)) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    "space",
    [
        Space({}, {}, 1),
        Space({"a": []}, {}, 1),
        Space({"a": [1]}, {"a": Random(0, 1)}, 1),
        Space({}, {"a": Random(0, 1)}, 0),
    ],
)
def test_a_space_without_points_or_with_a_key_twice_is_refused(space):
    with pytest.raises(UserError):
        combinations(space)


def test_combinations_that_differ_in_floats_alone_share_a_program():
    found = combinations(Space({"num_envs": [4, 8], "algo.gamma": [0.9, 0.99]}, {}, 1))
    groups = programs(found, {"algo.gamma", "algo.learning_rate"})
    assert [[c["num_envs"] for c in group] for group in groups] == [[4, 4], [8, 8]]


def test_names_are_those_of_folders():
    assert names_of([{"algo.learning_rate": 1e-3, "num_envs": 8}]) == ["learning_rate=0.001,num_envs=8"]
    assert "/" not in names_of([{"env.randomize": "a/b.py:draw"}])[0]
    close = names_of([{"algo.gamma": 0.99001}, {"algo.gamma": 0.99002}, {"algo.gamma": 0.5}])
    assert close == ["gamma=0.99,0", "gamma=0.99,1", "gamma=0.5"]
    with pytest.raises(UserError, match="200 characters"):
        names_of([{"env.randomize": "a" * 300}])


def test_the_picked_is_judged_on_seeds_that_did_not_pick_it():
    scores = {"lucky": {0: 9.0, 1: 9.0, 2: 1.0, 3: 1.0}, "good": {0: 5.0, 1: 5.0, 2: 5.0, 3: 7.0}}
    rows = judge(scores, [0, 1, 2, 3])
    assert [(row.name, row.picking, row.judging) for row in rows] == [("lucky", 9.0, 1.0), ("good", 5.0, 6.0)]
    assert math.isnan(rows[1].low)  # two seeds make no interval
    (row,) = judge({"a": {seed: float(seed) for seed in range(8)}}, range(8))
    assert 4.0 <= row.low < row.judging < row.high <= 7.0
    space = {"lucky": {"algo.gamma": 0.990001}, "good": {"algo.gamma": 0.9}}
    shown = table(rows, [0, 1, 2, 3], space)
    assert "seeds 0 to 1, judged on 2 to 3" in shown and shown.index("lucky") < shown.index("good")
    assert [row.best for row in rows] == [9.0, 7.0] and shown.endswith("Picked: `--algo.gamma 0.990001`")
    one = judge({"a": {0: 3.0}}, [0])
    assert one[0].picking == one[0].judging == 3.0 and "the judge is the picker" in table(one, [0], {"a": {}})


def test_what_failed_is_never_picked():
    nan = math.nan
    rows = judge(
        {"gone": {0: nan, 1: nan}, "half": {0: nan, 1: 9.0}, "a": {0: 4.0, 1: nan}, "b": {0: 3.0, 1: 2.0}}, [0, 1]
    )
    assert [(row.name, row.failed) for row in rows] == [("a", 1), ("b", 0), ("gone", 2), ("half", 1)]
    assert math.isnan(rows[0].judging) and rows[1].judging == 2.0
    rows = judge({"gone": {0: nan}, "a": {0: 5.0}}, [0])
    assert rows[0].name == "a" and math.isnan(rows[1].picking) and math.isnan(rows[1].best)
    assert "Picked:" not in table(judge({"gone": {0: nan}}, [0]), [0], {"gone": {}})


def test_whole_numbers_drawn_again_are_left_out():
    found = combinations(Space({}, {"a": Random(1, 3)}, samples=50))
    assert sorted(c["a"] for c in found) == [1, 2, 3]


def test_a_file_may_hold_the_space(tmp_path):
    file = tmp_path / "space.toml"
    file.write_text('[grid]\nnum_envs = [4, 8]\nalgo.gamma = [0.9]\n[random]\nalgo.learning_rate = "log:1e-5:1e-2"\n')
    grid, random = read_space(file)
    assert grid == {"num_envs": [4, 8], "algo.gamma": [0.9]} and random == {
        "algo.learning_rate": Random(1e-5, 1e-2, True)
    }
    file.write_text("[grid]\nnum_envs = 4\n")
    with pytest.raises(UserError, match="grid.num_envs"):
        read_space(file)


SIZES = "--total-steps 1024 --num-envs 8 --unroll-length 16 --num-evals 1 --eval-episodes 4 --quiet".split()
SIZES += ["--num-checkpoints", "1", "--algo.actor-hidden", "8", "--algo.critic-hidden", "8"]


@pytest.mark.slow
def test_the_command_trains_what_is_missing_and_reports(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["sweep", "ppo", "gymnax/Pendulum-v1", "--run-dir", "s", *SIZES]
    space = ["--grid", "algo.learning_rate=1e-3,1e-4", "--grid", "algo.num_epochs=1,2", "--num-seeds", "2"]
    assert cli.main([*command, *space]) == 0
    out = capsys.readouterr().out
    assert out.count("learning_rate=0.001") == 2 and "judged on 1" in out
    content = json.loads(Path("s/sweep.json").read_text())
    assert [len(program["runs"]) for program in content["programs"]] == [4, 4] and len(content["combinations"]) == 4
    run = "s/program-1/learning_rate=0.0001,num_epochs=2,seed=1"
    recorded = json.loads(Path(run, "config.json").read_text())
    assert recorded["algo"]["learning_rate"] == 1e-4 and recorded["algo"]["num_epochs"] == 2
    assert recorded["train"]["seed"] == 1
    assert recorded["settings"]["algo.learning_rate"] == {"value": 1e-4, "from": "sweep"}
    assert recorded["settings"]["seed"] == {"value": 1, "from": "num_seeds"}
    rows = Path(run, "metrics.jsonl").read_bytes()
    last = Path(run, "checkpoints")
    steps = sorted(path.name for path in last.iterdir() if path.name.isdigit())
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_many", None)  # nothing is left to train, so nothing is compiled
        assert cli.main(["resume", "s", "--quiet"]) == 0
    assert capsys.readouterr().out == out
    assert Path(run, "metrics.jsonl").read_bytes() == rows
    assert sorted(path.name for path in last.iterdir() if path.name.isdigit()) == steps
    status = cli.main([*command, *space])
    assert status == 2 and "is not empty" in capsys.readouterr().err
    Path("s/program-1/finished.json").unlink()  # as of a program that was cut in the middle
    monkeypatch.setattr(cli.sweeps, "train_program", lambda *arguments: None)
    assert cli.main(["resume", "s", "--quiet"]) == 1
    shown = capsys.readouterr().out
    assert "Not finished, so without a score: program-1." in shown
    cut = [line for line in shown.splitlines() if "num_epochs=2" in line]
    assert len(cut) == 2 and all("| nan | nan |  | nan | 2 |" in line for line in cut)
    assert cli.main(["evaluate", run, "--episodes", "2"]) == 0
    assert cli.main(["evaluate", "s"]) == 2
    assert "name one of the folders of runs in it: program-0, program-1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_signal_between_programs_stops_the_sweep_and_it_goes_on_from_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = training.train_many

    def stopped_late(*arguments, **keywords):
        done = real(*arguments, **keywords)
        os.kill(os.getpid(), signal.SIGTERM)
        return done

    monkeypatch.setattr(training, "train_many", stopped_late)
    command = ["sweep", "ppo", "gymnax/Pendulum-v1", "--run-dir", "s", *SIZES, "--grid", "algo.num_epochs=1,2"]
    assert cli.main(command) == 130
    assert "go on with: rlx resume" in capsys.readouterr().out
    assert Path("s/program-0/runs.json").exists() and not Path("s/program-1").exists()
    monkeypatch.setattr(training, "train_many", real)
    assert cli.main(["resume", "s", "--quiet"]) == 0
    assert "num_epochs=2" in capsys.readouterr().out


@pytest.mark.slow
def test_a_program_that_is_refused_does_not_keep_the_others_from_running(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = training.train_many

    def refused(env, algorithm, runs, **keywords):
        if next(iter(runs.values()))[1].num_epochs == 1:
            raise UserError("too large")
        return real(env, algorithm, runs, **keywords)

    monkeypatch.setattr(training, "train_many", refused)
    command = ["sweep", "ppo", "gymnax/Pendulum-v1", "--run-dir", "s", *SIZES, "--grid", "algo.num_epochs=1,2"]
    assert cli.main(command) == 1
    out, err = capsys.readouterr()
    assert "program-0 is refused: too large" in out + err and "num_epochs=2" in out
    assert Path("s/program-1/finished.json").exists() and not Path("s/program-0/finished.json").exists()


@pytest.mark.parametrize(("text", "message"), [("{", "damaged"), ("{}", "damaged"), ('{"format": 9}', "format = 9")])
def test_a_sweep_that_cannot_be_read_is_said(tmp_path, capsys, text, message):
    (tmp_path / "sweep.json").write_text(text)
    assert cli.main(["resume", str(tmp_path), "--quiet"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ([], "--grid KEY=V,V or --random"),
        (["--grid", "algo.learning_rat=1,2"], "Did you mean algo.learning_rate"),
        (["--grid", "algo.num_epochs=0,1"], "algo.num_epochs = 0"),
        (["--grid", "seed=0,1"], "--num-seeds"),
        (["--grid", "num_envs=8,9", "--algo.num-minibatches", "7"], "algo.num_minibatches = 7"),
        (["--random", "algo.gamma=0.9:0.99", "--num-evals", "0"], "num_evals = 0"),
        (["--grid", "num_evals=1,0"], "num_evals = 0"),
        (["--grid", "algo.gamma=0.9", "--grid", "algo.gamma=0.99"], "each key once, with all its values"),
        (["--grid", "algo.gamma=0.9,0.99", "--samples", "3"], "--samples = 3"),
        (["--grid", "algo.gamma=0.9,0.99", "--runs-per-program", "0"], "--runs-per-program = 0"),
        (["--grid", "algo.gamma=0.9,0.99", "--wandb", "project"], "--wandb"),
        (["--grid", "algo.gamma=0.9,0.99", "--overwrite"], "--overwrite"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_compiles(space, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = [word for word in SIZES]
    assert cli.main(["sweep", "ppo", "gymnax/Pendulum-v1", "--run-dir", "s", *sizes, *space]) == 2
    assert message in capsys.readouterr().err
    assert not Path("s").exists()


def test_the_runs_of_a_program_can_be_limited_and_its_devices_changed(tmp_path, capsys, monkeypatch):
    """Nothing is trained: what would be is noted."""
    monkeypatch.chdir(tmp_path)
    trained = []
    monkeypatch.setattr(cli.sweeps, "train_program", lambda place, env, algorithm, runs, *rest: trained.append(runs))
    command = ["sweep", "ppo", "gymnax/Pendulum-v1", "--run-dir", "s", *SIZES, "--quiet"]
    command += ["--grid", "algo.gamma=0.9,0.99", "--num-seeds", "3"]
    assert cli.main([*command, "--runs-per-program", "4"]) == 1
    assert [len(runs) for runs in trained] == [4, 2]
    assert list(trained[1]) == ["gamma=0.99,seed=1", "gamma=0.99,seed=2"]
    trained.clear()
    assert cli.main(["resume", "s", "--quiet", "--num-devices", "1"]) == 1
    assert {train.num_devices for runs in trained for train, _ in runs.values()} == {1}
