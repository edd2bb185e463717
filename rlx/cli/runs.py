"""`rlx train`, `rlx resume`: runs begun and gone on with."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlx import settings, storage
from rlx.cli.pairs import (
    default_run_dir,
    describe,
    find_pair,
    load_algorithm,
    load_data,
    load_env,
    load_run,
    say,
    settings_of,
    split_share,
    start_policy,
    with_overrides,
)
from rlx.cli.processes import begun, writes
from rlx.cli.programs import spread_over_cpu
from rlx.cli.sweeps import go_on, is_sweep
from rlx.errors import UserError, require
from rlx.logging import Progress
from rlx.run_directory import RunDirectory, run_directories

TRAIN_HELP = """\
usage: rlx train ALGORITHM ENV [--total-steps N] [--num-envs N] [--seed S] [--num-seeds K] [--run-dir DIR]
                 [--from RUN_DIR] [--data FILE[:SHARE] ...] [--physics P] [--config FILE] [--overwrite] [--quiet]
                 [--algo.FIELD V ...] [--env.KEY V ...]
                 [--distributed [--coordinator HOST:PORT --num-processes N --process-index I] [--start-timeout S]]

Several processes run the same command with --distributed; begun again, it goes on with the run in --run-dir. TPU pods,
SLURM and Open MPI say where the others are, and which this is; elsewhere the three flags do.

`rlx train ALGORITHM ENV --help` lists every setting with its default for that pair.
"""


def train(arguments: list[str]) -> int:
    """`rlx train ALGORITHM ENV [...]`."""
    wants_help = "-h" in arguments or "--help" in arguments
    if len(arguments) < 2 or arguments[0].startswith("-") or arguments[1].startswith("-"):
        print(TRAIN_HELP, end="", file=sys.stdout if wants_help else sys.stderr)
        return 0 if wants_help else 2
    quiet = wants_help or "--quiet" in arguments or not writes()
    pair = find_pair(*arguments[:2])
    if any(word.replace("_", "-").startswith("--num-seeds") for word in arguments):
        spread_over_cpu()  # before a file of the user's begins JAX, here as in `resume`
    with Progress(quiet=quiet) as shown:
        with shown.phase("importing"):
            algorithm = load_algorithm(pair)
            from rlx import training
            from rlx.arguments import parse_train
            from rlx.distributed import on_first
            from rlx.place import check_free
        options, merged = parse_train(pair.env, pair.algorithm, arguments[2:], training.TrainConfig, algorithm)
        pair = with_overrides(pair._replace(physics=options.physics), settings.values(merged, "env."))
        merged |= {f"env.{key}": merged[f"env.{key}"]._replace(value=value) for key, value in pair.overrides.items()}
        train_config = settings.build(training.TrainConfig, settings.values(merged))
        config = settings.build(algorithm.Config, settings.values(merged, "algo."))
        require(options.num_seeds >= 1, "num_seeds", options.num_seeds, "at least 1")
        many = options.num_seeds > 1
        require(not (many and begun()), "num_seeds", options.num_seeds, "1: several processes train one run at a time")
        require(bool(options.run_dir) or not begun(), "run_dir", "", "several processes need its name: --run-dir DIR")
        if many:
            spread_over_cpu(options.num_seeds)
        require(not (many and options.wandb), "--wandb", options.wandb, "it takes one run at a time")
        run_dir = storage.fetch(options.run_dir or default_run_dir(pair, train_config.seed))
        seeds = range(train_config.seed, train_config.seed + options.num_seeds)
        runs = {f"seed-{seed}": (dataclasses.replace(train_config, seed=seed), config) for seed in seeds}
        if not begun():  # several processes go on with what is there
            check_free(run_dir, list(runs), many, options.overwrite)
        which = f"seeds {seeds[0]} to {seeds[-1]}" if many else f"seed {seeds[0]}"
        say(quiet, f"{pair.algorithm} on {pair.env}, {which}, in {storage.home(run_dir)}")
        say(quiet or storage.home(run_dir) == run_dir, f"its logs are staged in {run_dir}")
        say(quiet, settings.describe(merged))
        with shown.phase("building"):
            env = load_env(pair)
            pair = pair._replace(physics=env.spec.physics or pair.physics)  # "auto" may be another one elsewhere
            say(quiet or not env.spec.physics, f"physics: {env.spec.physics}")
            start = options.from_run and str(storage.home(options.from_run))
            policy = start_policy(start, pair.physics, env, algorithm, train_config, config)
            data = load_data([split_share(file) for file in options.data], pair, env, quiet)
        goes_on = begun() and not options.overwrite and on_first(lambda: (run_dir / "config.json").is_file())
        record = {**describe(pair), "from": start, "wandb": options.wandb}
        record["command"] = shlex.join(["rlx", "train", *arguments])
        record["settings"] = settings.entries(merged)
        keywords: dict[str, Any] = {"run_dir": run_dir, "overwrite": options.overwrite, "init_policy": policy}
        keywords |= {"progress": shown, "data": data}
        if goes_on:
            check_same_start(on_first(lambda: RunDirectory.open(run_dir).config), record)
            keywords |= {"overwrite": False, "resume": True}
        if not many:
            return finish(training.train(env, algorithm, train_config, config, record=record, **keywords), run_dir)
        records = {
            name: {**record, "settings": {**record["settings"], "seed": {"value": own.seed, "from": "num_seeds"}}}
            for name, (own, _) in runs.items()
        }
        return finish_many(training.train_many(env, algorithm, runs, records=records, **keywords), run_dir)


def check_same_start(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises UserError where the run that a directory holds was begun with another environment or policy."""
    for name in ("env_overrides", "from"):
        was, now = recorded.get(name), json.loads(json.dumps(given[name]))
        require(was == now, name, now, f"the run to go on with was begun with {was!r}")


