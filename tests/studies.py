"""A small study and run directories as training leaves them, made by hand: for tests of results and reports."""

from __future__ import annotations

import json

from rlx.files import RUNS
from rlx.logging import JsonlWriter
from rlx.run_directory import FAILED, FINISHED, RunDirectory
from rlx.study import Reference, Size, Study, Task, Variant, programs, run_name

ENVS = ("probe/lqr", "probe/memory")


def reference(value=500.0, sd=50.0, steps=2000, trust="high"):
    return Reference(value, sd, "five", steps, "their table 3", trust)


def make_study(num_seeds=3, algorithms=("ppo",), envs=ENVS, **changes):
    return Study(
        **{
            "name": "tiny",
            "title": "A tiny study",
            "about": "What it asks.",
            "algorithms": algorithms
            if isinstance(algorithms, dict)
            else {name: Variant("ppo", {"algo.gamma": 0.9}) for name in algorithms},
            "environments": {env: Task(0.0, 1000.0) for env in envs},
            "sizes": {"small": Size(tuple(range(num_seeds)), {"total_steps": 1000})},
            "references": {(name, env): reference() for name in algorithms for env in envs},
            "tuning_seeds": (100,),
            **changes,
        }
    )


def programs_of(study):
    return programs(study, "small", "/nowhere")


def record(out, program, scores, finished=True, failed=(), points=5, total=1000, **config):
    """Runs whose evaluations rise to `scores`; those of the seeds `failed` stopped after the second."""
    place = out / program.folder
    place.mkdir(parents=True)
    names = [run_name(seed) for seed in program.seeds]
    (place / RUNS).write_text(json.dumps({"runs": names}))
    entries = {
        "algorithm": "ppo",
        "env": program.env,
        "physics": "mujoco",
        "commit": "abc123",
        "machine": {"platform": "cpu", "devices": ["cpu"], "cores": 2},
        "settings": {
            "algo.gamma": {"value": 0.9, "from": "study"},
            "num_envs": {"value": 256, "from": "default"},
            "env.randomize": {"value": str(out / "draw.py:function"), "from": "study"},
            "seed": {"value": 0, "from": "study"},
        },
        **config,
    }
    for seed, name, score in zip(program.seeds, names, scores, strict=True):
        run = RunDirectory.create(place / name, entries)
        writer = JsonlWriter(run.metrics_path)
        for point in range(points if seed not in failed else 2):
            row = {"eval/return": score * point / (points - 1)}
            if point:
                row |= {"time/elapsed": 60.0 * point, "time/steps_per_second": 100.0}
            writer.write(total * point // (points - 1), row)
        writer.close()
        if seed in failed:
            (run.path / FAILED).write_text(json.dumps({"step": 500, "error": "loss is nan"}))
    if finished:
        (place / FINISHED).write_text(json.dumps({"failed": {}}))
