"""PPO in rlx and in brax's trainer at the same settings: steps/s after compilation, time to the first update, total.

    python experiments/benchmarks/against_peers.py                         15 to 20 minutes on two cores
    python experiments/benchmarks/against_peers.py --envs CheetahRun --rounds 1

Every run is a process of its own that finds nothing compiled; brax (MJX), rlx on MJX and rlx on its default engine take
turns, `--rounds` times. Steps/s are the median over all epochs but the first two of each process: brax's trainer
compiles its epoch again at the second call. "Total" includes that.

Equal: Playground's task, MJX (but for rlx's default engine), environments, unroll, transitions and passes an iteration,
minibatches of whole segments, network sizes and activation, tanh-normal actions with a state-dependent deviation,
Adam's rate, discounts, clipping, entropy bonus, reward scale; observation statistics are updated first and advantages
computed anew in each minibatch, as brax does (`normalize_first`, `gae_per_minibatch`). Neither evaluates or saves.

Not equal: rlx draws new reset states once an epoch (32 true resets), keeps the true last observation of an episode and
computes its value, sums returns and checks for NaNs; brax reuses each environment's first state. rlx's steps/s include
everything on the host between epochs; brax's are its own `training/sps`, which leave that out. An epoch is
`--iterations` collect-and-update rounds: the first update is the first epoch's end less all of them but one, at the
median speed. "From the call" leaves out imports and building the environment.

brax 0.14.2 calls `jax.device_put_replicated`, which jax 0.10 has removed, and crashes: the processes that run brax, and
no others, get a replacement of one line. The result says where it was supplied.
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

from rlx.files import write_atomically
from rlx.machine import commit, usable_cores, versions

RESULTS = Path(__file__).parent / "results"
CONTENDERS = (("brax", "mjx"), ("rlx", "mjx"), ("rlx", "auto"))
ITERATIONS = {"CheetahRun": 12, "HopperHop": 2}  # of an epoch, seconds on MJX; Cheetah's resets take 200 steps each
LEARNING_RATE, GAMMA, GAE_LAMBDA, CLIP_EPS, ENTROPY, MAX_GRAD_NORM, REWARD_SCALE = 1e-3, 0.99, 0.95, 0.2, 1e-3, 0.5, 0.1
WARM_UPS = 2  # epochs
TIMES = ("first_update_from_start_s", "first_update_from_call_s", "total_s")


def steps_per_iteration(args: argparse.Namespace) -> int:
    return args.num_envs * args.unroll_length


def run_rlx(args: argparse.Namespace) -> dict[str, Any]:
    """Trains with rlx in this process: seconds of the epochs after the warm-ups, and when things happened."""
    import envs
    import rlx
    from rlx.logging import Progress

    env = envs.make(f"playground/{args.env}", args.physics)
    widths = tuple(args.hidden)
    config = rlx.ppo.Config(
        learning_rate=LEARNING_RATE,
        gamma=GAMMA,
        gae_lambda=GAE_LAMBDA,
        clip_eps=CLIP_EPS,
        entropy_coef=ENTROPY,
        max_grad_norm=MAX_GRAD_NORM,
        reward_scale=REWARD_SCALE,
        num_epochs=args.num_epochs,
        num_minibatches=args.num_minibatches,
        normalize_first=True,
        gae_per_minibatch=True,
        actor_hidden=widths,
        critic_hidden=widths,
        activation="swish",
        distribution="tanh_normal",
        state_dependent_std=True,
    )
    train_config = rlx.TrainConfig(
        total_steps=args.epochs * args.iterations * steps_per_iteration(args),
        num_envs=args.num_envs,
        unroll_length=args.unroll_length,
        seed=args.seed,
        iterations_per_epoch=args.iterations,
        num_evals=0,
    )
    elapsed, ended = [], 0.0

    def on_epoch(row: Mapping[str, float]) -> None:
        nonlocal ended
        ended = time.time()
        elapsed.append(row["time/elapsed"])

    called = time.time()
    rlx.train(env, rlx.ppo, train_config, config, on_epoch=on_epoch, progress=Progress(quiet=True))
    # The last epoch is reported when it ends, the others while the next one runs.
    first_epoch = ended - (elapsed[-1] - elapsed[0])
    seconds = [after - before for before, after in itertools.pairwise(elapsed)][WARM_UPS - 1 :]
    return {"called": called, "first_epoch": first_epoch, "seconds": seconds, "physics": env.spec.physics, "note": ""}


def supply_what_jax_removed() -> str:
    """Gives jax `device_put_replicated` back, for brax in this process; says so, or "" if it is there."""
    import jax
    import jax.numpy as jnp

    if hasattr(jax, "device_put_replicated"):
        return ""
    jax.device_put_replicated = lambda tree, devices: jax.tree.map(lambda x: jnp.stack([x] * len(devices)), tree)
    return f"jax {jax.__version__} has no device_put_replicated: a replacement was supplied to brax"


def run_brax(args: argparse.Namespace) -> dict[str, Any]:
    """Trains with brax's trainer in this process; see `run_rlx`."""
    note = supply_what_jax_removed()
    from brax.training.agents.ppo import networks, train
    from mujoco_playground import registry, wrapper

    env = registry.load(args.env, config_overrides={"impl": "jax"})
    widths = tuple(args.hidden)
    epoch_steps = args.iterations * steps_per_iteration(args)
    ended, rates = [], []

    def progress(steps: int, metrics: Mapping[str, Any]) -> None:
        ended.append(time.time())
        rates.append(float(metrics["training/sps"]))

    called = time.time()
    train.train(
        env,
        num_timesteps=args.epochs * epoch_steps,
        num_evals=args.epochs + 1,
        run_evals=False,
        progress_fn=progress,
        wrap_env_fn=wrapper.wrap_for_brax_training,
        episode_length=1000,
        num_envs=args.num_envs,
        unroll_length=args.unroll_length,
        batch_size=args.num_envs // args.num_minibatches,
        num_minibatches=args.num_minibatches,
        num_updates_per_batch=args.num_epochs,
        learning_rate=LEARNING_RATE,
        discounting=GAMMA,
        gae_lambda=GAE_LAMBDA,
        clipping_epsilon=CLIP_EPS,
        entropy_cost=ENTROPY,
        max_grad_norm=MAX_GRAD_NORM,
        reward_scaling=REWARD_SCALE,
        normalize_observations=True,
        network_factory=functools.partial(
            networks.make_ppo_networks, policy_hidden_layer_sizes=widths, value_hidden_layer_sizes=widths
        ),
        seed=args.seed,
    )
    seconds = [epoch_steps / rate for rate in rates[WARM_UPS:]]
    return {"called": called, "first_epoch": ended[0], "seconds": seconds, "physics": "mjx", "note": note}


