"""SAC beside PPO on dm_control tasks of MuJoCo Playground, against steps and against wall-clock.

`sac` has the settings and the budgets that ship, in hundreds of thousands of steps; `ppo` the settings that ship and
4M steps. `sac_parallel` has those of massively_parallel.toml: hundreds of environments, large batches. The figures of
SAC are those of brax's SAC (mean and standard deviation over up to five public runs of other groups; Playground's
settings: 5M steps, 10M on CheetahRun and FingerSpin); those of PPO stand in `experiments/ppo_dm_control/study.py`.
"""

from pathlib import Path

from rlx.settings import read_file
from rlx.study import Reference, Size, Study, Task, Variant

SOURCE = (
    "brax's SAC, last evaluation of other groups' public runs; steps are those of Playground's settings, taken to be "
    "theirs, and whether actions were deterministic is not known"
)
LONG = ("CheetahRun", "FingerSpin")
TASKS = ("CartpoleSwingup", "CheetahRun", "FingerSpin", "ReacherEasy", "WalkerWalk")
SMALL = ("CartpoleSwingup", "CheetahRun", "WalkerWalk")
BRAX_SAC = {
    "CartpoleSwingup": (857, None),
    "CheetahRun": (912, None),
    "FingerSpin": (871, 89),
    "ReacherEasy": (965, None),
    "WalkerWalk": (974, None),
}


def reference(task: str, value: float, sd: float | None) -> Reference:
    steps = 10_000_000 if task in LONG else 5_000_000
    return Reference(value, sd, runs="up to five", steps=steps, source=SOURCE, trust="medium")


STUDY = Study(
    name="sac_dm_control",
    title="SAC beside PPO on dm_control tasks of MuJoCo Playground",
    about="How many steps and how many minutes SAC and PPO take to the same return, both with the settings that ship.",
    algorithms={
        "sac": Variant("sac"),
        "sac_parallel": Variant("sac", read_file(Path(__file__).parent / "massively_parallel.toml")),
        "ppo": Variant("ppo", {"total_steps": 4_000_000}),
    },
    environments={f"playground/{task}": Task(low=0.0, high=1000.0) for task in TASKS},
    references={("sac", f"playground/{task}"): reference(task, *figures) for task, figures in BRAX_SAC.items()},
    tuning_seeds=(0, 1, 2, 10, 11),
    settings={"num_evals": 20, "eval_episodes": 32},
    sizes={
        "small": Size(seeds=(30, 31, 32), environments={f"playground/{task}": {} for task in SMALL}),
        "full": Size(seeds=tuple(range(20, 30))),
    },
)
