"""What the documents show works: their code blocks are run, their commands are taken by the parsers that take yours."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import envs
from rlx import cli, settings
from rlx.algorithms import ALGORITHMS

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--total-steps", "512", "--num-envs", "8", "--unroll-length", "16", "--num-evals", "1", "--quiet"]
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
HEAVY = ("playground/", "brax/", "multi_")  # suites that take seconds to import or build
DRAWN = " │┌└├"  # the first characters of a picture's lines, and of what goes on
NOT_RUN = "<!-- not run: "  # stands above a fence, with the reason
FENCE = re.compile(rf"^({NOT_RUN}.+ -->\n)?```(\w*)\n(.*?)^```", re.S | re.M)


def blocks(document: str) -> list[str]:
    return [code for _, language, code in FENCE.findall((ROOT / document).read_text()) if language == "python"]


def commands(document: str) -> list[str]:
    """The commands in a document's fences, but for those that a comment says are not run; of inline ones, scripts."""
    text = (ROOT / document).read_text()
    fences = [code for mark, language, code in FENCE.findall(text) if not mark and language in ("", "bash", "sh")]
    lines = [line for code in fences for line in code.splitlines() if line.strip() and line[0] not in DRAWN]
    inline = re.findall(r"`((?:python experiments/|rlx [a-z]+ )[^`]+)`", FENCE.sub("", text))
    return [line.partition(" #")[0].strip() for line in lines] + [line for line in inline if not is_pattern(line)]


def is_pattern(line: str) -> bool:
    """Whether a command stands for many: it has words in capitals to fill in, files of one's own, or goes on."""
    return line.split()[-1].startswith("--") or bool(re.search(r"\b[A-Z][A-Z_]{2,}\b|\.\.\.|\b[A-Z]\b|\bmy_", line))


COMMANDS = sorted({line for document in DOCUMENTS for line in commands(document)})


class Parsed(BaseException):
    """Thrown where a command's arguments have been taken, before it does anything."""


@pytest.fixture
def only_parse(monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *arguments, **keywords):
        raise Parsed(parse(self, *arguments, **keywords))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)


def check_train(words: list[str], build: bool) -> None:
    """What `rlx train` does before it compiles, without the files of earlier commands."""
    from rlx.arguments import parse_train
    from rlx.cli.pairs import find_pair, load_algorithm, load_env, with_overrides
    from rlx.cli.processes import take_flags
    from rlx.schedule import TrainConfig, make_schedule

    pair = find_pair(*words[:2])
    module = load_algorithm(pair)
    _, rest = take_flags(words[2:])
    options, merged = parse_train(pair.env, pair.algorithm, rest, TrainConfig, module)
    if not build:
        return
    pair = with_overrides(pair._replace(physics=options.physics), settings.values(merged, "env."))
    env = load_env(pair)
    plan = make_schedule(env, settings.build(TrainConfig, settings.values(merged))).plan
    module.check(settings.build(module.Config, settings.values(merged, "algo.")), env.spec, plan)


def check_rlx(words: list[str], build: bool, monkeypatch) -> None:
    command, *rest = words
    if command == "train" and "--help" not in rest:
        return check_train(rest, build)
    if command == "benchmark":
        from rlx.benchmark import parse

        options = parse(rest)
        envs.check_name(options.env)
        assert options.algorithm in ("", *ALGORITHMS)
    elif command == "sweep":  # checks all of its programs before it goes on
        monkeypatch.setattr("rlx.cli.sweeps.go_on", lambda folder, shown: 0)
        monkeypatch.setattr("rlx.cli.sweeps.spread_over_cpu", lambda *runs: None)
        assert cli.main(words) == 0
    elif "--help" in rest:
        assert cli.main(words) == 0
    else:
        with pytest.raises(Parsed) as parsed:
            cli.main(words)
        if command == "reproduce":
            from rlx.study import load

            (options,) = parsed.value.args
            assert options.size in load(options.study)[0].sizes


