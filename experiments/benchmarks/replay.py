"""Replay on this machine's device: time of an insert and of a draw against capacity.

    python experiments/benchmarks/replay.py                              about two minutes on two cores
    python experiments/benchmarks/replay.py --capacities 10000 100000 --rounds 3

An insert is one iteration's trajectory, `--num-envs` times `--unroll-length` transitions, into a ring that is full and
donated; a draw is `--batch-size` n-step windows out of it, every leaf of them added up. Both run `--inner` times inside
one program, so that calling it counts for nothing. Capacities take turns, `--rounds` times after two warm-ups.
"""

from __future__ import annotations

import argparse
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
import jax.numpy as jnp

from rlx.algorithm import Plan
from rlx.logging import versions, write_atomically
from rlx.machine import mib, usable_cores
from rlx.replay import Replay, make_replay
from rlx.types import Box, Spec, Transition

RESULTS = Path(__file__).parent / "results" / "replay.json"
CAPACITIES = (10_000, 100_000, 1_000_000, 4_000_000)
WARM_UPS = 2


class Ring:
    """One capacity, its programs and what they took."""

    def __init__(self, capacity: int, plan: Plan, spec: Spec, args: argparse.Namespace):
        self.replay: Replay = make_replay(capacity, (args.batch_size,), plan, spec, args.obs_dtype)
        self.trajectory = draw_trajectory(plan, spec)
        self.inner = args.inner

        def insert(rows: Any, trajectory: Transition, iteration: jax.Array) -> Any:
            return jax.lax.fori_loop(
                iteration, iteration + args.inner, lambda i, rows: self.replay.insert(rows, trajectory, i), rows
            )

        def draw(rows: Any, iteration: jax.Array) -> jax.Array:
            def one(i: jax.Array, total: jax.Array) -> jax.Array:
                key = jax.random.fold_in(jax.random.key(0), iteration + i)
                batch = self.replay.sample(rows, iteration, key, args.batch_size, args.n_step, 0.99)
                return total + sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(batch))

            return jax.lax.fori_loop(0, args.inner, one, jnp.zeros((), jnp.float32))

        self.rows = jax.jit(self.replay.init)()
        self.iteration = self.replay.num_rows // plan.unroll_length  # full, whatever is in it
        at = jnp.int32(self.iteration)
        self._insert = jax.jit(insert, donate_argnums=0).lower(self.rows, self.trajectory, at).compile()
        self._draw = jax.jit(draw).lower(self.rows, at).compile()
        self.capacity = self.replay.num_rows * plan.num_envs
        self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.rows))
        self.temporary_bytes = self._insert.memory_analysis().temp_size_in_bytes
        self.inserts: list[float] = []
        self.draws: list[float] = []

    def insert(self) -> None:
        self.rows = self._insert(self.rows, self.trajectory, jnp.int32(self.iteration))
        jax.block_until_ready(self.rows)
        self.iteration += self.inner

    def draw(self) -> None:
        jax.block_until_ready(self._draw(self.rows, jnp.int32(self.iteration)))

    def measure(self, counts: bool) -> None:
        inserted, drawn = seconds_of(self.insert) / self.inner, seconds_of(self.draw) / self.inner
        if counts:
            self.inserts.append(inserted)
            self.draws.append(drawn)


def seconds_of(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def draw_trajectory(plan: Plan, spec: Spec) -> Transition:
    """Normal observations, and an ending in a hundred steps."""
    shape = (plan.unroll_length, plan.num_envs)
    obs = jax.random.normal(jax.random.key(0), (*shape, *spec.obs.shape))
    action = jnp.zeros((*shape, *spec.action.shape), jnp.float32)
    terminated = jax.random.uniform(jax.random.key(1), shape) < 0.01
    return Transition(obs, action, jnp.ones(shape, jnp.float32), terminated, ~terminated & terminated, obs, ())


def row_of(ring: Ring) -> dict[str, Any]:
    return {
        "capacity": ring.capacity,
        "bytes": ring.bytes,
        "temporary_bytes": ring.temporary_bytes,
        "insert_us": 1e6 * statistics.median(ring.inserts),
        "draw_us": 1e6 * statistics.median(ring.draws),
    }


def show(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'transitions':>12s} {'memory':>12s} {'copied':>12s} {'insert':>12s} {'draw':>12s}"]
    for row in rows:
        sizes = f"{row['capacity']:>12,} {mib(row['bytes']):>12s} {mib(row['temporary_bytes']):>12s}"
        ratios = (row[name] / rows[0][name] for name in ("insert_us", "draw_us"))
        times = (row[name] for name in ("insert_us", "draw_us"))
        columns = (f"{value:>9.1f} us {ratio:>5.2f}x" for value, ratio in zip(times, ratios, strict=True))
        lines.append(f"{sizes} {' '.join(columns)}")
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacities", type=int, nargs="+", default=list(CAPACITIES), help="transitions")
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--unroll-length", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--n-step", type=int, default=1)
    parser.add_argument("--obs-size", type=int, default=17)
    parser.add_argument("--action-size", type=int, default=6)
    parser.add_argument("--obs-dtype", default="float32")
    parser.add_argument("--inner", type=int, default=200, help="inserts, and draws, in one program")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    plan = Plan(args.num_envs, args.unroll_length, 2**30, num_groups=min(args.num_envs, 32))
    spec = Spec(jax.ShapeDtypeStruct((args.obs_size,), jnp.float32), Box((args.action_size,)))
    rings = [Ring(capacity, plan, spec, args) for capacity in args.capacities]
    for round_ in range(args.rounds + WARM_UPS):
        for ring in rings:
            ring.measure(round_ >= WARM_UPS)
    rows = [row_of(ring) for ring in rings]
    print(show(rows), flush=True)
    content = {
        "rows": rows,
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "device": f"{platform.machine()}, {usable_cores()} cores, {jax.devices()[0].device_kind}",
        "versions": versions(),
        "command": shlex.join(["python", "experiments/benchmarks/replay.py", *arguments]),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
