"""`rlx plot`, `rlx benchmark`, `rlx list`, `rlx doctor`: what begins no run."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from rlx import settings, storage
from rlx.algorithms import ALGORITHMS
from rlx.cli.pairs import (
    Pair,
    envs_package,
    find_pair,
    load_algorithm,
    load_env,
    say,
    with_overrides,
)
from rlx.errors import UserError
from rlx.files import write_atomically
from rlx.logging import Progress
from rlx.run_directory import run_directories


def plot(arguments: list[str]) -> int:
    """`rlx plot RUN_DIR... --out FILE`."""
    parser = argparse.ArgumentParser("rlx plot", description="Draw the learning curves of runs.", allow_abbrev=False)
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", required=True, metavar="FILE", help="a .png, .svg or .pdf")
    parser.add_argument("--metric", default="eval/return", help="a key of metrics.jsonl (eval/return)")
    axes = ("steps", "minutes")
    parser.add_argument("--x", choices=axes, default="steps", help="of the environment, or of training (steps)")
    options = parser.parse_args(arguments)
    from rlx.plotting import plot as draw

    run_dirs = [run for path in options.run_dirs for run in run_directories(storage.fetch(path))]
    print(draw(run_dirs, options.out, options.metric, options.x))
    return 0


def benchmark(arguments: list[str]) -> int:
    """`rlx benchmark ENV [ALGORITHM]`."""
    from rlx import benchmark as benchmarking

    options = benchmarking.parse(arguments)
    pair = find_pair(options.algorithm or "ppo", options.env)  # without ALGORITHM: how long ppo's runs and unrolls are
    with Progress() as shown:
        with shown.phase("building"):
            sweep = build_sweep(options, pair)
        result = benchmarking.measure(options, sweep, shown)
    benchmarking.show(result)
    if options.out:
        write_atomically(options.out, json.dumps(result, indent=1) + "\n")
    return 0


def build_env(pair: Pair, physics: str) -> Any:
    return load_env(pair._replace(physics=physics or "auto"))


def build_sweep(options: Any, pair: Pair) -> Any:
    """The settings, and the environment on every engine that was asked for or that this machine has."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share an accelerator
    module = load_algorithm(pair)
    from rlx.benchmark import Sweep
    from rlx.measuring import Target
    from rlx.schedule import TrainConfig

    layers = [("preset", settings.preset_for(module, pair.env, pair.algorithm)), ("command line", options.settings)]
    merged = settings.merge(TrainConfig, module.Config, layers)
    pair = with_overrides(pair, settings.values(merged, "env."))
    engines: Sequence[str] = options.physics
    if not engines:
        fastest = build_env(pair, "auto").spec.physics
        engines = tuple(dict.fromkeys((fastest, "mujoco", "mjx"))) if fastest else ("",)
    envs = {}
    for engine in engines:
        try:
            envs[engine] = build_env(pair, engine)
        except UserError as error:
            if options.physics or not envs:
                raise
            say(False, f"{engine} is left out: {error}")
    target = Target(
        functools.partial(build_env, pair),
        functools.partial(load_algorithm, pair),
        tuple(name for name in sys.modules if name.partition(".")[0] in ("envs", "mujoco_playground")),
    )
    raw = importlib.import_module("envs.physics.raw").raw_rollout if "mujoco" in envs else lambda env, num_envs: None
    train_config = settings.build(TrainConfig, settings.values(merged))
    return Sweep(target, envs, train_config, settings.values(merged, "algo."), raw)


def list_names(arguments: list[str]) -> int:
    """`rlx list envs|algorithms`: one name a line."""
    parser = argparse.ArgumentParser("rlx list", description="What there is, one name a line.", allow_abbrev=False)
    parser.add_argument("what", choices=("envs", "algorithms"))
    options = parser.parse_args(arguments)
    print("\n".join(ALGORITHMS if options.what == "algorithms" else envs_package().names()))
    return 0


def doctor(arguments: list[str]) -> int:
    """`rlx doctor`."""
    argparse.ArgumentParser("rlx doctor", description="What this machine has, and what is missing.").parse_args(
        arguments
    )
    from rlx.doctor import examine

    for line in examine():
        print(line, flush=True)
    return 0
