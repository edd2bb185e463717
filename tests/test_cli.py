"""The command line: names, errors and exit codes, settings and where they came from, own files, whole runs."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import envs
import rlx
from envs.wrappers import ActionRepeat
from rlx import arguments, cli
from rlx.algorithms import ALGORITHMS, ppo, sac
from rlx.arguments import literal, option_value, parse_train, take_env_overrides
from rlx.doctor import check_robot_models, examine
from rlx.errors import UserError
from rlx.logging import Progress
from rlx.schedule import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
ALGORITHM = """
import dataclasses
from typing import NamedTuple
import jax, jax.numpy as jnp
from rlx.algorithm import Algorithm
from rlx.errors import UserError

@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1  # added to the weight in every update
    layers: tuple[int, ...] = (8,)  # not read
    loud: bool = False  # not read

class Policy(NamedTuple):
    weight: jax.Array

def check(config, spec, plan):
    if config.rate == 13.0:
        raise RuntimeError("a bug")

def make(config, spec, plan):
    def init(key, policy=None):
        return Policy(jnp.zeros((), jnp.float32)) if policy is None else policy

    def act(policy, memory, obs, key, mode):
        return memory, jnp.full((obs.shape[0], 1), 0.5), ()

    def update(learner, trajectory, iteration, key):
        return Policy(learner.weight + config.rate), {"weight": learner.weight}

    return Algorithm(init, lambda learner, mode: learner, lambda key: (), act, update)
"""
TINY = ["--total-steps", "64", "--num-envs", "4", "--unroll-length", "4", "--eval-episodes", "3", "--num-evals", "2"]


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """An algorithm and an environment in files of the user's, in whose folder the command runs."""
    (tmp_path / "my_algo.py").write_text(ALGORITHM)
    (tmp_path / "my_env.py").write_text((ROOT / "tests" / "worlds.py").read_text())
    monkeypatch.chdir(tmp_path)
    return ["my_algo.py", "my_env.py:Counter"]


def run(capsys, *arguments):
    """Exit status, stdout, stderr."""
    status = cli.main([str(argument) for argument in arguments])
    return (status, *capsys.readouterr())


def config_of(run_dir):
    return json.loads((Path(run_dir) / "config.json").read_text())


