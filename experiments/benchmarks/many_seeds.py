"""Seeds in one program against a process each: seconds from the command to the last file.

    python experiments/benchmarks/many_seeds.py
    python experiments/benchmarks/many_seeds.py --envs playground/CheetahRun --total-steps 500000 --num-seeds 4

`rlx train ppo ENV --num-seeds K` against K times `rlx train ppo ENV --seed S`, one after another and `--parallel` at a
time; the settings that ship, evaluations and checkpoints included. Every contender begins with nothing compiled; of
its own, later processes find what the first has compiled, as they would anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlx.files import write_atomically
from rlx.machine import commit, usable_cores, versions
from rlx.run_directory import read_metrics

RESULTS = Path(__file__).parent / "results" / "many_seeds.json"
ENVS = ("gymnax/CartPole-v1", "gymnax/Pendulum-v1", "probe/lqr")


def seconds_of(commands: Sequence[Sequence[str]], at_a_time: int) -> float:
    """Of all commands, from the first one's start to the last one's end."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}

        def run(command: Sequence[str]) -> None:
            done = subprocess.run(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            if done.returncode:
                raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")

        start = time.perf_counter()
        with ThreadPoolExecutor(at_a_time) as pool:
            list(pool.map(run, commands))
        return time.perf_counter() - start


def last_return(folder: Path) -> float:
    return read_metrics(folder / "metrics.jsonl")[-1]["eval/return"]


def measure(env: str, num_seeds: int, parallel: int, flags: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)

        def command(name: str, *own: object) -> list[str]:
            words = [sys.executable, "-m", "rlx.cli", "train", "ppo", env, "--run-dir", str(folder / name), "--quiet"]
            return [*words, *flags, *map(str, own)]

        found: dict[str, Any] = {"one_program_s": seconds_of([command("all", "--num-seeds", num_seeds)], 1)}
        found["returns"] = [last_return(folder / f"all/seed-{seed}") for seed in range(num_seeds)]
        for at_a_time in dict.fromkeys((1, parallel)):
            apart = [command(f"{at_a_time}-{seed}", "--seed", seed) for seed in range(num_seeds)]
            found[f"processes_{at_a_time}_at_a_time_s"] = seconds_of(apart, at_a_time)
        found["returns_apart"] = [last_return(folder / f"1-{seed}") for seed in range(num_seeds)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", default=ENVS)
    parser.add_argument("--num-seeds", type=int, default=16)
    parser.add_argument("--parallel", type=int, default=usable_cores(), help="processes at a time, beside one")
    parser.add_argument("--total-steps", type=int, default=0, help="0: the task's own")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.num_seeds < 2:
        parser.error("--num-seeds must be at least 2: they are compared")
    flags = ["--total-steps", str(options.total_steps)] if options.total_steps else []
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for env in options.envs:
        found = measure(env, options.num_seeds, options.parallel, flags)
        found |= {"num_seeds": options.num_seeds, "total_steps": options.total_steps}
        found |= {"versions": versions(), "commit": commit()}
        found |= {
            "cores": usable_cores(),
            "machine": platform.machine(),
            "command": shlex.join(["experiments/benchmarks/many_seeds.py", *sys.argv[1:]]),
        }
        results[f"{env}, {options.num_seeds} seeds"] = found
        write_atomically(options.out, json.dumps(results, indent=1) + "\n")
        apart = {name: seconds for name, seconds in found.items() if name.startswith("processes")}
        ratios = ", ".join(f"{name} {s:.0f} ({s / found['one_program_s']:.1f} times)" for name, s in apart.items())
        print(f"{env}: one program {found['one_program_s']:.0f} s; {ratios}", flush=True)


if __name__ == "__main__":
    main()
