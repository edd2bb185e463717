"""Many runs in one program: each as if it had run alone, on its own where it fails, all of them resumed bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from rlx import cli, records
from rlx.algorithms import ppo
from rlx.checkpoint import Checkpointer
from rlx.errors import NonFiniteError, UserError
from rlx.files import locked
from rlx.group import varied_settings
from rlx.learners import load_policy
from rlx.logging import Progress
from rlx.place import Place
from rlx.run_directory import RunDirectory, read_metrics, run_directories
from rlx.schedule import TrainConfig
from rlx.training import train, train_many
from tests.test_training import assert_same_state, without_time
from tests.worlds import Counter, constant_algorithm

SMALL = TrainConfig(
    total_steps=4 * 8 * 5, num_envs=4, unroll_length=8, iterations_per_epoch=1, num_evals=2, eval_episodes=4
)
CONFIG = ppo.Config(actor_hidden=(8,), critic_hidden=(8,), num_epochs=2, num_minibatches=2)


def quiet():
    return Progress(quiet=True)


def seeds(num, config=SMALL, algo=CONFIG):
    return {f"seed-{s}": (dataclasses.replace(config, seed=s), algo) for s in range(num)}


def many(runs, run_dir=None, env=None, module=ppo, **kwargs):
    return train_many(env or Counter(5), module, runs, run_dir=run_dir, progress=quiet(), **kwargs)


def check_like_alone(runs, env):
    """After five iterations: states to 1e-5, rows as a run alone writes them."""
    together = many(runs, env=env)
    for name, (config, algo) in runs.items():
        alone = train(env, ppo, config, algo, progress=quiet())
        for a, b in zip(jax.tree.leaves(alone.state), jax.tree.leaves(together[name].state), strict=True):
            if jnp.issubdtype(a.dtype, jnp.floating):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert int(together[name].state.iteration) == 5
        for row, expected in zip(without_time(together[name].history), without_time(alone.history), strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_seeds_together_equal_each_alone():
    check_like_alone(seeds(3), Counter(5))


@pytest.mark.slow
def test_settings_together_equal_each_alone():
    runs = {"fast": (SMALL, dataclasses.replace(CONFIG, learning_rate=1e-2))}
    runs["short"] = (SMALL, dataclasses.replace(CONFIG, gamma=0.5, max_grad_norm=0.1))
    check_like_alone(runs, Counter(5))


@pytest.mark.slow
def test_seeds_on_native_physics_equal_each_alone():
    env = envs.make("playground/PointMass", "mujoco", episode_length=9)
    config = dataclasses.replace(SMALL, num_evals=0)
    check_like_alone(seeds(2, config), env)


def test_what_one_program_cannot_vary_is_refused_by_name():
    with pytest.raises(UserError, match="algo.num_epochs differs"):
        many({"a": (SMALL, CONFIG), "b": (SMALL, dataclasses.replace(CONFIG, num_epochs=3))})
    with pytest.raises(UserError, match="num_envs differs"):
        many({"a": (SMALL, CONFIG), "b": (dataclasses.replace(SMALL, num_envs=8), CONFIG)})
    with pytest.raises(UserError, match="learning_rate = -1"):
        many({"a": (SMALL, CONFIG), "b": (SMALL, dataclasses.replace(CONFIG, learning_rate=-1.0))})
    with pytest.raises(UserError, match="at least one"):
        many({})
    for name in ("", "..", "a/b"):
        with pytest.raises(UserError, match="name of a folder"):
            many({name: (SMALL, CONFIG)})


def test_an_algorithm_that_decides_on_a_swept_number_is_told_so():
    def make(config, spec, plan):
        return ppo.make(config if config.entropy_coef > 0.5 else dataclasses.replace(config, num_epochs=1), spec, plan)

    module = types.SimpleNamespace(Config=ppo.Config, make=make, __name__="branching")
    runs = {str(x): (SMALL, dataclasses.replace(CONFIG, entropy_coef=x)) for x in (0.0, 1.0)}
    with pytest.raises(UserError, match="differ in algo.entropy_coef could not be traced .* TracerBoolConversionError"):
        many(runs, module=module)


def test_a_folder_with_a_single_run_takes_no_others(tmp_path):
    train(Counter(5), ppo, SMALL, CONFIG, run_dir=tmp_path / "run", progress=quiet())
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds a single run"):
            many(seeds(2), tmp_path / "run", overwrite=overwrite)


def test_only_what_differs_is_an_argument_of_the_program():
    _, shared, varied = varied_settings(
        {"a": (SMALL, CONFIG), "b": (SMALL, dataclasses.replace(CONFIG, entropy_coef=0.25))}
    )
    assert shared == CONFIG and set(varied) == {"entropy_coef"}
    np.testing.assert_array_equal(varied["entropy_coef"], [0.0, 0.25])


@pytest.mark.parametrize("stop_after", [1, 3])
@pytest.mark.slow
def test_stopped_and_resumed_they_equal_those_that_were_not(tmp_path, stop_after):
    runs = seeds(3)
    whole = many(runs, tmp_path / "whole")
    reports = []

    def on_epoch(rows):
        reports.append(rows)
        if len(reports) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = many(runs, tmp_path / "cut", on_epoch=on_epoch)
    assert all(run.interrupted for run in stopped.values()) and list(reports[0]) == list(runs)
    resumed = many(runs, tmp_path / "cut", resume=True)
    for name in runs:
        assert_same_state(whole[name].state, resumed[name].state)
        rows = [without_time(read_metrics(tmp_path / kind / name / "metrics.jsonl")) for kind in ("whole", "cut")]
        assert rows[0] == rows[1]


def flip_a_byte(folder):
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
def test_where_the_newest_checkpoint_is_damaged_the_one_before_is_used(tmp_path, capsys):
    runs = seeds(2)
    whole = many(runs, tmp_path)
    assert Checkpointer(tmp_path / "checkpoints").steps() == [128, 160]
    flip_a_byte(tmp_path / "checkpoints/160")
    resumed = many(runs, tmp_path, resume=True)
    assert "passed over" in capsys.readouterr().err
    for name in runs:
        assert_same_state(whole[name].state, resumed[name].state)
        assert without_time(whole[name].history) == without_time(resumed[name].history)


@pytest.mark.slow
def test_without_a_checkpoint_they_begin_anew(tmp_path):
    runs = seeds(2)
    whole = many(runs, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    resumed = many(runs, tmp_path, resume=True)
    for name in runs:
        assert_same_state(whole[name].state, resumed[name].state)


@pytest.mark.slow
def test_each_leaves_the_checkpoints_and_the_best_policy_of_a_run_alone(tmp_path):
    runs = seeds(2)
    together = many(runs, tmp_path / "many")
    config, algo = runs["seed-1"]
    alone = train(Counter(5), ppo, config, algo, run_dir=tmp_path / "alone", progress=quiet())
    like = jax.eval_shape(lambda: alone.state)
    keepers = [Checkpointer(tmp_path / name / "checkpoints") for name in ("many/seed-1", "alone")]
    states, steps = zip(*(keeper.restore(like) for keeper in keepers), strict=True)
    assert steps == (160, 160)
    assert_same_state(states[0], together["seed-1"].state)
    policy = jax.eval_shape(lambda: alone.policy)
    bests, steps = zip(*(keeper.restore_best(policy) for keeper in keepers), strict=True)
    assert steps[0] == steps[1]
    for a, b in zip(*map(jax.tree.leaves, bests), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@dataclasses.dataclass(frozen=True)
class Breaking:
    rate: float = 1.0  # what each update adds
    breaks_at: float = 1e9  # iteration


def breaking(shown=True):
    def make(config, spec, plan):
        base = constant_algorithm(plan)

        def update(learner, trajectory, iteration, key):
            added = jnp.where(iteration >= config.breaks_at, jnp.nan, config.rate)
            learner = learner._replace(bias=learner.bias + added)
            return learner, {} if shown is None else {"bias": learner.bias if shown else jnp.ones(())}

        return base._replace(update=update)

    return types.SimpleNamespace(Config=Breaking, make=make, __name__="breaking")


@pytest.mark.parametrize(
    ("per_epoch", "shown"), [*(pytest.param(*v, marks=pytest.mark.slow) for v in [(1, True), (2, False)]), (5, True)]
)
def test_a_run_that_is_not_finite_stops_and_the_others_never_notice(tmp_path, per_epoch, shown):
    """Whether a metric shows it or the learner alone, at an epoch's end or inside one."""
    small = dataclasses.replace(SMALL, iterations_per_epoch=per_epoch)
    runs = {name: (small, Breaking(breaks_at=at)) for name, at in (("a", 1e9), ("b", 3.0), ("c", 1e9))}
    found = many(runs, tmp_path, module=breaking(shown))
    assert [run.error != "" for run in found.values()] == [False, True, False]
    assert "bias is nan" in found["b"].error and "weight" not in found["b"].error
    alone = train(Counter(5), breaking(), small, Breaking(), progress=quiet())
    for name in ("a", "c"):
        assert float(found[name].state.learner.bias) == float(alone.state.learner.bias) == 5.5
        assert read_metrics(tmp_path / name / "metrics.jsonl")[-1]["step"] == 160
    ends = [32 * min(end, 5) for end in range(per_epoch, 5 + per_epoch, per_epoch)]
    rows = read_metrics(tmp_path / "b/metrics.jsonl")
    assert [row["step"] for row in rows] == [0, *(end for end in ends if end <= 96)]
    assert json.loads((tmp_path / "b/failed.json").read_text())["step"] == next(end for end in ends if end > 96)
    assert float(found["b"].state.learner.bias) == 3.5 and int(found["b"].state.iteration) == 3
    assert Checkpointer(tmp_path / "b/checkpoints").steps() == [96]
    if per_epoch == 1:  # later epochs leave its reset pool alone, too
        shorter = {name: (dataclasses.replace(small, total_steps=128), own) for name, (_, own) in runs.items()}
        assert_same_state(many(shorter, module=breaking(shown))["b"].state.source, found["b"].state.source)
    resumed = many(runs, tmp_path, module=breaking(shown), resume=True)
    assert resumed["b"].error == found["b"].error and len(resumed["b"].history) == len(rows)
    assert_same_state(found["c"].state, resumed["c"].state)