def test_help_names_and_misspelt_names_need_no_jax():
    code = """
import sys
from rlx.cli import main
assert main(["--help"]) == main(["--version"]) == main(["list", "envs"]) == main(["list", "algorithms"]) == 0
assert main(["train", "ppo", "playground/CheetaRun"]) == main(["train", "pppo", "gymnax/Pendulum-v1"]) == 2
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"jax", "brax", "gymnax", "mujoco_playground", "tyro", "rich"}, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "playground/CheetahRun" in done.stdout.split()
    assert "Did you mean playground/CheetahRun" in done.stderr and "Did you mean ppo or dppo or mappo?" in done.stderr


def test_a_folder_called_envs_in_the_working_directory_hides_nothing(tmp_path):
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "__init__.py").write_text("raise RuntimeError('the wrong envs')")
    command = [sys.executable, "-m", "rlx.cli", "list", "envs"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gymnax/Pendulum-v1" in done.stdout.split()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian", "ppo"], "command 'trian' does not exist. Did you mean train"),
        (["train", "pppo", "gymnax/Pendulum-v1"], "algorithm 'pppo' does not exist. Did you mean ppo"),
        (["train", "ppo", "gymnax/Pendulm-v1"], "Did you mean gymnax/Pendulum-v1"),
        (["train", "ppo"], "usage: rlx train ALGORITHM ENV"),
        (["train", "--seed", "3", "ppo"], "usage: rlx train ALGORITHM ENV"),
        (["train", "ppo", "missing.py:make"], "missing.py' does not exist"),
        (["train", "ppo", "no_such_module:make"], "there is no module 'no_such_module'"),
        (["train", "ppo", "my_env.py"], "lacks the function that makes it"),
        (["train", "ppo", "my_env.py:Nothing"], "'Nothing' does not exist"),
        (["train", "my_env.py", "my_env.py:Counter"], "has no Config"),
        (["train", "my_algo.py", "my_env.py:CounterState", "--env.t", "1", "--env.start", "2"], "lacks 'spec'"),
        (["train", "my_algo.py", "my_env.py:Counter", "--env.size", "3"], "'size' does not exist"),
        (["train", "my_algo.py", "my_env.py:Counter", "--env.length"], "--env.length needs a value"),
        (["train", "my_algo.py", "my_env.py:Counter", "--algo.rat", "3"], "--algo.rate"),
        (["train", "my_algo.py", "my_env.py:Counter", "--num-envs", "many"], "--num-envs"),
        (["train", "my_algo.py", "my_env.py:Counter", "--num-envs", "0"], "num_envs = 0 is not possible"),
        (["train", "my_algo.py", "my_env.py:Counter", "--config", "no.toml"], "no.toml"),
        (["train", "my_algo.py", "my_env.py:Counter", "--from", "nowhere"], "nowhere"),
        (["resume", "nowhere"], "does not exist"),
        (["evaluate", "nowhere", "--episodes", "0"], "--episodes = 0 is not possible"),
        (
            ["evaluate", "nowhere", "--video", "a.avi"],
            "video = 'a.avi' is not possible: it ends in .mp4, .gif, .png, .webp, .html",
        ),
        (["evaluate", "nowhere", "--video", "no/a.gif"], "no/a.gif' is not possible: the folder does not exist"),
        (["evaluate", "nowhere", "--video", "a.gif", "--video-episodes", "129"], "from 1 to the 128 episodes"),
        (["evaluate", "nowhere", "--video", "a.gif", "--fps", "0"], "fps = 0.0 is not possible"),
        (["evaluate", "nowhere", "--fps", "5"], "--fps = 5.0 is not possible: nothing without --video"),
        (["evaluate", "nowhere", "--decisions", "-1"], "--decisions = -1 is not possible"),
        (["evaluate", "nowhere", "--seed", "-1"], "seed = -1 is not possible"),
        (["evaluate"], "required: run_dir"),
        (["collect", "nowhere", "--steps", "5", "--out", "a.npz"], "nowhere' does not exist"),
        (["collect", "nowhere", "--steps", "5", "--out", "a.txt"], "is an .npz file; 'a.txt' is none"),
        (["collect", "nowhere", "--steps", "5", "--out", "no/a.npz"], "the folder of 'no/a.npz' does not exist"),
        (["collect", "nowhere", "--steps", "0", "--out", "a.npz"], "--steps = 0 is not possible"),
        (["collect", "nowhere@worst", "--steps", "5", "--out", "a.npz"], "random, latest, best, or the step"),
        (["collect", "nowhere:-1", "--steps", "5", "--out", "a.npz"], "share = -1.0 is not possible"),
        (["train", "my_algo.py", "my_env.py:Counter", "--data", "no.npz"], "data set 'no.npz': there is no such file"),
        (["train", "bc", "my_env.py:Counter"], "bc learns from a data set (--data FILE; `rlx collect` makes one)"),
        (["sweep", "bc", "my_env.py:Counter", "--data", "no.npz"], "a sweep does not take it"),
        (["plot", "nowhere", "--out", "a.png"], "nowhere"),
        (["list", "runs"], "invalid choice"),
    ],
)
def test_what_a_user_can_correct_is_said_without_a_traceback(pair, capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err and "internal error" not in err
    assert out == ""


def test_debug_shows_the_traceback_of_an_error_that_a_plain_call_reports_in_a_line(pair, capsys):
    arguments = ["train", *pair, "--algo.rate", "13", *TINY]
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert err.splitlines()[-1].startswith("internal error: RuntimeError: a bug; run again with --debug")
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main([*arguments, "--debug", "--run-dir", "other"])


def test_an_interrupt_before_training_ends_with_130(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "list_names", interrupted)
    assert run(capsys, "list", "envs") == (130, "", "interrupted\n")


def test_help_of_a_pair_lists_settings_with_their_comments_and_defaults(pair, capsys):
    status, out, _ = run(capsys, "train", *pair, "--help")
    assert status == 0
    for text in ("--algo.rate FLOAT", "added to the weight in every update", "(default: 0.1)", "--num-envs", "--from"):
        assert text in " ".join(out.split())


@pytest.mark.parametrize("name", [*ALGORITHMS, "options"])
def test_every_setting_has_a_help_text(name):
    """tyro shows the comment on a field's own line, and none where the line was broken."""
    module = arguments if name == "options" else importlib.import_module(ALGORITHMS[name])
    config = arguments.Options if name == "options" else module.Config
    lines = inspect.getsource(config).splitlines()
    for field in dataclasses.fields(config):
        assert any(re.match(rf"    {field.name}: .* = .*  # .", line) for line in lines), field.name


