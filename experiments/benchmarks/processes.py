"""Weak scaling over processes of one machine, and the share of an epoch in which they wait for each other.

    python experiments/benchmarks/processes.py
    python experiments/benchmarks/processes.py --env playground/CheetahRun --processes 1 2 4 --num-envs 256

P processes train PPO with `--num-envs` environments each: joined into one run, and, as the measure of what the machine
gives, each for itself at the same time, with the same work and nothing sent. The share of the collectives is what the
joined ones take longer. Both take turns, `--repeats` times after two to warm up; medians. On one machine processes
share its cores, so steps/s say little: what counts is the share, and how it grows with the processes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shlex
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rlx.logging import versions, write_atomically
from rlx.machine import commit, usable_cores

RESULTS = Path(__file__).parent / "results" / "processes.json"
WARM_UPS = 2


def work(options: argparse.Namespace) -> None:
    """One process: compiles, says so, and for each line on stdin runs a block of iterations and says its seconds."""
    import jax

    import envs
    from rlx import distributed, settings
    from rlx.algorithms import ppo
    from rlx.compilation import compile_run
    from rlx.logging import Progress
    from rlx.schedule import TrainConfig, make_schedule
    from rlx.training import build_algorithm

    count, index, port = options.worker
    if port:
        distributed.start(f"localhost:{port}", count, index)
    devices = len(jax.devices())
    env = envs.make(options.env)
    merged = settings.merge(TrainConfig, ppo.Config, [("preset", settings.preset(options.env, "ppo"))])
    train = settings.build(TrainConfig, settings.values(merged))
    sizes = {"num_envs": options.num_envs * devices, "num_groups": devices, "num_devices": devices, "split": "envs"}
    train = dataclasses.replace(train, **sizes, iterations_per_epoch=options.iterations, num_evals=0)
    train = dataclasses.replace(train, total_steps=10**9)
    config = settings.build(ppo.Config, settings.values(merged, "algo."))
    schedule = make_schedule(env, train)
    built = build_algorithm(ppo, config, env, schedule.plan)
    key = jax.random.key(0)
    programs = compile_run(env, lambda varied, draw: built, schedule, train, key, {}, None, Progress(quiet=True))
    state = jax.block_until_ready(programs.init(key, {}, None, programs.arrays))
    steps = options.iterations * options.num_envs * train.unroll_length
    print(json.dumps({"steps": steps, "devices": devices}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        state, metrics = programs.epoch(state, {}, programs.arrays)
        jax.block_until_ready((state, metrics))
        print(json.dumps(time.perf_counter() - began), flush=True)


class Team:
    """P processes, joined or not."""

    def __init__(self, options: argparse.Namespace, count: int, joined: bool):
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
            self._each.append(subprocess.Popen(command, **pipes))
        found = self._read()
        self.steps = sum(entry["steps"] for entry in found)
        assert all(entry["devices"] == (count if joined else 1) for entry in found)

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="playground/CheetahRun")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--num-envs", type=int, default=256, help="of each process")
    parser.add_argument("--iterations", type=int, default=4, help="in a block")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    rows: list[dict[str, Any]] = []
    columns = ("processes", "environments", "joined: steps/s", "each alone: steps/s", "share of collectives")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for count in options.processes:
        joined, alone = Team(options, count, True), Team(options, count, False)
        pairs = [(joined.block(), alone.block()) for _ in range(WARM_UPS + options.repeats)][WARM_UPS:]
        joined.close()
        alone.close()
        seconds = {"joined": [pair[0] for pair in pairs], "alone": [pair[1] for pair in pairs]}
        shares = [1 - without / with_ for with_, without in pairs]
        row = {"processes": count, "num_envs": options.num_envs * count, "steps": joined.steps, "seconds": seconds}
        row |= {"share": statistics.median(shares), "share_min": min(shares), "share_max": max(shares)}
        rows.append(row)
        speeds = [f"{row['steps'] / statistics.median(found):,.0f}" for found in seconds.values()]
        share = f"{row['share']:.2f} ({row['share_min']:.2f} to {row['share_max']:.2f})"
        print(f"| {' | '.join(map(str, [count, row['num_envs'], *speeds, share]))} |", flush=True)
    about = {"env": options.env, "cores": usable_cores(), "versions": versions(), "commit": commit()}
    about["command"] = shlex.join(["experiments/benchmarks/processes.py", *sys.argv[1:]])
    write_atomically(options.out, json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
