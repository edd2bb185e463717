"""`rlx sweep`: settings times seeds, program after program; and going on with a sweep that was stopped.

`sweep.json` in the sweep's folder holds everything it is made of, so that beginning and going on are one: `go_on`.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlx import settings
from rlx.cli.pairs import (
    Pair,
    default_run_dir,
    describe,
    find_pair,
    load_algorithm,
    load_env,
    say,
    with_overrides,
)
from rlx.errors import NonFiniteError, require
from rlx.logging import FAILED, RUNS, Progress, RunDirectory, read_metrics, write_atomically

FILE = "sweep.json"


def is_sweep(folder: str | Path) -> bool:
    return (Path(folder) / FILE).is_file()


def sweep(arguments: list[str]) -> int:
    """`rlx sweep ALGORITHM ENV --grid ... --random ...`."""
    text = "Settings times seeds; those that differ in numbers of the algorithm alone share one compiled program."
    parser = argparse.ArgumentParser("rlx sweep", description=text, allow_abbrev=False, epilog="Flags of `rlx train`.")
    parser.add_argument("algorithm", metavar="ALGORITHM")
    parser.add_argument("env", metavar="ENV")
    parser.add_argument("--grid", action="append", default=[], metavar="KEY=V,V", help="every one of these values")
    parser.add_argument("--random", action="append", default=[], metavar="KEY=LOW:HIGH", help="KEY=log:LOW:HIGH too")
    parser.add_argument("--samples", type=int, default=8, help="random draws for each point of the grid (8)")
    parser.add_argument("--space", metavar="FILE", help="TOML or JSON with tables [grid] and [random]")
    words, rest = parser.parse_known_args(arguments)
    pair = find_pair(words.algorithm, words.env)
    with Progress(quiet="--quiet" in rest) as shown:
        with shown.phase("importing"):
            algorithm = load_algorithm(pair)
            from rlx import sweep as sweeping
            from rlx.arguments import parse_train
            from rlx.training import TrainConfig
        options, merged = parse_train(pair.env, pair.algorithm, rest, TrainConfig, algorithm.Config)
        require(merged["num_evals"].value >= 1, "num_evals", merged["num_evals"].value, "at least 1: they are compared")
        require(options.num_seeds >= 1, "num_seeds", options.num_seeds, "at least 1")
        require(not options.from_run, "--from", options.from_run, "not of a sweep")
        grid, random = sweeping.read_space(words.space) if words.space else ({}, {})
        grid |= map(sweeping.read_grid, words.grid)
        random |= map(sweeping.read_random, words.random)
        space = sweeping.Space(grid, random, words.samples, merged["seed"].value)
        found = sweeping.combinations(space)
        seeds = list(range(space.seed, space.seed + options.num_seeds))
        content = {
            "format": 1,
            "command": shlex.join(["rlx", "sweep", *arguments]),
            "seeds": seeds,
            "wandb": options.wandb,
            **plan(pair._replace(physics=options.physics), algorithm, merged, found, seeds),
        }
        folder = Path(options.run_dir or default_run_dir(pair, space.seed)).absolute()
        with shown.phase("building"):
            check(content, algorithm)
        RunDirectory.check_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FILE, json.dumps(content, indent=1) + "\n")
        num_runs = sum(len(program["runs"]) for program in content["programs"])
        say(shown.quiet, f"{num_runs} runs in {len(content['programs'])} programs, in {folder}")
        return go_on(folder, shown)


def plan(
    pair: Pair, algorithm: Any, merged: Mapping[str, Any], found: Sequence[Mapping[str, Any]], seeds: Sequence[int]
) -> dict[str, Any]:
    """Programs and their runs, as sweep.json holds them. Raises UserError for settings that there are not."""
    from rlx import sweep as sweeping
    from rlx.training import TrainConfig

    for combination in found:
        require("seed" not in combination, "sweep", "seed", "seeds are swept by --num-seeds")
    floats = {f"algo.{name}" for name, hint in settings.hints(algorithm.Config).items() if hint is float}
    programs = []
    for index, combinations in enumerate(sweeping.programs(map(dict, found), floats)):
        runs: dict[str, Any] = {}
        own = pair
        for combination in combinations:
            layered = settings.override(merged, TrainConfig, algorithm.Config, [("sweep", combination)])
            own = with_overrides(pair, settings.values(layered, "env."))
            train, algo = settings.values(layered), settings.values(layered, "algo.")
            name = sweeping.name_of(combination)
            runs |= {f"{name},seed={seed}": {"train": {**train, "seed": seed}, "algo": algo} for seed in seeds}
        programs.append({"name": f"program-{index}", "pair": describe(own), "runs": runs})
    names = {sweeping.name_of(combination) for combination in found}
    require(len(names) == len(found), "sweep", len(found), f"of these settings only {len(names)} differ")
    return {"combinations": {sweeping.name_of(c): c for c in found}, "programs": programs}


def of_program(program: Mapping[str, Any], algorithm: Any) -> tuple[Pair, dict[str, tuple[Any, Any]]]:
    """The pair and the settings of the runs of a program in sweep.json."""
    from rlx.training import TrainConfig

    recorded = program["pair"]
    pair = Pair(*(recorded[name] for name in ("algorithm", "env", "physics", "env_overrides", "files")))
    runs = {
        name: (settings.build(TrainConfig, run["train"]), settings.build(algorithm.Config, run["algo"]))
        for name, run in program["runs"].items()
    }
    return pair, runs


def check(content: Mapping[str, Any], algorithm: Any) -> None:
    """Raises UserError for settings that cannot work, of any program, before the first one compiles."""
    from rlx.training import build_algorithm, make_schedule

    for program in content["programs"]:
        pair, runs = of_program(program, algorithm)
        env = load_env(pair)
        for train_config, config in runs.values():
            build_algorithm(algorithm, config, env, make_schedule(env, train_config).plan)


def go_on(folder: Path, shown: Progress) -> int:
    """Runs what is missing of a sweep, then prints and writes its table. 130 if it was stopped."""
    from rlx.training import train_many

    content = json.loads((folder / FILE).read_text())
    algorithm = load_algorithm(of_recorded(content))
    failed = False
    for program in content["programs"]:
        pair, runs = of_program(program, algorithm)
        env = load_env(pair)
        own = describe(pair._replace(physics=env.spec.physics or pair.physics))
        records = {name: {**own, "wandb": content["wandb"], "command": content["command"]} for name in runs}
        place = folder / program["name"]
        begun = (place / RUNS).exists()
        say(shown.quiet, f"{program['name']}: {len(runs)} runs")
        try:
            done = train_many(
                env, algorithm, runs, run_dir=place, records=records, resume=begun, progress=Progress(quiet=shown.quiet)
            )
        except NonFiniteError as error:  # of all runs of this program; the others may fare better
            say(False, f"{program['name']}: {error}")
            failed = True
            continue
        failed |= any(run.error for run in done.values())
        if any(run.interrupted for run in done.values()):
            print(f"stopped; go on with: rlx resume {folder}")
            return 130
    report(folder, content)
    return int(failed)


def of_recorded(content: Mapping[str, Any]) -> Pair:
    recorded = content["programs"][0]["pair"]
    return Pair(recorded["algorithm"], recorded["env"])


def report(folder: Path, content: Mapping[str, Any]) -> None:
    """The table of a sweep on stdout and in report.md."""
    from rlx.sweep import judge, table

    scores: dict[str, dict[int, float]] = {}
    for program in content["programs"]:
        for name, run in program["runs"].items():
            place = folder / program["name"] / name
            rows = [] if (place / FAILED).exists() else read_metrics(place / "metrics.jsonl")
            last = rows[-1].get("eval/return", math.nan) if rows else math.nan
            scores.setdefault(name.rpartition(",seed=")[0], {})[run["train"]["seed"]] = last
    text = table(judge(scores, content["seeds"]), content["seeds"])
    write_atomically(folder / "report.md", text + "\n")
    print(text)