@pytest.mark.parametrize("arguments", [["--help"], [], ["train", "--help"], ["evaluate", "--help"]])
def test_help_ends_with_0(capsys, arguments):
    status, out, err = run(capsys, *arguments)
    assert status == 0 and "usage: rlx" in out and err == ""


def test_a_run_is_trained_resumed_evaluated_and_drawn(pair, capsys, monkeypatch, tmp_path):
    status, out, err = run(capsys, "train", *pair, *TINY, "--run-dir", "a", "--env.length", "2", "--algo.rate=0.5")
    assert status == 0, err
    assert "done:" in out and "mean return of the last evaluation: 3" in out  # rewards 1 + 2
    for phase in ("importing", "building", "tracing", "compiling", "training"):
        assert f"{phase}: " in err
    config = config_of("a")
    assert config["env"] == f"{tmp_path / 'my_env.py'}:Counter" and config["algorithm"] == str(tmp_path / "my_algo.py")
    assert config["env_overrides"] == {"length": 2} and config["algo"]["rate"] == 0.5
    assert config["settings"]["algo.rate"] == {"value": 0.5, "from": "command line"}
    assert config["settings"]["seed"] == {"value": 0, "from": "default"}

    monkeypatch.chdir("/")  # what was recorded does not depend on the working directory
    folder = tmp_path / "a"
    assert run(capsys, "evaluate", folder, "--episodes", "5")[:2] == (
        0,
        "step 64: mean return 3, standard deviation 0, 5 episodes\n",
    )
    entry = json.loads((folder / "eval.json").read_text())
    assert entry["step"] == 64 and entry["returns"] == [3.0] * 5 and entry["lengths"] == [2.0] * 5
    assert run(capsys, "evaluate", folder, "--mode", "sample", "--episodes", "3")[0] == 0
    assert run(capsys, "evaluate", folder, "--decisions", "1")[0] == 0
    assert json.loads((folder / "eval.json").read_text()) == entry  # holds whole and deterministic episodes only
    assert run(capsys, "evaluate", folder, "--best")[0] == 0
    assert json.loads((folder / "eval.json").read_text())["step"] == 0  # all returns are equal: the first is the best
    status, out, err = run(capsys, "resume", folder)
    assert status == 0 and "resuming at step 64" in err and "done" in out
    status, out, _ = run(capsys, "plot", folder, "--out", tmp_path / "c.png")
    assert status == 0 and (tmp_path / "c.png").stat().st_size > 1000


