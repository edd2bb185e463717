"""`rlx evaluate RUN_DIR --gymnasium TASK`: a run's policy on a task of Gymnasium."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rlx import storage
from rlx.cli.pairs import load_run, settings_of
from rlx.errors import require
from rlx.logging import FAILED, Progress, RunDirectory, run_directories, write_atomically

FILE = "eval_gymnasium.json"  # of the run directory; eval.json is of the run's own environment


def evaluate_gymnasium(options: argparse.Namespace) -> int:
    """Plays the episodes, prints their mean return, and writes `FILE` into each run's directory."""
    require(not options.video, "--video", options.video, "it draws the run's own environment, not Gymnasium's")
    with Progress() as shown:
        with shown.phase("building"):
            members = run_directories(storage.fetch(options.run_dir))
            run = load_run(members[0], options.physics)
            from rlx.gymnasium import evaluate_gymnasium as play
            from rlx.learners import load_policy
            from rlx.recording import episodes

            mode = options.mode or run.train_config.eval_mode
        for path in members:
            train_config, config = settings_of(RunDirectory.open(path), run.module)
            name = f"{path.name}: " if len(members) > 1 else ""
            if name and (path / FAILED).exists():
                print(f"{name}stopped: {json.loads((path / FAILED).read_text())['error']}")
                continue
            built = (run.env, run.module, train_config, config)
            algorithm, policy, step = load_policy(path, *built, options.best, mode)
            seed = train_config.seed if options.seed is None else options.seed
            acting = (run.env.spec, algorithm, policy, options.episodes, mode, seed, options.decisions)
            with shown.phase("evaluating"):
                result = play(options.gymnasium, *acting)
            entry: dict[str, Any] = {"task": options.gymnasium, "step": step, "mode": mode, "seed": seed}
            entry |= {"best": options.best, **episodes(result)}
            write_atomically(path / FILE, json.dumps(entry) + "\n")
            storage.put(path / FILE)
            mean, std = result.returns.mean(), result.returns.std()
            text = f"mean return {mean:.4g}, standard deviation {std:.4g}, {options.episodes} episodes"
            print(f"{name}step {step:,} on {options.gymnasium}: {text}")
    return 0
