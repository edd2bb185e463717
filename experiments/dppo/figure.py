"""Policies on the avoiding task under injected action noise: a table of success, pictures of where they go and act.

    python experiments/dppo/figure.py RUN_DIR [RUN_DIR ...] --out FILE [--noise 0 0.1 0.2 0.4]

Each run is one of `study.py`'s. Success is the share of `--episodes` episodes that cross the paid half of the line; all
actions are draws from the policy. Noise is the standard deviation of what is added to every action, 1 being full speed
(`action_noise` of the environment). Prints the table in Markdown and writes it beside the picture, which shows first
and last noise; and in the last row the density of what the policy does at the saddle point, the start in the middle,
straight before the first obstacle: the mean velocity of a chunk to the right and forward, in shares of full speed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import envs
from envs.avoid import FINISH, OBSTACLES, SCALE, START
from rlx.cli.pairs import load_run
from rlx.learners import load_policy
from rlx.rolling import first_episodes

SHOWN = 100  # paths a panel
DRAWS = 5_000  # at the saddle point


class Rollouts(NamedTuple):
    """Episodes of one policy under one noise."""

    paths: list[np.ndarray]  # [L + 1, 2] each: positions, m
    success: float  # share


class Shown(NamedTuple):
    """What a run is judged and drawn by."""

    name: str  # its program's folder
    rollouts: list[Rollouts]  # under each noise
    velocities: np.ndarray  # [DRAWS, 2]: at the saddle point, each the mean of a chunk of actions


def roll_out(run_dir: str, noises: list[float], number: int) -> Shown:
    """Of the run's newest policy."""
    run = load_run(run_dir)
    built = (run.env, run.module, run.train_config, run.config)
    algorithm, policy, _ = load_policy(run_dir, *built, mode="sample")
    found = []
    for noise in noises:
        env = envs.make(run.pair.env, **{**run.pair.overrides, "action_noise": noise})
        seen, returns = first_episodes(env, algorithm, policy, "sample", number, jax.random.key(0))
        found.append(Rollouts([obs[:, :2] * SCALE for obs in seen], float(returns.mean())))
    start = np.tile(START / SCALE, 2)  # the previous position is the same
    obs = jax.numpy.broadcast_to(start, (DRAWS, len(start)))
    chunks = algorithm.act(policy, (), obs, jax.random.key(1), "sample")[1]
    velocities = np.asarray(chunks).reshape(DRAWS, -1, 2).mean(axis=1)
    return Shown(Path(run_dir).absolute().parent.parent.name, found, velocities)


def table(noises: list[float], found: list[Shown]) -> str:
    """Success in per cent, a row a policy; runs of the same name are averaged, with the range in brackets."""
    lines = ["| policy | " + " | ".join(f"noise {noise:g}" for noise in noises) + " |"]
    lines.append("|---" * (len(noises) + 1) + "|")
    for name in dict.fromkeys(shown.name for shown in found):
        each = 100 * np.array([[r.success for r in shown.rollouts] for shown in found if shown.name == name])
        cells = [f"{column.mean():.0f} ({column.min():.0f} to {column.max():.0f})" for column in each.T]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(noises: list[float], found: list[Shown], out: Path) -> None:
    """A column a policy (its first run), a row for the first and for the last noise, and one for densities."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    first = {shown.name: shown for shown in reversed(found)}
    names = list(dict.fromkeys(shown.name for shown in found))
    rows = sorted({0, len(noises) - 1})
    figure = Figure(figsize=(2.2 * len(names), 3.2 * len(rows) + 1.8), layout="constrained")
    grid = figure.subplots(len(rows) + 1, len(names), squeeze=False, height_ratios=[3.2] * len(rows) + [1.8])
    for name, ax in zip(names, grid[-1], strict=True):
        ax.hist2d(*first[name].velocities.T, bins=44, range=((-1.1, 1.1), (-0.1, 1.1)), cmap="Blues")
        ax.axvline(0, color="#a8a8a8", linewidth=0.5)
        ax.set(xticks=(-1, 0, 1), yticks=(0, 1), aspect="equal")
        ax.set_title("at the saddle point", fontsize=8)
    for row, axes in zip(rows, grid[:-1], strict=True):
        for name, ax in zip(names, axes, strict=True):
            rollouts = first[name].rollouts[row]
            for x, y, radius in OBSTACLES:
                ax.add_patch(Circle((x, y), radius, color="#e53946"))
            ax.plot([-0.25, 0], [FINISH, FINISH], color="#2a9d8f", linewidth=3)
            ax.plot([0, 0.25], [FINISH, FINISH], color="#a8a8a8", linewidth=3)
            for path in rollouts.paths[:SHOWN]:
                ax.plot(path[:, 0], path[:, 1], color="#264653", alpha=0.25, linewidth=0.7)
            ax.set(xlim=(-0.26, 0.26), ylim=(-0.33, 0.37), xticks=[], yticks=[], aspect="equal")
            ax.set_title(f"{name}\nnoise {noises[row]:g}: {rollouts.success:.0%}", fontsize=8)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture; the table beside it, .md")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.4])
    parser.add_argument("--episodes", type=int, default=500)
    words = parser.parse_args()
    found = [roll_out(run, words.noise, words.episodes) for run in words.runs]
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.with_suffix(".md").write_text(table(words.noise, found))
    draw(words.noise, found, words.out)
    print(table(words.noise, found), end="")
    print(words.out)


if __name__ == "__main__":
    main()
