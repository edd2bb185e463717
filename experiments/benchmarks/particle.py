"""Steps a second of particle worlds beside mpe2, out of which they are made anew, and beside JaxMARL's.

    python experiments/benchmarks/particle.py                about two minutes on two cores
    python experiments/benchmarks/particle.py --jaxmarl      about four; with jaxmarl and jaxtyping installed

Random actions, episodes of 25 steps and true resets on all sides; a step is one of the whole world, all agents
included. mpe2 runs one world in one process, in NumPy, its actions drawn beforehand; rlx runs `--num-envs` of them as
training would, auto reset included; JaxMARL as many under `vmap` and `scan`, its own auto reset included. All take
turns, `--rounds` times after two warm-ups; the ratios are of medians.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import envs
from rlx.algorithm import Plan
from rlx.collection import random_policy
from rlx.compilation import compile_program
from rlx.files import write_atomically
from rlx.machine import usable_cores, versions
from rlx.rollout import make_source

RESULTS = Path(__file__).parent / "results" / "particle.json"
WARM_UPS = 2
EPISODE = 25
MPE2 = {"simple_spread": "v3", "simple_speaker_listener": "v4", "simple_reference": "v3", "simple_tag": "v3"}


def rlx_block(name: str, num_envs: int, steps: int) -> tuple[Callable[[], None], int]:
    """Runs about `steps` steps of `num_envs` worlds; and how many those are."""
    env = envs.make(f"particle/{name}")
    length = max(1, round(steps / num_envs / EPISODE)) * EPISODE
    algorithm = random_policy(env.spec)
    source = make_source(env, Plan(num_envs, length, 1), reset="always")
    state = source.init(algorithm, jax.random.key(0))
    program = compile_program(
        jax.jit(lambda state, key: source.collect(algorithm, (), state, key)[2]).lower(state, jax.random.key(1))
    )

    def block() -> None:
        jax.block_until_ready(program(state, jax.random.key(1)))

    return block, num_envs * length


def mpe2_block(name: str, steps: int) -> tuple[Callable[[], None], int]:
    module = importlib.import_module(f"mpe2.{name}_{MPE2[name]}")
    env: Any = module.parallel_env(continuous_actions=True)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    draws = [
        {agent: rng.uniform(size=env.action_space(agent).shape).astype(np.float32) for agent in env.possible_agents}
        for _ in range(EPISODE)
    ]
    episodes = max(1, steps // EPISODE)

    def block() -> None:
        for _ in range(episodes):
            env.reset()
            for actions in draws:
                env.step(actions)

    return block, episodes * EPISODE


def jaxmarl_block(name: str, num_envs: int, steps: int) -> tuple[Callable[[], None], int]:
    mpe = importlib.import_module("jaxmarl.environments.mpe")
    env: Any = getattr(mpe, "".join(part.capitalize() for part in name.split("_")) + "MPE")(action_type="Continuous")
    length = max(1, round(steps / num_envs / EPISODE)) * EPISODE

    def step(state: Any, key: jax.Array) -> tuple[Any, Any]:
        draw_key, step_key = jax.random.split(key)
        spaces = {agent: env.action_space(agent) for agent in env.agents}
        keys = jax.random.split(draw_key, len(spaces))
        actions = {agent: space.sample(key) for (agent, space), key in zip(spaces.items(), keys, strict=True)}
        obs, state, reward, done, _ = env.step(step_key, state, actions)
        return state, (obs, reward, done)

    def run(keys: jax.Array) -> Any:
        def one(key: jax.Array) -> Any:
            reset_key, steps_key = jax.random.split(key)
            # Sums, so that what a learner would read is computed and yet not written [T, B].
            state, seen = jax.lax.scan(step, env.reset(reset_key)[1], jax.random.split(steps_key, length))
            return state, jax.tree.map(lambda x: x.sum(axis=0), seen)

        return jax.vmap(one)(keys)

    keys = jax.random.split(jax.random.PRNGKey(0), num_envs)
    program = jax.jit(run).lower(keys).compile()

    def block() -> None:
        jax.block_until_ready(program(keys))

    return block, num_envs * length


def seconds(block: Callable[[], None]) -> float:
    start = time.perf_counter()
    block()
    return time.perf_counter() - start


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", choices=sorted(MPE2), default=list(MPE2))
    parser.add_argument("--num-envs", type=int, nargs="+", default=[1, 128, 4096])
    parser.add_argument("--steps", type=int, default=400_000, help="of all environments, in a block of rlx")
    parser.add_argument("--mpe2-steps", type=int, default=2_000, help="in a block of mpe2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--jaxmarl", action="store_true", help="JaxMARL's worlds too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    rows = []
    for world in args.worlds:
        blocks = {"mpe2": mpe2_block(world, args.mpe2_steps)}
        for num_envs in args.num_envs:
            # A single world is bound by the overhead of its operations: fewer steps last as long.
            enough = min(args.steps, 20_000 * num_envs)
            blocks[f"rlx, {num_envs} envs"] = rlx_block(world, num_envs, enough)
            if args.jaxmarl:
                blocks[f"jaxmarl, {num_envs} envs"] = jaxmarl_block(world, num_envs, enough)
        taken: dict[str, list[float]] = {which: [] for which in blocks}
        for round_ in range(args.rounds + WARM_UPS):
            for which, (block, _) in blocks.items():
                took = seconds(block)
                if round_ >= WARM_UPS:
                    taken[which].append(took)
        rates = {which: steps / statistics.median(taken[which]) for which, (_, steps) in blocks.items()}
        for which, (_, steps) in blocks.items():
            row = {
                "world": world,
                "program": which,
                "steps_per_second": rates[which],
                "slowest": steps / max(taken[which]),
                "fastest": steps / min(taken[which]),
                "times_mpe2": rates[which] / rates["mpe2"],
            }
            rows.append(row)
            print(f"{world:26s} {which:18s} {rates[which]:12,.0f} steps/s  {row['times_mpe2']:8.1f}x", flush=True)
    content = {
        "rows": rows,
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "device": f"{platform.machine()}, {usable_cores()} cores, {jax.devices()[0].device_kind}",
        "versions": versions(),
        "command": shlex.join(["python", "experiments/benchmarks/particle.py", *arguments]),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
