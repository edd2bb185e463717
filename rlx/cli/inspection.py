"""`rlx evaluate`, `rlx plot`, `rlx benchmark`, `rlx list`, `rlx doctor`: what begins no run."""

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
from rlx.cli.gymnasium import evaluate_gymnasium
from rlx.cli.pairs import (
    Pair,
    envs_package,
    find_pair,
    load_algorithm,
    load_env,
    load_run,
    say,
    settings_of,
    with_overrides,
)
from rlx.errors import UserError, require
from rlx.logging import FAILED, Progress, RunDirectory, run_directories, write_atomically


def evaluate(arguments: list[str]) -> int:
    """`rlx evaluate RUN_DIR`: writes eval.json and prints the mean return."""
    text = "Play whole episodes with a run's policy; in the run's own mode they are written to its eval.json."
    parser = argparse.ArgumentParser("rlx evaluate", description=text, allow_abbrev=False)
    parser.add_argument("run_dir")
    parser.add_argument("--episodes", type=int, default=128, help="how many, in parallel (128)")
    parser.add_argument("--seed", type=int, help="decides the starts and the noise (the run's own, as in training)")
    parser.add_argument("--decisions", type=int, default=0, help="cut of an episode (0: the time limit)")
    parser.add_argument("--best", action="store_true", help="the policy of the best evaluation, not the newest")
    parser.add_argument("--mode", choices=("greedy", "sample"), help="greedy is deterministic (the run's own)")
    parser.add_argument("--physics", default="", help="another engine than the run's: mjx, warp or mujoco")
    what = "play this task of Gymnasium instead, HalfCheetah-v5 say; its result goes to eval_gymnasium.json"
    parser.add_argument("--gymnasium", metavar="TASK", help=what)
    parser.add_argument("--video", metavar="FILE", help="draw the first of them: a .gif, an animated .png or a .webp")
    parser.add_argument("--video-episodes", type=int, default=1, metavar="N", help="how many of them (1)")
    parser.add_argument("--fps", type=float, default=20.0, help="decisions a second of the video (20)")
    options = parser.parse_args(arguments)
    require(options.episodes >= 1, "--episodes", options.episodes, "at least 1")
    if options.gymnasium:
        return evaluate_gymnasium(options)
    if options.video:
        from rlx.video import check_video

        check_video(options.video, options.fps)
        drawn, allowed = options.video_episodes, f"from 1 to the {options.episodes} episodes"
        require(1 <= drawn <= options.episodes, "--video-episodes", drawn, allowed)
    with Progress() as shown:
        with shown.phase("building"):
            members = run_directories(storage.fetch(options.run_dir))
            require(len(members) == 1 or not options.video, "--video", options.video, "it takes one run at a time")
            run = load_run(members[0], options.physics)
            mode = options.mode or run.train_config.eval_mode
            import jax

            from rlx.evaluation import make_evaluate, make_player
            from rlx.learners import load_policy
            from rlx.recording import episodes
            from rlx.schedule import make_schedule, one_device

        players: dict[str, Any] = {}  # runs of one program may differ in their settings

        def player(config: Any) -> Any:
            key = repr(config)  # a user's Config need not be hashable
            if key not in players:
                players[key] = jax.jit(make_evaluate(*playing(config)))
            return players[key]

        def playing(config: Any) -> tuple[Any, ...]:
            """What plays the episodes of a run: the arguments of `make_evaluate` and `make_player`."""
            decisions = options.decisions or run.train_config.eval_decisions
            plan = make_schedule(run.env, one_device(run.train_config)).plan
            algorithm = run.module.make(config, run.env.spec, plan)
            return run.env, algorithm, options.episodes, mode, decisions, None

        for path in members:
            train_config, config = settings_of(RunDirectory.open(path), run.module)
            name = f"{path.name}: " if len(members) > 1 else ""
            if name and (path / FAILED).exists():
                print(f"{name}stopped: {json.loads((path / FAILED).read_text())['error']}")
                continue
            built = (run.env, run.module, train_config, config)
            _, policy, step = load_policy(path, *built, options.best, mode)
            seed = train_config.seed if options.seed is None else options.seed
            with shown.phase("evaluating"):
                _, _, _, key = jax.random.split(jax.random.key(seed), 4)  # the fourth, as in training
                result = jax.device_get(player(config)(policy, key))
            entry = {"step": step, "mode": mode, "seed": seed, "best": options.best}
            entry["physics"] = run.env.spec.physics or run.pair.physics
            entry |= episodes(result)
            if mode == run.train_config.eval_mode:
                write_atomically(path / "eval.json", json.dumps(entry) + "\n")
                storage.put(path / "eval.json")
            mean, std = result.returns.mean(), result.returns.std()
            text = f"mean return {mean:.4g}, standard deviation {std:.4g}, {options.episodes} episodes"
            lost = 0 if result.diverged is None else int(result.diverged.sum())
            text += f", of which {lost} ended early because their simulation diverged" if lost else ""
            if result.agent_returns is not None:
                text += f"; of each agent {', '.join(f'{x:.4g}' for x in result.agent_returns.mean(axis=0))}"
            print(f"{name}step {step:,}: {text}")
            if options.video:
                from rlx.video import film, write_video

                with shown.phase("drawing"):
                    frames = film(run.env, make_player(*playing(config)), policy, key, options.video_episodes)
                    write_video(options.video, frames, options.fps)
                print(options.video)
    return 0


def plot(arguments: list[str]) -> int:
    """`rlx plot RUN_DIR... --out FILE`."""
    parser = argparse.ArgumentParser("rlx plot", description="Draw the learning curves of runs.", allow_abbrev=False)
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", required=True, metavar="FILE", help="a .png, .svg or .pdf")
    parser.add_argument("--metric", default="eval/return", help="a key of metrics.jsonl (eval/return)")
    options = parser.parse_args(arguments)
    from rlx.plotting import plot as draw

    run_dirs = [run for path in options.run_dirs for run in run_directories(storage.fetch(path))]
    print(draw(run_dirs, options.out, metric=options.metric))
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

    layers = [("preset", settings.preset(pair.env, pair.algorithm)), ("command line", options.settings)]
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