def finish(run: Any, run_dir: Path) -> int:
    """The last lines of a run on stdout, and its exit status."""
    if run.interrupted:
        how = "the same command again" if begun() else f"rlx resume {storage.home(run_dir)}"
        step = run.history[-1]["step"] if run.history else 0
        tell(f"stopped at step {step:,}; go on with: {how}")
        return 130
    returns = [row["eval/return"] for row in run.history if "eval/return" in row]
    text = f"; mean return of the last evaluation: {returns[-1]:.4g}" if returns else ""
    tell(f"done: {storage.home(run_dir)}{text}")
    return 0


def tell(text: str) -> None:
    """A line on stdout, of the process that writes."""
    if writes():
        print(text)


def finish_many(runs: Mapping[str, Any], run_dir: Path) -> int:
    """As `finish`, for runs in one program; 1 where some of them met a NaN or an infinity."""
    for name, run in runs.items():
        returns = [row["eval/return"] for row in run.history if "eval/return" in row]
        text = f"mean return of the last evaluation: {returns[-1]:.4g}" if returns else "no evaluation"
        print(f"{name}: {f'stopped: {run.error}' if run.error else text}")
    if any(run.interrupted for run in runs.values()):
        print(f"stopped; go on with: rlx resume {storage.home(run_dir)}")
        return 130
    last = [[row["eval/return"] for row in run.history if "eval/return" in row][-1:] for run in runs.values()]
    returns = [value for values in last for value in values]
    text = f"; mean over {len(returns)} runs: {sum(returns) / len(returns):.4g}" if returns else ""
    print(f"done: {storage.home(run_dir)}{text}")
    return int(any(run.error for run in runs.values()))


def resume(arguments: list[str]) -> int:
    """`rlx resume RUN_DIR [--data FILE ...]`."""
    options = resume_options(arguments)
    quiet = options.quiet or not writes()
    if storage.is_remote(options.run_dir):
        address, options.run_dir = options.run_dir, storage.fetch(options.run_dir)
        say(quiet, f"the logs of {address} are staged in {options.run_dir}")
    sweep = is_sweep(options.run_dir)
    members = [] if sweep else run_directories(options.run_dir)
    allowed = "a single run: several processes train one at a time"
    require(len(members) == 1 or not begun(), "RUN_DIR", options.run_dir, allowed)
    if len(members) > 1 and not all((path / "config.json").is_file() for path in members):
        raise UserError(f"the runs in {options.run_dir!r} were not all begun: train them again, with --overwrite.")
    if len(members) > 1:
        spread_over_cpu(len(members))
    with Progress(quiet=quiet) as shown:
        if sweep:
            return go_on(Path(options.run_dir).absolute(), shown, options.num_devices)
        return resume_runs(members, options, shown)


def resume_options(arguments: list[str]) -> argparse.Namespace:
    text, more = "Go on with a run that was stopped.", "--distributed and what belongs to it: as for `rlx train`."
    parser = argparse.ArgumentParser("rlx resume", description=text, epilog=more, allow_abbrev=False)
    parser.add_argument("run_dir")
    devices = "others than it was begun with; 0: as many as it can"
    parser.add_argument("--num-devices", type=int, metavar="N", help=devices)
    moved = "where its data sets lie now, in their order"
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help=moved)
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors and the result")
    return parser.parse_args(arguments)


def resume_runs(members: Sequence[Path], options: argparse.Namespace, shown: Progress) -> int:
    """Goes on with one run, or with many of one program, which lie beside each other."""
    from rlx.place import check_alone

    recorded, folder = RunDirectory.open(members[0]).config, Path(options.run_dir).absolute()
    if members == [folder]:
        check_alone(folder)
    with shown.phase("building"):
        run = load_run(members[0])
        from rlx import training
        from rlx.checkpoint import Checkpointer

        empty = Checkpointer(folder / "checkpoints").empty()
        built = (run.env, run.module, run.train_config, run.config)
        policy = start_policy(recorded.get("from"), run.pair.physics, *built) if empty else None
        data = load_data(data_of(recorded, options.data), run.pair, run.env, shown.quiet)
    keywords: dict[str, Any] = {"init_policy": policy, "progress": shown, "resume": True, "data": data}
    own = {**describe(run.pair), "algorithm": recorded["algorithm"], "env": recorded["env"]}

    def here(train_config: Any) -> Any:
        """The settings of a run on the devices that it goes on on."""
        given = options.num_devices
        if begun():
            train_config = dataclasses.replace(train_config, num_devices=0, split="auto")
        return train_config if given is None else dataclasses.replace(train_config, num_devices=given)

    if members == [folder]:
        built = (run.env, run.module, here(run.train_config), run.config)
        return finish(training.train(*built, run_dir=folder, record=own, **keywords), folder)
    found = {path.name: settings_of(RunDirectory.open(path), run.module) for path in members}
    runs = {name: (here(train_config), config) for name, (train_config, config) in found.items()}
    records = dict.fromkeys(runs, own)
    return finish_many(
        training.train_many(run.env, run.module, runs, run_dir=folder, records=records, **keywords), folder
    )


def data_of(recorded: Mapping[str, Any], moved: Sequence[str]) -> list[tuple[str, float | None]]:
    """The data sets of a run and their shares; `moved`: where they lie now."""
    files = [(entry["path"], entry["share"]) for entry in recorded.get("data", ())]
    if not moved:
        return files
    allowed = f"the {len(files)} files that the run began with, in their order"
    require(len(moved) == len(files), "--data", list(moved), allowed)
    return [(path, share) for path, (_, share) in zip(moved, files, strict=True)]
