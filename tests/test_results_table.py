"""The results in README and docs/ are those of the studies' reports, and what changed since their runs is found."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from rlx import external
from rlx.study import load, programs

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = external.load_file(ROOT / "experiments" / "results_table.py")
STALE = external.load_file(ROOT / "experiments" / "stale.py")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository of one study, with its report."""
    study = tmp_path / "experiments" / "ppo_basics"
    shutil.copytree(ROOT / "experiments" / "ppo_basics", study)
    (tmp_path / "docs").mkdir()
    for name in SCRIPT.documents():
        (tmp_path / name).write_text(f"before\n\n{SCRIPT.BEGIN}\nold\n{SCRIPT.END}\n\nafter\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def results(tree):
    return tree / "experiments" / "ppo_basics" / "report" / "small" / "results.json"


def program(**changes):
    runs = [{"score": 1.0}, {"score": None}, {"score": 123.4}]
    plain = {"state": "finished", "mean": 62.2, "iqm": 62.2, "low": 1.0, "high": 123.4, "runs": runs, "reason": ""}
    return {**plain, "reference": None, "verdict": "not comparable", **changes}


@pytest.mark.parametrize("name", SCRIPT.documents())
def test_documents_show_what_the_reports_hold(name):
    message = f"{name} does not show experiments/*/report/small/results.json: run `make results`"
    assert SCRIPT.with_results(name, ROOT) == (ROOT / name).read_text(), message


def test_every_study_with_a_small_report_is_shown():
    for path in ROOT.glob("experiments/*/report/small/results.json"):
        study = path.parts[-4]
        assert f"[{study}](experiments/{study}/README.md)" in (ROOT / "README.md").read_text()
        assert f"`rlx reproduce {study} --size small`" in (ROOT / "docs/results.md").read_text()
    assert SCRIPT.reports(ROOT)[0].parts[-3] == "ppo_dm_control"


def test_the_command_writes_between_the_markers_alone_and_follows_the_report(tree):
    assert SCRIPT.main() == 0
    first = {name: (tree / name).read_text() for name in SCRIPT.documents()}
    assert all(t.startswith("before\n") and t.endswith("\nafter\n") and "old" not in t for t in first.values())
    content = json.loads(results(tree).read_text())
    content["programs"][0]["mean"] = 321.0
    results(tree).write_text(json.dumps(content))
    assert SCRIPT.main() == 0
    second = {name: (tree / name).read_text() for name in first}
    assert "| ppo 321 ± 0 | 500: within |" in second["README.md"]
    assert "| 321 (500, 500, 500) | 500: within |" in second["docs/results.md"]
    assert not any("321" in text for text in first.values())


@pytest.mark.parametrize("readme", ["no markers\n", f"{SCRIPT.END}\n{SCRIPT.BEGIN}\n", f"{SCRIPT.BEGIN}\n" * 2])
def test_a_readme_without_its_markers_is_refused_and_kept(tree, readme, capsys):
    (tree / "README.md").write_text(readme)
    assert SCRIPT.main() == 2
    assert "marker" in capsys.readouterr().err
    assert (tree / "README.md").read_text() == readme and "old" in (tree / "docs/results.md").read_text()


def test_a_place_without_reports_is_refused(tree, capsys):
    results(tree).unlink()
    for script in (SCRIPT, STALE):
        assert script.main() == 2
        assert "root of the repository" in capsys.readouterr().err


def test_few_runs_are_shown_each_and_many_by_their_interval():
    assert SCRIPT.score(program()) == "62.2 (1, stopped, 123)"
    many = program(runs=program()["runs"] * 2)
    assert SCRIPT.score(many) == "62.2 (IQM 62.2, 1 to 123; 2 runs stopped)"
    assert SCRIPT.score(program(state="begun")) == "not finished (begun)"


def test_a_verdict_stands_with_what_takes_its_weight_away():
    found = {"value": 2.0, "sd": 0.5, "steps": 60_000_000}
    reason = f"not clear: the intervals overlap; {SCRIPT.FLOOR}"
    shown = SCRIPT.reference(program(reference=found, verdict="better", reason=reason))
    assert shown == "2 ± 0.5 after 60M: better (not clear; its interval reaches the lowest score)"
    assert SCRIPT.reference(program(reference={**found, "sd": None, "steps": None}, verdict="worse")) == "2: worse"


def test_what_changed_since_the_runs_is_listed(tree, capsys):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    def write(file, text, subject):
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        (tree / file).write_text(text)
        git("add", file)
        git("commit", "-m", subject)

    git("init", "-q")
    write("rlx/replay.py", "", "a module that PPO does not import")
    write("rlx/algorithms/ppo.py", "from rlx.returns import gae\n", "PPO")
    write("rlx/returns.py", "", "returns")
    write("tests/test_ppo.py", '\nGOLDEN = {"loss": 1.0}\n', "golden numbers")
    content = json.loads(results(tree).read_text())
    for each in content["programs"]:
        each["commit"] = git("rev-parse", "HEAD")
    results(tree).write_text(json.dumps(content))
    write("rlx/replay.py", "# another\n", "not PPO's")
    assert STALE.main() == 0
    assert capsys.readouterr().out == "ppo_basics:\n  nothing changed\n"
    write("rlx/returns.py", "# other\n", "what PPO imports")
    assert STALE.main() == 0
    shown = capsys.readouterr().out
    assert "golden numbers agree" in shown and "what PPO imports [rlx/returns.py]" in shown and "not PPO's" not in shown
    write("tests/test_ppo.py", '\nGOLDEN = {"loss": 2.0}\n', "other golden numbers")
    assert STALE.main() == 0
    assert "golden numbers differ" in capsys.readouterr().out
    for each in content["programs"]:
        each["commit"] = None
    results(tree).write_text(json.dumps(content))
    assert STALE.main() == 2
    assert "git log" in capsys.readouterr().err


def test_what_decides_numbers_is_found_through_the_modules_between():
    def sources(name):
        study, place = load(str(ROOT / "experiments" / name))
        return STALE.sources(programs(study, "small", place), ROOT)

    assert {"rlx/returns.py", "rlx/distributions.py", "rlx/presets/default.toml"} <= set(sources("ppo_basics"))
    assert {"envs/particle_tasks.py", "rlx/off_policy.py", "rlx/replay.py"} <= set(sources("hasac"))
    assert not {"rlx/logging.py", "rlx/plotting.py", "rlx/errors.py", "rlx/replay.py"} & set(sources("ppo_basics"))
