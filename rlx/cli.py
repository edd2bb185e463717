"""The command line: the one module that may import environments and algorithms together.

Nothing heavy is imported before it is needed: names are checked before jax is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from rlx import __version__, external, settings
from rlx.algorithms import ALGORITHMS
from rlx.errors import UserError, require, unknown
from rlx.logging import Progress, RunDirectory, versions, write_atomically

HELP = """\
usage: rlx COMMAND ...

  train ALGORITHM ENV [...]    train; `rlx train ALGORITHM ENV --help` lists every setting
  resume RUN_DIR               go on with a run that was stopped
  evaluate RUN_DIR [...]       play whole episodes with a run's policy
  plot RUN_DIR... --out FILE   draw learning curves
  list envs|algorithms         what there is
  benchmark ENV [ALGORITHM]    steps/s, compile time and memory on every physics engine
  doctor                       what this machine has, and what each missing piece costs

  --version, --help            --debug with any command: show tracebacks

ALGORITHM: a name, path/to/file.py or a module, with Config and make.
ENV: a name such as gymnax/Pendulum-v1, path/to/file.py:function or module:function.
"""

TRAIN_HELP = """\
usage: rlx train ALGORITHM ENV [--total-steps N] [--num-envs N] [--seed S] [--run-dir DIR] [--from RUN_DIR]
                 [--physics P] [--config FILE] [--overwrite] [--quiet] [--algo.FIELD V ...] [--env.KEY V ...]

`rlx train ALGORITHM ENV --help` lists every setting with its default for that pair.
"""


class Pair(NamedTuple):
    """What a run is built from. References are canonical: they mean the same in any working directory."""

    algorithm: str
    env: str
    physics: str = "auto"
    overrides: Mapping[str, Any] = {}
    files: Mapping[str, Mapping[str, str]] = {}  # of "algorithm", "env", "env.KEY", where they are files: path, sha256

    def reference(self, part: str) -> str:
        """What stands for one of `files`."""
        return self.overrides[part.removeprefix("env.")] if part.startswith("env.") else getattr(self, part)


def keep_compiled_programs() -> None:
    """Points jax's compilation cache at a folder in the user's home, unless the environment names another.

    A folder a host: a program compiled for one processor may crash on another.
    """
    with contextlib.suppress(RuntimeError):  # a user without a home
        cache = Path.home() / ".cache" / "rlx" / f"jax-{platform.node()}"
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0; 1 a fault of ours; 2 a user's; 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    keep_compiled_programs()
    try:
        return dispatch([argument for argument in arguments if argument != "--debug"])
    except SystemExit as exit:  # argparse and tyro have said why
        return exit.code if isinstance(exit.code, int) else 2
    except BrokenPipeError:  # `rlx list envs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        return report(error)


def report(error: Exception) -> int:
    """One line on stderr for an exception, and the exit status."""
    if isinstance(error, UserError | OSError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = f"internal error: {type(error).__name__}: {error}; run again with --debug for the traceback"
    print(text, file=sys.stderr)
    return 1


def dispatch(arguments: list[str]) -> int:
    """Runs the command that `arguments` begin with."""
    commands = {"train": train, "resume": resume, "evaluate": evaluate, "plot": plot}
    commands |= {"list": list_names, "doctor": doctor, "benchmark": benchmark}
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] == "--version":
        print(f"rlx {__version__}")
        return 0
    if arguments[0] not in commands:
        raise unknown("command", arguments[0], commands)
    return commands[arguments[0]](arguments[1:])


def envs_package() -> ModuleType:
    """The `envs` installed beside this package, even where the working directory has a folder of that name."""
    root = str(Path(__file__).resolve().parent.parent)
    sys.path.insert(0, root)
    try:
        return importlib.import_module("envs")
    finally:
        sys.path.remove(root)


def find_pair(algorithm: str, env: str) -> Pair:
    """Checks both references without importing jax. Raises UserError with close names."""
    suites = envs_package()
    files = {}
    if algorithm not in ALGORITHMS:
        if not algorithm.endswith(".py") and external.source_file(algorithm) is None:
            raise unknown("algorithm", algorithm, ALGORITHMS)
        algorithm = external.canonical(algorithm)
        files["algorithm"] = external.fingerprint(algorithm, "algorithm")
    if ":" in env:
        env = external.canonical(env)
        files["env"] = external.fingerprint(env, "env")
    elif env.endswith(".py"):
        raise UserError(f"env {env!r} lacks the function that makes it: {env}:make, say.")
    suites.check_name(env)
    return Pair(algorithm, env, files=files)


def with_overrides(pair: Pair, overrides: Mapping[str, Any]) -> Pair:
    """`pair` with these overrides of its environment; references to functions among them are made canonical.

    Raises UserError for a file that does not exist.
    """
    canonical, files = dict(overrides), dict(pair.files)
    for key, value in overrides.items():
        target, colon, function = value.rpartition(":") if isinstance(value, str) else ("", "", "")
        if colon and function.isidentifier() and (target.endswith(".py") or external.source_file(target)):
            canonical[key] = external.canonical(value)
            files[f"env.{key}"] = external.fingerprint(canonical[key], f"env.{key}")
    return pair._replace(overrides=canonical, files=files)


def load_algorithm(pair: Pair) -> ModuleType:
    """The algorithm's module. Raises UserError if it lacks Config or make."""
    if pair.algorithm in ALGORITHMS:
        return importlib.import_module(ALGORITHMS[pair.algorithm])
    return external.load_algorithm(pair.algorithm)


