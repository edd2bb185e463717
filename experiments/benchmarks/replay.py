"""Replay on this machine's device: time of an insert and of a draw against capacity.

    python experiments/benchmarks/replay.py                              about three minutes on two cores
    python experiments/benchmarks/replay.py --capacities 10000 100000 --rounds 3

An insert is one iteration's trajectory, `--num-envs` times `--unroll-length` transitions, into a ring that is full and
donated; a draw is `--batch-size` n-step windows out of it, every leaf of them added up. Both run many times inside one
program, so that calling it counts for little: `--inner` times, with the processor's caches as the last ones left them
(small rings stay in them), and "cold", `--cold-inner` times after `--evict` MiB of other memory were written, as a
gradient step's work would between two inserts. Capacities take turns, `--rounds` times after two warm-ups.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlx.algorithm import Plan
from rlx.files import write_atomically
from rlx.machine import mib, usable_cores, versions
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

        def insert(rows: Any, trajectory: Transition, iteration: jax.Array, inner: jax.Array) -> Any:
            return jax.lax.fori_loop(
                iteration, iteration + inner, lambda i, rows: self.replay.insert(rows, trajectory, i), rows
            )

        def draw(rows: Any, iteration: jax.Array, inner: jax.Array) -> jax.Array:
            def one(i: jax.Array, total: jax.Array) -> jax.Array:
                key = jax.random.fold_in(jax.random.key(0), iteration + i)
                batch = self.replay.sample(rows, iteration, key, args.batch_size, args.n_step, 0.99)
                return total + sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(batch))

            return jax.lax.fori_loop(0, inner, one, jnp.zeros((), jnp.float32))

        self.rows = jax.jit(self.replay.init)()
        self.iteration = self.replay.num_rows // plan.unroll_length  # full, whatever is in it
        at = jnp.int32(self.iteration)
        self._insert = jax.jit(insert, donate_argnums=0).lower(self.rows, self.trajectory, at, at).compile()
        self._draw = jax.jit(draw).lower(self.rows, at, at).compile()
        self.capacity = self.replay.num_rows * plan.num_envs
        self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.rows))
        self.temporary_bytes = self._insert.memory_analysis().temp_size_in_bytes
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def insert(self, inner: int) -> None:
        self.rows = self._insert(self.rows, self.trajectory, jnp.int32(self.iteration), jnp.int32(inner))
        jax.block_until_ready(self.rows)
        self.iteration += inner

    def draw(self, inner: int) -> None:
        jax.block_until_ready(self._draw(self.rows, jnp.int32(self.iteration), jnp.int32(inner)))

    def measure(self, name: str, inner: int, prepare: Callable[[], None], counts: bool) -> None:
        for what, run in (("insert", self.insert), ("draw", self.draw)):
            prepare()
            start = time.perf_counter()
            run(inner)
            if counts:
                self.seconds[name + what].append((time.perf_counter() - start) / inner)


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
    } | {f"{name}_us": 1e6 * statistics.median(seconds) for name, seconds in ring.seconds.items()}


def show(rows: Sequence[dict[str, Any]]) -> str:
    names = [name for name in rows[0] if name.endswith("_us")]
    heads = (f"{name.removesuffix('_us').replace('_', ' '):>18s}" for name in names)
    lines = [f"{'transitions':>12s} {'memory':>12s} {'copied':>12s} {' '.join(heads)}"]
    for row in rows:
        sizes = f"{row['capacity']:>12,} {mib(row['bytes']):>12s} {mib(row['temporary_bytes']):>12s}"
        ratios = (row[name] / rows[0][name] for name in names)
        times = (row[name] for name in names)
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
    parser.add_argument("--cold-inner", type=int, default=8, help="the same, where caches were emptied before")
    parser.add_argument("--evict", type=int, default=256, metavar="MIB", help="written to empty them")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    plan = Plan(args.num_envs, args.unroll_length, 2**30, num_groups=min(args.num_envs, 32))
    spec = Spec(jax.ShapeDtypeStruct((args.obs_size,), jnp.float32), Box((args.action_size,)))
    rings = [Ring(capacity, plan, spec, args) for capacity in args.capacities]
    other = np.zeros(args.evict * 2**20, np.uint8)
    for round_ in range(args.rounds + WARM_UPS):
        for ring in rings:
            ring.measure("", args.inner, lambda: None, round_ >= WARM_UPS)
            ring.measure("cold_", args.cold_inner, partial(other.fill, round_ % 256), round_ >= WARM_UPS)
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
