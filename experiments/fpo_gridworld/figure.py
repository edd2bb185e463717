"""Pictures of a gridworld study: which goals policies reach from each cell of a row, and what they do at one of them.

    python experiments/fpo_gridworld/figure.py RUN_DIR [RUN_DIR ...] --out FILE [--row 12] [--rollouts 200]

For each run a column of three panels: paths from the cell of the row from which the goals are reached most evenly, the
share of each goal by the cell that rollouts start from, and the density of the actions at the cell above. A Gaussian
plays its mean (greedy), as the paper's baseline does; a flow policy its draws. Prints for each run the shares from that
cell, and from how many cells of the row each goal is reached by a fifth of the rollouts.
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
from rlx.learners import load_policy
from rlx.rolling import first_episodes

DRAWS = 4000  # actions whose density is shown
ENOUGH = 0.2  # share of the rollouts that makes a goal one that a policy goes to


class Rollouts(NamedTuple):
    """N episodes from each of C cells of a row."""

    title: str
    layout: str
    columns: np.ndarray  # [C] int: of the cells that are free
    paths: list[list[np.ndarray]]  # C times N of [L + 1, 2] int: cells
    shares: np.ndarray  # [C, 1 + goals]: of rollouts that end in no goal, and in each
    shown: int  # index of the cell with the most even shares, the nearest to the middle of these
    actions: np.ndarray  # [DRAWS, 2] float32: draws at that cell


def goals(layout: str) -> np.ndarray:
    """[y, x] int: which goal a cell belongs to, from 1 on; 0 for none. Goals are pieces that touch."""
    from scipy.ndimage import label

    return label(paint(LAYOUTS[layout]) == GOAL)[0]


def roll_out(run_dir: str, row: int, number: int) -> Rollouts:
    """What the newest policy of a run does from the cells of `row`, `number` times from each."""
    run = load_run(run_dir)
    algorithm, policy, _ = load_policy(run_dir, run.env, run.module, run.train_config, run.config)
    mode: Any = "greedy" if run.pair.algorithm == "ppo" else "sample"
    env = envs.make(run.pair.env, start_row=row)
    # Starts are random cells of the row: more than are wanted, so that there are enough from each.
    seen, _ = first_episodes(env, algorithm, policy, mode, 2 * SIZE * number, jax.random.key(0))
    cells = [np.rint(obs * MIDDLE + MIDDLE).astype(int) for obs in seen]
    columns = np.unique([path[0, 0] for path in cells])
    paths = [[path for path in cells if path[0, 0] == column][:number] for column in columns]

    layout = run.pair.env.partition("/")[2]
    of_cells = goals(layout)
    ends = np.array([[of_cells[path[-1, 1], path[-1, 0]] for path in each] for each in paths])
    shares = (ends[..., None] == np.arange(of_cells.max() + 1)).mean(axis=1)
    shown = min(range(len(columns)), key=lambda c: (-shares[c, 1:].min(), abs(columns[c] - MIDDLE)))
    first = jnp.asarray((paths[shown][0][:1] - MIDDLE) / MIDDLE, jnp.float32).repeat(DRAWS, axis=0)
    actions = jax.jit(lambda key: algorithm.act(policy, (), first, key, "sample")[1])(jax.random.key(1))
    title = f"{run.pair.algorithm}, seed {run.train_config.seed}"
    return Rollouts(title, layout, columns, paths, shares, shown, np.asarray(actions))


def describe(found: Rollouts) -> str:
    names = ["no goal", *(f"goal {i}" for i in range(1, found.shares.shape[1]))]
    reached = ", ".join(f"{name} {share:.1%}" for name, share in zip(names, found.shares[found.shown], strict=True))
    each = (found.shares[:, 1:] >= ENOUGH).all(axis=1).sum()
    return (
        f"{found.title}, from column {found.columns[found.shown]}: {reached}; each goal by {ENOUGH:.0%} or more from "
        f"{each} of {len(found.columns)} cells"
    )


def draw(found: list[Rollouts], out: Path) -> None:
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(found), 6.6), layout="constrained")
    axes = figure.subplots(3, len(found), squeeze=False, height_ratios=(3, 1.5, 3))
    for (paths, shares, density), rollouts in zip(axes.T, found, strict=True):
        paths.imshow(COLOURS[paint(LAYOUTS[rollouts.layout])], origin="lower")
        shown = rollouts.paths[rollouts.shown]
        jitter = np.random.default_rng(0).uniform(-0.3, 0.3, (len(shown), 1, 2))
        for path in map(np.add, shown, jitter):
            paths.plot(path[:, 0], path[:, 1], color="#264653", alpha=0.15, linewidth=0.8)
        paths.plot(*shown[0][0], "o", color="black", markersize=4)
        paths.set_title(rollouts.title, fontsize=9)
        paths.set(xlim=(-0.5, SIZE - 0.5), ylim=(-0.5, SIZE - 0.5), xticks=[], yticks=[])
        for goal in range(1, rollouts.shares.shape[1]):
            shares.plot(rollouts.columns, rollouts.shares[:, goal], ".-", label=f"goal {goal}", linewidth=1)
        shares.axvline(rollouts.columns[rollouts.shown], color="black", linewidth=0.5)
        shares.set(xlim=(-0.5, SIZE - 0.5), ylim=(-0.05, 1.05), xlabel="start: column")
        edges = np.linspace(-1, 1, 41)
        density.hist2d(*rollouts.actions.T, bins=[edges, edges], cmap="viridis", norm=PowerNorm(0.3))
        density.set(aspect="equal", xlabel="action x")
    axes[1, 0].set_ylabel("share of rollouts")
    axes[1, 0].legend(fontsize=7)
    axes[2, 0].set_ylabel("action y")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--row", type=int, default=MIDDLE)
    parser.add_argument("--rollouts", type=int, default=200)
    words = parser.parse_args()
    found = [roll_out(run, words.row, words.rollouts) for run in words.runs]
    for rollouts in found:
        print(describe(rollouts))
    draw(found, words.out)
    print(words.out)


if __name__ == "__main__":
    main()
