"""`rlx benchmark ENV [ALGORITHM]`: what it is told, the sweep, ratios, the table. Free of jax until it measures.

Every engine is measured at every batch size: the environment alone, and whole training where ALGORITHM is given;
beside native physics the simulator itself, stepped from a plain loop. The programs of one batch size take turns in one
process, two warm-up blocks each, so that ratios hold on a machine that others use too; `rlx.measuring` says what a
block is. Seconds of building (the model and the environment's own trace, without imports), tracing and compiling, and
memory, are those of one new process for each program, which finds nothing compiled: `peak_memory_mib` of that process,
libraries and compiler included, `running_memory_mib` after compilation (Linux), `device_memory_mib` of an accelerator.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlx.errors import UserError, require
from rlx.logging import Progress
from rlx.machine import commit, usable_cores, versions

if TYPE_CHECKING:
    from rlx.environment import Environment
    from rlx.measuring import Case, Target
    from rlx.schedule import TrainConfig

FLAGS = ("--physics", "--num-envs", "--repeats", "--iterations", "--out", "--help")
RAW = "raw C rollout"
LIMITS = {"training": "environment", "environment": RAW}  # what a program cannot be faster than
TIMES = ("building_s", "tracing_s", "compiling_s")
MEMORY = ("peak_memory_mib", "running_memory_mib")


class Options(NamedTuple):
    env: str
    algorithm: str  # "" for the environment alone
    physics: tuple[str, ...]  # () for all that the machine has
    num_envs: tuple[int, ...]
    repeats: int
    iterations: int  # 0: as many as last a second
    out: Path | None
    settings: dict[str, Any]  # as on the command line of `rlx train`: flat
    command: str  # what measures this again, without the place of the result


def parse(arguments: Sequence[str]) -> Options:
    """Reads the command line. Raises UserError for values that cannot be; argparse exits with status 2 for the rest."""
    text = "Steps/s, compile time and memory of an environment on every engine, and of whole training with ALGORITHM."
    more = "Any setting of `rlx train` may follow, as --unroll-length 16, --total-steps N, --env.KEY V, --algo.FIELD V."
    parser = argparse.ArgumentParser("rlx benchmark", description=text, epilog=more, allow_abbrev=False)
    parser.add_argument("env", metavar="ENV")
    parser.add_argument("algorithm", nargs="?", default="", metavar="ALGORITHM")
    parser.add_argument("--physics", default="", metavar="P,P", help="engines (all that this machine has)")
    parser.add_argument("--num-envs", default="256,1024", metavar="N,N", help="batch sizes (256,1024)")
    parser.add_argument("--repeats", type=int, default=5, help="timed blocks after two warm-ups (5)")
    parser.add_argument("--iterations", type=int, default=0, help="of a timed block (0: as many as last a second)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    rest, given = take_settings(arguments)
    words = parser.parse_intermixed_args(rest)
    sizes = words.num_envs.split(",")
    require(all(s.isdecimal() and int(s) > 0 for s in sizes), "--num-envs", words.num_envs, "whole numbers, N,N,...")
    require(words.repeats >= 1, "--repeats", words.repeats, "at least 1")
    require(words.iterations >= 0, "--iterations", words.iterations, "at least 0")
    if words.out is not None:
        fits = words.out.parent.is_dir() and not words.out.is_dir()
        require(fits, "--out", str(words.out), "a file in a folder that exists")
    if not words.algorithm and any(key.startswith("algo.") for key in given):
        raise UserError("--algo.FIELD is a setting of training: name an ALGORITHM after ENV.")
    return Options(
        env=words.env,
        algorithm=words.algorithm,
        physics=tuple(dict.fromkeys(words.physics.split(","))) if words.physics else (),
        num_envs=tuple(sorted({int(size) for size in sizes})),
        repeats=words.repeats,
        iterations=words.iterations,
        out=words.out,
        settings=given,
        command=command_of(arguments),
    )


def take_settings(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Splits off what is a setting of `rlx train`, as {"algo.gamma": 0.9}. Raises UserError for a missing value."""
    rest: list[str] = []
    given: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        flag, equals, text = word.partition("=")
        if not flag.startswith("--") or flag in FLAGS:
            rest.append(word)
            continue
        text = text if equals else next(words, "--")
        if not equals and text.startswith("--"):
            raise UserError(f"{flag} needs a value.")
        given[flag.removeprefix("--").replace("-", "_")] = text
    if not given:
        return rest, {}
    from rlx.arguments import literal

    return rest, {key: literal(text) for key, text in given.items()}


