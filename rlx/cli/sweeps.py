"""`rlx sweep`: settings times seeds, program after program; and going on with a sweep that was stopped.

`sweep.json` in the sweep's folder holds everything it is made of, so that beginning and going on are one: `go_on`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
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
    recorded_pair,
    say,
    warn_of_changes,
    with_overrides,
)
from rlx.cli.programs import failures, finished, spread_over_cpu, train_program
from rlx.errors import UserError, require
from rlx.files import write_atomically
from rlx.logging import Progress
from rlx.machine import versions
from rlx.run_directory import FAILED, RunDirectory, read_metrics

FILE = "sweep.json"
FORMAT = 1  # of that file


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
    parser.add_argument("--samples", type=int, help="random draws for each point of the grid (8)")
    parser.add_argument("--space", metavar="FILE", help="TOML or JSON with tables [grid] and [random]")
    parser.add_argument("--runs-per-program", type=int, metavar="N", help="at most so many at once (all that can be)")
    words, rest = parser.parse_known_args(arguments)
    pair = find_pair(words.algorithm, words.env)
    spread_over_cpu()
    with Progress(quiet="--quiet" in rest) as shown:
        with shown.phase("importing"):
            algorithm = load_algorithm(pair)
            from rlx import sweep as sweeping
            from rlx.arguments import parse_train
            from rlx.schedule import TrainConfig
        options, merged = parse_train(pair.env, pair.algorithm, rest, TrainConfig, algorithm)
        require(options.num_seeds >= 1, "num_seeds", options.num_seeds, "at least 1")
        refused = {"from": options.from_run, "wandb": options.wandb, "overwrite": options.overwrite}
        for flag, value in {**refused, "data": options.data}.items():
            require(not value, f"--{flag}", value, "a sweep does not take it")
        grid, random = sweeping.read_space(words.space) if words.space else ({}, {})
        grid |= once("--grid", map(sweeping.read_grid, words.grid))
        random |= once("--random", map(sweeping.read_random, words.random))
        require(bool(random) or words.samples is None, "--samples", words.samples, "nothing without --random")
        limit = words.runs_per_program
        require(limit is None or limit >= 1, "--runs-per-program", limit, "at least 1")
        whole = {**settings.hints(TrainConfig), **hints_of(algorithm)}
        random = {  # 0:1 of a field of floats means 0.0 to 1.0
            key: kind._replace(low=float(kind.low), high=float(kind.high)) if whole.get(key) is float else kind
            for key, kind in random.items()
        }
        samples = 8 if words.samples is None else words.samples
        space = sweeping.Space(grid, random, samples, merged["seed"].value)
        found = sweeping.combinations(space)
        seeds = list(range(space.seed, space.seed + options.num_seeds))
        content = {
            "format": FORMAT,
            "versions": versions(),
            "command": shlex.join(["rlx", "sweep", *arguments]),
            "seeds": seeds,
            **plan(pair._replace(physics=options.physics), algorithm, merged, found, seeds, limit),
        }
        require("://" not in str(options.run_dir), "run_dir", options.run_dir, "a sweep's runs lie in a local folder")
        folder = Path(options.run_dir or default_run_dir(pair, space.seed)).absolute()
        RunDirectory.check_free(folder)
        spread_over_cpu(largest(content))
        with shown.phase("building"):
            check(content, algorithm)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FILE, json.dumps(content, indent=1) + "\n")
        num_runs = sum(len(program["runs"]) for program in content["programs"])
        say(shown.quiet, f"{num_runs} runs in {len(content['programs'])} programs, in {folder}")
        return go_on(folder, shown)


def once(flag: str, given: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Raises UserError for a key that is given twice."""
    found: dict[str, Any] = {}
    for key, values in given:
        require(key not in found, flag, key, "each key once, with all its values")
        found[key] = values
    return found


def plan(
    pair: Pair,
    algorithm: Any,
    merged: Mapping[str, Any],
    found: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    limit: int | None = None,
) -> dict[str, Any]:
    """Programs and their runs, at most `limit` in each, as sweep.json holds them.

    Raises UserError for settings that there are not.
    """
    from rlx import sweep as sweeping
    from rlx.schedule import TrainConfig

    for combination in found:
        require("seed" not in combination, "sweep", "seed", "seeds are swept by --num-seeds")
    floats = {name for name, hint in hints_of(algorithm).items() if hint is float}
    names = dict(zip(map(repr, found), sweeping.names_of(list(map(dict, found))), strict=True))
    require(len(names) == len(found), "sweep", len(found), f"of these settings only {len(names)} differ")
    programs: list[dict[str, Any]] = []
    for combinations in sweeping.programs(map(dict, found), floats):
        runs: dict[str, Any] = {}
        own = pair
        for combination in combinations:
            layered = settings.override(merged, TrainConfig, algorithm.Config, [("sweep", combination)])
            own = with_overrides(pair, settings.values(layered, "env."))
            name, num_evals = names[repr(combination)], layered["num_evals"].value
            require(num_evals >= 1, "num_evals", num_evals, "at least 1: they are compared")
            for seed in seeds:
                seeded = {**layered, "seed": settings.Setting(seed, "num_seeds")}
                runs[f"{name},seed={seed}"] = settings.entries(seeded)
        items = list(runs.items())
        for start in range(0, len(items), limit or len(items)):
            part = dict(items[start : start + (limit or len(items))])
            programs.append({"name": f"program-{len(programs)}", "pair": describe(own), "runs": part})
    return {"combinations": {names[repr(c)]: c for c in found}, "programs": programs}


