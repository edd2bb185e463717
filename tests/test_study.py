"""Studies: their data, what is refused, and the command that runs, stops, goes on and never repeats."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import envs
from envs.names import DM_CONTROL
from rlx import cli, machine, training
from rlx.cli.pairs import find_pair
from rlx.cli.studies import merge
from rlx.collection import Part, collect, random_policy
from rlx.errors import UserError
from rlx.logging import Progress
from rlx.run_directory import read_metrics
from rlx.study import Size, Study, Task, Variant, beside, load, programs, select
from tests.studies import ENVS, make_study, reference
from tests.test_training import without_time

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 8

LEARNER = '''
"""A number that is the action, drawn at first; it grows, and turns into NaN where it was drawn above a bound."""
import dataclasses
from typing import Any, NamedTuple
import jax
import jax.numpy as jnp
from rlx.algorithm import Algorithm

@dataclasses.dataclass  # not frozen, so without a hash
class Config:
    breaks_above: float = 2.0
    rate: float = 0.01

class State(NamedTuple):
    drawn: Any
    bias: Any

def make(config, spec, plan):
    def init(key, policy=None):
        drawn = jax.random.uniform(key)
        return State(drawn, drawn)

    def act(policy, memory, obs, key, mode):
        noise = 0.0 if mode == "greedy" else 0.1 * jax.random.normal(key, (obs.shape[0], 1))
        return memory, jnp.clip(policy.bias + jnp.zeros((obs.shape[0], 1)) + noise, -1.0, 1.0), ()

    def update(learner, trajectory, iteration, key):
        bias = learner.bias + config.rate * trajectory.reward.mean()
        breaks = (learner.drawn > config.breaks_above) & (iteration >= 3)
        return learner._replace(bias=jnp.where(breaks, jnp.nan, bias)), {"bias": bias}

    return Algorithm(init, lambda learner, mode: learner, lambda key: (), act, update)
'''

STUDY = """
from rlx.study import Reference, Size, Study, Task, Variant

reference = Reference(-30.0, 20.0, "five", 10_000, "their table 3", "high")
STUDY = Study(
    name="tiny",
    title="A tiny study",
    about="Whether it runs.",
    algorithms={VARIANTS},
    environments={{"probe/lqr": Task(-100.0, 0.0, {{"env.episode_length": 5}})}},
    sizes={{"small": Size((0, 1), {{"total_steps": {STEPS}, "num_evals": 2, "eval_episodes": 4}})}},
    references={{("steady", "probe/lqr"): reference}},
    settings={{"num_envs": 4, "unroll_length": 4, "iterations_per_epoch": 1, "num_checkpoints": 4}},
)
"""


def begin(folder, variants, steps=16 * EPOCHS):
    """A study and its learner's file, in experiments/tiny of `folder`."""
    (folder / "learner.py").write_text(LEARNER)
    study = folder / "experiments" / "tiny"
    study.mkdir(parents=True)
    own = {name: f"Variant({str(folder / 'learner.py')!r}, {values})" for name, values in variants.items()}
    text = "{" + ", ".join(f"{name!r}: {variant}" for name, variant in own.items()) + "}"
    (study / "study.py").write_text(STUDY.format(VARIANTS=text, STEPS=steps))


def reproduce(*arguments):
    return cli.main(["reproduce", "tiny", *map(str, arguments), "--quiet"])


