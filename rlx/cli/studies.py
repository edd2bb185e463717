"""`rlx reproduce STUDY`: runs what is missing of a study, resumes what was cut, and writes its report.

Every program (an algorithm on an environment, all seeds) has a folder of its own; `finished.json` there says that
nothing of it is left to do. The report is written anew after each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlx import settings
from rlx.cli.pairs import (
    Pair,
    describe,
    envs_package,
    find_pair,
    load_algorithm,
    load_data,
    load_env,
    recorded_pair,
    say,
    start_policy,
    with_overrides,
)
from rlx.cli.programs import failures, finished, spread_over_cpu, train_program
from rlx.errors import UserError, require, unknown
from rlx.files import RUNS
from rlx.logging import Progress
from rlx.run_directory import RunDirectory, run_directories
from rlx.study import Program, load, programs, run_name, select

if TYPE_CHECKING:
    from rlx.findings import Findings
    from rlx.signals import StopSignal


class Planned(NamedTuple):
    """A program and what `train_many` takes of it."""

    program: Program
    out: Path  # the folder of the study's size
    pair: Pair
    runs: Mapping[str, tuple[Any, Any]]  # name -> TrainConfig, Config
    merged: Mapping[str, settings.Setting]

    @property
    def place(self) -> Path:
        """The program's folder."""
        return self.out / self.program.folder

    @property
    def finished(self) -> bool:
        return finished(self.place)

    @property
    def begun(self) -> bool:
        return (self.place / RUNS).is_file()


def reproduce(arguments: list[str]) -> int:
    """`rlx reproduce STUDY [...]`."""
    text = "Run what is missing of a study and write its report. Stopped, the same command goes on."
    parser = argparse.ArgumentParser("rlx reproduce", description=text, allow_abbrev=False)
    parser.add_argument("study", metavar="STUDY", help="a folder of experiments/, or the path of a study.py")
    parser.add_argument("--size", default="", help="how much of it (the first size that the study has)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the runs go (runs/STUDY/SIZE)")
    parser.add_argument("--report", type=Path, metavar="DIR", help="where the report goes, beside OUT/report")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these algorithms or environments")
    parser.add_argument("--physics", default="auto", help="engine of the programs that are begun: mjx, warp, mujoco")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors, verdicts and the result")
    words = parser.parse_args(arguments)
    study, folder = load(words.study)
    size = words.size or next(iter(study.sizes))
    every = programs(study, size, folder)
    chosen = select(every, words.only)
    pairs = {program.title: find_pair(program.algorithm, program.env_reference) for program in every}
    if words.physics not in envs_package().PHYSICS:
        raise unknown("physics", words.physics, envs_package().PHYSICS)
    pairs = {title: pair._replace(physics=words.physics) for title, pair in pairs.items()}
    out = (words.out or Path("runs") / study.name / size).absolute()
    name = study.name if Path(words.study).is_absolute() else words.study
    command = shlex.join(["rlx", "reproduce", name, "--size", size])
    targets = [out / "report"] + ([words.report.absolute()] if words.report else [])

    def write_report() -> Findings:
        from rlx import findings, report, results

        found = findings.findings(study, size, command, [results.read(program, out) for program in every])
        whole = all(result.state == "finished" for result in found.results)
        published = [folder / "report" / size] if whole and not words.report else []  # never a part over the whole
        for target in [*targets, *published]:
            report.write(found, target)
        return found

    status = 0
    if words.report_only:
        require(any((out / program.folder).is_dir() for program in every), "--out", str(out), "it holds no run of this")
        write_report()
    else:
        planned = plan([(program, pairs[program.title]) for program in every], chosen, out, words.quiet)
        say(words.quiet, f"{len(planned)} programs, {sum(one.finished for one in planned)} of them finished, in {out}")
        record = {"command": command, "study": {"name": study.name, "size": size}}
        write_report()  # what cannot be written fails here, not after hours
        status = run_all(planned, record, words.quiet, write_report, shlex.join(["rlx", "reproduce", *arguments]))
    print(f"report: {targets[-1] / 'report.md'}")
    return status


def plan(every: Sequence[tuple[Program, Pair]], chosen: Sequence[Program], out: Path, quiet: bool) -> list[Planned]:
    """Merges the settings of every program, and builds those of `chosen` that are not finished.

    Raises UserError for settings that cannot work, and for those of programs that were begun with others.
    """
    spread_over_cpu(max(len(program.seeds) for program, _ in every))
    with Progress(quiet=quiet) as shown:
        with shown.phase("importing"):
            planned = [merge(program, pair, out) for program, pair in every]
            for one in planned:
                check_unchanged(one)
            planned = [one for one in planned if one.program in chosen]
            from rlx.learners import build_algorithm, check_data
            from rlx.schedule import make_schedule
        with shown.phase("building"):
            for one in planned:
                if not one.finished:
                    env, (train_config, config) = load_env(one.pair), next(iter(one.runs.values()))
                    algorithm = load_algorithm(one.pair)
                    plan = make_schedule(env, train_config, len(one.runs)).plan
                    data = data_of(one.program, one.pair, env, quiet)
                    check_data(algorithm, config, build_algorithm(algorithm, config, env, plan), env, data)
    return planned


def data_of(program: Program, pair: Pair, env: Any, quiet: bool) -> Any:
    """The data sets of a program, None without any. Raises UserError for a file with a fault."""
    return load_data([(file, None) for file in program.data], pair, env, quiet)


