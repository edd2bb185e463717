"""What each of 1 to 256 devices holds and sends, read from the compiled program; no such hardware is needed.

    python experiments/benchmarks/scaling.py
    python experiments/benchmarks/scaling.py --env playground/CheetahRun --devices 1 8 --num-envs 65536

For each number of devices a process of its own compiles one iteration of PPO for so many CPU devices and runs nothing.
`weak`: `--envs-per-device` environments on each; `strong`: `--num-envs` in all.

Bytes that a device sends are those of a ring, D devices, R bytes of result on a device: 2 (D - 1) / D R for an
all-reduce, (D - 1) / D R for an all-gather or an all-to-all, R for a permutation, times how often the program runs it.
Time is that over a bandwidth, plus a latency for each operation; both are assumptions (`--bandwidth`, `--latency`),
not measurements. A real compiler may merge operations that the CPU's leaves apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlx.logging import versions, write_atomically

RESULTS = Path(__file__).parent / "results" / "scaling.json"
DEVICES = (1, 8, 64, 256)


def compiled_iteration(env_name: str, num_envs: int, num_devices: int) -> dict[str, Any]:
    """Of this process, which has so many devices: state and messages of one iteration."""
    import jax

    import envs
    from rlx import settings
    from rlx.algorithms import ppo
    from rlx.epoch import init_state, make_iteration
    from rlx.footprint import collectives, memory
    from rlx.rollout import make_source
    from rlx.schedule import TrainConfig, make_schedule
    from rlx.sharding import make_mesh, placement

    env = envs.make(env_name, physics="mjx") if env_name.startswith(("playground/", "brax/")) else envs.make(env_name)
    layers = [("preset", settings.preset(env_name, "ppo"))]
    merged = settings.merge(TrainConfig, ppo.Config, layers)
    train = settings.build(TrainConfig, settings.values(merged))
    train = dataclasses.replace(train, num_envs=num_envs, num_groups=min(num_envs, 256), num_devices=num_devices)
    config = settings.build(ppo.Config, settings.values(merged, "algo."))
    plan = make_schedule(env, train).plan
    algorithm, mesh = ppo.make(config, env.spec, plan), make_mesh(num_devices)
    ppo.check(config, env.spec, plan)
    source = make_source(env, plan, mesh=mesh)

    def init(key: jax.Array) -> Any:
        return init_state(algorithm, source, key)

    where = placement(jax.eval_shape(init, jax.random.key(0)), mesh) if mesh else None
    state = jax.jit(init, out_shardings=where).trace(jax.random.key(0)).out_info
    program = jax.jit(make_iteration(algorithm, source), out_shardings=(where, None), donate_argnums=0)
    compiled = program.lower(state).compile()
    parameters = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.learner.params))
    found = [c._asdict() for c in collectives(compiled.as_text())]
    return {"parameters": parameters, "collectives": found, **memory(compiled)._asdict()}


def sent(collective: dict[str, Any], devices: int) -> float:
    """Bytes that a device sends in one iteration."""
    share = (devices - 1) / devices
    factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(collective["kind"], share)
    return factor * collective["bytes"] * collective["times"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="playground/CheetahRun", help="on MJX, where there is a choice")
    parser.add_argument("--devices", type=int, nargs="+", default=DEVICES)
    parser.add_argument("--envs-per-device", type=int, default=1024, help="weak scaling")
    parser.add_argument("--num-envs", type=int, default=65536, help="strong scaling")
    parser.add_argument("--bandwidth", type=float, default=45e9, help="bytes/s of a device's links (an assumption)")
    parser.add_argument("--latency", type=float, default=20e-6, help="seconds an operation (an assumption)")
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
            row["sent"] = sum(sent(c, devices) for c in row["collectives"])
            operations = sum(c["times"] for c in row["collectives"])
            row["seconds"] = row["sent"] / options.bandwidth + operations * options.latency
            largest = max((c["bytes"] for c in row["collectives"]), default=0)
            rows.append(row)
            mib = [f"{row[name] / 2**20:.2f} MiB" for name in ("state", "temporaries", "sent")]
            share = f"{largest / row['parameters']:.2f} of the parameters"
            cells = [kind, devices, f"{num_envs:,}", *mib, share, f"{1e3 * row['seconds']:.2f} ms"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    about = {"env": options.env, "bandwidth": options.bandwidth, "latency": options.latency, "versions": versions()}
    write_atomically(options.out, json.dumps(about | {"command": shlex.join(sys.argv), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