def metrics(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("metrics.jsonl"))}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study that has run: one algorithm that finishes, one of which one seed fails, one of which both do."""
    folder = tmp_path_factory.mktemp("study")
    drawn = [
        float(jax.random.uniform(jax.random.split(jax.random.split(jax.random.key(seed), 4)[0])[0])) for seed in (0, 1)
    ]
    variants = {"steady": {}, "broken": {"algo.breaks_above": sum(drawn) / 2}, "hopeless": {"algo.breaks_above": -1.0}}
    begin(folder, variants)
    before = os.getcwd()
    os.chdir(folder)
    try:
        status = reproduce()
    finally:
        os.chdir(before)
    return folder, status, drawn


def test_a_study_runs_and_reports_failures_while_the_others_go_on(done):
    folder, status, drawn = done
    assert status == 1  # some runs failed
    report = json.loads((folder / "experiments/tiny/report/small/results.json").read_text())
    steady, broken, hopeless = report["programs"]
    assert [program["state"] for program in report["programs"]] == ["finished"] * 3
    assert steady["verdict"] in ("within", "better", "worse") and steady["steps"] == 16 * EPOCHS
    assert [len(run["returns"]) for run in steady["runs"]] == [3, 3] and steady["commit"] == machine.commit()
    high = drawn.index(max(drawn))
    errors = [bool(run["error"]) for run in broken["runs"]]
    assert errors[high] and not errors[1 - high]
    assert broken["verdict"] == hopeless["verdict"] == "not comparable"
    assert "2 of 2 runs met a NaN" in hopeless["reason"]
    text = (folder / "experiments/tiny/report/small/report.md").read_text()
    assert "broken on probe/lqr, seed" in text and str(folder) not in text
    assert (folder / "runs/tiny/small/steady/probe-lqr/seed-1/checkpoints").is_dir()


def test_settings_are_recorded_with_where_they_came_from(done):
    recorded = json.loads((done[0] / "runs/tiny/small/broken/probe-lqr/seed-1/config.json").read_text())
    assert recorded["settings"]["num_envs"] == {"value": 4, "from": "study"}
    assert recorded["settings"]["total_steps"]["from"] == "study, size small"
    assert recorded["settings"]["algo.breaks_above"]["from"] == "study, this algorithm"
    assert recorded["settings"]["seed"] == {"value": 1, "from": "study"} and recorded["train"]["seed"] == 1
    assert recorded["env_overrides"] == {"episode_length": 5}
    assert recorded["command"] == "rlx reproduce tiny --size small"


def test_nothing_that_is_finished_is_repeated(done, monkeypatch, capsys):
    folder, status, _ = done
    monkeypatch.chdir(folder)
    before = metrics(folder)
    monkeypatch.setattr(training, "train_many", None)  # called, it would be an error
    assert reproduce() == status == 1
    assert "report:" in capsys.readouterr().out and metrics(folder) == before


CLONING = """
from rlx.study import Size, Study, Task, Variant

