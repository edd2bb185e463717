"""Updates a second of learners of several agents, and how long they compile, by the number of agents.

    python experiments/benchmarks/agents.py                about five minutes on two cores

An update is one call of the learner's `update` on a trajectory of `--num-envs` x `--unroll-length` steps: for HASAC,
MASAC and MADDPG `--updates` gradient steps on batches of `--batch-size`, for MAPPO and HAPPO four passes over it.
Observations (18 numbers an agent) and actions (2) are made up. Nothing is taken from a compilation cache; each program
is compiled `--compiles` times, and the median kept, then runs `--rounds` times after two warm-ups.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlx.algorithm import Plan
from rlx.algorithms import hasac, maddpg, mappo
from rlx.files import write_atomically
from rlx.machine import usable_cores, versions
from rlx.types import Box, Spec, Transition

RESULTS = Path(__file__).parent / "results" / "agents.json"
WARM_UPS = 2
OBS, ACTION = 18, 2  # of each agent


def spec_of(num_agents: int) -> Spec:
    obs = {
        "agents": jax.ShapeDtypeStruct((num_agents, OBS), jnp.float32),
        "state": jax.ShapeDtypeStruct((num_agents * OBS,), jnp.float32),
    }
    mask = np.ones((num_agents, OBS), bool), np.ones((num_agents, ACTION), bool)
    return Spec(obs, Box((num_agents, ACTION)), num_agents, *mask, episode_length=25)


def learners(args: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
    """Name -> module and settings."""
    steps = args.num_envs * args.unroll_length
    off: dict[str, Any] = {
        "batch_size": args.batch_size,
        "utd_ratio": (args.updates, steps),
        "replay_size": 4 * steps,
        "prefill_steps": 0,
    }
    widths: dict[str, Any] = {"actor_hidden": tuple(args.hidden), "critic_hidden": tuple(args.hidden)}
    on: dict[str, Any] = {"num_epochs": 4, "num_minibatches": 4}
    return {
        "hasac": (hasac, hasac.Config(**off, **widths)),
        "masac": (hasac, hasac.Config(sequential=False, **off, **widths)),
        "maddpg": (maddpg, maddpg.Config(**off, **widths)),
        "mappo": (mappo, mappo.Config(**on, **widths)),
        "happo": (mappo, mappo.Config(sequential=True, **on, **widths)),
    }


def measure(module: Any, config: Any, num_agents: int, args: argparse.Namespace) -> dict[str, float]:
    spec, plan = spec_of(num_agents), Plan(args.num_envs, args.unroll_length, 10)
    algorithm = module.make(config, spec, plan)
    state = algorithm.init(jax.random.key(0))
    lead = (args.unroll_length, args.num_envs)
    obs = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), (*lead, *x.shape)), spec.obs)
    policy = algorithm.policy(state, "explore")
    _, action, extras = jax.vmap(lambda obs: algorithm.act(policy, (), obs, jax.random.key(2), "explore"))(obs)
    no = jnp.zeros(lead, bool)
    trajectory = Transition(obs, action, jnp.ones(lead), no, no.at[-1].set(True), obs, extras)
    arguments = (state, trajectory, jnp.asarray(1), jax.random.key(3))
    traced, compiled = [], []
    for _ in range(args.compiles):
        jax.clear_caches()
        start = time.perf_counter()
        lowered = jax.jit(algorithm.update).lower(*arguments)
        middle = time.perf_counter()
        program = lowered.compile()
        traced.append(middle - start)
        compiled.append(time.perf_counter() - middle)
    seconds = []
    for round_ in range(args.rounds + WARM_UPS):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        if round_ >= WARM_UPS:
            seconds.append(time.perf_counter() - start)
    return {
        "trace_s": statistics.median(traced),
        "compile_s": statistics.median(compiled),
        "updates_per_second": 1 / statistics.median(seconds),
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, nargs="+", default=[2, 3, 6, 17])
    parser.add_argument("--num-envs", type=int, default=20)
    parser.add_argument("--unroll-length", type=int, default=25)
    parser.add_argument("--updates", type=int, default=10, help="gradient steps of off-policy learners")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 128])
    parser.add_argument("--compiles", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    jax.config.update("jax_enable_compilation_cache", False)
    rows = []
    for name, (module, config) in learners(args).items():
        for num_agents in args.agents:
            rows.append({"learner": name, "agents": num_agents, **measure(module, config, num_agents, args)})
            first = next(row for row in rows if row["learner"] == name)
            took, began = (row["trace_s"] + row["compile_s"] for row in (rows[-1], first))
            rows[-1]["times_first"] = took / began
            print(
                f"{name:8s} {num_agents:3d} agents  {rows[-1]['updates_per_second']:8.2f} updates/s  "
                f"tracing and compiling {took:6.2f} s, {took / began:.2f} times that of {first['agents']}",
                flush=True,
            )
    content = {
        "rows": rows,
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "device": f"{platform.machine()}, {usable_cores()} cores, {jax.devices()[0].device_kind}",
        "versions": versions(),
        "command": shlex.join(["python", "experiments/benchmarks/agents.py", *arguments]),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
