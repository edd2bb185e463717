"""`rlx collect`: policies of runs rolled out into a data set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from rlx.cli.pairs import LoadedRun, load_run, split_share
from rlx.errors import UserError, check_seed, require
from rlx.logging import Progress

WORDS = ("random", "latest", "best")


class PolicyOf(NamedTuple):
    """One RUN_DIR[@POLICY][:SHARE]."""

    run_dir: str
    policy: str  # one of WORDS, or a step
    share: float | None


def parse_source(text: str, policy: str) -> PolicyOf:
    """Raises UserError for a policy that there is not."""
    name, share = split_share(text)
    run_dir, at, given = name.rpartition("@")
    if at and not Path(name).exists():
        name, policy = run_dir, given
    ok = policy in WORDS or policy.isdecimal()
    require(ok, "policy", policy, f"{', '.join(WORDS)}, or the step of a checkpoint")
    return PolicyOf(name, policy, share)


def collect(arguments: list[str]) -> int:
    """`rlx collect RUN_DIR... --steps N --out FILE`."""
    text = "Roll policies of runs out into a data set, for `rlx train ALGORITHM ENV --data FILE`."
    parser = argparse.ArgumentParser("rlx collect", description=text, allow_abbrev=False)
    what = "RUN_DIR[@POLICY][:SHARE]"
    parser.add_argument("sources", nargs="+", metavar=what, help="a run; its policy and its share of the steps")
    parser.add_argument("--steps", type=int, required=True, metavar="N", help="transitions in all")
    parser.add_argument("--out", required=True, metavar="FILE", help="an .npz")
    choices = "random, latest (the default), best, or the step of a checkpoint (--keep-checkpoints keeps more)"
    parser.add_argument("--policy", default="latest", help=f"of sources that name none: {choices}")
    parser.add_argument("--mode", choices=("sample", "greedy"), default="sample", help="sample draws actions (sample)")
    parser.add_argument("--num-envs", type=int, default=0, help="environments of each source (0: up to 256)")
    parser.add_argument("--reset", choices=("always", "pool"), default="always", help="pool: where resets are slow")
    parser.add_argument("--seed", type=int, default=0, help="decides everything that is random (0)")
    parser.add_argument("--physics", default="", help="another engine than the first run's: mjx, warp or mujoco")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors and the result")
    options = parser.parse_args(arguments)
    require(options.steps >= 1, "--steps", options.steps, "at least 1")
    require(options.num_envs >= 0, "--num-envs", options.num_envs, "at least 0")
    check_seed(options.seed, "--seed")
    sources = [parse_source(source, options.policy) for source in options.sources]
    with Progress(quiet=options.quiet) as shown:
        with shown.phase("building"):
            from rlx import collection
            from rlx.data import normalized_shares
            from rlx.data_file import check_target

            check_target(options.out, 0, options.overwrite)
            shares = normalized_shares([source.share for source in sources], [1.0] * len(sources))
            steps = collection.split_steps(options.steps, shares)
            runs = load_runs(sources, options.physics)
            env, pair = runs[0].env, runs[0].pair
            parts = [build_part(*of_part, options.mode, env) for of_part in zip(sources, runs, steps, strict=True)]
        metadata = collection.collect(
            env,
            parts,
            options.out,
            mode=options.mode,
            seed=options.seed,
            num_envs=options.num_envs,
            reset=options.reset,
            metadata={"env_overrides": dict(pair.overrides), "files": dict(pair.files)},
            overwrite=options.overwrite,
            progress=shown,
        )
    for part in metadata["parts"]:
        mean = "no whole episode" if part["mean_return"] is None else f"mean return {part['mean_return']:.4g}"
        print(f"{part['run']}@{part['policy']}: {part['steps']:,} steps, {part['episodes']:,} episodes, {mean}")
    print(f"done: {options.out}, sha256 {metadata['sha256'][:12]}")
    return 0


def load_runs(sources: list[PolicyOf], physics: str) -> list[LoadedRun]:
    """The runs of all sources. Raises UserError where they are not of one environment."""
    loaded: dict[str, LoadedRun] = {}
    for source in sources:
        if source.run_dir not in loaded:
            loaded[source.run_dir] = load_run(source.run_dir, physics)
    first = loaded[sources[0].run_dir].pair
    for run_dir, run in loaded.items():
        if (run.pair.env, dict(run.pair.overrides)) != (first.env, dict(first.overrides)):
            envs = f"{first.env} {dict(first.overrides)} and {run.pair.env} {dict(run.pair.overrides)}"
            raise UserError(f"the runs of a data set must be of one environment; {run_dir!r} differs: {envs}.")
    return [loaded[source.run_dir] for source in sources]


def build_part(source: PolicyOf, run: LoadedRun, steps: int, mode: Any, env: Any) -> Any:
    """The policy of a source. Raises UserError for a checkpoint that there is not."""
    from rlx.collection import Part, random_policy
    from rlx.learners import load_policy

    record: dict[str, Any] = {"run": str(run.directory.path), "policy": source.policy}
    if source.policy == "random":
        return Part(random_policy(env.spec), (), steps, {**record, "algorithm": "random", "step": 0})
    at = int(source.policy) if source.policy.isdecimal() else None
    built = (run.env, run.module, run.train_config, run.config)
    algorithm, policy, step = load_policy(source.run_dir, *built, source.policy == "best", mode, at)
    return Part(algorithm, policy, steps, {**record, "algorithm": run.pair.algorithm, "step": step})