def check(line: str, build: bool, monkeypatch) -> None:
    program, *words = shlex.split(line, comments=True)
    if program == "rlx":
        check_rlx(words, build, monkeypatch)
    elif program == "make":
        assert all(re.search(rf"^{word}:", (ROOT / "Makefile").read_text(), re.M) for word in words)
    else:
        assert program == "python", "a command that no test knows: mark its fence as not run, and say why"
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")


@pytest.mark.parametrize("line", COMMANDS, ids=str)
def test_the_commands_of_the_documents_are_taken(line, tmp_path, monkeypatch, only_parse):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    check(line, not any(suite in line for suite in HEAVY), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in COMMANDS if any(suite in line for suite in HEAVY)], ids=str)
def test_the_environments_of_the_documents_take_their_settings(line, tmp_path, monkeypatch, only_parse):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    check(line, True, monkeypatch)


@pytest.mark.parametrize("line", ["rlx train ppo gymnax/Pendulum-v1 --algo.gama 1", "rlx evaluate a --epsiodes 2"])
def test_a_command_with_a_misspelt_flag_would_be_noticed(line, monkeypatch, only_parse, capsys):
    with pytest.raises((SystemExit, pytest.fail.Exception)):
        check(line, True, monkeypatch)


def test_every_command_but_help_is_in_the_documents():
    used = {line.split()[1] for line in COMMANDS if line.startswith("rlx ")}
    assert used == set(re.findall(r"^  ([a-z]+) ", cli.HELP, re.M))


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


PYTHON = [(document, index) for document in DOCUMENTS for index in range(len(blocks(document)))]


@pytest.mark.parametrize(
    "document, index", [p if p[0] == "README.md" else pytest.param(*p, marks=pytest.mark.slow) for p in PYTHON]
)
def test_the_python_of_the_documents_runs(document, index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks(document)[index]
    small = code.replace("total_steps=200_000", "total_steps=4_096")
    tiny = "rlx.TrainConfig(total_steps=4_096, num_envs=64), rlx.ppo.Config()"
    small = small.replace("rlx.tuned(env, rlx.ppo)", tiny)
    if small == code:  # it plays with a run of the quick start
        assert cli.main(["train", "ppo", "gymnax/CartPole-v1", *TINY, "--run-dir", "runs/cartpole"]) == 0
    names: dict = {}
    exec(small, names)  # noqa: S102
    runs = names["many"].values() if "many" in names else [names["run"]] if small != code else ()
    assert all(run.history[-1]["step"] == 4096 for run in runs)
    assert runs or names["timestep"].reward.shape == ()


def test_every_algorithm_has_a_page_with_its_paper_and_settings():
    hook = runpy.run_path(str(ROOT / "docs/hook.py"))
    assert {path.stem for path in ROOT.glob("docs/algorithms/*.md")} == {"index", *ALGORITHMS}
    for name in ALGORITHMS:
        path = f"docs/algorithms/{name}.md"
        page = hook["expand"]((ROOT / path).read_text(), path)
        assert "arXiv" in page and page.count("\n| `") > 10, name


def test_links_of_the_documents_lead_somewhere():
    hook = runpy.run_path(str(ROOT / "docs/hook.py"))
    for document in [*DOCUMENTS, "CONTRIBUTING.md", *(path for path in hook["published"]() if path.endswith(".md"))]:
        hook["relink"]((ROOT / document).read_text(), document, set())
    with pytest.raises(ValueError, match="no_such.md does not exist"):
        hook["relink"]("[a](no_such.md)", "docs/faq.md", set())


def test_the_site_builds_without_a_warning(tmp_path):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site"))
    build(config)
    page = (tmp_path / "site/algorithms/sac.html").read_text()
    assert "target_entropy_scale" in page and "arXiv 1812.05905" in page
    assert 'src="http' not in page and "fonts.googleapis" not in page, "nothing is loaded from elsewhere"