def hints_of(algorithm: Any) -> dict[str, Any]:
    return {f"algo.{name}": hint for name, hint in settings.hints(algorithm.Config).items()}


def of_program(program: Mapping[str, Any], algorithm: Any) -> tuple[Pair, dict[str, tuple[Any, Any]]]:
    """The pair and the settings of the runs of a program in sweep.json."""
    from rlx.schedule import TrainConfig

    runs = {}
    for name, entries in program["runs"].items():
        merged = settings.read_entries(entries)
        train, algo = settings.values(merged), settings.values(merged, "algo.")
        runs[name] = settings.build(TrainConfig, train), settings.build(algorithm.Config, algo)
    return recorded_pair(program["pair"]), runs


def check(content: Mapping[str, Any], algorithm: Any) -> None:
    """Raises UserError for settings that cannot work, of any program, before the first one compiles.

    Writes into `content` which engine "auto" is here: all programs have the same, wherever they go on.
    """
    from rlx.learners import build_algorithm, check_data
    from rlx.schedule import make_schedule

    for program in content["programs"]:
        pair, runs = of_program(program, algorithm)
        env = load_env(pair)
        program["pair"]["physics"] = env.spec.physics or pair.physics
        for train_config, config in runs.values():
            built = build_algorithm(algorithm, config, env, make_schedule(env, train_config, len(runs)).plan)
            check_data(algorithm, config, built, env, None)


def largest(content: Mapping[str, Any]) -> int:
    """Of a sweep's programs, the number of runs."""
    return max(len(program["runs"]) for program in content["programs"])


def go_on(folder: Path, shown: Progress, num_devices: int | None = None) -> int:
    """Runs what is missing of a sweep, on other devices if told, then prints and writes its table.

    130 if it was stopped.
    """
    from rlx.signals import StopSignal

    try:
        content = json.loads((folder / FILE).read_text())
        found = int(content["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(folder / FILE)!r} is damaged: {error!r}.") from error
    require(found == FORMAT, "format", found, f"{FORMAT}: {str(folder / FILE)!r} is of another version of rlx")
    spread_over_cpu(largest(content))
    algorithm = load_algorithm(recorded_pair(content["programs"][0]["pair"]))
    shown.close()  # each program has a bar of its own
    places = [folder / program["name"] for program in content["programs"]]
    with StopSignal(shown.quiet) as stop:
        for program, place in zip(content["programs"], places, strict=True):
            if finished(place) or stop.requested:
                continue
            say(shown.quiet, f"{program['name']}: {len(program['runs'])} runs")
            pair, runs = of_program(program, algorithm)
            if num_devices is not None:
                runs = {k: (dataclasses.replace(t, num_devices=num_devices), c) for k, (t, c) in runs.items()}
            warn_of_changes(pair)
            record = {**describe(pair), "command": content["command"]}
            records = {name: {**record, "settings": program["runs"][name]} for name in runs}
            try:
                train_program(place, load_env(pair), algorithm, runs, records, stop, shown.quiet)
            except UserError as error:  # too large for the memory, say; others may not be
                say(False, f"{program['name']} is refused: {error}")
        if stop.requested:
            print(f"stopped; go on with: rlx resume {folder}")
            return 130
    report(folder, content)
    return int(any(not finished(place) or failures(place) for place in places))


def report(folder: Path, content: Mapping[str, Any]) -> None:
    """The table of a sweep on stdout and in report.md. Runs of programs that are not finished have no score."""
    from rlx.sweep import judge, table

    scores: dict[str, dict[int, float]] = {}
    for program in content["programs"]:
        cut = not finished(folder / program["name"])
        for name, run in program["runs"].items():
            place = folder / program["name"] / name
            missing = cut or (place / FAILED).exists() or not (place / "metrics.jsonl").exists()
            rows = [] if missing else read_metrics(place / "metrics.jsonl")
            last = rows[-1].get("eval/return", math.nan) if rows else math.nan
            scores.setdefault(name.rpartition(",seed=")[0], {})[run["seed"]["value"]] = last
    text = table(judge(scores, content["seeds"]), content["seeds"], content["combinations"])
    open_ones = [program["name"] for program in content["programs"] if not finished(folder / program["name"])]
    text += f"\n\nNot finished, so without a score: {', '.join(open_ones)}." if open_ones else ""
    write_atomically(folder / "report.md", text + "\n")
    print(text)
