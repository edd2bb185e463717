"""Weak scaling over processes of one machine, and the share of an epoch in which they wait for each other.

    python experiments/benchmarks/processes.py
    python experiments/benchmarks/processes.py --env playground/CheetahRun --processes 1 2 4 --num-envs 256

PPO with `--num-envs` environments a device, on P devices: P processes joined into one run; one process with P devices;
and, as the measure of what the machine gives, P processes each for itself at the same time, with the same work and
nothing sent. The share of the collectives is what the others take longer than these. All three take turns, `--repeats`
times after two to warm up; medians. "Sums" are the arrays that an iteration sums over devices, read from the compiled
program: gloo sums one after the other. On one machine processes share its cores, so steps/s say little: what counts is
the share, and how it grows with the processes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rlx.files import write_atomically
from rlx.machine import commit, usable_cores, versions

RESULTS = Path(__file__).parent / "results" / "processes.json"
WARM_UPS = 2


def work(options: argparse.Namespace) -> None:
    """One process: compiles, says so, and for each line on stdin runs a block of iterations and says its seconds."""
    import jax

    import envs
    from rlx import distributed
    from rlx.algorithms import ppo
    from rlx.compilation import compile_run
    from rlx.footprint import collectives
    from rlx.learners import build_algorithm, tuned
    from rlx.logging import Progress
    from rlx.schedule import make_schedule

    count, index, port = options.worker
    if port:
        distributed.start(f"localhost:{port}", count, index)
    devices = len(jax.devices())
    env = envs.make(options.env)
    train, config = tuned(env, ppo)
    sizes = {"num_envs": options.num_envs * devices, "num_groups": devices, "num_devices": devices, "split": "envs"}
    train = dataclasses.replace(train, **sizes, iterations_per_epoch=options.iterations, num_evals=0)
    train = dataclasses.replace(train, total_steps=10**9)
    schedule = make_schedule(env, train)
    built = build_algorithm(ppo, config, env, schedule.plan)
    key = jax.random.key(0)
    programs = compile_run(env, lambda varied, draw: built, schedule, train, key, {}, None, Progress(quiet=True))
    state = jax.block_until_ready(programs.init(key, {}, None, programs.arrays))
    steps = options.iterations * options.num_envs * train.unroll_length
    sums = sum(found.times * found.arrays for found in collectives(programs.epoch.as_text()))
    print(json.dumps({"steps": steps * devices, "devices": devices, "sums": sums}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        state, metrics = programs.epoch(state, {}, programs.arrays)
        jax.block_until_ready((state, metrics))
        print(json.dumps(time.perf_counter() - began), flush=True)


class Team:
    """`count` processes, joined or not, of `devices` each."""

    def __init__(self, options: argparse.Namespace, count: int, joined: bool, devices: int = 1):
        port = 0
        if joined:
            with socket.socket() as found:
                found.bind(("localhost", 0))
                port = found.getsockname()[1]
        sizes = ["--env", options.env, "--num-envs", options.num_envs, "--iterations", options.iterations]
        self._each = []
        for index in range(count):
            command = [sys.executable, __file__, *map(str, sizes), "--worker", *map(str, (count, index, port))]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
            self._each.append(subprocess.Popen(command, env=environment, **pipes))
        found = self._read()
        self.sums = found[0]["sums"]
        self.steps = found[0]["steps"] * (1 if joined else count)
        assert all(entry["devices"] == devices * (count if joined else 1) for entry in found)

    def _read(self) -> list[Any]:
        answers = []
        for process in self._each:
            line = "["
            while line.startswith("["):  # gloo greets its peers on stdout
                line = process.stdout.readline()
            if not line:
                raise SystemExit(f"a process ended with status {process.wait()}")
            answers.append(json.loads(line))
        return answers

    def block(self) -> float:
        """Seconds of the slowest."""
        for process in self._each:
            process.stdin.write("go\n")
            process.stdin.flush()
        return max(self._read())

    def close(self) -> None:
        for process in self._each:
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self._each:
            process.wait()


def cells(row: dict[str, Any]) -> list[str]:
    """Steps/s of each kind, the share of it that collectives take, and how many sums they are, of how long."""
    shares, texts = {}, {}
    for kind, found in row["seconds"].items():
        shares[kind] = [1 - alone / longer for longer, alone in zip(found, row["seconds"]["alone"], strict=True)]
        texts[kind] = f"{row['steps'] / statistics.median(found):,.0f}"
        if kind != "alone":
            texts[kind] += (
                f" | {statistics.median(shares[kind]):.2f} ({min(shares[kind]):.2f} to {max(shares[kind]):.2f})"
            )
    longer = [a - b for a, b in zip(row["seconds"]["processes"], row["seconds"]["alone"], strict=True)]
    each = f"{1e3 * statistics.median(longer) / row['sums']:.2f} ms" if row["sums"] else "-"
    return [str(row["devices"]), f"{row['num_envs']:,}", *texts.values(), f"{row['sums'] // row['iterations']:,}", each]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="playground/CheetahRun")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--num-envs", type=int, default=256, help="of each process")
    parser.add_argument("--iterations", type=int, default=2, help="in a block")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    rows: list[dict[str, Any]] = []
    columns = ("devices", "environments", "alone", "one process", "share", "processes", "share", "sums", "each")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for count in options.processes:
        teams = {"alone": Team(options, count, False), "one process": Team(options, 1, False, count)}
        teams["processes"] = Team(options, count, True)
        assert len({team.steps for team in teams.values()}) == 1
        turns = [[team.block() for team in teams.values()] for _ in range(WARM_UPS + options.repeats)][WARM_UPS:]
        for team in teams.values():
            team.close()
        seconds = dict(zip(teams, map(list, zip(*turns, strict=True)), strict=True))
        row = {"devices": count, "num_envs": options.num_envs * count, "steps": teams["alone"].steps}
        row |= {"iterations": options.iterations, "sums": teams["processes"].sums, "seconds": seconds}
        rows.append(row)
        print(f"| {' | '.join(cells(rows[-1]))} |", flush=True)
    about = {"env": options.env, "cores": usable_cores(), "versions": versions(), "commit": commit()}
    about["command"] = shlex.join(["experiments/benchmarks/processes.py", *sys.argv[1:]])
    write_atomically(options.out, json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
