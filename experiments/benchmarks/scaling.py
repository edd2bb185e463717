"""What each of 1 to 256 devices holds and sends, read from the compiled program; no such hardware is needed.

    python experiments/benchmarks/scaling.py
    python experiments/benchmarks/scaling.py --env playground/CheetahRun --devices 1 8 --num-envs 65536

For each number of devices a process of its own compiles one iteration of PPO for so many CPU devices and runs nothing.
`weak`: `--envs-per-device` environments on each; `strong`: `--num-envs` in all.

Bytes that a device sends are those of a ring, D devices, R bytes of result on a device: 2 (D - 1) / D R for an
all-reduce, (D - 1) / D R for an all-gather or an all-to-all, (D - 1) R for a reduce-scatter, R for a permutation, times
how often the program runs it. Time is that over a bandwidth, plus a latency for each of its hops, 2 (D - 1) or D - 1;
both are assumptions (`--bandwidth`, `--latency`), not measurements, and trees take fewer hops. Temporaries and the
number of operations are those of the CPU's compiler; others fuse and merge differently.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlx.files import write_atomically
from rlx.machine import versions

RESULTS = Path(__file__).parent / "results" / "scaling.json"
DEVICES = (1, 8, 64, 256)


def compiled_iteration(env_name: str, num_envs: int, num_devices: int) -> dict[str, Any]:
    """Of this process, which has so many devices: state and messages of one iteration."""
    import jax

    import envs
    from rlx.algorithms import ppo
    from rlx.compilation import compile_run
    from rlx.footprint import collectives, memory
    from rlx.learners import build_algorithm, tuned
    from rlx.logging import Progress
    from rlx.schedule import make_schedule

    env = envs.make(env_name, physics="mjx") if env_name.startswith(("playground/", "brax/")) else envs.make(env_name)
    train, config = tuned(env, ppo)
    groups = math.gcd(num_envs, 256)
    sizes = {"num_envs": num_envs, "num_groups": groups, "num_devices": num_devices, "iterations_per_epoch": 1}
    train = dataclasses.replace(train, **sizes, num_evals=0)
    schedule = make_schedule(env, train)
    built = build_algorithm(ppo, config, env, schedule.plan)
    quiet = Progress(quiet=True)
    programs = compile_run(env, lambda varied, draw: built, schedule, train, jax.random.key(0), {}, None, quiet)
    found = [c._asdict() for c in collectives(programs.epoch.as_text())]
    takes = memory(programs.epoch)
    assert takes is not None  # a CPU says
    leaves = jax.tree.leaves(programs.abstract_state.learner.params)
    return {"parameters": sum(x.size * x.dtype.itemsize for x in leaves), "collectives": found, **takes._asdict()}


def sent(collective: dict[str, Any], devices: int) -> tuple[float, int]:
    """Bytes that a device sends in one iteration, and in how many hops one after another."""
    others = devices - 1
    factors = {"all-reduce": 2 * others / devices, "all-gather": others / devices, "all-to-all": others / devices}
    factors |= {"ragged-all-to-all": others / devices, "reduce-scatter": others, "collective-permute": 1}
    hops = {"all-reduce": 2 * others, "collective-permute": 1}.get(collective["kind"], others)
    return factors[collective["kind"]] * collective["bytes"] * collective["times"], hops * collective["times"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="playground/CheetahRun", help="on MJX, where there is a choice")
    parser.add_argument("--devices", type=int, nargs="+", default=DEVICES)
    parser.add_argument("--envs-per-device", type=int, default=1024, help="weak scaling")
    parser.add_argument("--num-envs", type=int, default=65536, help="strong scaling")
    parser.add_argument("--bandwidth", type=float, default=45e9, help="bytes/s of a device's links (an assumption)")
    parser.add_argument("--latency", type=float, default=1e-6, help="seconds a hop (an assumption)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(compiled_iteration(options.env, *options.one)))
        return
    rows = []
    columns = ("scaling", "devices", "environments", "state a device", "temporaries", "sent", "largest message", "time")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for kind in ("weak", "strong"):
        for devices in options.devices:
            num_envs = options.envs_per_device * devices if kind == "weak" else options.num_envs
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
            command = [sys.executable, __file__, "--env", options.env, "--one", str(num_envs), str(devices)]
            environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
            done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
            row = {"scaling": kind, "devices": devices, "num_envs": num_envs} | json.loads(done.stdout.splitlines()[-1])
            messages = [sent(c, devices) for c in row["collectives"]]
            row["sent"] = sum(size for size, _ in messages)
            row["seconds"] = row["sent"] / options.bandwidth + sum(hops for _, hops in messages) * options.latency
            largest = max((c["bytes"] for c in row["collectives"]), default=0)
            rows.append(row)
            mib = [f"{row[name] / 2**20:.2f} MiB" for name in ("state", "temporaries", "sent")]
            share = f"{largest / row['parameters']:.2f} of the parameters"
            cells = [kind, devices, f"{num_envs:,}", *mib, share, f"{1e3 * row['seconds']:.2f} ms"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    about = {"env": options.env, "bandwidth": options.bandwidth, "latency": options.latency, "versions": versions()}
    write_atomically(
        options.out,
        json.dumps(
            about | {"command": shlex.join(["experiments/benchmarks/scaling.py", *sys.argv[1:]]), "rows": rows},
            indent=1,
        )
        + "\n",
    )


if __name__ == "__main__":
    main()
