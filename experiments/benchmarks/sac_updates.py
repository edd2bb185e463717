"""Gradient updates/s of SAC in rlx and in brax's trainer at the same settings, and their share of the matmul peak.

    python experiments/benchmarks/sac_updates.py                         a few minutes on two cores
    python experiments/benchmarks/sac_updates.py --rounds 1 --epochs 4 --iterations 2

Processes of brax and of rlx take turns, `--rounds` times. Both train on a world that costs nothing (its observation
turns by its action; sizes as CheetahRun's), `--updates` gradient steps after each step of `--num-envs` environments.
Updates/s are those of every epoch but the first two of each process: brax's trainer compiles its epoch again at the
second call. Collecting, drawing batches and normalising observations count; so does everything that rlx does on the
host between epochs, which brax's own `training/sps` leave out.

Equal: batch, networks (two critics), rates, discount, tau, ring. Not equal: rlx improves the actor on the critics that
have just been improved, gives the entropy of that step to the temperature, where brax draws once more, checks for NaNs,
keeps both endings apart, and draws a batch before each gradient step, where brax draws those of all steps at once.

The peak is the best of a few square float32 products. An update counts the products of its networks alone, forwards and
backwards (`flops_of_an_update`): about nine tenths of its arithmetic.

brax 0.14.2 calls `jax.device_put_replicated`, which jax 0.10 has removed: the processes that run brax, and no others,
get a replacement of one line.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlx.files import write_atomically
from rlx.machine import usable_cores, versions
from rlx.types import Box, Spec, TimeStep

RESULTS = Path(__file__).parent / "results" / "sac_updates.json"
OBS_SIZE, ACTION_SIZE = 17, 6
LEARNING_RATE, GAMMA, TAU, REPLAY_SIZE, PREFILL = 1e-3, 0.99, 0.005, 100_000, 1024
WARM_UPS = 2  # epochs
CONTENDERS = ("brax", "rlx")


def move(obs: jax.Array, action: jax.Array) -> jax.Array:
    return jnp.sin(obs + 0.1 * jnp.arange(OBS_SIZE, dtype=jnp.float32) + action.sum())


class World:
    """For rlx. Never ends."""

    spec = Spec(obs=jax.ShapeDtypeStruct((OBS_SIZE,), jnp.float32), action=Box((ACTION_SIZE,)))

    def reset(self, key: jax.Array, params: Any) -> tuple[jax.Array, jax.Array]:
        obs = jax.random.normal(key, (OBS_SIZE,))
        return obs, obs

    def step(self, state: jax.Array, action: jax.Array, key: jax.Array) -> tuple[jax.Array, TimeStep]:
        obs, never = move(state, action), jnp.zeros((), bool)
        return obs, TimeStep(obs, -jnp.square(action).sum(), never, never, obs, {})


def run_rlx(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the epochs after the warm-ups."""
    import rlx
    from rlx.logging import Progress

    per_epoch = args.iterations * args.num_envs
    config = rlx.sac.Config(
        actor_learning_rate=LEARNING_RATE,
        critic_learning_rate=LEARNING_RATE,
        gamma=GAMMA,
        tau=TAU,
        batch_size=args.batch_size,
        utd_ratio=(args.updates, args.num_envs),
        replay_size=REPLAY_SIZE,
        prefill_steps=0,
        actor_hidden=tuple(args.hidden),
        critic_hidden=tuple(args.hidden),
        dtype=args.dtype,
    )
    train_config = rlx.TrainConfig(
        total_steps=args.epochs * per_epoch,
        num_envs=args.num_envs,
        unroll_length=1,
        seed=args.seed,
        iterations_per_epoch=args.iterations,
        num_evals=0,
    )
    elapsed: list[float] = []
    on_epoch = lambda row: elapsed.append(row["time/elapsed"])  # noqa: E731
    rlx.train(World(), rlx.sac, train_config, config, on_epoch=on_epoch, progress=Progress(quiet=True))
    seconds = [after - before for before, after in itertools.pairwise(elapsed)][WARM_UPS - 1 :]
    return {"seconds": seconds, "note": ""}


def run_brax(args: argparse.Namespace) -> dict[str, Any]:
    """As `run_rlx`, by brax's trainer."""
    note = ""
    if not hasattr(jax, "device_put_replicated"):
        jax.device_put_replicated = lambda tree, devices: jax.tree.map(lambda x: jnp.stack([x] * len(devices)), tree)
        note = f"jax {jax.__version__} has no device_put_replicated: a replacement was supplied to brax"
    from brax.envs.base import Env, State
    from brax.training.agents.sac import networks, train

    class BraxWorld(Env):
        observation_size, action_size, backend = OBS_SIZE, ACTION_SIZE, "none"

        def reset(self, rng: jax.Array) -> State:
            zero = jnp.zeros((), jnp.float32)
            return State(None, jax.random.normal(rng, (OBS_SIZE,)), zero, zero)

        def step(self, state: State, action: jax.Array) -> State:
            return state.replace(obs=move(state.obs, action), reward=-jnp.square(action).sum())

    rates: list[float] = []

    def progress(steps: int, metrics: Mapping[str, Any]) -> None:
        if "training/sps" in metrics:
            rates.append(float(metrics["training/sps"]))

    per_epoch = args.iterations * args.num_envs
    train.train(
        BraxWorld(),
        num_timesteps=args.epochs * per_epoch + PREFILL,
        episode_length=8,
        num_envs=args.num_envs,
        num_eval_envs=1,
        learning_rate=LEARNING_RATE,
        discounting=GAMMA,
        seed=args.seed,
        batch_size=args.batch_size,
        num_evals=args.epochs + 1,
        normalize_observations=True,
        tau=TAU,
        min_replay_size=PREFILL,
        max_replay_size=REPLAY_SIZE,
        grad_updates_per_step=args.updates,
        network_factory=functools.partial(networks.make_sac_networks, hidden_layer_sizes=tuple(args.hidden)),
        progress_fn=progress,
    )
    return {"seconds": [per_epoch / rate for rate in rates[WARM_UPS:]], "note": note}