SIZES = {"total_steps": 256, "num_envs": 16, "unroll_length": 4, "num_evals": 2, "eval_episodes": 4}
STUDY = Study(
    name="cloning",
    title="Cloning and fine-tuning",
    about="Whether the second begins where the first ends.",
    algorithms={
        "tuned": Variant("ppo", {"algo.actor_hidden": [8], "algo.learning_rate": 1e-3}, start="clone"),
        "clone": Variant("bc", {"algo.actor_hidden": [8]}, data={"probe/lqr": ("a.npz",)}),
    },
    environments={"probe/lqr": Task(-100.0, 0.0)},
    sizes={"small": Size((0, 1), SIZES)},
)
"""


@pytest.mark.slow
def test_a_study_fine_tunes_what_it_has_cloned_of_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "experiments" / "cloning"
    folder.mkdir(parents=True)
    (folder / "study.py").write_text(CLONING)
    assert cli.main(["reproduce", "cloning", "--quiet"]) == 2
    assert "start: an algorithm before it 'clone'" in capsys.readouterr().err
    lines = CLONING.splitlines(keepends=True)
    index = next(i for i, line in enumerate(lines) if '"tuned"' in line)
    lines[index], lines[index + 1] = lines[index + 1], lines[index]
    (folder / "study.py").write_text("".join(lines))
    assert cli.main(["reproduce", "cloning", "--quiet"]) == 2
    assert "a.npz" in capsys.readouterr().err and not (tmp_path / "runs/cloning/small/clone").exists()
    env = envs.make("probe/lqr")
    collect(env, [Part(random_policy(env.spec), (), 400)], folder / "a.npz", progress=Progress(quiet=True))
    assert cli.main(["reproduce", "cloning", "--quiet", "--only", "tuned"]) == 1
    assert "starts from the policy of clone, which has not run to its end" in capsys.readouterr().err
    assert cli.main(["reproduce", "cloning", "--quiet"]) == 0
    runs = tmp_path / "runs/cloning/small"
    for seed in (0, 1):
        recorded = json.loads((runs / f"tuned/probe-lqr/seed-{seed}/config.json").read_text())
        assert recorded["from"] == str(runs / "clone/probe-lqr/seed-0") and "data" not in recorded
        cloned = json.loads((runs / f"clone/probe-lqr/seed-{seed}/config.json").read_text())
        assert cloned["from"] is None and cloned["data"][0]["path"] == str(folder / "a.npz")
    last, first = (
        read_metrics(runs / name / "probe-lqr/seed-0/metrics.jsonl")[row]["eval/return"]
        for name, row in (("clone", -1), ("tuned", 0))
    )
    assert first == pytest.approx(last, rel=1e-4)  # the same key draws the same episodes
    for run, entry, other in [
        ("tuned/probe-lqr/seed-1", "from", str(runs / "other/probe-lqr/seed-0")),
        ("clone/probe-lqr/seed-1", "data", [{"path": str(folder / "b.npz"), "share": 1.0}]),
    ]:
        config = runs / run / "config.json"
        before = config.read_text()
        config.write_text(json.dumps(json.loads(before) | {entry: other}))
        assert cli.main(["reproduce", "cloning", "--quiet"]) == 2
        assert f"{entry} = " in capsys.readouterr().err
        config.write_text(before)


def test_a_study_s_runs_are_evaluated(done, capsys):
    folder, _, _ = done
    place = folder / "runs/tiny/small/steady/probe-lqr"
    assert cli.main(["evaluate", str(place), "--episodes", "2"]) == 0
    assert capsys.readouterr().out.count("2 episodes") == 2


def test_the_report_is_written_again_without_jax(done):
    folder = done[0]
    page = folder / "experiments/tiny/report/small/report.html"
    before = page.read_bytes()
    page.unlink()
    code = "import sys; from rlx.cli import main; status = main(sys.argv[1:]); assert 'jax' not in sys.modules; "
    code += "sys.exit(status)"
    arguments = ["reproduce", "tiny", "--report-only"]
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, check=True, capture_output=True)
    assert page.read_bytes() == before


def test_changed_settings_and_seeds_are_refused_before_anything_runs(done, tmp_path, monkeypatch, capsys):
    folder = done[0]
    monkeypatch.chdir(folder)
    source = (folder / "experiments/tiny/study.py").read_text()
    changes = {
        ("'algo.breaks_above': -1.0", "'algo.breaks_above': -2.0"): "hopeless on probe/lqr: algo.breaks_above = -2.0",
        ('"num_envs": 4', '"num_envs": 8'): "num_envs = 8 is not possible: it was begun with 4",
        ('length": 5', 'length": 6'): "begun with {'episode_length': 5}",
        ("(0, 1)", "(0, 1, 2)"): "begun with ['seed-0', 'seed-1']",
    }
    before = metrics(folder)
    for index, ((old, new), message) in enumerate(changes.items()):
        assert old in source
        changed = tmp_path / f"changed{index}" / "study.py"
        changed.parent.mkdir()
        changed.write_text(source.replace(old, new))
        assert cli.main(["reproduce", str(changed), "--quiet"]) == 2
        err = capsys.readouterr().err
        assert message in err and "--out" in err, err
    assert metrics(folder) == before


@pytest.fixture
def steady(tmp_path, monkeypatch):
    begin(tmp_path, {"steady": {}})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stop_after(monkeypatch, epochs):
    """SIGTERM to this process after so many reports of training; 0: while the program is compiled."""
    real, seen = training.train_many, []

    def stopped(*arguments, on_epoch, **keywords):
        def after(rows):
            seen.append(rows)
            if len(seen) == epochs:
                os.kill(os.getpid(), signal.SIGTERM)
            return on_epoch(rows)

        if not epochs:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, on_epoch=after, **keywords)

    monkeypatch.setattr(training, "train_many", stopped)
    return real, seen


def test_stopped_by_a_signal_the_same_command_goes_on_to_the_same_numbers(done, steady, monkeypatch, capsys):
    real, _ = stop_after(monkeypatch, 3)
    assert reproduce() == 130
    out = capsys.readouterr().out
    assert "stopped; go on with: rlx reproduce tiny --quiet" in out
    place = steady / "runs/tiny/small/steady/probe-lqr"
    assert (
        not (place / "finished.json").exists()
        and read_metrics(place / "seed-0/metrics.jsonl")[-1]["step"] < 16 * EPOCHS
    )
    report = steady / "runs/tiny/small/report/report.md"
    published = steady / "experiments/tiny/report/small/report.md"
    assert "steady on probe/lqr (begun)" in report.read_text() and not published.exists()
    monkeypatch.setattr(training, "train_many", real)
    assert reproduce() == 0
    for seed in ("seed-0", "seed-1"):
        rows = read_metrics(done[0] / "runs/tiny/small/steady/probe-lqr" / seed / "metrics.jsonl")
        assert without_time(read_metrics(place / seed / "metrics.jsonl")) == without_time(rows)
    assert "| programs finished | 1 of 1 |" in report.read_text() == published.read_text()


def test_a_signal_while_a_program_is_compiled_stops_it_at_its_first_epoch(steady, monkeypatch, capsys):
    _, seen = stop_after(monkeypatch, 0)
    assert reproduce() == 130
    assert 1 <= len(seen) <= 2 and "stopped" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    """kill -9 in the middle of a program, and once more: what is left equals a study that nobody touched."""
    command = [sys.executable, "-m", "rlx.cli", "reproduce", "tiny", "--quiet"]
    folders = [tmp_path / "whole", tmp_path / "cut"]
    for folder in folders:
        folder.mkdir()
        begin(folder, {"steady": {}}, steps=16 * 600)
    subprocess.run(command, cwd=folders[0], check=True)
    file = folders[1] / "runs/tiny/small/steady/probe-lqr/seed-0/metrics.jsonl"
    for rows in (200, 400):
        process = subprocess.Popen(command, cwd=folders[1])
        while not file.exists() or file.read_bytes().count(b"\n") < rows:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.005)
        process.kill()
        process.wait()
    subprocess.run(command, cwd=folders[1], check=True)
    ours = [metrics(folder / "runs") for folder in folders]
    assert list(ours[0]) == list(ours[1]) and len(ours[0]) == 2
    for name in ours[0]:
        rows = [without_time(read_metrics(folder / "runs" / name)) for folder in folders]
        assert rows[0] == rows[1]


def test_names_that_do_not_exist_are_refused_without_jax(steady):
    source = (steady / "experiments/tiny/study.py").read_text()
    for name, old, new in (("a", "learner.py'", "lerner.py'"), ("b", "probe/lqr", "probe/lqe")):
        (steady / "experiments" / name).mkdir()
        (steady / "experiments" / name / "study.py").write_text(source.replace(old, new))
    code = """