def command_of(arguments: Sequence[str]) -> str:
    """The command as its user types it, without `--out`."""
    words = iter(arguments)
    kept = []
    for word in words:
        if word == "--out":
            next(words, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return shlex.join(["rlx", "benchmark", *kept])


class Sweep(NamedTuple):
    """What `measure` needs beside the options."""

    target: Target
    envs: Mapping[str, Environment]  # engine -> environment; {"": ...} where there is no choice
    train: TrainConfig
    algo: Mapping[str, Any]  # fields of the algorithm's Config
    raw: Callable[[Environment, int], Callable[[int], None] | None]  # `envs.physics.raw.raw_rollout`

    def cases(self, options: Options) -> Iterator[Case]:
        """Every engine, batch size and program."""
        from rlx.measuring import Case

        for num_envs in options.num_envs:
            train = dataclasses.replace(self.train, num_envs=num_envs, num_evals=0)
            for program in ("environment", *(["training"] if options.algorithm else [])):
                for engine in self.envs:
                    yield Case(engine, program, train, self.algo)


def check(options: Options, sweep: Sweep) -> None:
    """Raises UserError for settings that cannot work, before anything compiles."""
    from rlx.measuring import make_algorithm
    from rlx.schedule import make_schedule, one_device

    for case in sweep.cases(options):
        env = sweep.envs[case.physics]
        make_algorithm(sweep.target, case, env, make_schedule(env, one_device(case.train)).plan)


def measure(options: Options, sweep: Sweep, progress: Progress) -> dict[str, Any]:
    """The whole sweep, as the JSON file holds it. Raises UserError for settings that cannot work."""
    import jax

    check(options, sweep)
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for num_envs in options.num_envs:
            cases = [case for case in sweep.cases(options) if case.train.num_envs == num_envs]
            rows += measure_size(options, sweep, cases, cache, progress)
    device = jax.local_devices()[0]
    train = {name: getattr(sweep.train, name) for name in ("total_steps", "unroll_length", "reset", "reset_pool_size")}
    return {
        "env": options.env,
        "algorithm": options.algorithm,
        "settings": {**train, **{f"algo.{k}": v for k, v in sweep.algo.items() if options.algorithm}},
        "rows": rows,
        "ratios": ratios(rows),
        "device": f"{device.platform} {device.device_kind}, {platform.machine()}, {usable_cores()} cores",
        "versions": versions(),
        "command": options.command,
        "commit": commit(),
    }


def measure_size(
    options: Options, sweep: Sweep, cases: Sequence[Case], cache: str, progress: Progress
) -> list[dict[str, Any]]:
    """The rows of one batch size."""
    from rlx.measuring import RawRunning, Running, alternate, compiled_into

    num_envs, unroll_length = cases[0].train.num_envs, cases[0].train.unroll_length
    rows: list[dict[str, Any]] = []
    running: list[Any] = []
    for case in cases:
        row = {"physics": case.physics, "num_envs": num_envs, "program": case.program}
        with progress.phase(f"{title(row)}: compile time and memory, in a process of its own"):
            rows.append(row | in_new_process(title(row), sweep.target, case, cache))
    with compiled_into(cache):
        for row, case in zip(rows, cases, strict=True):
            with progress.phase(f"{title(row)}: compiling"):
                running.append(Running(sweep.target, case, sweep.envs[case.physics]))
        for engine, env in sweep.envs.items():
            roll = sweep.raw(env, num_envs)
            if roll is not None:
                rows.append({"physics": engine, "num_envs": num_envs, "program": RAW})
                running.append(RawRunning(roll, num_envs, unroll_length))
        with progress.phase(f"{num_envs} environments: {options.repeats} blocks of each, in turn"):
            for program in running:
                program.calibrate(options.iterations)
            rates = alternate(dict(enumerate(running)), options.repeats)
    for index, (row, program) in enumerate(zip(rows, running, strict=True)):
        row |= {"steps_per_second": spread(rates[index]), "iterations_per_block": program.iterations}
        if isinstance(program, Running):
            refresh = statistics.median(program.refreshes[2:])
            row |= {"steps_per_refresh": program.steps_per_refresh, "refresh_s": refresh}
    return rows


def in_new_process(what: str, target: Target, case: Case, cache: str) -> dict[str, Any]:
    """`rlx.measuring.measure_alone` in a process of its own. Raises UserError if the process dies."""
    from rlx.measuring import measure_alone

    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(measure_alone, target, case, cache).result()
        except BrokenProcessPool as error:
            raise UserError(f"{what}: its process died, of lack of memory perhaps: try fewer --num-envs.") from error


def title(row: Mapping[str, Any]) -> str:
    parts = [row["program"], row["physics"], f"{row['num_envs']} environments"]
    return ", ".join(part for part in parts if part)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of medians at equal batch size: the first engine over each other, training and environment over their limits."""
    found = []
    at = {(row["num_envs"], row["program"], row["physics"]): row for row in rows}
    for (num_envs, program, engine), row in at.items():
        first = next(e for n, p, e in at if (n, p) == (num_envs, program))
        if engine != first:
            best = at[num_envs, program, first]
            for what, measure_of in (("steps/s", speed), ("tracing + compiling", compile_seconds)):
                name = f"{program} {what}: {first} / {engine}"
                found.append({"num_envs": num_envs, "ratio": name, "value": measure_of(best) / measure_of(row)})
        limit = LIMITS.get(program, "")
        if (num_envs, limit, engine) in at:
            name = f"{program} / {limit}" + (f", {engine}" if engine else "")
            value = speed(row) / speed(at[num_envs, limit, engine])
            found.append({"num_envs": num_envs, "ratio": name, "value": value})
    return found


def speed(row: Mapping[str, Any]) -> float:
    return row["steps_per_second"]["median"]


def compile_seconds(row: Mapping[str, Any]) -> float:
    return row["tracing_s"] + row["compiling_s"]


def show(result: Mapping[str, Any]) -> None:
    """The table, on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 132, highlight=False)
    console.print(f"{result['env']} {result['algorithm']} on {result['device']}", markup=False)
    table = Table("physics", "program")
    for name in ("envs", "steps/s", "min", "max", "build s", "trace s", "compile s", "peak MiB", "running MiB"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        speeds = [f"{row['steps_per_second'][name]:,.0f}" for name in ("median", "min", "max")]
        times = [f"{row[name]:.1f}" if name in row else "" for name in TIMES]
        memory = [f"{row[name]:,.0f}" if name in row else "" for name in MEMORY]
        table.add_row(row["physics"], row["program"], f"{row['num_envs']:,}", *speeds, *times, *memory)
    console.print(table)
    for entry in result["ratios"]:
        console.print(f"{entry['num_envs']:>6,} environments  {entry['value']:>8.2f}  {entry['ratio']}", markup=False)