def test_a_learner_without_metrics_that_is_not_finite_is_seen_at_the_next_save(tmp_path):
    runs = {name: (SMALL, Breaking(breaks_at=at)) for name, at in (("a", 1e9), ("b", 3.0))}
    found = many(runs, tmp_path, module=breaking(shown=None))
    assert (found["a"].error, found["b"].error) == ("", "the learner is not finite")
    assert json.loads((tmp_path / "b/failed.json").read_text())["error"] == found["b"].error


def test_where_every_run_has_failed_that_is_the_error(tmp_path):
    runs = {name: (SMALL, Breaking(breaks_at=at)) for name, at in (("a", 1.0), ("b", 3.0))}
    with pytest.raises(NonFiniteError, match=r"(?s)a: .*nan.*b: .*nan"):
        many(runs, tmp_path, module=breaking())
    assert Checkpointer(tmp_path / "a/checkpoints").steps() == [32]
    assert Checkpointer(tmp_path / "b/checkpoints").steps() == [96]


@pytest.mark.slow
def test_a_kill_before_all_directories_were_made_is_made_good(tmp_path):
    runs = seeds(2)
    whole = many(runs, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "seed-1")
    assert_same_state(whole["seed-1"].state, many(runs, tmp_path, resume=True)["seed-1"].state)