import sys
from rlx.cli import main
for arguments in (["tinny"], ["tiny", "--size", "smal"], ["tiny", "--only", "probe/lqe"], ["a"], ["b"]):
    assert main(["reproduce", *arguments]) == 2
assert "jax" not in sys.modules
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=steady, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    lines = found.stderr.splitlines()
    for line, part in zip(
        lines,
        ("Did you mean tiny", "Did you mean small", "Did you mean probe/lqr", "lerner.py", "probe/lqr"),
        strict=True,
    ):
        assert part in line, lines
    assert not (steady / "runs").exists()


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"algo.rat": 1.0}, "Did you mean algo.rate"),
        ({"algo.rate": "x"}, "algo.rate = 'x'"),
        ({"num_envs": 0}, "num_envs = 0"),
        ({"env.scael": 1.0}, "scale"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_runs(tmp_path, monkeypatch, capsys, variant, message):
    begin(tmp_path, {"steady": {}, "wrong": variant})
    monkeypatch.chdir(tmp_path)
    assert reproduce() == 2
    assert message in capsys.readouterr().err and not Path("runs").exists()


def test_an_engine_that_there_is_not_is_refused(done, monkeypatch, capsys):
    monkeypatch.chdir(done[0])
    assert reproduce("--physics", "mojuco") == 2
    assert "Did you mean mujoco" in capsys.readouterr().err


def test_a_study_without_evaluations_is_refused(tmp_path, monkeypatch, capsys):
    begin(tmp_path, {"steady": {}})
    study = tmp_path / "experiments/tiny/study.py"
    study.write_text(study.read_text().replace('"num_evals": 2', '"num_evals": 0'))
    monkeypatch.chdir(tmp_path)
    assert reproduce() == 2
    assert "num_evals = 0" in capsys.readouterr().err


def test_the_commit_is_that_of_the_library(monkeypatch, tmp_path):
    found = machine.commit().removesuffix("+")
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
        assert head.startswith(found) and found
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "rlx/machine.py"))
    assert machine.commit() == ""