def test_a_run_directory_in_use_is_refused_unless_overwritten(pair, capsys):
    arguments = ["train", *pair, *TINY, "--run-dir", "a", "--quiet"]
    assert run(capsys, *arguments)[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlx.cli.runs.load_env", lambda pair: pytest.fail("an environment was built first"))
        status, _, err = run(capsys, *arguments)
        assert status == 2 and err.startswith("error: ") and "already holds a run" in err
        status, _, err = run(capsys, *arguments, "--num-seeds", "2")
        assert status == 2 and "holds a single run" in err
    assert run(capsys, *arguments, "--overwrite", "--seed", "5")[::2] == (0, "")
    assert config_of("a")["train"]["seed"] == 5


def test_without_a_run_directory_a_new_folder_of_runs_is_made(pair, capsys, tmp_path):
    assert run(capsys, "train", *pair, *TINY, "--quiet", "--seed", "4")[0] == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("my_algo-my_env_py_Counter-4-")


def test_the_command_line_stands_above_the_file_and_the_file_above_the_default(pair, capsys):
    Path("s.toml").write_text("seed = 7\nunroll_length = 2\nalgo.rate = 0.25\nenv.length = 2\nalgo.layers = [4, 4]")
    status, _, err = run(capsys, "train", *pair, *TINY, "--config", "s.toml", "--algo.rate", "0.5", "--run-dir", "a")
    assert status == 0, err
    config = config_of("a")
    origins = {key: (s["value"], s["from"]) for key, s in config["settings"].items()}
    assert origins["seed"] == (7, "config") and origins["unroll_length"] == (4, "command line")
    assert origins["algo.rate"] == (0.5, "command line") and origins["env.length"] == (2, "config")
    assert origins["algo.layers"] == ([4, 4], "config") and origins["algo.loud"] == (False, "default")
    assert config["env_overrides"] == {"length": 2} and config["train"]["seed"] == 7
    assert "seed=7 (config)" in err and "at their defaults" in err


def test_a_run_may_start_from_another_runs_policy(pair, capsys):
    assert run(capsys, "train", *pair, *TINY, "--run-dir", "a", "--algo.rate", "2", "--quiet")[0] == 0
    assert run(capsys, "train", *pair, *TINY, "--run-dir", "b", "--from", "a", "--algo.rate", "0", "--quiet")[0] == 0
    rows = [json.loads(line) for line in Path("b/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train/weight"] == 8.0  # 64 steps are 4 iterations, each of which added 2
    assert config_of("b")["from"] == str(Path("a").absolute())


def test_a_policy_of_another_shape_is_refused_by_leaf(pair, capsys):
    assert run(capsys, "train", *pair, *TINY, "--run-dir", "a", "--quiet")[0] == 0
    status, _, err = run(capsys, "train", "ppo", pair[1], "--from", "a", "--run-dir", "b", "--quiet")
    assert status == 2 and "the policy to start from has" in err and "this run's learner takes" in err
    assert not Path("b").exists()


@pytest.mark.slow
def test_a_policy_that_these_settings_would_make_another_one_is_refused(pair, capsys):
    """Weights fit all the same. What a run sets for its learning alone may differ."""
    small = ["--algo.actor-hidden", "8", "--algo.num-minibatches", "2", "--quiet"]
    assert run(capsys, "train", "ppo", "probe/lqr", *TINY, "--run-dir", "a", *small)[0] == 0
    begin = ("train", "ppo", "probe/lqr", *TINY, "--run-dir", "b", "--from", "a", *small)
    status, _, err = run(capsys, *begin, "--algo.activation", "swish", "--algo.gamma", "0.5")
    assert status == 2 and "algo.activation = 'swish', there 'tanh'" in err and not Path("b").exists()
    status, _, err = run(capsys, *begin, "--algo.learning-rate", "1e-5", "--algo.freeze-statistics", "true")
    assert status == 0, err


@pytest.mark.slow
def test_statistics_are_frozen_of_a_policy_to_start_from_alone_and_must_be_of_ranges(pair, capsys):
    small = ["--algo.actor-hidden", "8", "--algo.num-minibatches", "2", "--quiet"]
    status, _, err = run(capsys, "train", "ppo", "probe/lqr", *TINY, *small, "--algo.freeze-statistics", "true")
    assert status == 2 and "algo.freeze_statistics = True" in err and "--from" in err
    assert run(capsys, "train", "ppo", "probe/lqr", *TINY, "--run-dir", "a", *small)[0] == 0
    assert run(capsys, "collect", "a", "--steps", "64", "--out", "a.npz", "--quiet")[0] == 0
    bc = ("train", "bc", "probe/lqr", *TINY, "--data", "a.npz", "--algo.statistics", "range")
    assert run(capsys, *bc, "--run-dir", "c", *small)[0] == 0
    begin = ("train", "ppo", "probe/lqr", *TINY, "--run-dir", "d", "--from", "c", *small)
    status, _, err = run(capsys, *begin)
    assert status == 2 and "algo.freeze_statistics must be true" in err and not Path("d").exists()
    assert run(capsys, *begin, "--algo.freeze-statistics", "true")[0] == 0


def test_resume_says_what_changed_or_is_missing(pair, capsys):
    assert run(capsys, "train", *pair, *TINY, "--run-dir", "a", "--quiet")[0] == 0
    Path("my_env.py").write_text(Path("my_env.py").read_text() + "\n")
    status, _, err = run(capsys, "resume", "a", "--quiet")
    assert status == 0 and "warning" in err and "my_env.py has changed since the run began" in err
    Path("my_algo.py").unlink()
    status, _, err = run(capsys, "resume", "a")
    assert status == 2 and "my_algo.py' does not exist" in err


@pytest.mark.parametrize(("place", "kind"), [("flag", "module"), ("file", "file")])
def test_a_function_of_an_override_is_found_again_from_another_folder_and_its_changes_are_said(
    place, kind, pair, capsys, tmp_path, monkeypatch
):
    """The environment calls what `rule` refers to, as `envs.make` calls what `randomize` does."""
    name = f"rules_{kind}_{place}"  # a module is found once in a process
    module = f"{name}.py" if kind == "file" else name
    Path(f"{name}.py").write_text("def length(): return 3\n")
    with Path("my_env.py").open("a") as file:
        file.write("\nfrom envs.external import load_function\n")
        file.write("def ruled(rule=None): return Counter(load_function(rule, 'rule')())\n")
    arguments = ["train", pair[0], "my_env.py:ruled", *TINY, "--run-dir", "a", "--quiet"]
    status, _, err = run(capsys, *arguments, "--env.rule", "rulez.py:length")
    assert status == 2 and "env.rule" in err and "rulez.py' does not exist" in err
    Path("s.toml").write_text(f"env.rule = '{module}:length'")
    given = {"flag": ["--env.rule", f"{module}:length"], "file": ["--config", "s.toml"]}[place]
    assert run(capsys, *arguments, *given)[0] == 0
    reference = f"{tmp_path / module if kind == 'file' else module}:length"
    assert config_of("a")["env_overrides"] == {"rule": reference}
    assert config_of("a")["settings"]["env.rule"]["value"] == reference
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run(capsys, "evaluate", "../a")[0] == 0
    (tmp_path / f"{name}.py").write_text("def length(): return 3  # still\n")
    status, _, err = run(capsys, "resume", "../a", "--quiet")
    assert status == 0 and f"{name}.py has changed since the run began" in err


@pytest.mark.slow
def test_a_policy_trained_on_one_engine_is_evaluated_on_another_and_resumed_on_its_own(tmp_path, capsys):
    """The run records the engine that "auto" chose; the environments' state differs between engines, the policy not."""
    run = str(tmp_path / "run")
    sizes = ["--total-steps", "2048", "--num-envs", "8", "--env.episode_length", "50", "--num-checkpoints", "1"]
    assert (
        cli.main(["train", "ppo", "playground/CartpoleBalance", "--run-dir", run, *sizes, "--eval-episodes", "8"]) == 0
    )
    assert json.loads((tmp_path / "run" / "config.json").read_text())["physics"] == "mujoco"
    entries = {}
    for physics in ("mujoco", "mjx"):
        assert cli.main(["evaluate", run, "--episodes", "32", "--physics", physics]) == 0
        entries[physics] = json.loads((tmp_path / "run" / "eval.json").read_text())
        assert entries[physics]["physics"] == physics
    # The same starts, smooth dynamics, 50 steps: the returns agree one by one, not only in the mean.
    np.testing.assert_allclose(entries["mujoco"]["returns"], entries["mjx"]["returns"], rtol=1e-3)
    assert cli.main(["evaluate", run, "--physics", "mjxx"]) == 2
    assert "Did you mean mjx" in capsys.readouterr().err
    assert cli.main(["resume", run]) == 0


FRAGILE = """
from tests.worlds import Counter

class Fragile(Counter):
    def step(self, state, action, key):
        state, timestep = super().step(state, action, key)
        return state, timestep._replace(info={"diverged": (timestep.truncated & (state.start > 0.5)).astype(float)})
"""


def test_evaluations_tell_of_simulations_that_diverged(pair, capsys):
    Path("fragile.py").write_text(FRAGILE)
    arguments = [pair[0], "fragile.py:Fragile", *TINY, "--run-dir", "a", "--quiet"]
    status, _, err = run(capsys, "train", *arguments)
    assert status == 0, err
    diverged = json.loads(Path("a/eval.json").read_text())["diverged"]
    assert set(diverged) <= {0.0, 1.0}
    rows = [json.loads(line) for line in Path("a/metrics.jsonl").read_text().splitlines()]
    assert [row["eval/diverged"] for row in rows if "eval/return" in row][-1] == pytest.approx(np.mean(diverged))
    out = run(capsys, "evaluate", "a", "--episodes", "32")[1]
    lost = sum(json.loads(Path("a/eval.json").read_text())["diverged"])
    assert 0 < lost < 32 and f"32 episodes, of which {lost:.0f} ended early because their simulation diverged" in out


PAID_APART = """
import jax.numpy as jnp
import numpy as np
from tests.worlds import Counter

class PaidApart(Counter):
    def step(self, state, action, key):
        state, timestep = super().step(state, action, key)
        return state, timestep._replace(reward=timestep.reward * jnp.array([1.0, 2.0]))

    def render(self, states):
        return np.stack([np.full((2, 2, 3), 40 * state.t, np.uint8) for state in states])
"""


def test_returns_of_agents_are_told_and_episodes_are_drawn(pair, capsys):
    Path("apart.py").write_text(PAID_APART)
    arguments = [pair[0], "apart.py:PaidApart", *TINY, "--run-dir", "a", "--quiet"]
    status, _, err = run(capsys, "train", *arguments)
    assert status == 0, err
    assert json.loads(Path("a/eval.json").read_text())["agent_returns"][0] == [6.0, 12.0]
    last = json.loads(Path("a/metrics.jsonl").read_text().splitlines()[-1])
    assert (last["eval/return"], last["eval/return_agent_0"], last["eval/return_agent_1"]) == (18.0, 6.0, 12.0)
    arguments = ["--episodes", "5", "--video", "a.gif", "--video-episodes", "2", "--fps", "10"]
    status, out, err = run(capsys, "evaluate", "a", *arguments)
    assert status == 0, err
    mean = "step 64: mean return 18, standard deviation 0, 5 episodes; of each agent 6, 12"
    assert out.splitlines() == [mean, "a.gif"]
    with Image.open("a.gif") as video:
        assert video.n_frames == 2 * 4 and video.info["duration"] == 100


def test_a_module_of_the_working_directory_serves_too(pair, capsys):
    os.rename("my_algo.py", "my_module_algo.py")
    os.rename("my_env.py", "my_module_env.py")
    status, out, err = run(
        capsys, "train", "my_module_algo", "my_module_env:Counter", *TINY, "--run-dir", "a", "--quiet"
    )
    assert status == 0, err
    assert config_of("a")["env"] == "my_module_env:Counter"
    assert config_of("a")["files"]["algorithm"]["path"] == str(Path("my_module_algo.py").absolute())


def test_environment_overrides_are_split_off_and_read_as_literals():
    arguments = ["--seed", "3", "--env.length", "5", "--env.task-name=run", "--env.sizes", "(1, 2)", "--quiet"]
    rest, overrides = take_env_overrides(arguments)
    assert rest == ["--seed", "3", "--quiet"]
    assert overrides == {"env.length": 5, "env.task_name": "run", "env.sizes": (1, 2)}
    with pytest.raises(UserError, match="--env.length needs a value"):
        take_env_overrides(["--env.length", "--seed", "3"])


@pytest.mark.parametrize(
    "text, value",
    [("3", 3), ("-3.5", -3.5), ("true", True), ("False", False), ("none", None), ("[1]", [1]), ("a-b", "a-b")],
)
def test_literals(text, value):
    assert literal(text) == value and type(literal(text)) is type(value)


def test_the_value_of_a_flag_is_found_in_both_forms():
    assert option_value(["--config", "a"], "--config") == option_value(["--config=a"], "--config") == "a"
    assert option_value(["--config"], "--config") == option_value(["--configs", "b"], "--config") == ""


def test_the_doctor_reports_every_piece_and_none_fails(capsys):
    lines = list(examine())
    assert [line[:14].strip() for line in lines][:3] == ["versions", "devices", "processors"]
    assert len(lines) == 10 and not [line for line in lines if "FAILS" in line]
    status, out, _ = run(capsys, "doctor")
    assert status == 0 and out.splitlines()[0] == lines[0]


def test_the_doctor_looks_for_robot_models_where_playground_will(monkeypatch, tmp_path):
    monkeypatch.setenv("RLX_MENAGERIE_PATH", str(tmp_path))
    assert check_robot_models() == f"in {tmp_path}"
    monkeypatch.setenv("RLX_MENAGERIE_PATH", str(tmp_path / "absent"))
    assert "absent is no directory" in check_robot_models()


def test_the_doctor_goes_on_after_a_check_that_fails(monkeypatch):
    def broken():
        raise OSError("no such device")

    monkeypatch.setattr("rlx.doctor.check_devices", broken)
    lines = list(examine())
    assert lines[1] == "devices       FAILS: OSError: no such device" and len(lines) == 10


@pytest.mark.parametrize(
    ("variables", "before", "expected"),
    [({}, "", 3), ({"JAX_NUM_CPU_DEVICES": "32"}, "", 32), ({}, "jax.devices()", 1)]
    + [({"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, "", 4)],
)
def test_programs_of_many_runs_have_cpu_devices_unless_a_number_is_named(variables, before, expected):
    code = f"import jax; {before}\nfrom rlx.cli.programs import spread_over_cpu\n"
    code += "spread_over_cpu(); spread_over_cpu(3); print(len(jax.devices()))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | variables
    )
    assert int(found.stdout) == expected


def test_evaluations_draw_actions_where_a_run_says_so(capsys, monkeypatch, tmp_path):
    """On probe/lqr the starts are drawn, so each evaluation is compared with that of the other mode."""
    monkeypatch.chdir(tmp_path)
    tiny = ["--total-steps", "64", "--num-envs", "4", "--unroll-length", "4", "--num-evals", "1", "--quiet"]
    tiny += ["--eval-episodes", "64"]
    assert run(capsys, "train", "ppo", "probe/lqr", *tiny, "--eval-mode", "sample", "--run-dir", "a")[0] == 0
    drawn = json.loads(Path("a/eval.json").read_text())
    assert drawn["mode"] == "sample" and config_of("a")["train"]["eval_mode"] == "sample"
    assert run(capsys, "evaluate", "a", "--episodes", "64")[0] == 0
    again = json.loads(Path("a/eval.json").read_text())
    assert again["mode"] == "sample" and again["returns"] == pytest.approx(drawn["returns"], rel=1e-4)
    status, out, _ = run(capsys, "evaluate", "a", "--episodes", "64", "--mode", "greedy")
    assert status == 0 and json.loads(Path("a/eval.json").read_text()) == again
    assert f"{sum(again['returns']) / 64:.4g}" not in out
    assert run(capsys, "train", "ppo", "probe/lqr", *tiny, "--eval-mode", "mean", "--run-dir", "b")[0] == 2


@pytest.mark.parametrize(("words", "wanted"), [("true", True), ("True", True), ("false", False)])
def test_switches_take_the_words_of_toml_and_of_python(words, wanted):
    parsed = parse_train("probe/lqr", "ppo", ["--algo.anneal-lr", words, "--overwrite"], TrainConfig, ppo)
    assert parsed.merged["algo.anneal_lr"].value is wanted and parsed.options.overwrite


def test_a_switch_takes_no_other_word(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_train("probe/lqr", "ppo", ["--algo.anneal-lr", "maybe"], TrainConfig, ppo)
    assert ended.value.code == 2 and "Expected one of ('true', 'false'" in " ".join(capsys.readouterr().err.split())


def test_a_run_begun_from_python_with_what_ships_is_one_of_the_command_line_too(tmp_path, capsys):
    sizes = rlx.TrainConfig(total_steps=512, num_envs=4, unroll_length=16, num_evals=0)
    config = rlx.ppo.Config(actor_hidden=(8,), critic_hidden=(8,), num_epochs=1, num_minibatches=2)
    env = envs.make("gymnax/Pendulum-v1", max_torque=1.5)
    for name, made in (("plain", env), ("wrapped", ActionRepeat(env, 2))):
        rlx.train(made, rlx.ppo, sizes, config, run_dir=tmp_path / name, progress=Progress(quiet=True))
    status, out, err = run(capsys, "evaluate", tmp_path / "plain", "--episodes", 3)
    assert status == 0 and "step 512: mean return" in out, err
    assert config_of(tmp_path / "plain")["env_overrides"] == {"max_torque": 1.5}
    assert run(capsys, "resume", tmp_path / "plain", "--quiet")[0] == 0
    status, _, err = run(capsys, "evaluate", tmp_path / "wrapped")
    assert status == 2 and "begun from Python with what no file or name stands for" in err


def test_own_work_that_python_trained_is_found_by_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("own_ppo.py").write_text('from rlx.algorithms.ppo import Config, check, make\nPRESET = "ppo"\n')
    own = importlib.import_module("own_ppo")
    env = envs.make("gymnax/Pendulum-v1")
    tuned, config = rlx.tuned(env, own)
    assert (tuned, config) == rlx.tuned(env, rlx.ppo) and config.gamma == 0.95
    sizes = dataclasses.replace(tuned, total_steps=512, num_envs=4, unroll_length=16, num_evals=0)
    rlx.train(env, own, sizes, config, run_dir="run", progress=Progress(quiet=True))
    monkeypatch.chdir("/")
    loaded = rlx.load(tmp_path / "run")
    assert loaded.step == 512 and loaded.env.spec.name == "gymnax/Pendulum-v1"
    assert run(capsys, "resume", tmp_path / "run", "--quiet")[0] == 0
    assert list(config_of(tmp_path / "run")["files"]["algorithm"]) == ["path", "sha256"]
    (tmp_path / "other.py").write_text('from rlx.algorithms.ppo import Config, check, make\nPRESET = "pppo"\n')
    status, _, err = run(capsys, "train", tmp_path / "other.py", "gymnax/Pendulum-v1", "--total-steps", "1e3")
    assert status == 2 and "PRESET: algorithm 'pppo' does not exist. Did you mean" in err.replace("\n", " "), err
    (tmp_path / "third.py").write_text("from rlx.algorithms.ppo import Config, check, make\nPRESET = True\n")
    status, _, err = run(capsys, "train", tmp_path / "third.py", "gymnax/Pendulum-v1", "--total-steps", "1e3")
    assert status == 2 and "PRESET = True is not possible" in err.replace("\n", " "), err


def test_a_policy_that_python_gave_is_not_forgotten(tmp_path, capsys):
    sizes = rlx.TrainConfig(total_steps=512, num_envs=4, unroll_length=16, num_evals=0)
    env = envs.make("gymnax/Pendulum-v1")
    first = rlx.train(env, rlx.ppo, sizes, progress=Progress(quiet=True))
    rlx.train(env, rlx.ppo, sizes, run_dir=tmp_path / "a", init_policy=first.policy, progress=Progress(quiet=True))
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    status, _, err = run(capsys, "resume", tmp_path / "a")
    assert status == 2 and "a policy given in Python" in err


def test_numbers_and_names_are_taken_as_others_write_them():
    parsed = parse_train("probe/lqr", "ppo", ["--total-steps", "1e6", "--num-envs=1_000"], TrainConfig, ppo)
    assert (parsed.merged["total_steps"].value, parsed.merged["num_envs"].value) == (1_000_000, 1_000)
    for word, meant in (("--algo.lr", "algo.learning-rate"), ("--num-steps=8", "unroll-length"), ("--lr", "algo.lea")):
        with pytest.raises(UserError, match=f"is called --{meant}"):
            parse_train("probe/lqr", "ppo", [word, "1"], TrainConfig, ppo)
    with pytest.raises(UserError, match="called --algo.actor-learning-rate and --algo.critic-learning-rate"):
        parse_train("probe/lqr", "sac", ["--lr", "1"], TrainConfig, sac)
    with pytest.raises(SystemExit):
        parse_train("probe/lqr", "ppo", ["--total-steps", "1.5"], TrainConfig, ppo)
