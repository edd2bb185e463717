"""Steps a second of whole training and of the environment alone, compile time and peak memory.

    python experiments/benchmarks/throughput.py                       both default environments, each in its own process
    python experiments/benchmarks/throughput.py brax/hopper --num-envs 2048 --set backend=spring --out result.json

Both are measured in one process, alternating: the environment alone takes random actions through the same source
(auto reset and the reset pool's refresh included), training is PPO with its defaults. Two warm-up blocks, then the
median, minimum and maximum over `--repeats` blocks, each waited for.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

DEFAULTS = (("brax/hopper", "backend=spring"), ("playground/CartpoleBalance", ""))
RESULTS = Path(__file__).parent / "results"


def compile_timed(program, *args):
    """A compiled program and its seconds of tracing and of compiling."""
    start = time.perf_counter()
    traced = program.trace(*args)
    middle = time.perf_counter()
    compiled = traced.lower().compile()
    return compiled, {"tracing_s": middle - start, "compiling_s": time.perf_counter() - middle}


def rates(blocks: dict, repeats: int, steps: int) -> dict[str, list[float]]:
    """Steps a second of each block, `repeats` times after two warm-ups, alternating between the blocks."""
    import jax

    measured: dict[str, list[float]] = {name: [] for name in blocks}
    for repeat in range(repeats + 2):
        for name, (program, state) in blocks.items():
            start = time.perf_counter()
            state = jax.block_until_ready(program(state)[0])
            seconds = time.perf_counter() - start
            blocks[name] = (program, state)
            if repeat >= 2:
                measured[name].append(steps / seconds)
    return measured


def peak_memory_mib() -> float:
    """Of the device where it says so, else the largest resident set of this process."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(args: argparse.Namespace) -> dict:
    """One environment, in this process."""
    import jax

    import envs
    import rlx
    from rlx.environment import random_action
    from rlx.logging import versions
    from rlx.machine import usable_cores
    from rlx.rollout import make_source
    from rlx.training import init_state, make_epoch

    overrides = dict(pair.split("=", 1) for pair in args.set)
    env = envs.make(args.env, **overrides)
    plan = rlx.Plan(args.num_envs, args.unroll_length, 2**30, env.spec.action_repeat)
    source = make_source(env, plan, args.reset)
    ppo = rlx.ppo.make(rlx.ppo.Config(num_minibatches=args.num_minibatches), env.spec, plan)

    def act(policy, memory, obs, key, mode):
        return memory, jax.vmap(lambda k: random_action(env.spec, k))(jax.random.split(key, args.num_envs)), ()

    random = rlx.Algorithm(lambda key, policy=None: (), lambda s, mode: (), lambda key: (), act, lambda s, *_: (s, {}))
    blocks, times = {}, {}
    for name, algorithm in (("environment", random), ("training", ppo)):
        epoch = jax.jit(make_epoch(algorithm, source, plan, args.iterations), donate_argnums=0)
        state = jax.jit(lambda key, a=algorithm: init_state(a, source, key))(jax.random.key(0))
        epoch, times[name] = compile_timed(epoch, state)
        blocks[name] = (epoch, state)
    measured = rates(blocks, args.repeats, plan.steps_per_iteration * args.iterations)
    device = jax.local_devices()[0]
    return {
        "env": args.env,
        "overrides": overrides,
        "num_envs": args.num_envs,
        "reset": args.reset,
        "unroll_length": args.unroll_length,
        "steps_per_second": {
            name: {"median": statistics.median(v), "min": min(v), "max": max(v)} for name, v in measured.items()
        },
        **times,
        "peak_memory_mib": peak_memory_mib(),
        "device": f"{device.platform} {device.device_kind}, {platform.machine()}, {usable_cores()} cores",
        "versions": versions(),
        "command": command_of(args),
    }


def command_of(args: argparse.Namespace) -> str:
    """What measures this again, without the place of the result."""
    words = ["python experiments/benchmarks/throughput.py", args.env, f"--num-envs {args.num_envs}"]
    words += [f"--reset {args.reset} --unroll-length {args.unroll_length} --num-minibatches {args.num_minibatches}"]
    words += [f"--iterations {args.iterations} --repeats {args.repeats}", *[f"--set {pair}" for pair in args.set]]
    return " ".join(words)


def show(result: dict) -> str:
    speed = result["steps_per_second"]
    where = f"{result['num_envs']} environments, {result['reset']} resets, on {result['device']}"
    line = f"{result['env']} {result['overrides'] or ''}: {where}"
    rows = [
        f"  {name:12s} {speed[name]['median']:>12,.0f} steps/s (min {speed[name]['min']:,.0f}, "
        f"max {speed[name]['max']:,.0f})  tracing {result[name]['tracing_s']:.1f} s, "
        f"compiling {result[name]['compiling_s']:.1f} s"
        for name in speed
    ]
    share = speed["training"]["median"] / speed["environment"]["median"]
    return "\n".join([line, *rows, f"  training / environment {share:.2f}, peak {result['peak_memory_mib']:,.0f} MiB"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", nargs="?", help="suite/name; the two defaults if left out")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the environment")
    parser.add_argument("--num-envs", type=int, default=256)
    parser.add_argument("--reset", choices=("pool", "always"), default="pool", help="where new episodes start")
    parser.add_argument("--unroll-length", type=int, default=32)
    parser.add_argument("--num-minibatches", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=8, help="iterations in one timed block")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.env:
        result = measure(args)
        print(show(result), flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
        return
    for env, override in DEFAULTS:
        out = RESULTS / f"throughput-{env.replace('/', '-')}-{args.num_envs}.json"
        command = [sys.executable, __file__, env, "--num-envs", str(args.num_envs), "--out", str(out)]
        subprocess.run([*command, *(["--set", override] if override else [])], check=True)


if __name__ == "__main__":
    main()
