"""The demonstrations that `study.py` clones: scripted, half around either side of the first obstacle.

python experiments/dppo/make_data.py        # writes experiments/dppo/avoid.npz, the same bytes every time
"""

from __future__ import annotations

from pathlib import Path

import jax

import envs
from envs.avoid import demonstrations
from rlx.data_file import column, describe_env, write

EPISODES = 96  # as many as D3IL has of Avoiding
FILE = Path(__file__).parent / "avoid.npz"


def main(path: Path = FILE) -> None:
    columns = demonstrations(jax.random.key(0), EPISODES)
    steps = len(columns["rewards"])
    metadata = {**describe_env(envs.make("avoid/obstacles")), "total_steps": steps, "total_episodes": EPISODES}
    write(path, {name: column(array) for name, array in columns.items()}, metadata, overwrite=True)
    print(f"{path}: {steps} steps of {EPISODES} episodes")


if __name__ == "__main__":
    main()