def test_a_report_of_no_runs_is_refused(steady, capsys):
    assert reproduce("--report-only") == 2
    assert "--out" in capsys.readouterr().err


def test_the_command_lists_what_it_takes(capsys):
    assert cli.main(["reproduce", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("STUDY", "--size", "--out", "--report-only", "--only"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "name = 'a/b'"),
        ({"algorithms": {}}, "algorithms = {}"),
        ({"algorithms": {"a b": Variant("ppo")}, "references": {}}, "'a b'"),
        ({"sizes": {"small": Size(())}}, "seeds = ()"),
        ({"sizes": {"small": Size((0, 0))}}, "each once"),
        ({"sizes": {"small": Size((1, 100))}}, r"seeds = \[100\].*tuned on these"),
        ({"sizes": {"small": Size((0,), environments={"probe/lqe": {}})}}, "Did you mean probe/lqr"),
        ({"sizes": {"small": Size((0,), {"seed": 3})}}, "seeds are those of the sizes"),
        ({"settings": {"seed": 3}}, "seeds are those of the sizes"),
        ({"environments": {"a/b": Task(0, 1), "a-b": Task(0, 1)}, "references": {}}, "differ as folders"),
        ({"environments": {ENVS[0]: Task(1, 1)}, "references": {}}, "low below high"),
        ({"references": {("pppo", ENVS[0]): reference()}}, "Did you mean ppo"),
        ({"references": {("ppo", "probe/lqe"): reference()}}, "Did you mean probe/lqr"),
        ({"references": {("ppo", ENVS[0]): reference(value=float("nan"))}}, "value = nan"),
        ({"references": {("ppo", ENVS[0]): reference(sd=-1.0)}}, "sd = -1.0"),
        ({"references": {("ppo", ENVS[0]): reference(steps=0)}}, "steps = 0"),
        ({"references": {("ppo", ENVS[0]): reference(trust="some")}}, "high, medium, low"),
        ({"tolerance": 0.0}, "tolerance = 0.0"),
        ({"algorithms": {"ppo": Variant("ppo", start="bc")}, "references": {}}, "start: an algorithm before it 'bc'"),
        ({"algorithms": {"bc": Variant("bc", data={"probe/lqe": ("a",)})}, "references": {}}, "Did you mean probe/lqr"),
    ],
)
def test_a_study_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_study(**changes)


def test_programs_are_every_algorithm_on_every_environment_of_the_size_with_layers_in_order():
    study = make_study(
        2,
        ("a", "b"),
        settings={"num_envs": 1},
        sizes={"small": Size((0, 1), {"num_envs": 2}, {ENVS[1]: {"num_envs": 3}}), "full": Size((7,))},
    )
    found = programs(study, "small", "/x")
    assert [(p.variant, p.env, p.seeds) for p in found] == [("a", ENVS[1], (0, 1)), ("b", ENVS[1], (0, 1))]
    assert [layer.get("num_envs") for _, layer in found[0].layers] == [1, None, None, 2, 3]
    assert found[0].folder == Path("a/probe-memory")
    assert len(programs(study, "full", "/x")) == 4
    with pytest.raises(UserError, match="size of the study 'ful'.*full"):
        programs(study, "ful", "/x")


def test_data_and_the_run_to_start_from_are_found_by_environment():
    study = make_study(
        2,
        {
            "clone": Variant("bc", data={ENVS[1]: ("x.npz", "/y.npz")}),
            "tuned": Variant("dppo", start="clone"),
        },
        references={},
        sizes={"small": Size((5, 6))},
    )
    found = {p.title: p for p in programs(study, "small", "/x")}
    assert found[f"clone on {ENVS[1]}"].data == ("/x/x.npz", "/y.npz") and found[f"clone on {ENVS[0]}"].data == ()
    assert found[f"tuned on {ENVS[1]}"].start == found[f"clone on {ENVS[1]}"].folder / "seed-5"
    assert found[f"clone on {ENVS[1]}"].start is None


