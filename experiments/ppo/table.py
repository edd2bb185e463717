"""PPO's rows of README's results table: three seeds a task, the tuned settings, greedy evaluation of the last policy.

    python experiments/ppo/table.py                       every row (about two hours on two cores), into runs/ppo/
    python experiments/ppo/table.py gymnax/Pendulum-v1    one row

Each run is `rlx train ppo ENV --seed S --run-dir runs/ppo/ENV-S`, then `rlx evaluate` on as many episodes as EPISODES
says. Runs that are there are resumed if they were cut, and not repeated. Prints the table and writes results.json.

The figures of brax are the mean and standard deviation of brax's PPO over other groups' public runs
(60M steps on CheetahRun).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from rlx.logging import read_metrics, versions
from rlx.results import minutes_of

SEEDS = (0, 1, 2)
EPISODES = {"probe/lqr": 16384}  # its returns spread widely: the start decides them
TASKS = {
    "gymnax/CartPole-v1": ">= 475",
    "gymnax/Pendulum-v1": ">= -200",
    "brax/inverted_pendulum": ">= 950",
    "playground/CartpoleBalance": ">= 950",
    "playground/CartpoleSwingup": ">= 500",
    "playground/CheetahRun": ">= 825; brax 825 +- 70",
    "playground/FingerSpin": "brax 570 +- 96",
    "playground/HopperStand": "brax 205 +- 225",
    "playground/WalkerWalk": "brax 969",
    "probe/lqr": "within 5 % of -9.44, the Riccati optimum",
}


def rlx(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "rlx.cli", *map(str, arguments)], check=True)


def measure(env: str, seed: int) -> tuple[int, float, float]:
    """Steps taken, the mean return, and minutes of training (evaluations and saves included) of one seed."""
    folder = Path("runs/ppo") / f"{env.replace('/', '-')}-{seed}"
    if (folder / "config.json").exists():
        rlx("resume", folder)
    else:
        rlx("train", "ppo", env, "--seed", seed, "--run-dir", folder)
    rlx("evaluate", folder, "--episodes", EPISODES.get(env, 128), "--seed", 1000)
    evaluation = json.loads((folder / "eval.json").read_text())
    minutes = minutes_of(read_metrics(folder / "metrics.jsonl"))
    return evaluation["step"], float(np.mean(evaluation["returns"])), minutes


def main() -> None:
    file = Path(__file__).with_name("results.json")
    results = json.loads(file.read_text()) if file.exists() else {}
    for env in sys.argv[1:] or TASKS:
        steps, returns, minutes = zip(*(measure(env, seed) for seed in SEEDS), strict=True)
        results[env] = {"steps": steps[0], "returns": returns, "minutes": minutes, "versions": versions()}
        file.write_text(json.dumps(results, indent=1) + "\n")
    print("| task | steps | minutes | mean return of 3 seeds (each) | for comparison |\n|---|---|---|---|---|")
    for env, target in TASKS.items():
        if env in results:
            each = ", ".join(f"{value:.4g}" for value in results[env]["returns"])
            mean = np.mean(results[env]["returns"])
            minutes = f"{np.mean(results[env]['minutes']):.1f}"
            print(f"| `{env}` | {results[env]['steps']:,} | {minutes} | {mean:.4g} ({each}) | {target} |")


if __name__ == "__main__":
    main()