def merge(program: Program, pair: Pair, out: Path) -> Planned:
    """The settings of a program's runs. Raises UserError for those that do not exist or are of a wrong type."""
    algorithm = load_algorithm(pair)
    from rlx.schedule import TrainConfig

    layers = [("preset", settings.preset_for(algorithm, pair.env, pair.algorithm)), *program.layers]
    merged = settings.merge(TrainConfig, algorithm.Config, layers)
    pair = with_overrides(pair, settings.values(merged, "env."))
    train_config = settings.build(TrainConfig, settings.values(merged))
    require(train_config.num_evals >= 1, "num_evals", train_config.num_evals, "at least 1: evaluations are reported")
    config = settings.build(algorithm.Config, settings.values(merged, "algo."))
    runs = {run_name(seed): (dataclasses.replace(train_config, seed=seed), config) for seed in program.seeds}
    return Planned(program, out, pair, runs, merged)


def check_unchanged(one: Planned) -> None:
    """Raises UserError where a program was begun with other seeds or settings than the study has now."""
    if not one.begun:
        return
    advice = f"name another --out, or remove {str(one.place)!r} to run it anew"
    names = [path.name for path in run_directories(one.place)]
    require(names == list(one.runs), f"runs of {one.program.title}", list(one.runs), f"begun with {names}; {advice}")
    for name, (train_config, config) in one.runs.items():
        if not (one.place / name / "config.json").is_file():  # killed before it was made
            continue
        recorded = RunDirectory.open(one.place / name).config
        now = dataclasses.asdict(train_config) | settings.flatten(dataclasses.asdict(config), "algo.")
        now |= {"algorithm": one.pair.algorithm, "env": one.pair.env, "env.*": dict(one.pair.overrides)}
        was = recorded["train"] | settings.flatten(recorded["algo"], "algo.")
        was |= {"algorithm": recorded["algorithm"], "env": recorded["env"], "env.*": recorded["env_overrides"]}
        now["files"], was["files"] = dict(one.pair.files), recorded["files"]
        # Both folders may have been moved as they are.
        now["data"] = [Path(file).name for file in one.program.data]
        was["data"] = [Path(entry["path"]).name for entry in recorded.get("data", ())]
        start = one.program.start
        now["from"] = str(start) if start else None
        was["from"] = str(Path(*Path(recorded["from"]).parts[-3:])) if recorded.get("from") else None
        for key, new in json.loads(json.dumps(now)).items():
            if key in ("num_devices", "split"):
                continue  # they decide roundings, and may have to be others
            old = was.get(key, new)  # a field that is new since was at its default
            require(old == new, f"{one.program.title}: {key}", new, f"it was begun with {old!r}; {advice}")


def run_all(
    planned: Sequence[Planned], record: Mapping[str, Any], quiet: bool, report: Callable[[], Findings], again: str
) -> int:
    """Runs what is not finished, program after program. The exit status: 130 if stopped, 1 if a run failed.

    A program that is refused (it does not fit into memory, say) is named, and the others go on. `again`: the command.
    """
    from rlx.signals import StopSignal

    refused = False
    with StopSignal(quiet) as stop:
        for index, one in enumerate(planned, start=1):
            if one.finished or stop.requested:
                continue
            say(quiet, f"{one.program.title}: program {index} of {len(planned)}, {len(one.runs)} runs")
            try:
                run_program(one, record, quiet, stop)
            except UserError as error:
                say(False, f"{one.program.title} is refused: {error}")
                refused = True
            found = report()
            if one.finished:
                row = [result.program for result in found.results].index(one.program)
                judged = found.verdicts[row]
                print(
                    f"{one.program.title}: mean {found.scores[row].mean:.4g}; {judged.word}, {judged.reason}",
                    flush=True,
                )
        if stop.requested:
            print(f"stopped; go on with: {again}")
            return 130
    return int(refused or any(failures(one.place) for one in planned))


def run_program(one: Planned, record: Mapping[str, Any], quiet: bool, stop: StopSignal) -> None:
    """Begins or goes on with one program; finished.json names the runs that met a NaN or an infinity."""
    pair = one.pair
    begun = [path for path in run_directories(one.place) if (path / "config.json").is_file()] if one.begun else []
    if begun:
        before = recorded_pair(RunDirectory.open(begun[0]).config)
        require(
            pair.physics in ("auto", before.physics), "--physics", pair.physics, f"{before.physics}, as it was begun"
        )
        pair = pair._replace(physics=before.physics)  # "auto" may be another engine here
    env = load_env(pair)
    pair = pair._replace(physics=env.spec.physics or pair.physics)
    start = None
    if one.program.start:
        start, first = str(one.out / one.program.start), one.program.start.parts[0]
        place = Path(start).parent
        if not finished(place) or Path(start).name in failures(place):
            raise UserError(f"it starts from the policy of {first}, which has not run to its end.")
    train_config, config = next(iter(one.runs.values()))
    keywords = {
        "init_policy": start_policy(start, pair.physics, env, load_algorithm(pair), train_config, config),
        "data": data_of(one.program, pair, env, quiet=True),
    }
    entries = settings.entries(one.merged)
    records = {
        name: {
            **describe(pair),
            **record,
            "from": start,
            "settings": {**entries, "seed": {"value": own.seed, "from": "study"}},
        }
        for name, (own, _) in one.runs.items()
    }
    train_program(one.place, env, load_algorithm(pair), one.runs, records, stop, quiet, **keywords)