def flops_of_an_update(batch: int, hidden: Sequence[int]) -> float:
    """Of matrix products: targets, the critics' loss and gradient, the actor's through the critics."""

    def layers(inputs: int, outputs: int) -> list[float]:
        return [2.0 * batch * a * b for a, b in itertools.pairwise([inputs, *hidden, outputs])]

    actor, critic = layers(OBS_SIZE, 2 * ACTION_SIZE), [2 * flops for flops in layers(OBS_SIZE + ACTION_SIZE, 1)]
    targets = sum(actor) + sum(critic)
    critic_step = 2 * sum(critic) + sum(critic[1:])  # forwards, weights, and inputs but for the first layer's
    action_share = ACTION_SIZE / (OBS_SIZE + ACTION_SIZE)
    through_critics = sum(critic) + sum(critic[1:]) + critic[0] * action_share
    return targets + critic_step + through_critics + 2 * sum(actor) + sum(actor[1:])


def peak_flops(seconds: float = 0.5) -> float:
    """Flop/s of the best square float32 product."""
    best = 0.0
    for size in (512, 1024, 2048):
        x = jax.random.normal(jax.random.key(0), (size, size))
        product = jax.jit(lambda x: x @ x)
        jax.block_until_ready(product(x))
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            before = time.perf_counter()
            jax.block_until_ready(product(x))
            best = max(best, 2 * size**3 / (time.perf_counter() - before))
    return best


def in_new_process(args: argparse.Namespace, library: str, round_: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--worker", library, "--seed", str(round_), "--result", str(result)]
        command += ["--hidden", *map(str, args.hidden), "--dtype", args.dtype]
        for name in ("epochs", "iterations", "num_envs", "updates", "batch_size"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        subprocess.run(command, check=True, env={**os.environ, "JAX_NUMPY_RANK_PROMOTION": "allow"})
        raw = json.loads(result.read_text())
    updates = args.iterations * args.updates
    return {"updates_per_second": [updates / seconds for seconds in raw["seconds"]], "note": raw["note"]}


def summarize(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    speeds = [speed for run in runs for speed in run["updates_per_second"]]
    spread = {"median": statistics.median(speeds), "min": min(speeds), "max": max(speeds)}
    return {"updates_per_second": spread, "note": runs[0]["note"], "runs": list(runs)}


def show(summaries: Mapping[str, Mapping[str, Any]], flops: float, peak: float) -> str:
    lines = [f"{'':8s} {'updates/s (min to max)':>32s} {'of the matmul peak':>20s}"]
    for name, summary in summaries.items():
        speed = summary["updates_per_second"]
        text = f"{speed['median']:,.1f} ({speed['min']:,.1f} to {speed['max']:,.1f})"
        lines.append(f"{name:8s} {text:>32s} {speed['median'] * flops / peak:>19.0%}")
        lines += [f"  {summary['note']}"] if summary["note"] else []
    brax, rlx = (summaries[name]["updates_per_second"]["median"] for name in CONTENDERS)
    lines.append(f"rlx / brax {rlx / brax:.2f}; {flops / 1e9:.2f} Gflop an update, peak {peak / 1e9:,.0f} Gflop/s")
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each contender")
    parser.add_argument("--epochs", type=int, default=6, help=f"of a run; the first {WARM_UPS} do not count")
    parser.add_argument("--iterations", type=int, default=8, help="of an epoch")
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--updates", type=int, default=64, help="gradient steps after each step of the environments")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 256], help="layers of actor and critics")
    parser.add_argument("--dtype", default="float32", help="of rlx's arithmetic")
    parser.add_argument("--out", type=Path, default=RESULTS)
    for name in ("--worker", "--result"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.epochs <= WARM_UPS or args.rounds < 1:
        parser.error(f"--epochs must be above {WARM_UPS}, for so many do not count, and --rounds at least 1")
    return args


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    if args.worker:
        raw = {"rlx": run_rlx, "brax": run_brax}[args.worker](args)
        Path(args.result).write_text(json.dumps(raw))
        return
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for round_ in range(args.rounds):
        for library in CONTENDERS:
            print(f"round {round_ + 1}: {library}", file=sys.stderr, flush=True)
            runs[library].append(in_new_process(args, library, round_))
    summaries = {name: summarize(found) for name, found in runs.items()}
    flops, peak = flops_of_an_update(args.batch_size, args.hidden), peak_flops()
    print(show(summaries, flops, peak), flush=True)
    kept = ("epochs", "iterations", "num_envs", "updates", "batch_size", "hidden", "dtype")
    content = {
        "contenders": summaries,
        "flops_of_an_update": flops,
        "peak_flops": peak,
        "settings": {name: getattr(args, name) for name in kept},
        "device": f"{platform.machine()}, {usable_cores()} cores",
        "versions": versions(),
        "command": shlex.join(["python", "experiments/benchmarks/sac_updates.py", *arguments]),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
