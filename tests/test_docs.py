"""What the documents show works: their code blocks are run, their commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlx import cli

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--total-steps", "512", "--num-envs", "8", "--unroll-length", "16", "--num-evals", "1", "--quiet"]


def blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.S)


def test_the_examples_of_contributing_train_together(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    algorithm, env, _ = blocks("CONTRIBUTING.md")
    Path("my_idea.py").write_text(algorithm)
    Path("my_env.py").write_text(env)
    assert cli.main(["train", "my_idea.py", "my_env.py:make", *TINY, "--run-dir", "a"]) == 0, capsys.readouterr().err
    assert cli.main(["train", "ppo", "my_env.py:make", *TINY, "--run-dir", "b"]) == 0, capsys.readouterr().err
    assert cli.main(["train", "my_idea.py", "probe/memory", *TINY, "--run-dir", "c"]) == 2
    assert "continuous" in capsys.readouterr().err


@pytest.mark.slow
def test_the_randomised_model_of_contributing_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my_worlds.py").write_text(blocks("CONTRIBUTING.md")[2])
    arguments = ["--env.randomize", "my_worlds.py:draw", "--env.randomize-variants", "64", "--env.episode-length", "20"]
    arguments += ["--physics", "mujoco", "--run-dir", "a"]
    assert cli.main(["train", "ppo", "playground/PointMass", *TINY, *arguments]) == 0, capsys.readouterr().err
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert cli.main(["evaluate", "../a", "--episodes", "4"]) == 0, capsys.readouterr().err


def test_the_python_of_readme_runs():
    (code,) = blocks("README.md")
    small = code.replace("total_steps=200_000", "total_steps=4_096")
    assert small != code
    names: dict = {}
    exec(small, names)  # noqa: S102
    assert names["run"].history[-1]["step"] == 4096


@pytest.mark.parametrize("command", re.findall(r"^rlx (\w+)", (ROOT / "README.md").read_text(), re.M))
def test_the_commands_of_readme_exist(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert command in capsys.readouterr().out
