"""`rlx export RUN_DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlx import storage
from rlx.cli.pairs import load_run
from rlx.errors import require
from rlx.logging import Progress
from rlx.run_directory import run_directories


def export(arguments: list[str]) -> int:
    """`rlx export RUN_DIR --out FOLDER`: writes a policy that others can load without rlx."""
    text = "Write the policy of a run for others: StableHLO, which takes jax and flatbuffers alone, its metadata, ONNX."
    parser = argparse.ArgumentParser("rlx export", description=text, allow_abbrev=False)
    parser.add_argument("run_dir")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for policy.stablehlo, policy.json, policy.onnx")
    parser.add_argument("--best", action="store_true", help="the policy of the best evaluation, not the newest")
    parser.add_argument("--mode", choices=("greedy", "sample"), help="greedy is deterministic (the run's own)")
    platforms = ("cpu", "cuda", "tpu")
    parser.add_argument("--platforms", nargs="+", default=platforms, help="cpu, cuda, rocm, tpu (all but rocm)")
    parser.add_argument("--onnx", action="store_true", help="policy.onnx too; it needs jax2onnx (docs: FAQ)")
    parser.add_argument("--overwrite", action="store_true", help="replace a policy that FOLDER holds")
    options = parser.parse_args(arguments)
    with Progress() as shown:
        with shown.phase("building"):
            from rlx.export import check_onnx, check_target, export_policy
            from rlx.learners import load_policy

            check_target(Path(options.out), options.platforms, options.overwrite)
            members = run_directories(storage.fetch(options.run_dir))
            require(len(members) == 1, "RUN_DIR", options.run_dir, f"one of {', '.join(path.name for path in members)}")
            run = load_run(members[0])
            mode = options.mode or run.train_config.eval_mode
            if options.onnx:
                check_onnx(mode)
            built = (run.env, run.module, run.train_config, run.config)
            algorithm, policy, step = load_policy(run.directory.path, *built, options.best, mode)
        record = {name: run.directory.config[name] for name in ("algorithm", "env", "physics", "env_overrides")}
        record |= {"step": step, "best": options.best}
        with shown.phase("exporting"):
            acting = (run.env.spec, algorithm, policy, mode)
            export_policy(options.out, *acting, options.platforms, record, options.overwrite, options.onnx)
    print(options.out)
    return 0