def load_env(pair: Pair) -> Any:
    """The environment. Raises UserError for an engine or an override that it does not take."""
    return envs_package().make(pair.env, pair.physics, **pair.overrides)


def train(arguments: list[str]) -> int:
    """`rlx train ALGORITHM ENV [...]`."""
    wants_help = "-h" in arguments or "--help" in arguments
    if len(arguments) < 2 or arguments[0].startswith("-") or arguments[1].startswith("-"):
        print(TRAIN_HELP, end="", file=sys.stdout if wants_help else sys.stderr)
        return 0 if wants_help else 2
    quiet = wants_help or "--quiet" in arguments
    pair = find_pair(*arguments[:2])
    with Progress(quiet=quiet) as shown:
        with shown.phase("importing"):
            algorithm = load_algorithm(pair)
            from rlx import training
            from rlx.arguments import parse_train
        options, merged = parse_train(pair.env, pair.algorithm, arguments[2:], training.TrainConfig, algorithm.Config)
        pair = with_overrides(pair._replace(physics=options.physics), settings.values(merged, "env."))
        merged |= {f"env.{key}": merged[f"env.{key}"]._replace(value=value) for key, value in pair.overrides.items()}
        train_config = settings.build(training.TrainConfig, settings.values(merged))
        config = settings.build(algorithm.Config, settings.values(merged, "algo."))
        run_dir = Path(options.run_dir or default_run_dir(pair, train_config.seed)).absolute()
        say(quiet, f"{pair.algorithm} on {pair.env}, seed {train_config.seed}, in {run_dir}")
        say(quiet, settings.describe(merged))
        with shown.phase("building"):
            env = load_env(pair)
            pair = pair._replace(physics=env.spec.physics or pair.physics)  # "auto" may be another one elsewhere
            say(quiet or not env.spec.physics, f"physics: {env.spec.physics}")
            start = options.from_run and str(Path(options.from_run).absolute())
            policy = start_policy(start, pair.physics)
        record = {**describe(pair), "from": start, "wandb": options.wandb}
        record["command"] = shlex.join(["rlx", "train", *arguments])
        record["settings"] = {key: {"value": s.value, "from": s.origin} for key, s in merged.items()}
        keywords: dict[str, Any] = {"run_dir": run_dir, "record": record, "overwrite": options.overwrite}
        run = training.train(env, algorithm, train_config, config, init_policy=policy, progress=shown, **keywords)
    return finish(run, run_dir)


def say(quiet: bool, text: str) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def default_run_dir(pair: Pair, seed: int) -> str:
    """A new folder of runs/: algorithm, environment, seed, time."""
    names = [Path(name).name if ".py" in name else name for name in (pair.algorithm, pair.env)]
    parts = [re.sub(r"[^\w-]+", "_", name.removesuffix(".py")) for name in names]
    return f"runs/{parts[0]}-{parts[1]}-{seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def describe(pair: Pair) -> dict[str, Any]:
    """What config.json needs to build the pair again."""
    parts = {"physics": pair.physics, "env_overrides": dict(pair.overrides), "files": dict(pair.files)}
    return {"algorithm": pair.algorithm, "env": pair.env, **parts}


def finish(run: Any, run_dir: Path) -> int:
    """The last lines of a run on stdout, and its exit status."""
    if run.interrupted:
        print(f"stopped at step {run.history[-1]['step'] if run.history else 0:,}; go on with: rlx resume {run_dir}")
        return 130
    returns = [row["eval/return"] for row in run.history if "eval/return" in row]
    text = f"; mean return of the last evaluation: {returns[-1]:.4g}" if returns else ""
    print(f"done: {run_dir}{text}")
    return 0


class LoadedRun(NamedTuple):
    """A run directory and what it was built from."""

    directory: RunDirectory
    pair: Pair
    env: Any
    module: ModuleType
    train_config: Any
    config: Any


def load_run(run_dir: str, physics: str = "") -> LoadedRun:
    """Builds environment and algorithm of a run again, on another engine if `physics` names one.

    Raises UserError that says what is missing.
    """
    directory = RunDirectory.open(run_dir)
    recorded = directory.config
    if "env_overrides" not in recorded:
        raise UserError(f"{run_dir!r} was begun from Python: go on there, with rlx.train(..., resume=True).")
    pair = Pair(*(recorded[name] for name in ("algorithm", "env", "physics", "env_overrides", "files")))
    pair = pair._replace(physics=physics or pair.physics)
    for part, was in pair.files.items():
        warning = external.changed(pair.reference(part), part, was)
        say(warning is None, str(warning))
    module = load_algorithm(pair)
    from rlx import training

    train_config = settings.build(training.TrainConfig, recorded["train"])
    config = settings.build(module.Config, recorded["algo"])
    env = load_env(pair)
    return LoadedRun(directory, pair, env, module, train_config, config)


