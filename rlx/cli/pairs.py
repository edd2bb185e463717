"""What a run is built from: references to an algorithm and an environment, looked up, recorded and built again."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from rlx import external, settings, storage
from rlx.algorithms import ALGORITHMS
from rlx.errors import UserError, require, unknown
from rlx.run_directory import RunDirectory

SAME_ACTIONS = 0.05  # of the box from -1 to 1: other arithmetic (bfloat16) gives less, another network more


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


def say(quiet: bool, text: str) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def envs_package() -> ModuleType:
    """The `envs` installed beside this package, even where the working directory has a folder of that name."""
    root = str(Path(__file__).resolve().parents[2])
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


def default_run_dir(pair: Pair, seed: int) -> str:
    """A new folder of runs/: algorithm, environment, seed, time."""
    names = [Path(name).name if ".py" in name else name for name in (pair.algorithm, pair.env)]
    parts = [re.sub(r"[^\w-]+", "_", name.removesuffix(".py")) for name in names]
    return f"runs/{parts[0]}-{parts[1]}-{seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def describe(pair: Pair) -> dict[str, Any]:
    """What config.json needs to build the pair again."""
    parts = {"physics": pair.physics, "env_overrides": dict(pair.overrides), "files": dict(pair.files)}
    return {"algorithm": pair.algorithm, "env": pair.env, **parts}


def warn_of_changes(pair: Pair) -> None:
    """Says which files are not as they were recorded. Raises UserError where one is missing."""
    for part, was in pair.files.items():
        warning = external.changed(pair.reference(part), part, was)
        say(warning is None, str(warning))


def recorded_pair(recorded: Mapping[str, Any]) -> Pair:
    """Undoes `describe`, and `rlx.records.rebuilding`."""
    found = {**recorded, **recorded.get("built_from", {})}
    return Pair(*(found[name] for name in ("algorithm", "env", "physics", "env_overrides", "files")))


class LoadedRun(NamedTuple):
    """A run directory and what it was built from."""

    directory: RunDirectory
    pair: Pair
    env: Any
    module: ModuleType
    train_config: Any
    config: Any


def load_run(run_dir: str | Path, physics: str = "") -> LoadedRun:
    """Builds environment and algorithm of a run again, on another engine if `physics` names one.

    Raises UserError that says what is missing.
    """
    directory = RunDirectory.open(storage.fetch(run_dir))
    recorded = directory.config
    if "env_overrides" not in recorded:
        raise UserError(
            f"{str(run_dir)!r} was begun from Python with what no file or name stands for: use it there, and go "
            "on with resume=True of rlx.train or train_many."
        )
    pair = recorded_pair(recorded)
    pair = pair._replace(physics=physics or pair.physics)
    warn_of_changes(pair)
    module = load_algorithm(pair)
    env = load_env(pair)
    return LoadedRun(directory, pair, env, module, *settings_of(directory, module))


class Loaded(NamedTuple):
    """A policy and what it acts in."""

    env: Any
    algorithm: Any  # rlx.Algorithm
    policy: Any
    step: int  # of the checkpoint that it is from


def load(run_dir: str | Path, best: bool = False, physics: str = "") -> Loaded:
    """Builds the environment and the algorithm of a run again, with the policy of its newest or best checkpoint.

    Args:
        run_dir: a run of the command line, or of Python where its algorithm and environment have names or files.
        best: the policy of the best evaluation, not the newest.
        physics: another engine than the run's.

    Raises UserError where there is none, or where the run cannot be built again.
    """
    from rlx.learners import load_policy

    run = load_run(run_dir, physics)
    built = (run.env, run.module, run.train_config, run.config)
    return Loaded(run.env, *load_policy(run.directory.path, *built, best, run.train_config.eval_mode))


def settings_of(directory: RunDirectory, module: ModuleType) -> tuple[Any, Any]:
    """The recorded TrainConfig and Config of a run. Raises UserError for fields that are no more."""
    from rlx.schedule import TrainConfig

    train_config = settings.build(TrainConfig, directory.config["train"])
    return train_config, settings.build(module.Config, directory.config["algo"])


def start_policy(run_dir: str | None, physics: str, env: Any, module: ModuleType, train: Any, config: Any) -> Any:
    """The policy that `--from` names, or None, for a run of these settings. Its environment is built on that engine.

    Raises UserError where they do not fit: for the settings, that policy would be another one.
    """
    from rlx.learners import build_algorithm, check_policy, distance_between, load_policy
    from rlx.records import GIVEN
    from rlx.schedule import make_schedule

    if run_dir == GIVEN:
        raise UserError(f"the run started from {GIVEN} and has no checkpoint yet: begin it anew there.")
    frozen = getattr(config, "freeze_statistics", False)
    if not run_dir:
        require(not frozen, "algo.freeze_statistics", frozen, "there with a policy to start from: --from RUN_DIR")
        return None
    run = load_run(run_dir, physics)
    before, policy, _ = load_policy(run_dir, run.env, run.module, run.train_config, run.config)
    algorithm = build_algorithm(module, config, env, make_schedule(env, train).plan)
    check_policy(algorithm, policy)
    was, now = (settings.flatten(dataclasses.asdict(one), "algo.") for one in (run.config, config))
    if was.get("algo.statistics") == "range" and not frozen:
        raise UserError("algo.freeze_statistics must be true: the policy to start from has ranges, no deviations.")
    distance = distance_between(before, algorithm, policy, env.spec)
    if distance > SAME_ACTIONS:
        differ = "; ".join(
            f"{key} = {now[key]!r}, there {was[key]!r}" for key in now if was.get(key, now[key]) != now[key]
        )
        raise UserError(
            f"under these settings the policy of {run_dir!r} would be another one: its greedy actions differ by up to "
            f"{distance:.2g}. Give this run the settings of that one, as far as they make up the policy: {differ}."
        )
    return policy


def split_share(text: str) -> tuple[str, float | None]:
    """`text` without the `:SHARE` at its end, and that share, if it has one."""
    name, colon, share = text.rpartition(":")
    with contextlib.suppress(ValueError):
        if colon and not Path(text).exists():
            return name, float(share)
    return text, None


def load_data(files: Sequence[tuple[str, float | None]], pair: Pair, env: Any, quiet: bool) -> Any:
    """The data sets in these files with these shares, None without any. Raises UserError for a file with a fault."""
    from rlx.data import read

    if not files:
        return None
    data = read(files, env)
    for entry in data.record:
        metadata = entry["metadata"]
        share = "" if entry["share"] is None else f", share {entry['share']:g}"
        say(quiet, f"data: {entry['path']}, {metadata.get('total_steps', '?')} steps{share}")
        overrides, own = metadata.get("env_overrides", {}), dict(pair.overrides)
        if "chunk" not in metadata["action"]:  # single actions are read as chunks of them
            own.pop("action_chunk", None)
        same = overrides == json.loads(json.dumps(own))
        say(quiet or same, f"warning: gathered under {overrides}, evaluated under {own}")
    return data