@pytest.mark.slow
def test_they_are_a_folder_of_run_directories_and_refuse_one_that_holds_others(tmp_path):
    runs = seeds(2)
    many(runs, tmp_path / "runs")
    assert [path.name for path in run_directories(tmp_path / "runs")] == list(runs)
    assert run_directories(tmp_path) == [tmp_path]
    assert RunDirectory.open(tmp_path / "runs/seed-1").config["train"]["seed"] == 1
    before = (tmp_path / "runs/seed-0/metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="already holds runs"):
        many(runs, tmp_path / "runs")
    with pytest.raises(UserError, match="holds no run"):
        many(runs, tmp_path)
    assert (tmp_path / "runs/seed-0/metrics.jsonl").read_bytes() == before
    again = many(seeds(1), tmp_path / "runs", overwrite=True)
    assert len(again["seed-0"].history) == 6 and not (tmp_path / "runs/seed-1").exists()


def test_one_whose_state_lies_in_the_shared_checkpoints_has_no_policy_of_its_own(tmp_path):
    runs, rows = seeds(2), []
    many(runs, tmp_path, on_epoch=lambda row: rows.append(row) or len(rows) == 2)
    shutil.rmtree(tmp_path / "seed-1/checkpoints")  # as after a kill
    before = (tmp_path / "seed-1/metrics.jsonl").read_bytes()
    config, algo = runs["seed-1"]
    with pytest.raises(UserError, match="share their checkpoints.*rlx resume"):
        load_policy(tmp_path / "seed-1", Counter(5), ppo, config, algo)
    assert (tmp_path / "seed-1/metrics.jsonl").read_bytes() == before


def test_what_does_not_hold_these_runs_is_not_resumed(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        many(seeds(2), tmp_path / "mistyped", resume=True)
    assert not (tmp_path / "mistyped").exists()
    many(seeds(1), tmp_path / "runs")
    with pytest.raises(UserError, match=r"those that .* was begun with: \['seed-0'\]"):
        many(seeds(2), tmp_path / "runs", resume=True)


@pytest.mark.parametrize("many", [False, True])
def test_of_two_that_begin_at_once_the_second_replaces_nothing(tmp_path, many):
    with contextlib.ExitStack() as stack:
        descriptions = {name: {"algorithm": "ppo", "env": "probe"} for name in (("a", "b") if many else ("",))}
        first, second = (Place(tmp_path / "new", descriptions, many, True, False, quiet()) for _ in range(2))
        first.hold(stack)
        second.hold(stack)
        (directory, *_) = first.begin(stack)
        (directory.path / "metrics.jsonl").write_text("kept")
        with pytest.raises(UserError, match="another process trains there"):
            second.begin(stack)
        assert (directory.path / "metrics.jsonl").read_text() == "kept"


def test_runs_that_another_process_trains_are_not_overwritten(tmp_path):
    many(seeds(1), tmp_path)
    before = (tmp_path / "seed-0/metrics.jsonl").read_bytes()
    with locked(tmp_path), pytest.raises(UserError, match="another process trains there"):
        many(seeds(1), tmp_path, overwrite=True)
    assert (tmp_path / "seed-0/metrics.jsonl").read_bytes() == before


def test_every_seed_is_one_that_keys_can_be_made_of():
    with pytest.raises(UserError, match="seed = 4294967296"):
        varied_settings({"a": (SMALL, CONFIG), "b": (dataclasses.replace(SMALL, seed=2**32), CONFIG)})


@pytest.mark.slow
def test_other_versions_and_commits_that_runs_go_on_with_are_said_and_recorded_once(tmp_path, monkeypatch, capsys):
    many(seeds(2), tmp_path)
    monkeypatch.setattr(records, "commit", lambda: "another")
    for _ in range(2):
        train_many(Counter(5), ppo, seeds(2), run_dir=tmp_path, resume=True, progress=Progress())
        recorded = RunDirectory.open(tmp_path / "seed-1").config
        assert [entry["commit"] for entry in recorded["resumed"]] == ["another"]
    assert capsys.readouterr().err.count("versions differ, so results may too: commit") == 1


def test_a_copy_of_one_run_of_many_goes_on_alone_and_the_run_itself_with_the_others(tmp_path):
    """What went on alone would be taken back by those that go on together."""
    runs, rows = seeds(2), []
    many(runs, tmp_path / "runs", on_epoch=lambda row: rows.append(row) or len(rows) == 2)
    one = tmp_path / "runs/seed-1"
    shutil.copytree(one, tmp_path / "copy")
    before = (one / "config.json").read_bytes(), (one / "metrics.jsonl").read_bytes()
    config, algo = runs["seed-1"]
    refused = "'seed-1' is one of the runs in .* which go on together: `rlx resume .*runs`"
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match=refused):
            train(Counter(5), ppo, config, algo, run_dir=one, progress=quiet(), **how)
    assert ((one / "config.json").read_bytes(), (one / "metrics.jsonl").read_bytes()) == before
    alone = train(Counter(5), ppo, config, algo, run_dir=tmp_path / "copy", resume=True, progress=quiet())
    assert int(alone.state.iteration) == 5 and not alone.interrupted


@pytest.mark.slow
def test_the_command_line_trains_resumes_evaluates_and_plots_many_seeds(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = "--total-steps 2048 --num-envs 8 --unroll-length 16 --num-evals 1 --eval-episodes 4 --quiet".split()
    sizes += ["--algo.actor-hidden", "8", "--algo.critic-hidden", "8"]
    command = ["train", "ppo", "gymnax/Pendulum-v1", "--run-dir", "runs", *sizes]
    assert cli.main([*command, "--num-seeds", "0"]) == 2
    assert "num_seeds = 0" in capsys.readouterr().err and not (tmp_path / "runs").exists()
    assert cli.main([*command, "--seed", "3", "--num-seeds", "3"]) == 0
    out = capsys.readouterr().out
    assert all(f"seed-{seed}: mean return" in out for seed in (3, 4, 5)) and "mean over 3 runs" in out
    recorded = RunDirectory.open("runs/seed-4").config
    assert recorded["train"]["seed"] == 4 == recorded["settings"]["seed"]["value"]
    assert cli.main(["resume", "runs", "--quiet"]) == 0
    os.rename("runs/seed-4/config.json", "away")
    capsys.readouterr()
    assert cli.main(["resume", "runs", "--quiet"]) == 2 and "not all begun" in capsys.readouterr().err
    os.rename("away", "runs/seed-4/config.json")
    assert cli.main(["evaluate", "runs", "--episodes", "5"]) == 0
    assert capsys.readouterr().out.count("5 episodes") == 3
    assert len(json.loads((tmp_path / "runs/seed-5/eval.json").read_text())["returns"]) == 5
    assert cli.main(["plot", "runs", "--out", "curves.svg"]) == 0
    assert (tmp_path / "curves.svg").stat().st_size > 0
    assert cli.main(["evaluate", "runs/seed-3", "--episodes", "2"]) == 0
    assert cli.main(["resume", "runs/seed-3"]) == 2 and "go on together" in capsys.readouterr().err