def times(raw: Mapping[str, Any], started: float, ended: float, iterations: int, steps: int) -> dict[str, Any]:
    """What one process measured: `iterations` an epoch, `steps` an iteration; moments are wall clock."""
    epoch = statistics.median(raw["seconds"])
    first_update = raw["first_epoch"] - epoch * (iterations - 1) / iterations
    return {
        "steps_per_second": [iterations * steps / seconds for seconds in raw["seconds"]],
        "first_update_from_start_s": first_update - started,
        "first_update_from_call_s": first_update - raw["called"],
        "total_s": ended - started,
        "physics": raw["physics"],
        "note": raw["note"],
    }


def summarize(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The runs of one contender: median, minimum and maximum of everything measured."""
    speeds = [speed for run in runs for speed in run["steps_per_second"]]
    values = {"steps_per_second": speeds} | {name: [run[name] for run in runs] for name in TIMES}
    spreads = {k: {"median": statistics.median(v), "min": min(v), "max": max(v)} for k, v in values.items()}
    return {"physics": runs[0]["physics"], "note": runs[0]["note"], **spreads, "runs": list(runs)}


def ratios(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """rlx over brax of each median: above 1 is good for speed, below 1 for times."""
    brax = summaries["brax mjx"]
    names = ("steps_per_second", *TIMES)
    return {
        f"{contender} / brax mjx": {name: summary[name]["median"] / brax[name]["median"] for name in names}
        for contender, summary in summaries.items()
        if contender != "brax mjx"
    }


def in_new_process(args: argparse.Namespace, env: str, library: str, physics: str, round_: int) -> dict[str, Any]:
    """One run. Compiled programs of earlier ones are out of its reach."""
    iterations = args.iterations or ITERATIONS.get(env, 2)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--worker", library, "--env", env, "--physics", physics]
        command += ["--iterations", str(iterations), "--seed", str(round_), "--result", str(result)]
        command += ["--hidden", *map(str, args.hidden)]
        for name in ("epochs", "num_envs", "unroll_length", "num_epochs", "num_minibatches"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        started = time.time()
        subprocess.run(command, check=True, env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"})
        ended = time.time()
        return times(json.loads(result.read_text()), started, ended, iterations, steps_per_iteration(args))


def show(env: str, summaries: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{env:16s} {'steps/s (min to max)':>32s} {'first update: start':>20s} {'call':>8s} {'total':>8s}"]
    for contender, summary in summaries.items():
        speed, name = summary["steps_per_second"], contender.split()[0] + " " + summary["physics"]
        text = f"{speed['median']:,.0f} ({speed['min']:,.0f} to {speed['max']:,.0f})"
        start, call, total = (summary[name]["median"] for name in TIMES)
        lines.append(f"{name:16s} {text:>32s} {start:>18.1f} s {call:>6.1f} s {total:>6.1f} s")
        lines += [f"  {summary['note']}"] if summary["note"] else []
    for pair, values in ratios(summaries).items():
        start, call, total = (values[name] for name in TIMES)
        lines.append(f"{pair:24s} {values['steps_per_second']:>24.2f} {start:>18.2f}   {call:>6.2f}   {total:>6.2f}")
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", default=["CheetahRun", "HopperHop"], help="names of playground/*")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each contender")
    parser.add_argument("--epochs", type=int, default=4, help=f"of a run; the first {WARM_UPS} do not count")
    parser.add_argument("--iterations", type=int, default=0, help=f"of an epoch (0: {ITERATIONS}, 2 elsewhere)")
    parser.add_argument("--num-envs", type=int, default=256)
    parser.add_argument("--unroll-length", type=int, default=32)
    parser.add_argument("--num-epochs", type=int, default=4, help="passes over the data of an iteration")
    parser.add_argument("--num-minibatches", type=int, default=8)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 64], help="layers of actor and critic")
    parser.add_argument("--out", type=Path, help="one file for all (results/against_peers-ENV.json, one for each)")
    for name in ("--worker", "--env", "--physics", "--result"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.epochs <= WARM_UPS or args.rounds < 1:
        parser.error(f"--epochs must be above {WARM_UPS}, for so many do not count, and --rounds at least 1")
    if args.num_envs % args.num_minibatches:
        parser.error("--num-envs must be divisible by --num-minibatches: a minibatch holds whole segments")
    return args


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    if args.worker:
        raw = {"rlx": run_rlx, "brax": run_brax}[args.worker](args)
        Path(args.result).write_text(json.dumps(raw))
        return
    results: dict[str, Any] = {}
    for env in args.envs:
        runs: dict[str, list[dict[str, Any]]] = {" ".join(contender): [] for contender in CONTENDERS}
        for round_ in range(args.rounds):
            for library, physics in CONTENDERS:
                print(f"{env}, round {round_ + 1}: {library} {physics}", file=sys.stderr, flush=True)
                runs[f"{library} {physics}"].append(in_new_process(args, env, library, physics, round_))
        summaries = {contender: summarize(found) for contender, found in runs.items()}
        print(show(env, summaries), flush=True)
        results = results if args.out else {}
        results[env] = {"contenders": summaries, "ratios": ratios(summaries)}
        write(args.out or RESULTS / f"against_peers-{env}.json", results, args, arguments)


def write(path: Path, results: Mapping[str, Any], args: argparse.Namespace, arguments: Sequence[str]) -> None:
    """`results`, and what they were measured with."""
    kept = ("epochs", "num_envs", "unroll_length", "num_epochs", "num_minibatches", "hidden")
    content = {
        "results": results,
        "settings": {name: getattr(args, name) for name in kept},
        "device": f"{platform.machine()}, {usable_cores()} cores",
        "versions": versions(),
        "command": shlex.join(["python", "experiments/benchmarks/against_peers.py", *arguments]),
        "commit": commit(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
