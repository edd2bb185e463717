"""What an action of FPO and of DPPO costs, beside one of PPO, by the number of their steps.

    python experiments/benchmarks/acting.py                  about two minutes on two cores

Acts on one batch of observations `--inner` times inside one program, each time on what the last action made of it, so
that no call is left out. All actors have `--hidden` layers; PPO's is a Gaussian of them. "explore" is how training data
are gathered, with what the learners note; "greedy" is how they are evaluated. Programs take turns, `--rounds` times
after two warm-ups.
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

from rlx.algorithm import Plan
from rlx.algorithms import dppo, fpo, ppo
from rlx.compilation import compile_program
from rlx.files import write_atomically
from rlx.machine import usable_cores, versions
from rlx.types import Box, Spec

RESULTS = Path(__file__).parent / "results" / "acting.json"
WARM_UPS = 2


class Actor:
    """One learner's acting, compiled, and what it took."""

    def __init__(self, name: str, module: Any, config: Any, mode: Any, spec: Spec, args: argparse.Namespace):
        plan = Plan(args.num_envs, 1, 1)
        algorithm = module.make(config, spec, plan)
        policy = algorithm.policy(algorithm.init(jax.random.key(0)), mode)

        def run(policy: Any, obs: jax.Array) -> jax.Array:
            def once(i: jax.Array, obs: jax.Array) -> jax.Array:
                _, action, extras = algorithm.act(policy, (), obs, jax.random.fold_in(jax.random.key(1), i), mode)
                noted = sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves((action, extras)))
                return obs + 1e-9 * noted

            return jax.lax.fori_loop(0, args.inner, once, obs)

        self.name, self.mode = name, mode
        self.arguments = (policy, jax.random.normal(jax.random.key(2), (args.num_envs, *spec.obs.shape)))
        self.program = compile_program(jax.jit(run).lower(*self.arguments))
        self.seconds: list[float] = []

    def measure(self, inner: int, counts: bool) -> None:
        start = time.perf_counter()
        jax.block_until_ready(self.program(*self.arguments))
        if counts:
            self.seconds.append((time.perf_counter() - start) / inner)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5, 10, 20], help="flow and denoising steps")
    parser.add_argument("--num-envs", type=int, default=256)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 64])
    parser.add_argument("--obs-size", type=int, default=17)
    parser.add_argument("--action-size", type=int, default=6)
    parser.add_argument("--inner", type=int, default=50, help="decisions of the batch in one program")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    spec = Spec(jax.ShapeDtypeStruct((args.obs_size,), jnp.float32), Box((args.action_size,)))
    hidden = {"actor_hidden": tuple(args.hidden), "activation": "swish"}
    settings: list[tuple[str, Any, Any]] = [("ppo", ppo, ppo.Config(**hidden))]
    for steps in args.steps:
        settings.append((f"fpo, {steps} steps", fpo, fpo.Config(num_flow_steps=steps, **hidden)))
        settings.append((f"dppo, {steps} steps", dppo, dppo.Config(num_denoising_steps=steps, **hidden)))
    actors = [Actor(*which, mode, spec, args) for which in settings for mode in ("explore", "greedy")]
    for round_ in range(args.rounds + WARM_UPS):
        for actor in actors:
            actor.measure(args.inner, round_ >= WARM_UPS)
    medians = {(actor.name, actor.mode): statistics.median(actor.seconds) for actor in actors}
    rows = [
        {
            "actor": name,
            "mode": mode,
            "us_per_decision": 1e6 * seconds / args.num_envs,
            "times_ppo": seconds / medians["ppo", mode],
        }
        for (name, mode), seconds in medians.items()
    ]
    for row in rows:
        print(f"{row['actor']:16s} {row['mode']:8s} {row['us_per_decision']:8.3f} us  {row['times_ppo']:6.1f}x")
    content = {
        "rows": rows,
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "device": f"{platform.machine()}, {usable_cores()} cores, {jax.devices()[0].device_kind}",
        "versions": versions(),
        "command": shlex.join(["python", "experiments/benchmarks/acting.py", *arguments]),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