def test_an_environment_may_go_by_a_name_of_the_study_and_a_variant_learn_on_another_one():
    names = {"mild": Task(0.0, 10.0, {"env.k": -25}, env="matrix/penalty"), "probe/lqr": Task(0.0, 1.0)}
    variants = {"ppo": Variant("ppo"), "sac": Variant("sac", instead={"probe/lqr": "probe/memory"})}
    found = programs(make_study(algorithms=variants, environments=names, references={}), "small", "/x")
    assert [(p.title, p.env_reference) for p in found] == [
        ("ppo on mild", "matrix/penalty"),
        ("sac on mild", "matrix/penalty"),
        ("ppo on probe/lqr", "probe/lqr"),
        ("sac on probe/lqr", "probe/memory"),
    ]
    assert [str(p.folder) for p in found][:2] == ["ppo/mild", "sac/mild"]


def test_environments_are_picked_by_either_name_and_algorithms_by_theirs():
    found = programs(make_study(), "small", "/x")
    assert [p.env for p in select(found, ["memory"])] == [p.env for p in select(found, ["probe/memory"])] == [ENVS[1]]
    assert select(found, []) == found
    (one,) = select(found, [found[0].variant, "memory"])
    assert (one.variant, one.env) == (found[0].variant, ENVS[1])
    assert len(select(found, [found[0].variant])) == len({p.env for p in found})
    with pytest.raises(UserError, match="Did you mean probe/memory"):
        select(found, ["probe/memry"])


def test_own_files_lie_beside_the_study():
    assert beside("learner.py", "/x") == "/x/learner.py" and beside("/y/w.py:make", "/x") == "/y/w.py:make"
    assert beside("world.py:make", "/x") == "/x/world.py:make"
    assert beside("ppo", "/x") == "ppo" and beside("module:make", "/x") == "module:make"


@pytest.mark.parametrize(
    ("text", "message"),
    [("STUDY = 3", "defines no STUDY"), ("import nothing_at_all", "nothing_at_all"), ("STUDY = (", "line 1")],
)
def test_a_file_that_holds_no_study_is_refused(tmp_path, text, message):
    (tmp_path / "study.py").write_text(text)
    for given in (tmp_path, tmp_path / "study.py"):
        with pytest.raises(UserError, match=message):
            load(str(given))
    with pytest.raises(UserError, match="there is no study"):
        load(str(tmp_path / "other"))


def studies():
    return sorted(path.parent.name for path in (ROOT / "experiments").glob("*/study.py"))


@pytest.mark.parametrize("name", studies())
def test_studies_of_this_repository_can_be_run(name):
    """Names and settings exist, README shows the commands; environments are built by the command itself."""
    study, folder = load(str(ROOT / "experiments" / name))
    assert isinstance(study, Study) and study.name == name and {"small", "full"} <= set(study.sizes)
    for size in study.sizes:
        for program in programs(study, size, folder):
            merge(program, find_pair(program.algorithm, program.env_reference), Path("runs"))
    commands = re.findall(r"rlx reproduce (\S+) --size (\S+)", (folder / "README.md").read_text())
    assert {given for given, _ in commands} == {name} and {size for _, size in commands} == set(study.sizes)


def test_the_study_of_ppo_has_every_task_with_a_reference_and_the_budget_of_it():
    study, _ = load(str(ROOT / "experiments/ppo_dm_control"))
    assert sorted(study.environments) == sorted(f"playground/{task}" for task in DM_CONTROL)
    assert {env for _, env in study.references} == set(study.environments)
    for env, settings in study.sizes["full"].environments.items():
        assert settings["total_steps"] == study.references["ppo", env].steps >= 60_000_000
    small, full = study.sizes["small"], study.sizes["full"]
    assert len(full.environments) == 25 and len(full.seeds) == 10
    assert len(small.environments) >= 14 and len(small.seeds) == 3
    assert study.references["ppo", "playground/CheetahRun"].value == 825
