"""`rlx collect` and `rlx train --data`: sources and their shares, what is printed and recorded, resumed and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from rlx.cli.collection import parse_source
from rlx.data_file import load
from tests.test_cli import TINY, config_of, run
from tests.test_cli import pair as pair  # a fixture

COLLECT = ["--steps", "40", "--out", "a.npz", "--mode", "greedy", "--quiet"]


@pytest.fixture
def trained(pair, capsys):
    """A run `a` with checkpoints of 32 and 64 steps, and best of 0, whose action is always 0.5."""
    arguments = ["--run-dir", "a", "--num-checkpoints", "2", "--quiet"]
    assert run(capsys, "train", *pair, *TINY, *arguments)[0] == 0
    return pair


def test_a_policy_is_rolled_out_and_learnt_from(trained, capsys, monkeypatch, tmp_path):
    status, out, err = run(capsys, "collect", "a", *[a for a in COLLECT if a != "--quiet"])
    assert status == 0, err
    assert "a@latest: 40 steps, 14 episodes, mean return 6" in out and "done: a.npz, sha256" in out
    for phase in ("building", "compiling", "collecting", "writing"):
        assert f"{phase}: " in err
    assert "40/40 steps" in err
    columns, metadata = load(Path("a.npz"))
    assert (columns["actions"] == 0.5).all() and len(columns["rewards"]) == 40
    assert metadata["env"] == f"{tmp_path / 'my_env.py'}:Counter" and metadata["env_overrides"] == {}
    assert metadata["parts"][0]["step"] == 64 and metadata["parts"][0]["run"] == str(tmp_path / "a")
    assert metadata["seed"] == 0 and metadata["mode"] == "greedy" and "jax" in metadata["versions"]

    arguments = [*TINY, "--algo.num-minibatches", "2", "--num-checkpoints", "1"]
    status, out, err = run(capsys, "train", "bc", trained[1], "--data", "a.npz", *arguments, "--run-dir", "b")
    assert status == 0, err
    assert f"data: {tmp_path / 'a.npz'}, 40 steps" in err and "mean return of the last evaluation: 6" in out
    (entry,) = config_of("b")["data"]
    assert (entry["path"], entry["share"], entry["sha256"]) == (str(tmp_path / "a.npz"), None, metadata["sha256"])

    monkeypatch.chdir("/")
    assert run(capsys, "evaluate", tmp_path / "b")[0] == 0  # without the data
    assert run(capsys, "resume", tmp_path / "b", "--quiet")[0] == 0
    assert run(capsys, "collect", tmp_path / "a", *COLLECT[:2], "--out", tmp_path / "c.npz", "--seed", "1")[0] == 0
    shutil.move(tmp_path / "a.npz", tmp_path / "moved.npz")
    assert run(capsys, "resume", tmp_path / "b", "--data", tmp_path / "moved.npz", "--quiet")[0] == 0
    status, _, err = run(capsys, "resume", tmp_path / "b", "--data", "1.npz", "2.npz")
    assert status == 2 and "the 1 files that the run began with" in err
    shutil.move(tmp_path / "c.npz", tmp_path / "a.npz")
    status, _, err = run(capsys, "resume", tmp_path / "b")
    assert status == 2 and "the run to resume learns from other data" in err
    (tmp_path / "a.npz").unlink()
    status, _, err = run(capsys, "resume", tmp_path / "b")
    assert status == 2 and "there is no such file" in err


def test_several_sources_give_their_shares(trained, capsys):
    assert run(capsys, "train", *trained, *TINY, "--run-dir", "b", "--seed", "1", "--quiet")[0] == 0
    sources = ["a@random:2", "a@32:1", "b@best:1"]
    status, out, err = run(capsys, "collect", *sources, *COLLECT)
    assert status == 0, err
    assert err == "" and len(out.splitlines()) == 4
    actions, parts = load(Path("a.npz"))[0]["actions"][:, 0], load(Path("a.npz"))[1]["parts"]
    assert len(np.unique(actions[:20])) == 20 and (actions[20:] == 0.5).all()
    found = [(Path(part["run"]).name, part["policy"], part["step"], part["steps"]) for part in parts]
    assert found == [("a", "random", 0, 20), ("a", "32", 32, 10), ("b", "best", 0, 10)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a@16"], "no checkpoint of step 16"),
        (["a", "--policy", "7"], "no checkpoint of step 7"),
        (["a", "--num-envs", "50"], "num_envs = 50 is not possible: from 1 to the 40 steps"),
        (["a", "b"], "must be of one environment; 'b' differs"),
        (["a:1", "a@random"], "share = None is not possible"),
        (["a", "--seed", "-1"], "--seed = -1"),
        (["a", "--physics", "mjx"], "has no parameter `physics`"),
    ],
)
def test_what_a_user_can_correct_is_said_before_anything_compiles(trained, capsys, arguments, message):
    if "b" in arguments:
        assert run(capsys, "train", *trained, *TINY, "--run-dir", "b", "--env.length", "2", "--quiet")[0] == 0
    status, out, err = run(capsys, "collect", *arguments, *COLLECT[:-1])
    assert status == 2 and message in " ".join(err.split())
    assert "compiling" not in err and out == "" and not Path("a.npz").exists()


def test_a_file_is_replaced_only_if_asked(trained, capsys):
    assert run(capsys, "collect", "a", *COLLECT)[0] == 0
    before = Path("a.npz").read_bytes()
    status, _, err = run(capsys, "collect", "a", *COLLECT, "--seed", "1")
    assert status == 2 and "'a.npz' exists already" in err and Path("a.npz").read_bytes() == before
    assert run(capsys, "collect", "a", *COLLECT, "--overwrite")[0] == 0
    assert Path("a.npz").read_bytes() == before  # the same arguments
    assert run(capsys, "collect", "a", *COLLECT, "--overwrite", "--seed", "1")[0] == 0
    assert Path("a.npz").read_bytes() != before


def test_data_of_other_settings_are_said(trained, capsys):
    assert run(capsys, "collect", "a", *COLLECT)[0] == 0
    arguments = ["--data", "a.npz:1", *TINY, "--algo.num-minibatches", "2", "--env.length", "2", "--run-dir", "b"]
    status, _, err = run(capsys, "train", "bc", trained[1], *arguments)
    assert status == 0 and "warning: gathered under {}, evaluated under {'length': 2}" in err
    assert json.loads(Path("b/config.json").read_text())["data"][0]["share"] == 1.0


def test_chunks_are_cloned_out_of_single_actions_and_collected_in_their_turn(trained, capsys):
    assert run(capsys, "collect", "a", *COLLECT)[0] == 0
    arguments = ["--data", "a.npz", *TINY, "--algo.num-minibatches", "2", "--env.action-chunk", "2", "--run-dir", "b"]
    status, _, err = run(capsys, "train", "bc", trained[1], *arguments, "--quiet")
    assert status == 0, err
    status, out, err = run(capsys, "collect", "b", *COLLECT[:2], "--out", "b.npz", "--quiet")
    assert status == 0 and "mean return 6" in out, err
    columns, metadata = load(Path("b.npz"))
    assert columns["actions"].shape == (40, 2) and metadata["action"]["chunk"] == metadata["action"]["repeat"] == 2
    assert metadata["env_overrides"] == {"action_chunk": 2}
    status, _, err = run(capsys, "train", "bc", trained[1], *["b.npz" if a == "a.npz" else a for a in arguments[:-4]])
    assert status == 2 and "its actions are {'low': [-1.0, -1.0]" in " ".join(err.split())


def test_sources_are_read_from_the_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_source("a", "best") == ("a", "best", None)
    assert parse_source("a@latest:0.5", "best") == ("a", "latest", 0.5)
    assert parse_source("a@b/c@20", "best") == ("a@b/c", "20", None)
    Path("a@20").mkdir()
    Path("c:1").mkdir()
    assert parse_source("a@20", "best") == ("a@20", "best", None)
    assert parse_source("c:1", "best") == ("c:1", "best", None)
    assert parse_source("c:1:2", "best") == ("c:1", "best", 2.0)