def start_policy(run_dir: str | None, physics: str) -> Any:
    """The policy that `--from` names, or None. Its environment is built on the engine of the run that begins."""
    from rlx.training import load_policy

    if not run_dir:
        return None
    run = load_run(run_dir, physics)
    return load_policy(run_dir, run.env, run.module, run.train_config, run.config)[1]


def resume(arguments: list[str]) -> int:
    """`rlx resume RUN_DIR`."""
    parser = argparse.ArgumentParser("rlx resume", description="Go on with a run that was stopped.", allow_abbrev=False)
    parser.add_argument("run_dir")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors and the result")
    options = parser.parse_args(arguments)
    recorded = RunDirectory.open(options.run_dir).config
    with Progress(quiet=options.quiet) as shown:
        with shown.phase("building"):
            run = load_run(options.run_dir)
            from rlx import training
            from rlx.checkpoint import Checkpointer

            start = recorded.get("from") if Checkpointer(run.directory.checkpoints_path).empty() else None
            policy = start_policy(start, run.pair.physics)
        now = versions()
        other = [f"{k} {was} then, {now.get(k, 'missing')} now" for k, was in recorded["versions"].items()]
        other = [text for text, (k, was) in zip(other, recorded["versions"].items(), strict=True) if now.get(k) != was]
        say(options.quiet or not other, f"versions differ, so results may in their last digits: {'; '.join(other)}")
        keywords: dict[str, Any] = {"run_dir": run.directory.path, "init_policy": policy, "progress": shown}
        keywords["record"] = describe(run.pair)
        done = training.train(run.env, run.module, run.train_config, run.config, resume=True, **keywords)
    return finish(done, run.directory.path)


def evaluate(arguments: list[str]) -> int:
    """`rlx evaluate RUN_DIR`: writes eval.json and prints the mean return."""
    text = "Play whole episodes with a run's policy; greedy ones are written to eval.json in the run directory."
    parser = argparse.ArgumentParser("rlx evaluate", description=text, allow_abbrev=False)
    parser.add_argument("run_dir")
    parser.add_argument("--episodes", type=int, default=128, help="how many, in parallel (128)")
    parser.add_argument("--seed", type=int, help="decides the starts and the noise (the run's own, as in training)")
    parser.add_argument("--decisions", type=int, default=0, help="cut of an episode (0: the time limit)")
    parser.add_argument("--best", action="store_true", help="the policy of the best evaluation, not the newest")
    parser.add_argument("--mode", choices=("greedy", "sample"), default="greedy", help="greedy is deterministic")
    parser.add_argument("--physics", default="", help="another engine than the run's: mjx, warp or mujoco")
    options = parser.parse_args(arguments)
    require(options.episodes >= 1, "--episodes", options.episodes, "at least 1")
    with Progress() as shown:
        with shown.phase("building"):
            run = load_run(options.run_dir, options.physics)
            import jax

            from rlx.evaluation import make_evaluate
            from rlx.training import load_policy

            built = (run.env, run.module, run.train_config, run.config)
            algorithm, policy, step = load_policy(options.run_dir, *built, options.best, options.mode)
        seed = run.train_config.seed if options.seed is None else options.seed
        decisions = options.decisions or run.train_config.eval_decisions
        with shown.phase("evaluating"):
            play = jax.jit(make_evaluate(run.env, algorithm, options.episodes, options.mode, decisions))
            _, _, _, key = jax.random.split(jax.random.key(seed), 4)  # the fourth, as in training
            result = jax.device_get(play(policy, key))
    entry = {"step": step, "mode": options.mode, "seed": seed, "best": options.best}
    entry["physics"] = run.env.spec.physics or run.pair.physics
    entry |= {"returns": result.returns.tolist(), "lengths": result.lengths.tolist()}
    if options.mode == "greedy":
        write_atomically(run.directory.path / "eval.json", json.dumps(entry) + "\n")
    mean, std = result.returns.mean(), result.returns.std()
    print(f"step {step:,}: mean return {mean:.4g}, standard deviation {std:.4g}, {options.episodes} episodes")
    return 0


def plot(arguments: list[str]) -> int:
    """`rlx plot RUN_DIR... --out FILE`."""
    parser = argparse.ArgumentParser("rlx plot", description="Draw the learning curves of runs.", allow_abbrev=False)
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", required=True, metavar="FILE", help="a .png, .svg or .pdf")
    parser.add_argument("--metric", default="eval/return", help="a key of metrics.jsonl (eval/return)")
    options = parser.parse_args(arguments)
    from rlx.plotting import plot as draw

    print(draw(options.run_dirs, options.out, metric=options.metric))
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
    from rlx.training import TrainConfig

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


if __name__ == "__main__":
    sys.exit(main())
