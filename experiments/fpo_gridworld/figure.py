"""Pictures of a gridworld study: where policies go from one cell, and what actions they take there.

    python experiments/fpo_gridworld/figure.py RUN_DIR [RUN_DIR ...] --out FILE [--column 12] [--row 12]

For each run a panel with `--rollouts` paths from one cell, and one with the density of its actions there. A Gaussian
plays its mean (greedy), as the paper's baseline does; a flow policy its draws. Prints for each run the share of
rollouts that end in each goal.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import envs
from envs.gridworld import COLOURS, GOAL, LAYOUTS, MIDDLE, SIZE, paint
from rlx.cli.pairs import load_run
from rlx.rolling import first_episodes
from rlx.training import load_policy

DRAWS = 4000  # actions whose density is shown


class Rollouts(NamedTuple):
    """N episodes from one cell."""

    algorithm: str
    layout: str
    paths: list[np.ndarray]  # [L + 1, 2] int each: cells
    returns: np.ndarray  # [N]
    actions: np.ndarray  # [DRAWS, 2] float32: draws at the first cell


def roll_out(run_dir: str, column: int, row: int, number: int) -> Rollouts:
    """What the newest policy of a run does."""
    run = load_run(run_dir)
    algorithm, policy, _ = load_policy(run_dir, run.env, run.module, run.train_config, run.config)
    mode: Any = "greedy" if run.pair.algorithm == "ppo" else "sample"
    env = envs.make(run.pair.env, start_row=row, start_column=column)
    seen, returns = first_episodes(env, algorithm, policy, mode, number, jax.random.key(0))
    first = jnp.broadcast_to(seen[0][:1], (DRAWS, 2))
    actions = jax.jit(lambda key: algorithm.act(policy, (), first, key, "sample")[1])(jax.random.key(1))
    paths = [np.rint(obs * MIDDLE + MIDDLE).astype(int) for obs in seen]
    return Rollouts(run.pair.algorithm, run.pair.env.partition("/")[2], paths, returns, np.asarray(actions))


def goals(layout: str) -> np.ndarray:
    """[y, x] int: which goal a cell belongs to, from 1 on; 0 for none. Goals are pieces that touch."""
    from scipy.ndimage import label

    return label(paint(LAYOUTS[layout]) == GOAL)[0]


def shares(rollouts: Rollouts) -> dict[str, float]:
    """Of the rollouts that end in each goal, and in none."""
    of_cells = goals(rollouts.layout)
    which = [int(of_cells[path[-1, 1], path[-1, 0]]) for path in rollouts.paths]
    names = ["no goal", *(f"goal {i}" for i in range(1, of_cells.max() + 1))]
    return {name: which.count(i) / len(which) for i, name in enumerate(names)}


def draw(found: list[Rollouts], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(found), 6.6), layout="constrained")
    axes = figure.subplots(2, len(found), squeeze=False)
    for column, rollouts in enumerate(found):
        above, below = axes[:, column]
        above.imshow(COLOURS[paint(LAYOUTS[rollouts.layout])], origin="lower")
        jitter = np.random.default_rng(0).uniform(-0.3, 0.3, (len(rollouts.paths), 1, 2))
        for path in map(np.add, rollouts.paths, jitter):
            above.plot(path[:, 0], path[:, 1], color="#264653", alpha=0.15, linewidth=0.8)
        above.plot(*rollouts.paths[0][0], "o", color="black", markersize=4)
        reached = ", ".join(f"{name} {share:.0%}" for name, share in shares(rollouts).items())
        above.set_title(f"{rollouts.algorithm} on {rollouts.layout}\n{reached}", fontsize=8)
        above.set(xlim=(-0.5, SIZE - 0.5), ylim=(-0.5, SIZE - 0.5), xticks=[], yticks=[])
        edges = np.linspace(-1, 1, 41)
        below.hist2d(*rollouts.actions.T, bins=[edges, edges], cmap="viridis")
        below.set(aspect="equal", xlabel="action x", ylabel="action y")
        below.set_title("actions there, drawn from the policy", fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--column", type=int, default=MIDDLE)
    parser.add_argument("--row", type=int, default=MIDDLE)
    parser.add_argument("--rollouts", type=int, default=200)
    words = parser.parse_args()
    found = [roll_out(run, words.column, words.row, words.rollouts) for run in words.runs]
    for run, rollouts in zip(words.runs, found, strict=True):
        print(f"{run}: {', '.join(f'{name} {share:.1%}' for name, share in shares(rollouts).items())}")
    draw(found, words.out)
    print(words.out)


if __name__ == "__main__":
    main()
